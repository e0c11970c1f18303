package udp

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"os"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/subnet"
)

// pair returns two ends of a connection that keeps packets apart: a tun, and
// the end of the kernel.
func pair(t testing.TB) (*tun, int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 4<<20); err != nil {
			t.Fatal(err)
		}
	}
	q := &tun{file: os.NewFile(uintptr(fds[0]), "tun"), offloads: allOffloads}
	if q.raw, err = q.file.SyscallConn(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		q.file.Close()
		unix.Close(fds[1])
	})
	return q, fds[1]
}

// written returns what was written to the tun whose other end fd is.
func written(t testing.TB, fd int) [][]byte {
	t.Helper()
	var all [][]byte
	buf := make([]byte, maxRead)
	for {
		n, err := unix.Read(fd, buf)
		if err == unix.EAGAIN {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, bytes.Clone(buf[:n]))
	}
}

const (
	ownRecord  = `{"PublicIP":"127.0.0.1","PublicIPv6":"::1"}`
	peerRecord = `{"PublicIP":"127.0.0.2","PublicIPv6":"fd18::2"}`
)

func lease(t testing.TB, key, record string) subnet.Lease {
	t.Helper()
	s, err := subnet.ParseKey(key)
	if err != nil {
		t.Fatal(err)
	}
	l := subnet.Lease{Subnets: s}
	if err := l.Attrs.UnmarshalJSON([]byte(record)); err != nil {
		t.Fatal(err)
	}
	return l
}

// testTable is of the node that has the flows' destinations, or (out) their
// sources.
func testTable(t testing.TB, out bool) *table {
	near, far := "10.5.2.0-24&fd05:0:0:2::-64", "10.5.1.0-24&fd05:0:0:1::-64"
	if out {
		near, far = far, near
	}
	own, peer := lease(t, near, ownRecord), lease(t, far, peerRecord)
	return newTable(own, map[subnet.Subnets]*subnet.Lease{peer.Subnets: &peer}, defaults.Port)
}

// newTestSender returns a sender whose batches are read by the test instead of being sent.
func newTestSender(t testing.TB) *sender {
	var now atomic.Pointer[table]
	now.Store(testTable(t, true))
	s := &socket{offloads: allOffloads}
	return newSender(nil, [2]*socket{s, s}, &now, &icmpSender{}, &counters{})
}

// packets returns what a batch would send, and forgets it.
func (b *batch) packets() [][]byte {
	var all [][]byte
	for i := range b.count {
		u, end := b.bursts[i], b.used
		if i+1 < b.count {
			end = b.bursts[i+1].first
		}
		var whole []byte
		for _, p := range b.parts[u.first:end] {
			whole = append(whole, unsafe.Slice(p.Base, int(p.Len))...)
		}
		for range u.packets {
			n := min(u.size, len(whole))
			all = append(all, whole[:n])
			whole = whole[n:]
		}
	}
	b.count, b.used, b.made = 0, 0, 0
	return all
}

// TestBurst: a burst that is sent is packets as they would have been without,
// and those become the burst again.
func TestBurst(t *testing.T) {
	const size = 1000
	first := uint32(1<<32 - 7296) // wraps
	for _, f := range flows {
		payload := random(13*size + 345)
		out := newTestSender(t)
		h := f.burst(first, tcpACK|tcpPSH|tcpFIN|tcpCWR, payload, size)
		out.send(h, out.table.Load())
		got := out.batches[f.family()].packets()
		for i, b := range got {
			data := payload[i*size : min((i+1)*size, len(payload))]
			flags := uint8(tcpACK)
			if i == 0 {
				flags |= tcpCWR
			}
			if i == len(got)-1 {
				flags |= tcpPSH | tcpFIN
			}
			one := f
			one.ttl--
			want := one.finished(first+uint32(i*size), flags, data)
			if f.from.Addr().Is4() { // the identification counts up
				binary.BigEndian.PutUint16(want[4:], 0xabcd+uint16(i))
				want[10], want[11] = 0, 0
				binary.BigEndian.PutUint16(want[10:], ^slowSum(want[:ipv4Header]))
			}
			if !bytes.Equal(b, want) {
				t.Fatalf("%v: packet %d is\n%x, want\n%x", f, i, b[:100], want[:100])
			}
		}
		if len(got) != 14 {
			t.Fatalf("%v: %d packets, want 14", f, len(got))
		}

		// CWR and FIN are for nobody to merge.
		out.send(f.burst(first, tcpACK|tcpPSH, payload, size), out.table.Load())
		q, fd := pair(t)
		m := &merger{to: q}
		m.open(&counters{})
		for _, b := range out.batches[f.family()].packets() {
			m.add(b)
		}
		m.flush()
		f.ttl--
		all := written(t, fd)
		want := f.burst(first, tcpACK|tcpPSH, payload, size)
		if len(all) != 1 || !bytes.Equal(all[0], want) {
			t.Errorf("%v: %d bursts, the first is\n%x, want\n%x", f, len(all), all[0][:100], want[:100])
		}
	}
}

