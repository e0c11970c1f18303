package udp

import (
	"bytes"
	"encoding/binary"

	"golang.org/x/sys/unix"
)

const (
	// maxMerged is the maximum length of a burst: the length has to fit into the IPv4 header.
	maxMerged = 65535
	// maxParts is how many parts of memory are written at once (UIO_MAXIOV is 1024, linux/uio.h).
	maxParts = 512
)

// A merger writes packets to the device, in order. Packets that follow each other in a TCP stream, or between two UDP
// ports, become a burst. Packets are not copied: they must stay unchanged until flush.
type merger struct {
	to       *tun // nil: the device is not open
	counters *counters

	header virtioHeader
	parts  [maxParts]unix.Iovec // header, the first packet, the payloads of the others
	used   int

	head    []byte  // the first packet; nil: none
	like    segment // the first packet
	length  int     // of the burst so far
	packets int
	bytes   int  // of all packets, with their headers
	checked bool // the checksum of the first packet was checked
	full    bool // the burst must end here
	push    bool // the last packet has PSH

	pace pace
	out  func(fd uintptr) bool
	err  error // of out
}

// A segment is a packet that can be part of a burst.
type segment struct {
	protocol  uint8
	start     int // of the transport's header
	headers   int // length of all
	payload   int
	next      uint32 // TCP: the sequence number after it
	seq, bits int    // TCP: the sequence number, the flags
}

func (m *merger) open(c *counters) {
	m.counters = c
	m.out = m.write
	m.parts[0].Base = &m.header.bytes()[0]
	m.parts[0].SetLen(virtioSize)
}

// add adds a packet to the burst, or writes the burst and begins another with the packet.
func (m *merger) add(b []byte) {
	if m.to == nil {
		m.counters.drop(dropUnreceivable, 1)
		return
	}
	s, ok := m.segment(b)
	if ok && m.head != nil && m.follows(b, s) {
		m.append(b, s)
		return
	}
	m.flush()
	m.head, m.like = b, s
	m.length, m.packets, m.bytes = len(b), 1, len(b)
	m.checked, m.full, m.push = false, !ok || s.bits&tcpPSH != 0, false
	m.used = 1
	m.part(b)
}

func (m *merger) part(b []byte) {
	m.parts[m.used].Base = &b[0]
	m.parts[m.used].SetLen(len(b))
	m.used++
}

// segment reports whether a packet can be part of a burst: a packet of UDP, or of TCP with data and without flags that
// have a meaning of their own; not a fragment, and without IP options.
func (m *merger) segment(b []byte) (s segment, ok bool) {
	be := binary.BigEndian
	if isIPv4(b) {
		if b[0] != 4<<4|ipv4Header/4 || be.Uint16(b[6:])&^0x4000 != 0 { // DF alone
			return s, false
		}
		s.protocol, s.start = b[9], ipv4Header
	} else {
		s.protocol, s.start = b[6], ipv6Header
	}
	t := b[s.start:]
	switch {
	case s.protocol == unix.IPPROTO_TCP && m.to.offloads.tso && len(t) >= tcpHeader:
		header := int(t[12]>>4) * 4
		s.bits = int(t[13])
		if header < tcpHeader || len(t) <= header || s.bits&^tcpPSH != tcpACK {
			return s, false
		}
		s.headers, s.payload = s.start+header, len(t)-header
		s.seq = int(be.Uint32(t[4:]))
		s.next = uint32(s.seq) + uint32(s.payload)
		return s, true
	case s.protocol == unix.IPPROTO_UDP && m.to.offloads.uso && len(t) > udpHeader:
		s.headers, s.payload = s.start+udpHeader, len(t)-udpHeader
		return s, int(be.Uint16(t[4:])) == len(t) && be.Uint16(t[6:]) != 0
	}
	return s, false
}

// follows reports whether a packet continues the burst.
func (m *merger) follows(b []byte, s segment) bool {
	h, l := m.head, m.like
	if m.full || s.protocol != l.protocol || s.start != l.start || s.headers != l.headers || s.payload > l.payload ||
		m.length+s.payload > maxMerged || m.used == len(m.parts) || b[0] != h[0] {
		return false
	}
	if isIPv4(h) {
		// TOS, DF, TTL and addresses.
		if b[1] != h[1] || b[6] != h[6] || b[8] != h[8] || [8]byte(b[12:]) != [8]byte(h[12:]) {
			return false
		}
	} else if [4]byte(b) != [4]byte(h) || b[7] != h[7] || [32]byte(b[8:]) != [32]byte(h[8:]) {
		return false // class, flow, hop limit, addresses
	}
	b, h = b[s.start:s.headers], h[s.start:s.headers]
	if [4]byte(b) != [4]byte(h) { // ports
		return false
	}
	if s.protocol == unix.IPPROTO_UDP {
		return true
	}
	// Sequence number, acknowledgement, window, options.
	return uint32(s.seq) == m.like.next && [4]byte(b[8:]) == [4]byte(h[8:]) && [2]byte(b[14:]) == [2]byte(h[14:]) &&
		bytes.Equal(b[18:], h[18:])
}

// append adds a packet that continues the burst. The checksum must be right: the kernel does not get to see it.
func (m *merger) append(b []byte, s segment) {
	if !m.checked {
		if !m.valid(m.head, m.like) {
			m.full = true
		}
		m.checked = true
	}
	if m.full || !m.valid(b, s) {
		m.flush()
		m.add(b)
		return
	}
	m.part(b[s.headers:])
	m.length += s.payload
	m.packets++
	m.bytes += len(b)
	m.like.next = s.next
	m.push = s.bits&tcpPSH != 0
	m.full = m.push || s.payload < m.like.payload
}

func (m *merger) valid(b []byte, s segment) bool {
	return fold(sum(b[s.start:], pseudo(b, s.protocol, len(b)-s.start))) == 0xffff
}

// flush writes the burst.
func (m *merger) flush() {
	if m.head == nil {
		return
	}
	m.header = virtioHeader{}
	if m.packets > 1 {
		m.seal()
	}
	err := m.to.raw.Write(m.out)
	if err == nil {
		err = m.err
	}
	if err == nil {
		m.counters.moved(m.packets, m.bytes)
	} else {
		m.counters.drop(dropUnreceivable, m.packets)
	}
	m.head = nil
}

func (m *merger) write(fd uintptr) bool {
	m.err = writev(fd, m.parts[:m.used], m.pace.brief(m.length))
	return m.err != unix.EAGAIN
}

// seal turns the headers of the first packet into the headers of the burst.
func (m *merger) seal() {
	b, s, be := m.head, m.like, binary.BigEndian
	setLength(b, m.length, identification(b))
	t := b[s.start:]
	m.header = virtioHeader{
		flags: unix.VIRTIO_NET_HDR_F_NEEDS_CSUM, header: uint16(s.headers), size: uint16(s.payload), start: uint16(s.start),
	}
	if s.protocol == unix.IPPROTO_UDP {
		be.PutUint16(t[4:], uint16(m.length-s.start))
		m.header.gso, m.header.check = unix.VIRTIO_NET_HDR_GSO_UDP_L4, 6
	} else {
		m.header.gso, m.header.check = unix.VIRTIO_NET_HDR_GSO_TCPV4, 16
		if !isIPv4(b) {
			m.header.gso = unix.VIRTIO_NET_HDR_GSO_TCPV6
		}
		if m.push {
			t[13] |= tcpPSH
		}
	}
	binary.NativeEndian.PutUint16(t[m.header.check:], fold(pseudo(b, s.protocol, m.length-s.start)))
}
