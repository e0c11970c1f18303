package echo

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/nstest"
)

// A datagram to a port on which nobody listens is rejected. The firewall of this host does not hide that.
func TestRejections(t *testing.T) {
	for f, pair := range addrs.Each() {
		t.Run(f.String(), func(t *testing.T) {
			nstest.New(t)
			nstest.Need(t, "nft")
			addAddress(t, pair[0])
			addAddress(t, pair[1])
			nstest.Run(t, "nft add table inet test")
			nstest.Run(t, "nft add chain inet test in { type filter hook input priority 0 ; }")
			nstest.Run(t, "nft add rule inet test in meta l4proto { icmp, ipv6-icmp } drop")
			r, err := OpenRejections(f)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			conn, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(pair[0], 0)))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			dst := netip.AddrPortFrom(pair[1], 33434)
			if _, err := conn.WriteToUDPAddrPort([]byte("data"), dst); err != nil {
				t.Fatal(err)
			}
			src := conn.LocalAddr().(*net.UDPAddr).AddrPort()
			if got, err := r.Receive(); err != nil || got != (Rejection{pair[1], src, dst}) {
				t.Errorf("got %+v, %v, want what %s sent", got, err, src)
			}
		})
	}
}

// Close ends Receive.
func TestRejectionsClose(t *testing.T) {
	nstest.New(t)
	r, err := OpenRejections(family.IPv4)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error)
	go func() {
		_, err := r.Receive()
		ended <- err
	}()
	r.Close()
	select {
	case err := <-ended:
		if !errors.Is(err, os.ErrClosed) {
			t.Errorf("got %v", err)
		}
	case <-time.After(time.Minute):
		t.Error("Receive does not end")
	}
}

// Whatever arrives, what is not a whole message is left out.
func TestParseRejection(t *testing.T) {
	for f, packet := range map[family.Family][]byte{
		family.IPv4: append(make([]byte, 20+8+20), 0x12, 0x34, 0x82, 0x9a, 0, 0, 0, 0),
		family.IPv6: append(make([]byte, 40+8+40), 0x12, 0x34, 0x82, 0x9a, 0, 0, 0, 0),
	} {
		if f == family.IPv4 {
			packet[0], packet[28] = 0x45, 0x45
		}
		needed := len(packet) - 4
		for size := range len(packet) + 1 {
			r, ok := parseRejection(f, packet[:size:size])
			if ok != (size >= needed) || ok && (r.Src.Port() != 0x1234 || r.Dst.Port() != 0x829a) {
				t.Errorf("%v, %d bytes: got %+v, %v", f, size, r, ok)
			}
		}
	}
	for _, options := range []byte{0x41, 0x4f} { // too short for the addresses; longer than the packet
		if _, ok := parseRejection(family.IPv4, append([]byte{options}, make([]byte, 40)...)); ok {
			t.Errorf("a header that begins with %#x is taken", options)
		}
	}
}

// A request that the device cannot carry as one packet is refused; one of the device's MTU is not.
func TestDontFragment(t *testing.T) {
	for f, pair := range addrs.Each() {
		t.Run(f.String(), func(t *testing.T) {
			nstest.New(t)
			nstest.Run(t, "ip link set lo mtu 1500")
			addAddress(t, pair[0])
			c, messages := open(t, f)
			if err := c.Send(netip.Addr{}, pair[0], 1, make([]byte, c.DataLen(1501))); err != nil {
				t.Errorf("in fragments: %v", err)
			}
			if err := c.DontFragment(); err != nil {
				t.Fatal(err)
			}
			if err := c.Send(netip.Addr{}, pair[0], 2, make([]byte, c.DataLen(1501))); !errors.Is(err, unix.EMSGSIZE) {
				t.Errorf("1501 bytes: got %v", err)
			}
			if err := c.Send(netip.Addr{}, pair[0], 3, make([]byte, c.DataLen(1500))); err != nil {
				t.Fatal(err)
			}
			for m := next(t, messages); m.Seq != 3; m = next(t, messages) {
				if m.Seq == 2 {
					t.Error("1501 bytes were sent")
				}
			}
		})
	}
}
