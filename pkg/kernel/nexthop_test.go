package kernel

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/nstest"
	"github.com/flanneld/flanneld/pkg/rtnl"
)

// The numbers of the nexthops of peer and peerDirect.
const (
	nhid       = "168100352"  // 10.5.2.0
	nhidDirect = "3323068419" // 198.18.0.3
)

// useNexthops has nexthops used from the first gateway on.
func useNexthops(t *testing.T, r *Reconciler) {
	t.Helper()
	if !r.supported[KindNexthop] {
		t.Skip("this kernel has no nexthop objects")
	}
	r.fewGateways = 0
}

// withNexthops is idler, with nexthops.
func withNexthops(t *testing.T) *Reconciler {
	t.Helper()
	r := idler(t)
	useNexthops(t, r)
	return r
}

// startNexthops is start, likewise.
func startNexthops(t *testing.T) *Reconciler {
	t.Helper()
	r := withNexthops(t)
	r.Set("node", node())
	r.Set("peer", peer(mac2))
	r.Set("direct", peerDirect())
	apply(t, r)
	return r
}

// nexthops lists them as ip does.
func nexthops(t *testing.T) string { return strings.TrimSpace(nstest.Run(t, "ip nexthop show")) }

// withoutID takes from what ip shows that a route goes through a nexthop.
func withoutID(text string) string { return regexp.MustCompile(`nhid \d+ `).ReplaceAllString(text, "") }

// A route through a nexthop is, but for that, the route that a plain one is.
func TestRoutesThroughNexthops(t *testing.T) {
	host(t)
	r := start(t)
	want := tables(t)
	r.Set("peer", nil)
	r.Set("direct", nil)
	apply(t, r)
	alone := tables(t)
	useNexthops(t, r)
	r.Set("peer", peer(mac2))
	r.Set("direct", peerDirect())
	apply(t, r)
	got := tables(t)
	for _, id := range []string{nhid, nhidDirect} {
		if !strings.Contains(got, "nhid "+id) {
			t.Errorf("no route through nexthop %s in\n%s", id, got)
		}
	}
	if withoutID(got) != want {
		t.Errorf("through nexthops:\n%s\n\nplain:\n%s", got, want)
	}
	if strings.Count(nexthops(t), "proto 70") != 2 {
		t.Errorf("nexthops:\n%s", nexthops(t))
	}
	if err := r.compare(); err != nil || len(r.dirty) > 0 {
		t.Fatalf("what was just applied differs when read back: %v, %d entries", err, len(r.dirty))
	}
	r.Set("peer", nil)
	r.Set("direct", nil)
	apply(t, r)
	if tables(t) != alone || nexthops(t) != "" {
		t.Errorf("without peers: want\n%s\ngot\n%s\n%s", alone, tables(t), nexthops(t))
	}
	if entries := slices.Collect(r.entries.All()); len(entries) != len(node()) || r.wanted[KindNexthop] != 0 {
		t.Errorf("%d entries are remembered, and %d gateways", len(entries), r.wanted[KindNexthop])
	}
}

func TestRepairsDriftOfNexthops(t *testing.T) {
	for _, c := range append([]drift{
		{"nexthop deleted", "ip nexthop del id " + nhid},
		{"nexthops flushed", "ip nexthop flush proto 70"},
		{"nexthop changed", "ip nexthop replace id " + nhid + " via 10.5.66.0 dev flannel.1 onlink proto 70"},
		{"nexthop on another device", "ip nexthop replace id " + nhid + " via 198.18.0.66 dev eth0 proto 70"},
		{"stray nexthop", "ip nexthop add id 77 via 198.18.0.66 dev eth0 proto 70;ip route add 10.5.66.0/24 nhid 77 proto 70"},
		{"carrier lost and found", "ip link set far down;ip link set far up"},
	}, drifts...) {
		if c.name == "routes flushed" {
			continue // "ip route flush" cannot, of routes through nexthops
		}
		t.Run(c.name, func(t *testing.T) {
			host(t)
			r := startNexthops(t)
			before := nexthops(t)
			c.try(t, r)
			if after := nexthops(t); after != before {
				t.Errorf("nexthops were\n%s\nare\n%s", before, after)
			}
		})
	}
}

