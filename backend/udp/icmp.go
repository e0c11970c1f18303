package udp

import (
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/flanneld/flanneld/subnet"
)

// A complaint is an ICMP error, as its type and code for IPv4 and IPv6
// (RFC 792, RFC 4443).
type complaint [2][2]byte

var (
	noRoute = complaint{{3, 0}, {1, 0}}  // net unreachable; no route to destination
	expired = complaint{{11, 0}, {3, 0}} // time exceeded; hop limit exceeded
)

const (
	// As the kernel does by default (icmp_msgs_per_sec and icmp_msgs_burst).
	complaintRate  = 1000
	complaintBurst = 50
)

// Complaints sends ICMP errors to who sent packets that go nowhere, from this
// node's own address of the network.
type complaints struct {
	sockets [2]*os.File // nil: the family is off
	limit   *rate.Limiter
}

func newComplaints(own subnet.Lease) (*complaints, error) {
	c := &complaints{limit: rate.NewLimiter(complaintRate, complaintBurst)}
	for i, s := range []netip.Prefix{own.IPv4, own.IPv6} {
		if !s.IsValid() {
			continue
		}
		var err error
		if c.sockets[i], err = icmpSocket(s.Addr()); err != nil {
			c.close()
			return nil, fmt.Errorf("ICMP: %w", err)
		}
	}
	return c, nil
}

func (c *complaints) close() {
	for _, s := range c.sockets {
		if s != nil {
			s.Close()
		}
	}
}

// icmpSocket opens a socket that sends, and receives nothing.
func icmpSocket(from netip.Addr) (*os.File, error) {
	family, protocol := unix.AF_INET, unix.IPPROTO_ICMP
	if from.Is6() {
		family, protocol = unix.AF_INET6, unix.IPPROTO_ICMPV6
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "icmp")
	if from.Is4() {
		// The device, and with it the address, may come later.
		err = unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_FREEBIND, 1)
		if err == nil {
			err = unix.SetsockoptInt(fd, unix.SOL_RAW, icmpFilter, -1)
		}
		if err == nil {
			err = unix.Bind(fd, &unix.SockaddrInet4{Addr: from.As4()})
		}
	} else {
		err = unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_FREEBIND, 1)
		if err == nil {
			none := unix.ICMPv6Filter{Data: [8]uint32{^uint32(0), ^uint32(0), ^uint32(0), ^uint32(0), ^uint32(0), ^uint32(0), ^uint32(0), ^uint32(0)}}
			err = unix.SetsockoptICMPv6Filter(fd, unix.SOL_ICMPV6, unix.ICMPV6_FILTER, &none)
		}
		if err == nil {
			err = unix.Bind(fd, &unix.SockaddrInet6{Addr: from.As16()})
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

const icmpFilter = 1 // ICMP_FILTER (linux/icmp.h): types that are not received

// send complains about a packet, unless that is not done (RFC 1122, 3.2.2; RFC
// 4443, 2.4) or was done too often of late.
func (c *complaints) send(what complaint, about []byte) {
	family, most := 0, 576-ipv4Header // of the whole error
	if !isIPv4(about) {
		family, most = 1, 1280-ipv6Header
	}
	if c.sockets[family] == nil || !deserves(about) || !c.limit.Allow() {
		return
	}
	about = about[:min(len(about), most-8)]
	message := make([]byte, 8+len(about))
	message[0], message[1] = what[family][0], what[family][1]
	copy(message[8:], about)
	var to unix.Sockaddr = &unix.SockaddrInet6{Addr: source(about).As16()}
	if family == 0 { // of IPv6 the kernel does it
		putChecksum(message[2:], sum(message, 0), unix.IPPROTO_ICMP)
		to = &unix.SockaddrInet4{Addr: source(about).As4()}
	}
	raw, err := c.sockets[family].SyscallConn()
	if err == nil {
		// Errors get lost like any packet.
		raw.Control(func(fd uintptr) { _ = unix.Sendto(int(fd), message, unix.MSG_DONTWAIT, to) })
	}
}

// deserves tells whether an error may be sent about a packet.
func deserves(b []byte) bool {
	from, to := source(b), destination(b)
	if from.IsUnspecified() || from.IsMulticast() || from.IsLoopback() || from.IsLinkLocalUnicast() || to.IsMulticast() ||
		to.IsLinkLocalUnicast() || from == netip.AddrFrom4([4]byte{255, 255, 255, 255}) || to == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
		return false
	}
	if !isIPv4(b) {
		// Errors have types below 128.
		return b[6] != unix.IPPROTO_ICMPV6 || len(b) > ipv6Header && b[ipv6Header] >= 128
	}
	if b[6]&0x1f != 0 || b[7] != 0 {
		return false // not the first fragment
	}
	if b[9] != unix.IPPROTO_ICMP {
		return true
	}
	if len(b) <= header(b) {
		return false
	}
	switch b[header(b)] {
	case 0, 8, 13, 14: // echo and timestamp, queries
		return true
	}
	return false
}