func (f flow) family() int {
	if f.from.Addr().Is4() {
		return 0
	}
	return 1
}

// TestApart: what is no burst is written as it came, and in the order in which
// it came.
func TestApart(t *testing.T) {
	tcp, udp := flows[0], flows[2]
	other := tcp
	other.from = netip.MustParseAddrPort("10.5.1.8:1000")
	older := tcp
	older.ttl--
	damaged := tcp.finished(200, tcpACK, random(100))
	damaged[60] ^= 1
	data := random(100)
	for name, packets := range map[string][][]byte{
		"acknowledgements": {tcp.finished(100, tcpACK, nil), tcp.finished(100, tcpACK, nil)},
		"a gap":            {tcp.finished(100, tcpACK, data), tcp.finished(201, tcpACK, data)},
		"backwards":        {tcp.finished(200, tcpACK, data), tcp.finished(100, tcpACK, data)},
		"growing":          {tcp.finished(100, tcpACK, data[:50]), tcp.finished(150, tcpACK, data)},
		"PSH first":        {tcp.finished(100, tcpACK|tcpPSH, data), tcp.finished(200, tcpACK, data)},
		"FIN":              {tcp.finished(100, tcpACK, data), tcp.finished(200, tcpACK|tcpFIN, data)},
		"two streams":      {tcp.finished(100, tcpACK, data), other.finished(200, tcpACK, data)},
		"TTLs differ":      {tcp.finished(100, tcpACK, data), older.finished(200, tcpACK, data)},
		"a damaged one":    {tcp.finished(100, tcpACK, data), damaged, tcp.finished(300, tcpACK, data)},
		"UDP growing":      {udp.finished(0, 0, data[:50]), udp.finished(0, 0, data)},
		"TCP, UDP":         {tcp.finished(100, tcpACK, data), udp.finished(0, 0, data)},
	} {
		q, fd := pair(t)
		m := &merger{to: q}
		m.open(&counters{})
		for _, b := range packets {
			m.add(bytes.Clone(b))
		}
		m.flush()
		got := written(t, fd)
		for i := range got {
			if want := append(make([]byte, virtioSize), packets[i]...); !bytes.Equal(got[i], want) {
				t.Errorf("%s: packet %d is\n%x, want\n%x", name, i, got[i], want)
			}
		}
		if len(got) != len(packets) {
			t.Errorf("%s: %d packets of %d", name, len(got), len(packets))
		}
	}
}

// FuzzReceive: whatever arrives, what the device gets are whole packets, for
// this node.
func FuzzReceive(f *testing.F) {
	for _, flow := range flows {
		one, two := flow.finished(100, tcpACK, random(60)), flow.finished(160, tcpACK, random(60))
		f.Add(append(one, two...), uint16(len(one)))
	}
	f.Add([]byte{0x45}, uint16(1))
	f.Add([]byte{}, uint16(0))
	f.Fuzz(func(t *testing.T, b []byte, size uint16) {
		if len(b) > 65535 {
			return
		}
		q, fd := pair(t)
		counts := &counters{}
		in := &receiver{counters: counts, icmp: &icmpSender{}}
		in.merger.open(counts)
		in.merger.to = q
		now := testTable(t, false)
		n := int(size)
		if n == 0 || n > len(b) {
			n = len(b)
		}
		in.datagrams(bytes.Clone(b), n, now, netip.MustParseAddrPort("127.0.0.2:8285"))
		in.merger.flush()
		for _, got := range written(t, fd) {
			p := got[virtioSize:]
			if length(p) != len(p) || !now.isOurs(destination(p)) {
				t.Errorf("%x was written", p)
			}
		}
	})
}

// FuzzSend: whatever the device hands out, what is sent are whole packets, for a
// peer.
func FuzzSend(f *testing.F) {
	for _, flow := range flows {
		f.Add(flow.burst(100, tcpACK, random(300), 100))
		f.Add(append(make([]byte, virtioSize), flow.finished(100, tcpACK, random(60))...))
	}
	// A checksum that would be written over the destination.
	over := []byte{unix.VIRTIO_NET_HDR_F_NEEDS_CSUM, 0, 0, 0, 100, 0, 0, 0, 16, 0}
	f.Add(append(over, flows[0].finished(100, tcpACK, random(300))...))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		out := newTestSender(t)
		now := out.table.Load()
		if len(b) > 5000 {
			return // many small ones are more than a batch holds
		}
		if len(b) > virtioSize && readVirtio(b).size < 20 {
			return
		}
		out.send(bytes.Clone(b), now)
		for i := range out.batches {
			for _, p := range out.batches[i].packets() {
				if length(p) != len(p) || now.lookup(destination(p)) == nil {
					t.Errorf("%x was sent", p)
				}
			}
		}
	})
}