// Somebody takes a nexthop of ours for his own, or had that number before us:
// he keeps it, and the route is plain.
func TestNexthopsOfOthers(t *testing.T) {
	host(t)
	taken := "ip nexthop replace id " + nhid + " via 198.18.0.9 dev eth0"
	for _, when := range []string{"before", "after"} {
		r := withNexthops(t)
		r.Set("node", node())
		apply(t, r)
		if when == "before" {
			nstest.Run(t, taken)
		}
		r.Set("peer", peer(mac2))
		r.Set("direct", peerDirect())
		r.Compare()
		apply(t, r)
		if when == "after" {
			nstest.Run(t, taken)
		}
		settle(t, r, "a plain route "+when, func() bool {
			return strings.TrimSpace(nstest.Run(t,
				"ip route show 10.5.2.0/24")) == "10.5.2.0/24 via 10.5.2.0 dev flannel.1 proto 70 onlink"
		})
		r.Compare()
		apply(t, r)
		if r.pending() {
			t.Error("it is compared again and again")
		}
		if got := nstest.Run(t, "ip route show 10.5.3.0/24"); !strings.Contains(got, "nhid "+nhidDirect) {
			t.Errorf("the other route is %q", got)
		}
		r.Set("peer", nil)
		apply(t, r)
		if got := nstest.Run(t, "ip nexthop show id "+nhid); !strings.Contains(got, "via 198.18.0.9") {
			t.Errorf("%s: somebody else's nexthop is %q", when, got)
		}
		nstest.Run(t, "ip nexthop flush")
	}
}

// Two routes have one gateway; a third has it on another device.
func TestSharedNexthops(t *testing.T) {
	host(t)
	r := withNexthops(t)
	via := func(dst, dev string) []Object {
		return []Object{Route{Dst: prefix(dst), Via: addr("198.18.0.3"), Dev: dev, Onlink: dev != "eth0"}}
	}
	r.Set("node", node())
	r.Set("first", via("10.5.3.0/24", "eth0"))
	r.Set("second", via("10.5.4.0/24", "eth0"))
	r.Set("third", via("10.5.5.0/24", "flannel.1"))
	apply(t, r)
	show := func() string { return nstest.Run(t, "ip route show proto 70") }
	want := []string{"10.5.3.0/24 nhid " + nhidDirect + " via 198.18.0.3 dev eth0", "10.5.4.0/24 nhid " + nhidDirect +
		" via 198.18.0.3 dev eth0", "10.5.5.0/24 via 198.18.0.3 dev flannel.1 onlink"}
	for _, line := range want {
		if !strings.Contains(show(), line) {
			t.Errorf("no %s in\n%s", line, show())
		}
	}
	r.Set("first", nil)
	apply(t, r)
	if strings.Contains(show(), "10.5.3.0/24") || !strings.Contains(show(), want[1]) ||
		!strings.Contains(show(), want[2]) {
		t.Errorf("without the first:\n%s", show())
	}
	r.Set("second", nil)
	r.Set("third", nil)
	apply(t, r)
	if nexthops(t) != "" {
		t.Errorf("left over: %s", nexthops(t))
	}
}

// A route that changes its gateway is there all the while.
func TestGatewayChanges(t *testing.T) {
	host(t)
	r := startNexthops(t)
	for _, gateway := range []string{"198.18.0.33", "198.18.0.34"} {
		heard := listen(t, unix.RTNLGRP_IPV4_ROUTE)
		r.Set("direct", []Object{Route{Dst: prefix("10.5.3.0/24"), Via: addr(gateway), Dev: "eth0"}})
		apply(t, r)
		if got := nstest.Run(t, "ip route show 10.5.3.0/24"); !strings.Contains(got, "via "+gateway) {
			t.Errorf("route: %q", got)
		}
		if got := heard(); len(got) != 1 || got[replaced] != 1 {
			t.Errorf("the route was not just replaced, once: %v", got)
		}
	}
	if got := nexthops(t); strings.Contains(got, "198.18.0.3 ") || strings.Contains(got, "198.18.0.33") {
		t.Errorf("left over: %s", got)
	}
}

// replaced is how listen counts a route that takes another's place.
const replaced = unix.RTM_NEWROUTE | unix.NLM_F_REPLACE

// listen counts the notifications of some groups from now on, until it is
// asked: by their types, and whether they replace something. Those that nobody
// caused, as when an address comes into use, do not count.
func listen(t *testing.T, groups ...int) (heard func() map[uint16]int) {
	t.Helper()
	l, err := rtnl.Listen(nil, groups...)
	if err != nil {
		t.Fatal(err)
	}
	return func() map[uint16]int {
		defer l.Close()
		count := map[uint16]int{}
		buf := make([]byte, 1<<16)
		for {
			datagram, err := l.TryNext(buf) // the kernel has queued all there are
			if err != nil {
				t.Fatal(err)
			}
			if datagram == nil {
				return count
			}
			rtnl.EachMessage(datagram, func(h unix.NlMsghdr, _ []byte) error {
				if h.Pid != 0 {
					count[h.Type|h.Flags&unix.NLM_F_REPLACE]++
				}
				return nil
			})
		}
	}
}

