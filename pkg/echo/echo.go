// Package echo sends ICMP echo requests (RFC 792, RFC 4443), and receives the replies. All its requests carry a mark, so
// that a program that uses this package also knows the requests that such programs on other hosts send to this host: the
// kernel replies to them, and Receive returns them.
package echo

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"

	"golang.org/x/net/bpf"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/family"
)

// mark begins the data of all our requests. Its last byte is the version of what follows.
const mark = "flannel\x01"

// headerLen is the length of an echo message without data: type, code, checksum, identifier, sequence number.
const headerLen = 8

// A Conn sends and receives the messages of one family, in the network namespace of the thread that opened it. Its
// methods may be called at the same time.
type Conn struct {
	family family.Family
	raw    *net.IPConn
	id     uint16 // of our requests
	v4     *ipv4.PacketConn
	v6     *ipv6.PacketConn
}

// A Message is an echo request of another host, or the reply to a request of ours.
type Message struct {
	Reply bool
	From  netip.Addr
	Seq   uint16
	Data  []byte // after the mark; valid until the next call of Receive
}

// Open opens a Conn, which needs CAP_NET_RAW. The kernel passes it only what Receive returns, however much ICMP the host
// receives.
func Open(f family.Family) (*Conn, error) {
	network := [...]string{"ip4:icmp", "ip6:ipv6-icmp"}[f]
	raw, err := net.ListenIP(network, nil)
	if err != nil {
		return nil, err
	}
	c := &Conn{family: f, raw: raw, id: uint16(rand.Uint32())} // not the process's: that is 1 in many containers
	filter, err := bpf.Assemble(c.filter())
	if err == nil && f == family.IPv4 {
		c.v4 = ipv4.NewPacketConn(raw)
		err = c.v4.SetBPF(filter)
	} else if err == nil {
		c.v6 = ipv6.NewPacketConn(raw)
		err = c.v6.SetBPF(filter)
	}
	if err != nil {
		raw.Close()
		return nil, fmt.Errorf("filtering %s: %w", network, err)
	}
	return c, nil
}

// types returns the types of requests and replies.
func (c *Conn) types() (request, reply icmp.Type) {
	if c.family == family.IPv4 {
		return ipv4.ICMPTypeEcho, ipv4.ICMPTypeEchoReply
	}
	return ipv6.ICMPTypeEchoRequest, ipv6.ICMPTypeEchoReply
}

// number returns a type as it is in a message.
func number(t icmp.Type) uint32 {
	if t, ok := t.(ipv4.ICMPType); ok {
		return uint32(t)
	}
	return uint32(t.(ipv6.ICMPType))
}

// filter returns a program that accepts replies with our identifier, and requests, which both carry the mark.
func (c *Conn) filter() []bpf.Instruction {
	request, reply := c.types()
	start := bpf.Instruction(bpf.LoadMemShift{Off: 0}) // X = the length of the IP header
	if c.family == family.IPv6 {
		start = bpf.LoadConstant{Dst: bpf.RegX, Val: 0} // there is none
	}
	word := func(i int) uint32 { return binary.BigEndian.Uint32([]byte(mark[i:])) }
	return []bpf.Instruction{
		start,
		bpf.LoadIndirect{Off: 0, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: number(request), SkipTrue: 3},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: number(reply), SkipTrue: 7},
		bpf.LoadIndirect{Off: 4, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: uint32(c.id), SkipTrue: 5},
		bpf.LoadIndirect{Off: headerLen, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: word(0), SkipTrue: 3},
		bpf.LoadIndirect{Off: headerLen + 4, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: word(4), SkipTrue: 1},
		bpf.RetConstant{Val: 1 << 16},
		bpf.RetConstant{Val: 0},
	}
}

// Send sends a request with data after the mark. Where from is no valid address, the kernel chooses the source. An error
// is the kernel's: that there is no route (ENETUNREACH, EHOSTUNREACH), that a rule of this host drops the packet (EPERM),
// that from is not an address of this host (IPv6: EINVAL, IPv4: ENETUNREACH), among others.
func (c *Conn) Send(from, to netip.Addr, seq uint16, data []byte) error {
	request, _ := c.types()
	message := icmp.Message{Type: request, Body: &icmp.Echo{ID: int(c.id), Seq: int(seq), Data: append([]byte(mark), data...)}}
	packet, err := message.Marshal(nil) // the kernel computes the checksum of ICMPv6
	if err != nil {
		return err
	}
	dst := &net.IPAddr{IP: to.AsSlice(), Zone: to.Zone()}
	switch {
	case !from.IsValid():
		_, err = c.raw.WriteTo(packet, dst)
	case c.v4 != nil:
		_, err = c.v4.WriteTo(packet, &ipv4.ControlMessage{Src: from.AsSlice()}, dst)
	default:
		_, err = c.v6.WriteTo(packet, &ipv6.ControlMessage{Src: from.AsSlice()}, dst)
	}
	return err
}

// Receive waits for a message, and reads it into buf. It returns net.ErrClosed after Close.
func (c *Conn) Receive(buf []byte) (Message, error) {
	for {
		n, from, err := c.raw.ReadFromIP(buf) // without the IP header
		if errors.Is(err, net.ErrClosed) {
			return Message{}, net.ErrClosed
		}
		if err != nil {
			return Message{}, err
		}
		packet := buf[:n]
		if len(packet) < headerLen+len(mark) || c.family == family.IPv4 && checksum(packet) != 0xffff {
			continue // the kernel checks ICMPv6, but leaves ICMP to us
		}
		ip, _ := netip.AddrFromSlice(from.IP)
		if c.family == family.IPv4 {
			ip = ip.Unmap()
		}
		_, reply := c.types()
		return Message{
			Reply: uint32(packet[0]) == number(reply), From: ip,
			Seq: binary.BigEndian.Uint16(packet[6:]), Data: packet[headerLen+len(mark):],
		}, nil
	}
}

// checksum returns the sum of RFC 1071 over a message: 0xffff if the checksum in it is right.
func checksum(message []byte) uint32 {
	var sum uint32
	for i := 0; i+1 < len(message); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(message[i:]))
	}
	if len(message)%2 == 1 {
		sum += uint32(message[len(message)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return sum
}

// DontFragment has the requests that are sent from now on leave this host, and cross routers, as one packet or not at
// all: a request that is larger than the MTU of the device is an error (EMSGSIZE). What the kernel has learned of the
// path does not count.
func (c *Conn) DontFragment() error {
	raw, err := c.raw.SyscallConn()
	if err != nil {
		return err
	}
	level, option, value := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE
	if c.family == family.IPv6 {
		level, option, value = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), level, option, value) }); err != nil {
		return err
	}
	return failed
}

// DataLen returns how long the data of a request are that is an IP packet of so many bytes.
func (c *Conn) DataLen(packet int) int { return packet - c.family.HeaderLen() - headerLen - len(mark) }

// Close closes the Conn.
func (c *Conn) Close() error { return c.raw.Close() }
