package udp

import (
	"unsafe"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

const (
	// maxHeaders is how long the headers of a packet of a burst can be.
	maxHeaders = 128
	batchParts = 512 // of packets: one each, or two of a burst's
)

// A batch is packets to be sent to one family's addresses. What is of one size
// and goes to one peer makes a burst.
type batch struct {
	socket *socket // nil: the family is off
	tally  *tally

	parts    [batchParts]unix.Iovec // of packets, all in order
	used     int
	messages [batchParts]message
	bursts   [batchParts]burst // what the messages are
	count    int
	controls [batchParts]control
	headers  [batchParts / 2][maxHeaders]byte
	made     int // of headers

	sent int // of messages
	pace pace
	fast bool // to send all is brief
	out  func(fd uintptr) bool
	next int // a part, when packets are sent again one by one
	one  message
}

// A burst is what one message holds.
type burst struct {
	to           *endpoint
	first        int // part
	packets      int
	size, length int  // of each packet but the last, and of all
	full         bool // the last one was smaller
}

func (b *batch) open(s *socket, t *tally) {
	b.socket, b.tally, b.out = s, t, b.write
}

// header returns room for the headers of a packet that is added next.
func (b *batch) header(n int) []byte {
	if b.made == len(b.headers) || b.used+2 > len(b.parts) {
		b.flush() // what is wrong with the socket will be seen again
	}
	b.made++
	return b.headers[b.made-1][:n]
}

// add has a packet sent with the batch, until which it stays where it is. The
// rest, if any, follows the packet's first part.
func (b *batch) add(to *endpoint, packet, rest []byte) {
	if b.used+2 > len(b.parts) {
		b.flush()
	}
	length := len(packet) + len(rest)
	last := &b.bursts[max(b.count-1, 0)]
	if b.count == 0 || last.to != to || !b.socket.able.udpSegment || last.full || length > last.size ||
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

// flush sends all that was added. The error is about the socket; what the
// kernel does not send is counted.
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
	b.tally.moved(packets, bytes)
	err := b.socket.raw.Write(b.out)
	b.count, b.used, b.made = 0, 0, 0
	return err
}

// write sends what messages have not been sent. It returns false if it has to
// wait for room.
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
			// The path takes no packets of this size, or no bursts at all.
			if err == unix.EIO {
				klog.Infof("%s: no bursts can be sent from here: datagrams are sent one by one", b.socket.file.Name())
				b.socket.able.udpSegment = false
			}
			b.next = u.first + 1
		default:
			b.refused(u, u.length)
			b.sent++
		}
	}
	return true
}

// singly sends the packets of a burst one by one, from the part before next on.
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

// refused takes back that a packet was sent.
func (b *batch) refused(u *burst, length int) {
	b.tally.packets.Add(^uint64(0))
	b.tally.bytes.Add(-uint64(length))
	b.tally.drop(Unsendable, 1)
}