// What an earlier life left is kept, whether plain or through nexthops, and
// also when half of it is the one and half the other.
func TestRestartChangesNothing(t *testing.T) {
	for _, few := range []int{0, 1, fewGateways} {
		t.Run(fmt.Sprint(few), func(t *testing.T) {
			host(t)
			all := func(r *Reconciler) {
				r.Set("node", node())
				r.Set("peer", peer(mac2))
				r.Set("direct", peerDirect())
				for i := range 100 {
					r.Set(fmt.Sprint(i), vxlanPeer(i))
				}
			}
			first := idler(t)
			first.fewGateways = few
			first.Set("node", node())
			apply(t, first)
			first.Set("peer", peer(mac2)) // a single gateway
			apply(t, first)
			all(first)
			apply(t, first)
			first.Close()
			heard := listen(t, unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
				unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_NEXTHOP)
			for _, later := range []int{0, fewGateways} {
				again := idler(t)
				again.fewGateways = later
				all(again)
				apply(t, again)
				again.Close()
			}
			if got := heard(); len(got) != 0 {
				t.Errorf("a restart caused notifications of these types: %v", got)
			}
		})
	}
}

// Nexthops, and the routes through them, go with the uplink's carrier. No
// nexthop can be made without it, but a plain route can.
func TestCarrierIsLost(t *testing.T) {
	host(t)
	r := startNexthops(t)
	show := func() string { return strings.TrimSpace(nstest.Run(t, "ip route show 10.5.3.0/24")) }
	nstest.Run(t, "ip link set far down")
	settle(t, r, "a plain route", func() bool { return show() == "10.5.3.0/24 via 198.18.0.3 dev eth0 proto 70 linkdown" })
	if r.waiting() {
		t.Error("something waits, though all is as well as can be")
	}
	nstest.Run(t, "ip link set far up")
	settle(t, r, "the carrier", func() bool { return show() == "10.5.3.0/24 via 198.18.0.3 dev eth0 proto 70" })
	r.Compare()
	apply(t, r)
	if r.waiting() || r.pending() {
		t.Errorf("failed %t, pending %t", r.waiting(), r.pending())
	}
}

// An earlier life's nexthops that nobody wants any more go, with their routes.
func TestRemovesStaleNexthops(t *testing.T) {
	host(t)
	startNexthops(t).Close()
	again := withNexthops(t)
	again.Set("node", node())
	again.Set("peer", peer(mac2))
	apply(t, again)
	if got := nexthops(t); strings.Contains(got, nhidDirect) || !strings.Contains(got, nhid) {
		t.Errorf("nexthops:\n%s", got)
	}
}

// Upstream's plain routes become ours without ever being gone.
func TestMigratesPlainRoutes(t *testing.T) {
	host(t)
	before := withNexthops(t)
	before.Set("node", node())
	apply(t, before)
	before.Close()
	nstest.Run(t, "ip route add 10.5.2.0/24 via 10.5.2.0 dev flannel.1 onlink")
	nstest.Run(t, "ip route add 10.5.3.0/24 via 198.18.0.3 dev eth0")
	r := withNexthops(t)
	r.Set("node", node())
	heard := listen(t, unix.RTNLGRP_IPV4_ROUTE)
	r.Set("peer", peer(mac2))
	r.Set("direct", peerDirect())
	apply(t, r)
	if got := heard(); len(got) != 1 || got[replaced] != 2 {
		t.Errorf("the two routes were not just replaced: %v", got)
	}
	if got := nstest.Run(t, "ip route show proto 70"); strings.Count(got, "nhid") != 2 {
		t.Errorf("routes:\n%s", got)
	}
}

// Where routes through nexthops do not show their gateway, ours are plain.
func TestNexthopsThatAreNotTold(t *testing.T) {
	host(t)
	r := startNexthops(t)
	const file = "/proc/sys/net/ipv4/nexthop_compat_mode"
	if err := os.WriteFile(file, []byte("0"), 0); err != nil {
		t.Skip(err)
	}
	r.Compare()
	apply(t, r)
	want := []string{"10.5.2.0/24 via 10.5.2.0 dev flannel.1 onlink", "10.5.3.0/24 via 198.18.0.3 dev eth0"}
	show := func() string { return nstest.Run(t, "ip route show proto 70") }
	for _, line := range want {
		if !strings.Contains(show(), line) {
			t.Errorf("no %s in\n%s", line, show())
		}
	}
	if err := r.compare(); err != nil || len(r.dirty) > 0 {
		t.Errorf("it is never content: %v, %d entries differ", err, len(r.dirty))
	}
	r.Set("peer", nil)
	r.Set("direct", nil)
	apply(t, r)
	if strings.Contains(show(), "via") || nexthops(t) != "" {
		t.Errorf("left over:\n%s\n%s", show(), nexthops(t))
	}
}

// A kernel before 5.3.
func TestKernelWithoutNexthops(t *testing.T) {
	host(t)
	r := withNexthops(t)
	r.supported[KindNexthop] = false
	r.Set("node", node())
	r.Set("peer", peer(mac2))
	r.Set("direct", peerDirect())
	apply(t, r)
	if err := r.compare(); err != nil || len(r.dirty) > 0 {
		t.Errorf("%v, %d entries differ", err, len(r.dirty))
	}
	if nexthops(t) != "" || !r.Has("peer") || r.waiting() {
		t.Errorf("nexthops %q, all there %t, failed %t", nexthops(t), r.Has("peer"), r.waiting())
	}
}
