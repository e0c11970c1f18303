package udp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

const (
	// socketBuffer holds what arrives while the proxy is not running.
	socketBuffer = 4 << 20
	// maxDatagram is the maximum payload of a datagram, or of a burst of datagrams.
	maxDatagram = 65535 - ipv4Header - udpHeader
	// maxSegments is how many datagrams the kernel takes as a burst (UDP_MAX_SEGMENTS, linux/udp.h; more since 6.9).
	maxSegments = 64
)

// A socket is a UDP socket of one family.
type socket struct {
	log      klog.Logger
	at       netip.AddrPort
	file     *os.File
	raw      syscall.RawConn
	offloads offloads
}

// listen opens a socket.
func listen(log klog.Logger, at netip.AddrPort, use offloads) (*socket, error) {
	family, freebind := unix.AF_INET, [2]int{unix.SOL_IP, unix.IP_FREEBIND}
	if at.Addr().Is6() {
		family, freebind = unix.AF_INET6, [2]int{unix.SOL_IPV6, unix.IPV6_FREEBIND}
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_UDP)
	if err != nil {
		return nil, fmt.Errorf("UDP: %w", err)
	}
	s := &socket{log: log, at: at, offloads: use}
	s.file = os.NewFile(uintptr(fd), "udp") // non-blocking: the runtime waits for packets
	if family == unix.AF_INET6 {
		err = unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_V6ONLY, 1)
	}
	if err == nil {
		// The address of the uplink may be missing for a short time. The other options only make the proxy faster.
		_ = unix.SetsockoptInt(fd, freebind[0], freebind[1], 1)
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, socketBuffer)
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, socketBuffer)
		if _, err := unix.GetsockoptInt(fd, unix.SOL_UDP, unix.UDP_SEGMENT); err != nil {
			s.offloads.udpSegment = false
		}
		s.offloads.udpGRO = use.udpGRO && unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_GRO, 1) == nil
		if family == unix.AF_INET {
			err = unix.Bind(fd, &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()})
		} else {
			err = unix.Bind(fd, &unix.SockaddrInet6{Port: int(at.Port()), Addr: at.Addr().As16()})
		}
	}
	if err == nil {
		s.raw, err = s.file.SyscallConn()
	}
	if err != nil {
		s.file.Close()
		if errors.Is(err, unix.EADDRINUSE) {
			err = fmt.Errorf("%w: stop the program that uses it, or choose another Port for all nodes", err)
		}
		return nil, fmt.Errorf("UDP port %d of %s: %w", at.Port(), at.Addr(), err)
	}
	return s, nil
}

// A message is a struct mmsghdr of sendmmsg(2) and recvmmsg(2).
type message struct {
	unix.Msghdr
	length uint32 // received
}

func sendmmsg(fd uintptr, messages []message, brief bool) (int, error) {
	return mmsg(unix.SYS_SENDMMSG, fd, messages, brief)
}

func recvmmsg(fd uintptr, messages []message) (int, error) {
	return mmsg(unix.SYS_RECVMMSG, fd, messages, true)
}

func mmsg(call, fd uintptr, messages []message, brief bool) (int, error) {
	for {
		n, errno := syscall3(call, fd, uintptr(unsafe.Pointer(&messages[0])), uintptr(len(messages)), brief)
		switch errno {
		case 0:
			return n, nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// A control is room for one control message (cmsg(3)): the length of each datagram of a burst.
type control [8]uint64 // aligned for a struct cmsghdr

func (c *control) bytes() []byte { return (*[unsafe.Sizeof(control{})]byte)(unsafe.Pointer(c))[:] }

// put writes UDP_SEGMENT, and returns the length of the message.
func (c *control) put(size int) int {
	h := (*unix.Cmsghdr)(unsafe.Pointer(c))
	h.Level, h.Type = unix.SOL_UDP, unix.UDP_SEGMENT
	h.SetLen(unix.CmsgLen(2))
	binary.NativeEndian.PutUint16(c.bytes()[unix.CmsgLen(0):], uint16(size))
	return unix.CmsgSpace(2)
}

// get reads UDP_GRO from n bytes; 0: there is no UDP_GRO.
func (c *control) get(n int) int {
	h := (*unix.Cmsghdr)(unsafe.Pointer(c))
	if n < unix.CmsgLen(4) || h.Level != unix.SOL_UDP || h.Type != unix.UDP_GRO {
		return 0
	}
	return int(binary.NativeEndian.Uint32(c.bytes()[unix.CmsgLen(0):]))
}
