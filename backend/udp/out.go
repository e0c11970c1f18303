package udp

import (
	"encoding/binary"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	// maxRead is the longest packet that the device hands out, a burst.
	maxRead = virtioSize + 65535
	// As much is read from the device before it is sent, if it is there.
	batchBytes   = 64 << 10
	batchPackets = 128
)

// An outlet moves packets from one queue of the device to the network.
type outlet struct {
	from    *queue
	batches [2]batch // to IPv4 and IPv6 addresses
	table   *atomic.Pointer[table]
	errors  *complaints
	tally   *tally

	buffer  []byte
	packets [][]byte // parts of buffer
	err     error    // why it ended
}

func newOutlet(from *queue, to [2]*socket, table *atomic.Pointer[table], errors *complaints, tally *tally) *outlet {
	o := &outlet{
		from: from, table: table, errors: errors, tally: tally,
		buffer: make([]byte, batchBytes+maxRead), packets: make([][]byte, 0, batchPackets),
	}
	for i := range o.batches {
		o.batches[i].open(to[i], tally)
	}
	return o
}

// run moves packets until the device is gone or a socket closed.
func (o *outlet) run() error {
	if err := o.from.raw.Read(o.step); err != nil {
		return err
	}
	return o.err
}

// step moves all packets that there are. It returns false to be called again
// when there are more. A lone packet is sent before another is looked for.
func (o *outlet) step(fd uintptr) bool {
	for most := 1; ; most = min(2*most, batchPackets) {
		more := o.read(fd, most)
		now := o.table.Load()
		for _, b := range o.packets {
			o.send(b, now)
		}
		for i := range o.batches {
			if err := o.batches[i].flush(); err != nil {
				o.err = err
			}
		}
		if o.err != nil || !more {
			return o.err != nil
		}
	}
}

// read reads up to so many packets, and tells whether there may be more.
func (o *outlet) read(fd uintptr, most int) bool {
	o.packets = o.packets[:0]
	for free := o.buffer; len(o.packets) < most && len(free) >= maxRead; {
		n, err := read(fd, free[:maxRead])
		switch err {
		case nil:
			o.packets = append(o.packets, free[:n:n])
			free = free[n:]
		case unix.EINTR:
		case unix.EAGAIN:
			return false
		default:
			o.err = err
			return false
		}
	}
	return true
}

// send sends a packet, or a burst of them, as the device has it.
func (o *outlet) send(b []byte, t *table) {
	if len(b) < virtioSize {
		o.tally.drop(Malformed, 1)
		return
	}
	h, b := readVirtio(b), b[virtioSize:]
	n := len(b) // of a burst, the header may not tell the length
	if h.gso == unix.VIRTIO_NET_HDR_GSO_NONE {
		n = length(b)
	}
	if n < ipv4Header || n < header(b) || header(b) < ipv4Header || !isIPv4(b) && b[0]>>4 != 6 {
		o.tally.drop(Malformed, 1)
		return
	}
	b = b[:n]
	dst := destination(b)
	to := t.way(dst)
	switch {
	case to == nil && (dst.IsMulticast() || dst.IsLinkLocalUnicast()):
		o.tally.drop(OnLink, 1)
		return
	case to == nil:
		o.tally.drop(NoRoute, 1)
		o.errors.send(noRoute, b)
		return
	case ends(b):
		o.tally.drop(Expired, 1)
		o.errors.send(expired, b)
		return
	}
	age(b)
	batch := &o.batches[to.six]
	ok := true
	switch {
	case batch.socket == nil:
		o.tally.drop(Unsendable, 1)
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
		o.tally.drop(Malformed, 1)
	}
}

// complete finishes a checksum of which only the pseudo header's is there.
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

// split sends the packets of a burst. The headers of each are made anew, what
// they carry stays where it is.
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
