package echo

import (
	"errors"
	"maps"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/nstest"
)

// open opens a Conn in the namespace of the test, and returns its messages.
func open(t *testing.T, f family.Family) (*Conn, <-chan Message) {
	t.Helper()
	c, err := Open(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	messages := make(chan Message, 100)
	go func() {
		defer close(messages)
		for {
			m, err := c.Receive(make([]byte, 1500))
			if err != nil {
				if !errors.Is(err, net.ErrClosed) {
					t.Error(err)
				}
				return
			}
			messages <- m
		}
	}()
	return c, messages
}

// addAddress adds an address to the test's namespace, and waits until it can be reached: for IPv6, that may be a moment
// after the kernel has the address.
func addAddress(t *testing.T, a netip.Addr) {
	t.Helper()
	nstest.Run(t, "ip address add "+a.String()+" dev lo nodad")
	for end := time.Now().Add(time.Minute); time.Now().Before(end); {
		if _, err := nstest.Try("ping -c 1 -W 1 " + a.String()); err == nil {
			return
		}
	}
	t.Fatalf("%s cannot be reached", a)
}

func next(t *testing.T, messages <-chan Message) Message {
	t.Helper()
	select {
	case m := <-messages:
		return m
	case <-time.After(time.Minute):
		t.Fatal("nothing arrives")
	}
	panic("unreachable")
}

var addrs = family.Pair[[2]netip.Addr]{
	IPv4: [2]netip.Addr{netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("198.18.0.2")},
	IPv6: [2]netip.Addr{netip.MustParseAddr("fd00::1"), netip.MustParseAddr("fd00::2")},
}

// A request comes back as a reply, from the address that was asked and to the one that asks. The host that is asked
// receives the request, too.
func TestRequestAndReply(t *testing.T) {
	for f, pair := range addrs.Each() {
		t.Run(f.String(), func(t *testing.T) {
			nstest.New(t)
			addAddress(t, pair[0])
			addAddress(t, pair[1])
			c, messages := open(t, f)
			for _, from := range []netip.Addr{pair[0], {}} {
				if err := c.Send(from, pair[1], 7, []byte("data")); err != nil {
					t.Fatal(err)
				}
				var got [2]Message // the request and the reply, in any order
				for range 2 {
					m := next(t, messages)
					i := 0
					if m.Reply {
						i = 1
					}
					got[i] = m
				}
				for i, m := range got {
					if m.Reply != (i == 1) || m.Seq != 7 || string(m.Data) != "data" || i == 1 && m.From != pair[1] ||
						i == 0 && from.IsValid() && m.From != from {
						t.Errorf("from %v: got %+v", from, m)
					}
				}
			}
		})
	}
}

// What is not ours does not wake us: pings of others, and replies to another program's requests.
func TestFilter(t *testing.T) {
	for f, pair := range addrs.Each() {
		t.Run(f.String(), func(t *testing.T) {
			nstest.New(t)
			addAddress(t, pair[0])
			c, messages := open(t, f)
			other, err := Open(f)
			if err != nil {
				t.Fatal(err)
			}
			defer other.Close()
			other.id = c.id + 1
			nstest.Run(t, "ping -c 1 "+pair[0].String())
			for i, sender := range []*Conn{other, c} {
				if err := sender.Send(netip.Addr{}, pair[0], uint16(i), nil); err != nil {
					t.Fatal(err)
				}
			}
			type seen struct {
				reply bool
				seq   uint16
			}
			got := map[seen]bool{}
			for range 3 {
				m := next(t, messages)
				got[seen{m.Reply, m.Seq}] = true
			}
			if want := map[seen]bool{{false, 0}: true, {false, 1}: true, {true, 1}: true}; !maps.Equal(got, want) {
				t.Errorf("got %v, want the requests of both, and one reply", got)
			}
		})
	}
}

// A message that was changed on its way is not taken for one that arrived.
func TestChecksum(t *testing.T) {
	nstest.New(t)
	c, messages := open(t, family.IPv4)
	body := &icmp.Echo{ID: int(c.id), Seq: 1, Data: []byte(mark + "data")}
	request, _ := c.types()
	packet, err := (&icmp.Message{Type: request, Body: body}).Marshal(nil)
	if err != nil {
		t.Fatal(err)
	}
	packet[len(packet)-1]++
	if _, err := c.raw.WriteTo(packet, &net.IPAddr{IP: net.IPv4(127, 0, 0, 1)}); err != nil {
		t.Fatal(err)
	}
	if err := c.Send(netip.Addr{}, netip.MustParseAddr("127.0.0.1"), 2, nil); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if m := next(t, messages); m.Seq != 2 {
			t.Errorf("got %+v", m)
		}
	}
}

// Callers tell these errors of the kernel apart.
func TestSendErrors(t *testing.T) {
	nstest.New(t)
	nstest.Need(t, "iptables", "ip6tables")
	for _, f := range family.All {
		own, other := addrs.Of(f)[0], addrs.Of(f)[1]
		addAddress(t, own)
		c, _ := open(t, f)
		if err := c.Send(other, own, 1, nil); !errors.Is(err, unix.ENETUNREACH) && !errors.Is(err, unix.EINVAL) {
			t.Errorf("%s, from an address of another host: %v", f, err)
		}
		nstest.Run(t, family.Pair[string]{IPv4: "iptables", IPv6: "ip6tables"}.Of(f)+" -w -A OUTPUT -j DROP")
		if err := c.Send(own, own, 1, nil); !errors.Is(err, unix.EPERM) {
			t.Errorf("%s, where a rule drops the request: %v", f, err)
		}
	}
}
