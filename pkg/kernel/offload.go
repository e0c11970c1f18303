package kernel

import (
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ethtoolValue is a struct ethtool_value, ethtoolRequest a struct ifreq that
// refers to one (linux/ethtool.h, linux/if.h).
type ethtoolValue struct{ command, value uint32 }

type ethtoolRequest struct {
	name  [unix.IFNAMSIZ]byte
	value *ethtoolValue
	_     [24 - unsafe.Sizeof(uintptr(0))]byte // the rest of the union
}

// ethtool asks a device's driver for a value, or to take one. The kernel hands
// down to drivers what a netlink socket does not know itself.
func (s *socket) ethtool(dev string, command, value uint32) (uint32, error) {
	r := ethtoolRequest{value: &ethtoolValue{command, value}}
	copy(r.name[:unix.IFNAMSIZ-1], dev)
	var pin runtime.Pinner
	pin.Pin(r.value)
	defer pin.Unpin()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(s.fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&r))); errno != 0 {
		return 0, os.NewSyscallError("SIOCETHTOOL", errno)
	}
	return r.value.value, nil
}

// txChecksumOff tells whether the kernel computes the checksums of all that it
// hands to a device. A device that is gone meanwhile says no.
func (s *socket) txChecksumOff(dev string) bool {
	on, err := s.ethtool(dev, unix.ETHTOOL_GTXCSUM, 0)
	return err == nil && on == 0
}

// setTXChecksumOff has it do so, or leave that to the device.
func (s *socket) setTXChecksumOff(dev string, off bool) error {
	on := uint32(1)
	if off {
		on = 0
	}
	if _, err := s.ethtool(dev, unix.ETHTOOL_STXCSUM, on); err != nil {
		return fmt.Errorf("setting its checksum offload: %w", err)
	}
	return nil
}
