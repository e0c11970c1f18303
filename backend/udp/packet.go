package udp

import (
	"encoding/binary"
	"math/bits"
	"net/netip"

	"golang.org/x/sys/unix"
)

const (
	ipv4Header = 20 // without options
	ipv6Header = 40 // without extensions
	tcpHeader  = 20 // without options
	udpHeader  = 8
)

// length returns the length of the IP packet at the start of b, as its header has it. length returns 0 if b does not
// start with a whole packet.
func length(b []byte) int {
	if len(b) < ipv4Header {
		return 0
	}
	switch b[0] >> 4 {
	case 4:
		least, n := header(b), int(binary.BigEndian.Uint16(b[2:]))
		if least >= ipv4Header && least <= n && n <= len(b) {
			return n
		}
	case 6:
		if len(b) < ipv6Header {
			return 0
		}
		if n := ipv6Header + int(binary.BigEndian.Uint16(b[4:])); n <= len(b) {
			return n
		}
	}
	return 0
}

// header returns the length of the IP header, without IPv6's extensions.
func header(b []byte) int {
	if isIPv4(b) {
		return int(b[0]&15) * 4
	}
	return ipv6Header
}

// isIPv4 reports the version of a packet, which must be whole.
func isIPv4(b []byte) bool { return b[0]>>4 == 4 }

func source(b []byte) netip.Addr {
	if isIPv4(b) {
		return netip.AddrFrom4([4]byte(b[12:]))
	}
	return netip.AddrFrom16([16]byte(b[8:]))
}

func destination(b []byte) netip.Addr {
	if isIPv4(b) {
		return netip.AddrFrom4([4]byte(b[16:]))
	}
	return netip.AddrFrom16([16]byte(b[24:]))
}

// ttlExpires reports whether the TTL or hop limit of a packet ends at this hop.
func ttlExpires(b []byte) bool {
	if isIPv4(b) {
		return b[8] <= 1
	}
	return b[7] <= 1
}

// decrementTTL takes one off the TTL or hop limit of a packet. The checksum of the header is updated, not computed, so
// that a wrong checksum stays wrong (RFC 1624).
func decrementTTL(b []byte) {
	if !isIPv4(b) {
		b[7]--
		return
	}
	b[8]--
	check := uint32(binary.BigEndian.Uint16(b[10:])) + 0x0100
	if check >= 0xffff {
		check++
	}
	binary.BigEndian.PutUint16(b[10:], uint16(check))
}

// setLength sets the total length and the identification of an IPv4 packet, or the payload length of an IPv6 packet. n
// is the length of the packet.
func setLength(b []byte, n int, id uint16) {
	if !isIPv4(b) {
		binary.BigEndian.PutUint16(b[4:], uint16(n-ipv6Header))
		return
	}
	be := binary.BigEndian
	check := uint32(^be.Uint16(b[10:]))
	check += uint32(^be.Uint16(b[2:])) + uint32(uint16(n)) + uint32(^be.Uint16(b[4:])) + uint32(id)
	be.PutUint16(b[2:], uint16(n))
	be.PutUint16(b[4:], id)
	check = check>>16 + check&0xffff
	check += check >> 16
	be.PutUint16(b[10:], ^uint16(check))
}

// identification returns the identification of an IPv4 packet, which its fragments share; 0 for IPv6.
func identification(b []byte) uint16 {
	if !isIPv4(b) {
		return 0
	}
	return binary.BigEndian.Uint16(b[4:])
}

// sum adds the 16-bit words of b, in the byte order of this machine, to an Internet checksum (RFC 1071). fold reduces
// the sum to 16 bits.
func sum(b []byte, s uint64) uint64 {
	var carry uint64
	for len(b) >= 64 {
		w := b[:64:64]
		s, carry = bits.Add64(s, binary.NativeEndian.Uint64(w), 0)
		s, carry = bits.Add64(s, binary.NativeEndian.Uint64(w[8:]), carry)
		s, carry = bits.Add64(s, binary.NativeEndian.Uint64(w[16:]), carry)
		s, carry = bits.Add64(s, binary.NativeEndian.Uint64(w[24:]), carry)
		s, carry = bits.Add64(s, binary.NativeEndian.Uint64(w[32:]), carry)
		s, carry = bits.Add64(s, binary.NativeEndian.Uint64(w[40:]), carry)
		s, carry = bits.Add64(s, binary.NativeEndian.Uint64(w[48:]), carry)
		s, carry = bits.Add64(s, binary.NativeEndian.Uint64(w[56:]), carry)
		s += carry // does not overflow: with a carry, s is never all ones
		b = b[64:]
	}
	for len(b) >= 8 {
		s, carry = bits.Add64(s, binary.NativeEndian.Uint64(b), 0)
		s += carry
		b = b[8:]
	}
	if len(b) > 0 {
		var rest [8]byte
		copy(rest[:], b)
		s, carry = bits.Add64(s, binary.NativeEndian.Uint64(rest[:]), 0)
		s += carry
	}
	return s
}

func fold(s uint64) uint16 {
	s = s>>32 + s&0xffffffff
	s = s>>32 + s&0xffffffff
	s = s>>16 + s&0xffff
	s = s>>16 + s&0xffff
	return uint16(s)
}

// pseudo returns the sum of the pseudo header of the packet b, with which a checksum of TCP, UDP or ICMPv6 begins. n is
// the length of header and payload of that protocol.
func pseudo(b []byte, protocol uint8, n int) uint64 {
	var tail [8]byte
	binary.BigEndian.PutUint32(tail[:], uint32(n))
	tail[7] = protocol
	if isIPv4(b) {
		return sum(b[12:20], sum(tail[:], 0))
	}
	return sum(b[8:40], sum(tail[:], 0))
}

// putChecksum writes the checksum of a sum.
func putChecksum(at []byte, s uint64, protocol uint8) {
	check := ^fold(s)
	if check == 0 && protocol == unix.IPPROTO_UDP {
		check = 0xffff // 0 means that there is no checksum (RFC 768)
	}
	binary.NativeEndian.PutUint16(at, check)
}
