package main

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// ethtoolValue is a struct ethtool_value.
type ethtoolValue struct{ cmd, data uint32 }

// ifreqData is a struct ifreq with a pointer in its union.
type ifreqData struct {
	name [unix.IFNAMSIZ]byte
	data unsafe.Pointer
	_    [16]byte
}

// offloads tells whether a device computes checksums of what is sent
// (ETHTOOL_GTXCSUM, linux/ethtool.h).
func offloads(device string) bool {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	value := ethtoolValue{cmd: unix.ETHTOOL_GTXCSUM}
	request := ifreqData{data: unsafe.Pointer(&value)}
	copy(request.name[:unix.IFNAMSIZ-1], device)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request)))
	return errno == 0 && value.data != 0
}
