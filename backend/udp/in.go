package udp

import (
	"net/netip"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// slots is how many datagrams, or bursts of them, are received at once.
const slots = 16

// An inlet moves packets from a socket to the queue of the device that is
// attached by then.
type inlet struct {
	from   *socket
	to     *atomic.Pointer[queue]
	table  *atomic.Pointer[table]
	errors *complaints
	tally  *tally
	merger merger

	buffers  [slots][]byte
	messages [slots]message
	parts    [slots]unix.Iovec
	names    [slots]unix.RawSockaddrAny
	controls [slots]control
}

func newInlet(from *socket, to *atomic.Pointer[queue], table *atomic.Pointer[table], errors *complaints, tally *tally) *inlet {
	in := &inlet{from: from, to: to, table: table, errors: errors, tally: tally}
	in.merger.open(tally)
	for i := range slots {
		in.buffers[i] = make([]byte, 65536)
		in.parts[i].Base = &in.buffers[i][0]
		in.parts[i].SetLen(len(in.buffers[i]))
		m := &in.messages[i]
		m.Name = (*byte)(unsafe.Pointer(&in.names[i]))
		m.Iov = &in.parts[i]
		m.SetIovlen(1)
		m.Control = &in.controls[i].bytes()[0]
	}
	return in
}

// run moves packets until the socket is closed.
func (in *inlet) run() { _ = in.from.raw.Read(in.step) }

// step moves all packets that there are, and is called again when there are
// more.
func (in *inlet) step(fd uintptr) bool {
	for {
		for i := range in.messages {
			m := &in.messages[i]
			m.Namelen = unix.SizeofSockaddrAny
			m.SetControllen(int(unsafe.Sizeof(in.controls[i])))
		}
		received, err := recvmmsg(fd, in.messages[:])
		if err != nil {
			return false // there is nothing; errors of what was sent come once
		}
		now := in.table.Load()
		in.merger.to = in.to.Load()
		for i := range received {
			m := &in.messages[i]
			b := in.buffers[i][:m.length]
			size := in.controls[i].get(int(m.Controllen))
			if size <= 0 || size > len(b) {
				size = len(b)
			}
			in.datagrams(b, size, now, addrPort(&in.names[i]))
		}
		in.merger.flush()
		if received < slots {
			return false
		}
	}
}

// datagrams takes what came from one sender: datagrams of one size, and the last
// one maybe smaller.
func (in *inlet) datagrams(b []byte, size int, t *table, from netip.AddrPort) {
	count := max((len(b)+size-1)/max(size, 1), 1)
	if !t.knows(from) {
		in.tally.drop(Stranger, count)
		return
	}
	for range count {
		n := min(size, len(b))
		in.datagram(b[:n], t)
		b = b[n:]
	}
}

// datagram takes a packet from a peer.
func (in *inlet) datagram(b []byte, t *table) {
	n := length(b)
	if n == 0 {
		in.tally.drop(Malformed, 1)
		return
	}
	b = b[:n]
	switch {
	case !t.mine(destination(b)):
		in.tally.drop(NotOurs, 1)
	case ends(b):
		in.tally.drop(Expired, 1)
		in.errors.send(expired, b)
	default:
		age(b)
		in.merger.add(b)
	}
}
