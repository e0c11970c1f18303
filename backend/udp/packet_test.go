package udp

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/backend/backendtest"
)

func TestGolden(t *testing.T) { backendtest.Golden(t) }

func TestReference(t *testing.T) { backendtest.Keys(t, defaults) }

// slowSum is RFC 1071 as it is written.
func slowSum(parts ...[]byte) uint16 {
	b := bytes.Join(parts, nil)
	if len(b)%2 == 1 {
		b = append(b, 0)
	}
	s := uint32(0)
	for ; len(b) > 0; b = b[2:] {
		s += uint32(binary.BigEndian.Uint16(b))
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

func random(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rand.Uint32())
	}
	return b
}

func TestSum(t *testing.T) {
	for n := range 600 {
		for _, b := range [][]byte{random(n), bytes.Repeat([]byte{0xff}, n), make([]byte, n)} {
			var got [2]byte
			binary.NativeEndian.PutUint16(got[:], fold(sum(b, 0)))
			if want := slowSum(b); binary.BigEndian.Uint16(got[:]) != want {
				t.Fatalf("the sum of %x is %x, want %04x", b, got, want)
			}
		}
	}
}

// The checksum of a header that is changed stays right, or wrong.
func TestHeaderChecksum(t *testing.T) {
	for range 100000 {
		b := random(ipv4Header)
		b[0], b[8] = 0x45, b[8]|1
		b[10], b[11] = 0, 0
		error := uint16(rand.IntN(2)) * uint16(rand.Uint32())
		binary.BigEndian.PutUint16(b[10:], ^slowSum(b)+error)
		before := slowSum(b)
		decrementTTL(b)
		setLength(b, rand.IntN(65536), uint16(rand.Uint32()))
		if got := slowSum(b); got%0xffff != before%0xffff {
			t.Fatalf("%x sums up to %x, and did to %x", b, got, before)
		}
	}
}

// A flow makes packets for tests.
type flow struct {
	from, to netip.AddrPort
	protocol uint8
	ttl      uint8
}

var flows = []flow{
	{netip.MustParseAddrPort("10.5.1.7:1000"), netip.MustParseAddrPort("10.5.2.9:80"), unix.IPPROTO_TCP, 64},
	{netip.MustParseAddrPort("[fd05:0:0:1::7]:1000"), netip.MustParseAddrPort("[fd05:0:0:2::9]:80"), unix.IPPROTO_TCP, 64},
	{netip.MustParseAddrPort("10.5.1.7:1000"), netip.MustParseAddrPort("10.5.2.9:53"), unix.IPPROTO_UDP, 64},
	{netip.MustParseAddrPort("[fd05:0:0:1::7]:1000"), netip.MustParseAddrPort("[fd05:0:0:2::9]:53"), unix.IPPROTO_UDP, 64},
}

// packet returns a packet without checksums, but for the IPv4 header's, and
// where its transport's header and its payload begin.
func (f flow) packet(seq uint32, flags uint8, payload []byte) (b []byte, start, data int) {
	be := binary.BigEndian
	var t []byte
	t = be.AppendUint16(t, f.from.Port())
	t = be.AppendUint16(t, f.to.Port())
	if f.protocol == unix.IPPROTO_TCP {
		t = be.AppendUint32(t, seq)
		t = be.AppendUint32(t, 12345)
		t = append(t, 8<<4, flags, 1, 0, 0, 0, 0, 0, 1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8) // with timestamps
	} else {
		t = be.AppendUint16(t, uint16(udpHeader+len(payload)))
		t = append(t, 0, 0)
	}
	data = len(t)
	t = append(t, payload...)
	if f.from.Addr().Is4() {
		b = []byte{0x45, 0}
		b = be.AppendUint16(b, uint16(ipv4Header+len(t)))
		b = append(b, 0xab, 0xcd, 0x40, 0, f.ttl, f.protocol, 0, 0)
		b = append(b, f.from.Addr().AsSlice()...)
		b = append(b, f.to.Addr().AsSlice()...)
		be.PutUint16(b[10:], ^slowSum(b))
	} else {
		b = []byte{0x60, 0, 0, 0}
		b = be.AppendUint16(b, uint16(len(t)))
		b = append(b, f.protocol, f.ttl)
		b = append(b, f.from.Addr().AsSlice()...)
		b = append(b, f.to.Addr().AsSlice()...)
	}
	return append(b, t...), len(b), len(b) + data
}

func (f flow) checkAt() int {
	if f.protocol == unix.IPPROTO_TCP {
		return 16
	}
	return 6
}

// finished is packet with all checksums.
func (f flow) finished(seq uint32, flags uint8, payload []byte) []byte {
	b, start, _ := f.packet(seq, flags, payload)
	be := binary.BigEndian
	be.PutUint16(b[start+f.checkAt():], ^f.transport(b, start))
	return b
}

// transport sums up what a transport's checksum is about.
func (f flow) transport(b []byte, start int) uint16 {
	length := binary.BigEndian.AppendUint32(nil, uint32(len(b)-start))
	return slowSum(f.from.Addr().AsSlice(), f.to.Addr().AsSlice(), length, []byte{0, 0, 0, f.protocol}, b[start:])
}

// burst returns what the device hands out for a burst.
func (f flow) burst(seq uint32, flags uint8, payload []byte, size int) []byte {
	b, start, data := f.packet(seq, flags, payload)
	h := virtioHeader{
		flags: unix.VIRTIO_NET_HDR_F_NEEDS_CSUM, gso: unix.VIRTIO_NET_HDR_GSO_UDP_L4,
		header: uint16(data), size: uint16(size), start: uint16(start), check: uint16(f.checkAt()),
	}
	if f.protocol == unix.IPPROTO_TCP {
		h.gso = unix.VIRTIO_NET_HDR_GSO_TCPV4
		if f.from.Addr().Is6() {
			h.gso = unix.VIRTIO_NET_HDR_GSO_TCPV6
		}
	}
	length := binary.BigEndian.AppendUint32(nil, uint32(len(b)-start))
	pseudo := slowSum(f.from.Addr().AsSlice(), f.to.Addr().AsSlice(), length, []byte{0, 0, 0, f.protocol})
	binary.BigEndian.PutUint16(b[start+f.checkAt():], pseudo)
	return append(h.bytes(), b...)
}
