package echo

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/net/bpf"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/family"
)

// Rejections receives the messages of hosts that did not deliver a datagram of UDP, in the network namespace of the
// thread that opened it. It sees the messages as they arrive: before the firewall of this host can drop them, and
// before this host undoes a translation of addresses.
type Rejections struct {
	family family.Family
	file   *os.File
}

// A Rejection is the message of a host that did not deliver a datagram of UDP: nobody listens on the port, a firewall
// refuses the datagram, or the host has to forward the datagram, whose hop limit does not allow that.
type Rejection struct {
	From     netip.Addr     // the host that sends the message
	Src, Dst netip.AddrPort // of the datagram, as that host received it
}

// udp is UDP's number among the protocols of IP.
const udp = unix.IPPROTO_UDP

// OpenRejections opens Rejections of one family, which needs CAP_NET_RAW.
func OpenRejections(f family.Family) (*Rejections, error) {
	filter, err := bpf.Assemble(rejectionFilter(f))
	if err != nil {
		return nil, err
	}
	var program []unix.SockFilter
	for _, i := range filter {
		program = append(program, unix.SockFilter{Code: i.Op, Jt: i.Jt, Jf: i.Jf, K: i.K})
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0) // nothing yet
	if err != nil {
		return nil, fmt.Errorf("packet socket: %w", err)
	}
	err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
		&unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]})
	if err == nil {
		protocol := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil,
			[...]uint16{unix.ETH_P_IP, unix.ETH_P_IPV6}[f]))
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: protocol})
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("packet socket: %w", err)
	}
	return &Rejections{f, os.NewFile(uintptr(fd), "packet socket")}, nil
}

// rejectionFilter returns a program that accepts the messages of ICMP that quote a datagram of UDP.
func rejectionFilter(f family.Family) []bpf.Instruction {
	if f == family.IPv6 {
		return []bpf.Instruction{
			bpf.LoadAbsolute{Off: 6, Size: 1},
			bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.IPPROTO_ICMPV6, SkipTrue: 6},
			bpf.LoadAbsolute{Off: ipv6.HeaderLen, Size: 1},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: number(ipv6.ICMPTypeTimeExceeded), SkipTrue: 1},
			bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: number(ipv6.ICMPTypeDestinationUnreachable), SkipTrue: 3},
			bpf.LoadAbsolute{Off: ipv6.HeaderLen + headerLen + 6, Size: 1},
			bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: udp, SkipTrue: 1},
			bpf.RetConstant{Val: 1 << 16},
			bpf.RetConstant{Val: 0},
		}
	}
	return []bpf.Instruction{
		bpf.LoadAbsolute{Off: 9, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.IPPROTO_ICMP, SkipTrue: 7},
		bpf.LoadMemShift{Off: 0}, // X = the length of the IP header
		bpf.LoadIndirect{Off: 0, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: number(ipv4.ICMPTypeTimeExceeded), SkipTrue: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: number(ipv4.ICMPTypeDestinationUnreachable), SkipTrue: 3},
		bpf.LoadIndirect{Off: headerLen + 9, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: udp, SkipTrue: 1},
		bpf.RetConstant{Val: 1 << 16},
		bpf.RetConstant{Val: 0},
	}
}

// Receive waits for a rejection. It returns os.ErrClosed after Close.
func (r *Rejections) Receive() (Rejection, error) {
	buf := make([]byte, 1500)
	for {
		n, err := r.file.Read(buf)
		if errors.Is(err, unix.ENETDOWN) {
			continue // a device of the host was set down
		}
		if err != nil {
			return Rejection{}, err
		}
		if rejection, ok := parseRejection(r.family, buf[:n]); ok {
			return rejection, nil
		}
	}
}

// parseRejection reads an IP packet that the filter accepts. ok is false if the packet is too short.
func parseRejection(f family.Family, packet []byte) (r Rejection, ok bool) {
	from, _, message, ok := parseIP(f, packet)
	if !ok || len(message) < headerLen {
		return r, false
	}
	src, dst, datagram, ok := parseIP(f, message[headerLen:])
	if !ok || len(datagram) < 4 {
		return r, false
	}
	return Rejection{
		From: from,
		Src:  netip.AddrPortFrom(src, binary.BigEndian.Uint16(datagram)),
		Dst:  netip.AddrPortFrom(dst, binary.BigEndian.Uint16(datagram[2:])),
	}, true
}

// parseIP returns the addresses of an IP packet, and what follows the header.
func parseIP(f family.Family, packet []byte) (src, dst netip.Addr, rest []byte, ok bool) {
	header, at, size := ipv6.HeaderLen, 8, 16
	if f == family.IPv4 {
		header, at, size = ipv4.HeaderLen, 12, 4
		if len(packet) > 0 {
			header = int(packet[0]&0xf) * 4
		}
	}
	if header < at+2*size || len(packet) < header {
		return src, dst, nil, false
	}
	src, _ = netip.AddrFromSlice(packet[at : at+size])
	dst, _ = netip.AddrFromSlice(packet[at+size : at+2*size])
	return src, dst, packet[header:], true
}

// Close ends Receive.
func (r *Rejections) Close() error { return r.file.Close() }
