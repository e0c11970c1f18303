// Package rtnl listens to the kernel's notifications, of links, addresses and
// routes among others (rtnetlink(7)), and takes netlink's messages apart.
package rtnl

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// ErrLost says that notifications came faster than they were read, and some
// are lost. What is found in the kernel's tables afterwards is followed by
// notifications again.
var ErrLost = errors.New("notifications were lost")

// receiveBuffer holds a burst of some ten thousand notifications.
const receiveBuffer = 8 << 20

// A Listener receives notifications. Close ends a Next that is under way.
type Listener struct{ *os.File }

// Listen returns a Listener of the calling thread's network namespace, for
// groups (RTNLGRP_*, linux/rtnetlink.h). The filter, a classic BPF program,
// may be nil.
func Listen(filter []unix.SockFilter, groups ...int) (*Listener, error) {
	return ListenTo(unix.NETLINK_ROUTE, filter, groups...)
}

// ListenTo is Listen for another protocol of netlink(7).
func ListenTo(protocol int, filter []unix.SockFilter, groups ...int) (*Listener, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	l := &Listener{os.NewFile(uintptr(fd), "netlink")} // non-blocking: the runtime waits for it
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer)
	if len(filter) > 0 { // before there is anything to receive
		if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}); err != nil {
			l.Close()
			return nil, fmt.Errorf("netlink: filter: %w", err)
		}
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		l.Close()
		return nil, fmt.Errorf("netlink: %w", err)
	}
	for _, g := range groups {
		if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, g); err != nil {
			l.Close()
			return nil, fmt.Errorf("netlink: joining group %d: %w", g, err)
		}
	}
	return l, nil
}

// Next waits for a datagram and reads it into buf. ErrLost is no reason to
// stop; any other error is.
func (l *Listener) Next(buf []byte) ([]byte, error) {
	n, err := l.Read(buf)
	if errors.Is(err, unix.ENOBUFS) {
		return nil, l.drain(buf)
	}
	return buf[:max(n, 0)], err
}

// drain throws away what waits to be read. Once the kernel has reported a loss
// it drops, and does not report, all further messages until there is nothing
// left to read (netlink_overrun, net/netlink/af_netlink.c).
func (l *Listener) drain(buf []byte) error {
	raw, err := l.SyscallConn()
	if err != nil {
		return err
	}
	err = raw.Read(func(fd uintptr) bool {
		for {
			_, _, err := unix.Recvfrom(int(fd), buf, unix.MSG_DONTWAIT)
			if err != nil && !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.ENOBUFS) {
				return true // empty
			}
		}
	})
	if err != nil {
		return err
	}
	return ErrLost
}
