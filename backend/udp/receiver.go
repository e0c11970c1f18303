package udp

import (
	"net/netip"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// slots is how many datagrams, or bursts of datagrams, are received at once.
const slots = 16

// A receiver moves packets from a socket to the device, if the device is open.
type receiver struct {
	from     *socket
	to       *atomic.Pointer[tun]
	table    *atomic.Pointer[table]
	icmp     *icmpSender
	counters *counters
	merger   merger

	buffers  [slots][]byte
	messages [slots]message
	parts    [slots]unix.Iovec
	names    [slots]unix.RawSockaddrAny
	controls [slots]control
}

func newReceiver(
	from *socket, to *atomic.Pointer[tun], table *atomic.Pointer[table], icmp *icmpSender, c *counters,
) *receiver {
	r := &receiver{from: from, to: to, table: table, icmp: icmp, counters: c}
	r.merger.open(c)
	for i := range slots {
		r.buffers[i] = make([]byte, 65536)
		r.parts[i].Base = &r.buffers[i][0]
		r.parts[i].SetLen(len(r.buffers[i]))
		m := &r.messages[i]
		m.Name = (*byte)(unsafe.Pointer(&r.names[i]))
		m.Iov = &r.parts[i]
		m.SetIovlen(1)
		m.Control = &r.controls[i].bytes()[0]
	}
	return r
}

// run moves packets until the socket is closed.
func (r *receiver) run() { _ = r.from.raw.Read(r.step) }

// step moves all packets that have arrived. The runtime calls step again when more packets arrive.
func (r *receiver) step(fd uintptr) bool {
	for {
		for i := range r.messages {
			m := &r.messages[i]
			m.Namelen = unix.SizeofSockaddrAny
			m.SetControllen(int(unsafe.Sizeof(r.controls[i])))
		}
		received, err := recvmmsg(fd, r.messages[:])
		if err != nil {
			return false // nothing has arrived; an error about a packet that was sent is returned only once
		}
		now := r.table.Load()
		r.merger.to = r.to.Load()
		for i := range received {
			m := &r.messages[i]
			b := r.buffers[i][:m.length]
			size := r.controls[i].get(int(m.Controllen))
			if size <= 0 || size > len(b) {
				size = len(b)
			}
			r.datagrams(b, size, now, addrPort(&r.names[i]))
		}
		r.merger.flush()
		if received < slots {
			return false
		}
	}
}

// datagrams takes datagrams of one sender. All have the same size, except that the last may be smaller.
func (r *receiver) datagrams(b []byte, size int, t *table, from netip.AddrPort) {
	count := max((len(b)+size-1)/max(size, 1), 1)
	if !t.isPeer(from) {
		r.counters.drop(dropStranger, count)
		return
	}
	for range count {
		n := min(size, len(b))
		r.datagram(b[:n], t)
		b = b[n:]
	}
}

// datagram takes a packet from a peer.
func (r *receiver) datagram(b []byte, t *table) {
	n := length(b)
	if n == 0 {
		r.counters.drop(dropMalformed, 1)
		return
	}
	b = b[:n]
	switch {
	case !t.isOurs(destination(b)):
		r.counters.drop(dropNotOurs, 1)
	case ttlExpires(b):
		r.counters.drop(dropExpired, 1)
		r.icmp.send(timeExceeded, b)
	default:
		decrementTTL(b)
		r.merger.add(b)
	}
}
