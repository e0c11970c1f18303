package kernel

import (
	"testing"

	"github.com/flanneld/flanneld/pkg/nstest"
)

// What is wanted and held is counted by kind, and what was set right by its
// cause; what we change ourselves is no repair.
func TestStats(t *testing.T) {
	host(t)
	r := start(t)
	by := func(which func(KindStats) int) (all [kinds]int) {
		for k, s := range r.Stats().Kinds {
			all[k] = which(s)
		}
		return all
	}
	wanted := func(s KindStats) int { return s.Wanted }
	held := func(s KindStats) int { return s.Held }
	check := func(what string, want, have [kinds]int) {
		t.Helper()
		if w, h := by(wanted), by(held); w != want || h != have {
			t.Errorf("%s: wanted are %v and held %v, want %v and %v", what, w, h, want, have)
		}
	}
	all := [kinds]int{KindLink: 2, KindAddr: 2, KindNeighbor: 2, KindFDB: 2, KindRoute: 6}
	check("at first", all, all)
	repairs := func() (all [kinds][causes]uint64) {
		for k, s := range r.Stats().Kinds {
			all[k] = s.Repairs
		}
		return all
	}
	r.Set("peer", peer(mac3))
	apply(t, r)
	check("another MAC", all, all)
	var want [kinds][causes]uint64
	if got := repairs(); got != want {
		t.Errorf("what we changed ourselves is counted as %v", got)
	}

	undo(t, r)
	missing := all
	missing[KindRoute]--
	check("a route is gone", all, missing)
	apply(t, r)
	check("and back", all, all)
	want[KindRoute][Missing]++

	nstest.Run(t, "ip route replace 10.5.3.0/24 via 198.18.0.66 dev eth0 proto static")
	hear(r, func(have Object) bool { return have != peerDirect()[0] })
	apply(t, r)
	want[KindRoute][Changed]++

	nstest.Run(t, "ip route add 10.5.9.0/24 via 198.18.0.9 dev eth0 proto 70")
	settle(t, r, "the route that nobody wants to go",
		func() bool { return nstest.Run(t, "ip route show 10.5.9.0/24") == "" })
	want[KindRoute][LeftOver]++
	if got := repairs(); got != want {
		t.Errorf("repairs are counted as %v, want %v", got, want)
	}

	// What the kernel refuses is not held; refused twice, it is counted once.
	r.Set("far", []Object{Route{Dst: prefix("10.5.7.0/24"), Via: addr("203.0.113.7"), Dev: "eth0"}})
	all[KindRoute]++
	missing = all
	missing[KindRoute]--
	for range 2 {
		if r.Reconcile() == nil {
			t.Fatal("a route with an unreachable gateway is taken")
		}
		check("refused", all, missing)
		r.retryFailed()
	}
	r.Set("far", nil)
	r.Set("direct", nil)
	apply(t, r)
	all[KindRoute] -= 3
	check("without a peer", all, all)
}
