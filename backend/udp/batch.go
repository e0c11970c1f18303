package udp

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// maxHeaders is the maximum length of the headers of a packet in a burst.
	maxHeaders = 128
	batchParts = 512 // one of each packet, or two of a packet in a burst
)

// A batch is packets to send to addresses of one family. Packets of one size to one peer make a burst.
type batch struct {
	socket   *socket // nil: the family is off
	counters *counters

	parts    [batchParts]unix.Iovec // of packets, all in order
	used     int
	messages [batchParts]message
	bursts   [batchParts]burst // what the messages hold
	count    int
	controls [batchParts]control
	headers  [batchParts / 2][maxHeaders]byte
	made     int // of headers

	sent int // of messages
	pace pace
	fast bool // sending everything is brief
	out  func(fd uintptr) bool
	next int // the part after the next one, when packets are sent again one by one; else 0
	one  message
}

// A burst is what one message holds.
type burst struct {
	to           *endpoint
	first        int // part
	packets      int
	size, length int  // of each packet except the last; of all packets
	full         bool // the last packet was smaller
}

func (b *batch) open(s *socket, c *counters) {
	b.socket, b.counters, b.out = s, c, b.write
}

// header returns room for the headers of the packet that is added next.
func (b *batch) header(n int) []byte {
	if b.made == len(b.headers) || b.used+2 > len(b.parts) {
		b.flush() // an error of the socket comes up again
	}
	b.made++
	return b.headers[b.made-1][:n]
}

// add adds a packet to the batch, without copying it. rest, if any, is the second part of the packet.
func (b *batch) add(to *endpoint, packet, rest []byte) {
	if b.used+2 > len(b.parts) {
		b.flush()
	}
	length := len(packet) + len(rest)
	last := &b.bursts[max(b.count-1, 0)]
	if b.count == 0 || last.to != to || !b.socket.offloads.udpSegment || last.full || length > last.size ||
		last.packets == maxSegments || last.length+length > maxDatagram {
		last = &b.bursts[b.count]
		*last = burst{to: to, first: b.used, size: length}
		b.count++
	}
	last.packets++
	last.length += length
	last.full = length < last.size
	b.part(packet)
	if len(rest) > 0 {
		b.part(rest)
	}
}

func (b *batch) part(p []byte) {
	b.parts[b.used].Base = &p[0]
	b.parts[b.used].SetLen(len(p))
	b.used++
}

// flush sends the batch. The error is about the socket; packets that the kernel does not send are counted.
func (b *batch) flush() error {
	if b.count == 0 {
		return nil
	}
	packets, bytes := 0, 0
	for i := range b.count {
		u := &b.bursts[i]
		end := b.used
		if i+1 < b.count {
			end = b.bursts[i+1].first
		}
		m := &b.messages[i]
		m.Name, m.Namelen = (*byte)(unsafe.Pointer(&u.to.name)), u.to.size
		m.Iov = &b.parts[u.first]
		m.SetIovlen(end - u.first)
		m.Control = nil
		m.SetControllen(0)
		if u.packets > 1 {
			m.Control = &b.controls[i].bytes()[0]
			m.SetControllen(b.controls[i].put(u.size))
		}
		packets, bytes = packets+u.packets, bytes+u.length
	}
	b.sent = 0
	b.fast = b.pace.brief(bytes)
	b.counters.moved(packets, bytes)
	err := b.socket.raw.Write(b.out)
	b.count, b.used, b.made = 0, 0, 0
	return err
}

// write sends the remaining messages. write returns false if it has to wait for room in the socket.
func (b *batch) write(fd uintptr) bool {
	for b.sent < b.count {
		if b.next > 0 {
			if !b.singly(fd) {
				return false
			}
			continue
		}
		n, err := sendmmsg(fd, b.messages[b.sent:b.count], b.fast)
		b.sent += n
		switch u := &b.bursts[min(b.sent, b.count-1)]; {
		case err == nil:
		case err == unix.EAGAIN:
			return false
		case u.packets > 1:
			// The path takes no packets of this size, or the kernel sends no bursts here.
			if err == unix.EIO {
				b.socket.log.Info("The kernel sends no bursts; sending datagrams one by one", "address", b.socket.at)
				b.socket.offloads.udpSegment = false
			}
			b.next = u.first + 1
		default:
			b.refused(u, u.length)
			b.sent++
		}
	}
	return true
}

// singly sends the packets of a burst one by one, starting with the part before next.
func (b *batch) singly(fd uintptr) bool {
	u := &b.bursts[b.sent]
	end := b.used
	if b.sent+1 < b.count {
		end = b.bursts[b.sent+1].first
	}
	for b.next-1 < end {
		parts, length := 0, 0
		for p := b.next - 1; p < end && length < u.size; p++ {
			length += int(b.parts[p].Len)
			parts++
		}
		b.one.Msghdr = b.messages[b.sent].Msghdr
		b.one.Iov = &b.parts[b.next-1]
		b.one.SetIovlen(parts)
		b.one.Control = nil
		b.one.SetControllen(0)
		_, err := sendmmsg(fd, unsafe.Slice(&b.one, 1), false)
		if err == unix.EAGAIN {
			return false
		}
		if err != nil {
			b.refused(u, length)
		}
		b.next += parts
	}
	b.next = 0
	b.sent++
	return true
}

// refused counts a packet as dropped that flush has counted as sent.
func (b *batch) refused(u *burst, length int) {
	b.counters.packets.Add(^uint64(0))
	b.counters.bytes.Add(-uint64(length))
	b.counters.drop(dropUnsendable, 1)
}
