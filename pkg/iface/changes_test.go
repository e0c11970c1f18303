package iface

import (
	"context"
	"encoding/binary"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/flanneld/flanneld/pkg/nstest"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// signalled waits for a signal.
func signalled(t *testing.T, changes <-chan struct{}, what string) {
	t.Helper()
	select {
	case _, ok := <-changes:
		if !ok {
			t.Fatalf("%s: the channel was closed", what)
		}
	case <-time.After(time.Minute):
		t.Fatalf("%s: no signal", what)
	}
}

func TestChanges(t *testing.T) {
	setup(t, "link add eth0 type veth peer name far0")
	ctx, cancel := context.WithCancel(t.Context())
	changes, err := Changes(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"link set eth0 up",
		"addr add 198.18.0.1/24 dev eth0",
		"addr add 2001:db8::1/64 dev eth0 nodad",
		"route add default via 198.18.0.254",
		"route del default",
		"route add default via 2001:db8::fe",
		"link set eth0 mtu 1400",
		"addr del 198.18.0.1/24 dev eth0",
		"link del eth0",
	} {
		nstest.Run(t, "ip "+line)
		signalled(t, changes, line)
	}
	cancel()
	for range changes { // what is left, until it is closed
	}
}

func newReader(t *testing.T) *reader {
	t.Helper()
	f, err := listen()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return &reader{f, seen{}}
}

// until reads up to the notification of an MTU, set as a mark, and returns how
// many messages of routes and addresses came before it, and how many messages
// of any kind were changes.
func (r *reader) until(t *testing.T, dev string, mtu int) (routes, addrs, changed int) {
	t.Helper()
	nstest.Run(t, fmt.Sprintf("ip link set %s mtu %d", dev, mtu))
	mark := string(binary.NativeEndian.AppendUint32(binary.NativeEndian.AppendUint16(nil, unix.IFLA_MTU), uint32(mtu)))
	buf := make([]byte, 1<<16)
	defer r.SetReadDeadline(time.Time{})
	for {
		if err := r.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		datagram, isChange, err := r.next(buf)
		if err != nil {
			t.Fatal(err)
		}
		messages, err := syscall.ParseNetlinkMessage(datagram)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range messages {
			attrs, err := syscall.ParseNetlinkRouteAttr(&m)
			if err != nil {
				t.Fatal(err)
			}
			switch m.Header.Type {
			case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
				routes++
			case unix.RTM_NEWADDR, unix.RTM_DELADDR:
				addrs++
			case unix.RTM_NEWLINK:
				if pick(attrs, unix.IFLA_MTU) == mark {
					return routes, addrs, changed
				}
			}
		}
		if isChange {
			changed++
		}
	}
}

// quiet is a link that does nothing by itself, such as to try a link-local
// address for a second.
const quiet = `
	link add eth0 type veth peer name far0
	link set eth0 addrgenmode none
	link set far0 addrgenmode none
	link set far0 up
	link set eth0 up
`

func TestOtherRoutesAreFiltered(t *testing.T) {
	setup(t, quiet+`
		addr add 198.18.0.1/24 dev eth0
		addr add 2001:db8::1/64 dev eth0 nodad`)
	r := newReader(t)
	r.until(t, "eth0", 1400)
	for i := range 20 {
		nstest.Run(t, fmt.Sprintf("ip route add 198.19.%d.0/24 via 198.18.0.2", i))
		nstest.Run(t, fmt.Sprintf("ip route del 198.19.%d.0/24", i))
		nstest.Run(t, fmt.Sprintf("ip route add 2001:db8:%x::/64 via 2001:db8::2", i+1))
	}
	if routes, _, _ := r.until(t, "eth0", 1401); routes > 0 {
		t.Errorf("routes of no interest woke us %d times", routes)
	}
	for i, line := range []string{
		"ip route add default via 198.18.0.254",
		"ip route del default",
		"ip route add default via 2001:db8::fe",
		"ip -6 route del default",
	} {
		nstest.Run(t, line)
		if routes, _, changed := r.until(t, "eth0", 1402+i); routes == 0 || changed < routes {
			t.Errorf("%s: %d messages, %d signals", line, routes, changed)
		}
	}
}

// The kernel sends a notification for an address with every router advertisement, and for a port of a bridge with every
// change of the port's state. These are no changes of the uplink.
func TestRepetitionsAreNoChanges(t *testing.T) {
	nstest.Need(t, "bridge")
	setup(t, quiet+`
		link add br0 address 02:00:00:00:00:b0 type bridge
		link add port type veth peer name far1
		link set port master br0
		addr add 2001:db8::1/64 dev eth0 nodad
		addr add 198.18.0.1/24 dev eth0`)
	nstest.AwaitCarrier(t, "eth0", "far0")
	r := newReader(t)
	mtu := 1400
	for _, dev := range []string{"far0", "far1", "port", "br0"} { // so that a late notification of the carrier is no change
		r.until(t, dev, mtu)
		mtu++
	}
	for _, c := range []struct {
		line    string
		changed bool
	}{
		{"ip addr change 2001:db8::1/64 dev eth0 valid_lft 1000 preferred_lft 500", true}, // the address was unknown
		{"ip addr change 2001:db8::1/64 dev eth0 valid_lft 1001 preferred_lft 500", false},
		{"ip addr change 198.18.0.1/24 dev eth0 valid_lft 1000 preferred_lft 500", true},
		{"ip addr change 198.18.0.1/24 dev eth0 valid_lft 1001 preferred_lft 500", false},
		{"ip addr change 2001:db8::1/64 dev eth0 valid_lft 1000 preferred_lft 0", true}, // deprecated
		{"bridge link set dev port cost 7", false},
		{"bridge link set dev port cost 8", false},
		{"ip link set port nomaster", false},
		{"ip link set eth0 txqueuelen 77", false},
		{"ip link set eth0 address 02:00:00:00:00:77", true},
		{"ip link property add dev eth0 altname enp3s0", true},
		{"ip link set far0 down", true},
		{"ip link set far0 mtu 1300", true},
		{"ip link set far0 up", true},
		{"ip addr del 198.18.0.1/24 dev eth0", true},
		{"ip addr add 198.18.0.1/24 dev eth0 valid_lft 1001 preferred_lft 500", true}, // the same as before it went
	} {
		r.until(t, "eth0", mtu) // whatever was on the way
		nstest.Run(t, c.line)
		mtu++
		_, addrs, changed := r.until(t, "eth0", mtu)
		mtu++
		if strings.Contains(c.line, " addr ") && addrs == 0 {
			t.Errorf("%s: the kernel sent no notification: this tests nothing", c.line)
		}
		if changed > 0 != c.changed {
			t.Errorf("%s: %d signals", c.line, changed)
		}
	}
	// A link that is deleted is forgotten with its addresses.
	eth0, err := netlink.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	index := uint32(eth0.Attrs().Index)
	if _, known := r.seen[object{index: index}]; !known {
		t.Error("eth0 is unknown")
	}
	nstest.Run(t, "ip link del eth0")
	r.until(t, "br0", 1234)
	for o := range r.seen {
		if o.index == index {
			t.Errorf("%v is still remembered", o)
		}
	}
}

// After a loss, the reader knows no state: the next notification is a change, even with the state from before the loss,
// because the lost notifications may have been about another state.
func TestLossIsChange(t *testing.T) {
	setup(t, quiet)
	r := newReader(t)
	r.until(t, "eth0", 1300)
	nstest.Overflow(t, r, "eth0") // another MTU
	buf := make([]byte, 1<<16)
	for lost := false; !lost; {
		datagram, changed, err := r.next(buf)
		if err != nil {
			t.Fatal(err)
		}
		if lost = datagram == nil; lost && !changed {
			t.Error("the loss is no change")
		}
	}
	nstest.Run(t, "ip link set eth0 mtu 1300")
	if _, changed, err := r.next(buf); err != nil || !changed {
		t.Errorf("the MTU of before the loss: changed %v, error %v", changed, err)
	}
}

func TestLossSignals(t *testing.T) {
	setup(t, quiet)
	f, err := listen()
	if err != nil {
		t.Fatal(err)
	}
	nstest.Overflow(t, f, "eth0")
	ctx, cancel := context.WithCancel(t.Context())
	changes := follow(ctx, f)
	signalled(t, changes, "loss")
	for i := range 3 {
		nstest.Run(t, fmt.Sprintf("ip link set eth0 mtu %d", 1200+i))
		signalled(t, changes, "a change after the loss")
	}
	cancel()
	for range changes {
	}
}
