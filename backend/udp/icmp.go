package udp

import (
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/flanneld/flanneld/subnet"
)

// An icmpError is the type and code of an ICMP error, for IPv4 and IPv6 (RFC 792, RFC 4443).
type icmpError [2][2]byte

var (
	unreachable  = icmpError{{3, 0}, {1, 0}}  // net unreachable; no route to destination
	timeExceeded = icmpError{{11, 0}, {3, 0}} // time exceeded; hop limit exceeded
)

const (
	// The defaults of the kernel (icmp_msgs_per_sec and icmp_msgs_burst).
	icmpRate  = 1000
	icmpBurst = 50
)

// An icmpSender sends ICMP errors to the senders of packets that cannot be delivered. The errors come from the address
// that this node has in the network of pods.
type icmpSender struct {
	sockets [2]*os.File // nil: the family is off
	limit   *rate.Limiter
}

func newICMPSender(own subnet.Lease) (*icmpSender, error) {
	c := &icmpSender{limit: rate.NewLimiter(icmpRate, icmpBurst)}
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

func (c *icmpSender) close() {
	for _, s := range c.sockets {
		if s != nil {
			s.Close()
		}
	}
}

// icmpSocket opens a socket that only sends.
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
		// The device and its address may be added later.
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
			var none unix.ICMPv6Filter
			for i := range none.Data {
				none.Data[i] = ^uint32(0)
			}
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

const icmpFilter = 1 // ICMP_FILTER (linux/icmp.h): the types that are not received

// send sends an error about a packet, unless RFC 1122 (3.2.2) or RFC 4443 (2.4) forbids the error or the rate is too
// high.
func (c *icmpSender) send(what icmpError, about []byte) {
	family, most := 0, 576-ipv4Header // of the whole error
	if !isIPv4(about) {
		family, most = 1, 1280-ipv6Header
	}
	if c.sockets[family] == nil || !mayReport(about) || !c.limit.Allow() {
		return
	}
	about = about[:min(len(about), most-8)]
	message := make([]byte, 8+len(about))
	message[0], message[1] = what[family][0], what[family][1]
	copy(message[8:], about)
	var to unix.Sockaddr = &unix.SockaddrInet6{Addr: source(about).As16()}
	if family == 0 { // for IPv6, the kernel computes the checksum
		putChecksum(message[2:], sum(message, 0), unix.IPPROTO_ICMP)
		to = &unix.SockaddrInet4{Addr: source(about).As4()}
	}
	raw, err := c.sockets[family].SyscallConn()
	if err == nil {
		// An error may be lost like any packet.
		raw.Control(func(fd uintptr) { _ = unix.Sendto(int(fd), message, unix.MSG_DONTWAIT, to) })
	}
}

// mayReport reports whether an error may be sent about a packet.
func mayReport(b []byte) bool {
	from, to := source(b), destination(b)
	broadcast := netip.AddrFrom4([4]byte{255, 255, 255, 255})
	if from.IsUnspecified() || from.IsMulticast() || from.IsLoopback() || from.IsLinkLocalUnicast() || from == broadcast ||
		to.IsMulticast() || to.IsLinkLocalUnicast() || to == broadcast {
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
