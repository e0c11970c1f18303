package udp

import (
	"encoding/binary"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	// maxRead is the length of the longest packet that the device hands out: a burst.
	maxRead = virtioSize + 65535
	// The limits of what is read from the device before it is sent.
	batchBytes   = 64 << 10
	batchPackets = 128
)

// A sender moves packets from the device to the network.
type sender struct {
	from     *tun
	batches  [2]batch // to IPv4 and IPv6 addresses
	table    *atomic.Pointer[table]
	icmp     *icmpSender
	counters *counters

	buffer  []byte
	packets [][]byte // parts of buffer
	err     error    // why it ended
}

func newSender(from *tun, to [2]*socket, table *atomic.Pointer[table], icmp *icmpSender, c *counters) *sender {
	s := &sender{
		from: from, table: table, icmp: icmp, counters: c,
		buffer: make([]byte, batchBytes+maxRead), packets: make([][]byte, 0, batchPackets),
	}
	for i := range s.batches {
		s.batches[i].open(to[i], c)
	}
	return s
}

// run moves packets until the device is gone or a socket is closed.
func (s *sender) run() error {
	if err := s.from.raw.Read(s.step); err != nil {
		return err
	}
	return s.err
}

// step moves all packets that the device has. step returns false to be called again when there are more packets. A lone
// packet is sent before the device is asked for another packet.
func (s *sender) step(fd uintptr) bool {
	for most := 1; ; most = min(2*most, batchPackets) {
		more := s.read(fd, most)
		now := s.table.Load()
		for _, b := range s.packets {
			s.send(b, now)
		}
		for i := range s.batches {
			if err := s.batches[i].flush(); err != nil {
				s.err = err
			}
		}
		if s.err != nil || !more {
			return s.err != nil
		}
	}
}

// read reads up to most packets, and reports whether there may be more.
func (s *sender) read(fd uintptr, most int) bool {
	s.packets = s.packets[:0]
	for free := s.buffer; len(s.packets) < most && len(free) >= maxRead; {
		n, err := read(fd, free[:maxRead])
		switch err {
		case nil:
			s.packets = append(s.packets, free[:n:n])
			free = free[n:]
		case unix.EINTR:
		case unix.EAGAIN:
			return false
		default:
			s.err = err
			return false
		}
	}
	return true
}

// send sends a packet, or a burst of packets, as the device hands it out.
func (s *sender) send(b []byte, t *table) {
	if len(b) < virtioSize {
		s.counters.drop(dropMalformed, 1)
		return
	}
	h, b := readVirtio(b), b[virtioSize:]
	n := len(b) // the header of a burst may not hold the length
	if h.gso == unix.VIRTIO_NET_HDR_GSO_NONE {
		n = length(b)
	}
	if n < ipv4Header || n < header(b) || header(b) < ipv4Header || !isIPv4(b) && b[0]>>4 != 6 {
		s.counters.drop(dropMalformed, 1)
		return
	}
	b = b[:n]
	dst := destination(b)
	to := t.lookup(dst)
	switch {
	case to == nil && (dst.IsMulticast() || dst.IsLinkLocalUnicast()):
		s.counters.drop(dropOnLink, 1)
		return
	case to == nil:
		s.counters.drop(dropNoRoute, 1)
		s.icmp.send(unreachable, b)
		return
	case ttlExpires(b):
		s.counters.drop(dropExpired, 1)
		s.icmp.send(timeExceeded, b)
		return
	}
	decrementTTL(b)
	batch := &s.batches[to.family]
	ok := true
	switch {
	case batch.socket == nil:
		s.counters.drop(dropUnsendable, 1)
	case h.gso != unix.VIRTIO_NET_HDR_GSO_NONE:
		ok = split(b, h, to, batch)
	default:
		if h.flags&unix.VIRTIO_NET_HDR_F_NEEDS_CSUM != 0 {
			ok = complete(b, h)
		}
		if ok {
			batch.add(to, b, nil)
		}
	}
	if !ok {
		s.counters.drop(dropMalformed, 1)
	}
}

// complete finishes a checksum that covers only the pseudo header so far.
func complete(b []byte, h virtioHeader) bool {
	start, at := int(h.start), int(h.start)+int(h.check)
	if start < header(b) || at+2 > len(b) {
		return false
	}
	protocol := uint8(unix.IPPROTO_TCP)
	if h.check == 6 {
		protocol = unix.IPPROTO_UDP
	}
	putChecksum(b[at:], sum(b[start:], 0), protocol)
	return true
}

// split sends the packets of a burst. Each packet gets headers of its own; the payloads are not copied.
func split(b []byte, h virtioHeader, to *endpoint, out *batch) bool {
	start, size := int(h.start), int(h.size)
	protocol, headers := uint8(unix.IPPROTO_TCP), start+tcpHeader
	switch h.gso &^ unix.VIRTIO_NET_HDR_GSO_ECN {
	case unix.VIRTIO_NET_HDR_GSO_TCPV4, unix.VIRTIO_NET_HDR_GSO_TCPV6:
		if start < ipv4Header || len(b) < headers {
			return false
		}
		headers = start + int(b[start+12]>>4)*4
		if headers < start+tcpHeader {
			return false
		}
	case unix.VIRTIO_NET_HDR_GSO_UDP_L4:
		protocol, headers = unix.IPPROTO_UDP, start+udpHeader
	default:
		return false
	}
	if start < header(b) || headers > maxHeaders || headers >= len(b) || size == 0 || headers+size > maxDatagram {
		return false
	}
	be := binary.BigEndian
	first, id := be.Uint32(b[start+4:]), identification(b)
	transport := headers - start
	for i, at := 0, headers; at < len(b); i, at = i+1, at+size {
		payload := b[at:min(at+size, len(b))]
		last := at+size >= len(b)
		header := out.header(headers)
		copy(header, b)
		setLength(header, headers+len(payload), id+uint16(i))
		var check []byte
		if protocol == unix.IPPROTO_TCP {
			be.PutUint32(header[start+4:], first+uint32(at-headers))
			if i > 0 {
				header[start+13] &^= tcpCWR
			}
			if !last {
				header[start+13] &^= tcpFIN | tcpPSH
			}
			check = header[start+16:]
		} else {
			be.PutUint16(header[start+4:], uint16(udpHeader+len(payload)))
			check = header[start+6:]
		}
		check[0], check[1] = 0, 0
		s := pseudo(header, protocol, transport+len(payload))
		putChecksum(check, sum(payload, sum(header[start:headers], s)), protocol)
		out.add(to, header, payload)
	}
	return true
}

// Flags in byte 13 of a TCP header.
const (
	tcpFIN = 0x01
	tcpPSH = 0x08
	tcpACK = 0x10
	tcpCWR = 0x80
)
