// Package rtnl listens to the kernel's notifications of links, addresses, routes and more (rtnetlink(7)), and splits
// netlink messages into their parts.
package rtnl

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// ErrLost says that notifications came faster than they were read, so that some are lost. A caller that reads the
// kernel's tables after ErrLost misses nothing: the notifications of later changes come as usual.
var ErrLost = errors.New("notifications were lost")

// receiveBuffer holds a burst of some ten thousand notifications.
const receiveBuffer = 8 << 20

// A Listener receives notifications. Close ends Next and Wait, which then return an error.
type Listener struct{ *os.File }

// Listen returns a Listener of the calling thread's network namespace, for multicast groups of rtnetlink (RTNLGRP_*,
// linux/rtnetlink.h). The filter is a classic BPF program, or nil.
func Listen(filter []unix.SockFilter, groups ...int) (*Listener, error) {
	return ListenTo(unix.NETLINK_ROUTE, filter, groups...)
}

// ListenTo is Listen for another protocol of netlink(7).
func ListenTo(protocol int, filter []unix.SockFilter, groups ...int) (*Listener, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	l := &Listener{os.NewFile(uintptr(fd), "netlink")} // non-blocking: the runtime's poller waits for it
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer)
	if len(filter) > 0 { // before there is anything to receive
		program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
		if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &program); err != nil {
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

// Next waits for a datagram and reads it into buf. After ErrLost the caller can go on; any other error is final.
func (l *Listener) Next(buf []byte) ([]byte, error) {
	n, err := l.Read(buf)
	if errors.Is(err, unix.ENOBUFS) {
		return nil, l.drain(buf)
	}
	return buf[:max(n, 0)], err
}

// TryNext is Next without the wait: it returns nil and no error when no datagram has come. It may be called while
// Wait waits.
func (l *Listener) TryNext(buf []byte) (datagram []byte, err error) {
	n, err := l.receive(buf)
	switch {
	case errors.Is(err, unix.EAGAIN):
		return nil, nil
	case errors.Is(err, unix.ENOBUFS):
		return nil, l.drain(buf)
	}
	return buf[:max(n, 0)], err
}

// Wait waits until there is something to read, which may be ErrLost. It reads nothing itself.
func (l *Listener) Wait() error {
	raw, err := l.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Read(func(fd uintptr) bool {
		n, _ := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return n != 0
	})
}

// receive reads a datagram that has come, or returns EAGAIN.
func (l *Listener) receive(buf []byte) (n int, err error) {
	raw, err := l.SyscallConn()
	if err != nil {
		return 0, err
	}
	closed := raw.Control(func(fd uintptr) { // raw.Read would block while another goroutine is in Wait
		for {
			if n, _, err = unix.Recvfrom(int(fd), buf, unix.MSG_DONTWAIT); !errors.Is(err, unix.EINTR) {
				return
			}
		}
	})
	if closed != nil {
		return 0, closed
	}
	return n, err
}

// drain discards what has come, and returns ErrLost. After the kernel has reported a loss it drops all further
// messages, without another report, until there is nothing left to read (netlink_overrun, net/netlink/af_netlink.c).
func (l *Listener) drain(buf []byte) error {
	for {
		_, err := l.receive(buf)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return ErrLost
		case err != nil && !errors.Is(err, unix.ENOBUFS):
			return err
		}
	}
}
