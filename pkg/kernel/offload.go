package kernel

import (
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ethtoolValue is a struct ethtool_value. ethtoolRequest is a struct ifreq that refers to an ethtoolValue
// (linux/ethtool.h, linux/if.h).
type ethtoolValue struct{ command, value uint32 }

type ethtoolRequest struct {
	name  [unix.IFNAMSIZ]byte
	value *ethtoolValue
	_     [24 - unsafe.Sizeof(uintptr(0))]byte // the rest of the union
}

// ethtool asks the driver of a device for a value, or sets the value. The kernel accepts this ioctl on any socket, a
// netlink socket too, and looks for the device in the namespace of the socket.
func (s *socket) ethtool(dev string, command, value uint32) (uint32, error) {
	r := ethtoolRequest{value: &ethtoolValue{command, value}}
	copy(r.name[:unix.IFNAMSIZ-1], dev)
	var pin runtime.Pinner
	pin.Pin(r.value)
	defer pin.Unpin()
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(s.fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&r)))
	if errno != 0 {
		return 0, os.NewSyscallError("SIOCETHTOOL", errno)
	}
	return r.value.value, nil
}

// ComputesTXChecksums reports whether a device of the calling thread's namespace computes the checksums of packets that
// the kernel hands to the device.
func ComputesTXChecksums(dev string) (bool, error) {
	s, err := newSocket(unix.NETLINK_ROUTE)
	if err != nil {
		return false, err
	}
	defer s.close()
	on, err := s.ethtool(dev, unix.ETHTOOL_GTXCSUM, 0)
	return on != 0, err
}

// txChecksumOff reports whether the kernel computes the checksums of all packets that it hands to a device. The answer
// is false for a device that was removed meanwhile.
func (s *socket) txChecksumOff(dev string) bool {
	on, err := s.ethtool(dev, unix.ETHTOOL_GTXCSUM, 0)
	return err == nil && on == 0
}

// setTXChecksumOff has the kernel compute the checksums (off), or the device.
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
