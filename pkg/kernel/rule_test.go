package kernel

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/flanneld/flanneld/pkg/nstest"
)

// inTable returns two peers' routes in a table of their own, and the rules that lead there.
func inTable() []Object {
	var all []Object
	for _, o := range peerDirect() {
		r := o.(Route)
		r.Table = 7070
		all = append(all, r)
	}
	return append(all,
		Rule{Dst: prefix("10.5.1.0/24"), Table: MainTable, Priority: 1000},
		Rule{Dst: prefix("10.5.0.0/16"), Table: 7070, Priority: 1001},
		Rule{Dst: prefix("fd05:0:0:1::/64"), Table: MainTable, Priority: 1000},
		Rule{Dst: prefix("fd05::/48"), Table: 7070, Priority: 1001})
}

// showTable returns the rules, and the routes of the table.
func showTable(t *testing.T) string {
	t.Helper()
	text := ""
	for _, line := range []string{"ip rule", "ip -6 rule", "ip route show table 7070", "ip -6 route show table 7070"} {
		if out, err := nstest.Try(line); err == nil && out != "" { // a table that was never used is an error
			text += out + "\n"
		}
	}
	return text
}

// Rules and routes in a table are what the commands say, and come back whatever is done to them. What another program
// has beside them stays.
func TestRules(t *testing.T) {
	quietHost(t)
	nstest.Run(t, "ip addr add fd18::1/64 dev eth0 nodad")
	for _, line := range []string{
		"ip rule add to 10.5.0.0/16 lookup 7070 priority 1001 protocol 4",
		"ip rule add to 10.5.0.0/16 fwmark 7 lookup 7070 priority 1002 protocol 70",
		"ip route add 10.5.9.0/24 via 198.18.0.9 table 7070 proto 4",
		"ip route add 10.5.3.0/24 via 198.18.0.9 table 7071 proto 4",
	} {
		nstest.Run(t, line)
	}
	before := showTable(t)
	for _, o := range inTable() {
		nstest.Run(t, o.String())
	}
	want := showTable(t)
	for _, o := range inTable() {
		nstest.Run(t, o.Undo())
	}
	if got := showTable(t); got != before {
		t.Fatalf("the commands leave\n%s\nbefore\n%s", got, before)
	}
	r := idler(t)
	r.Table = 7070
	r.SetOverlays([]netip.Prefix{prefix("10.5.0.0/16"), prefix("fd05::/48")})
	r.Set("all", inTable())
	apply(t, r)
	if got := showTable(t); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if err := r.compare(); err != nil || len(r.dirty) > 0 {
		t.Fatalf("what was just applied differs when read back: %v, %d entries", err, len(r.dirty))
	}
	for _, harm := range []string{
		"ip rule del to 10.5.1.0/24 lookup main priority 1000",
		"ip -6 rule del to fd05::/48 lookup 7070 priority 1001",
		"ip route del 10.5.3.0/24 table 7070",
		"ip route replace 10.5.3.0/24 via 198.18.0.9 table 7070 proto 4",
		"ip -6 route flush table 7070",
	} {
		nstest.Run(t, harm)
		if showTable(t) == want {
			t.Errorf("%s changes nothing", harm)
		}
		settle(t, r, "the table, after "+harm, func() bool { return r.Has("all") && showTable(t) == want })
	}

	// Another program's route to the same subnet in the main table is behind ours.
	nstest.Run(t, "ip route add 10.5.3.0/24 via 198.18.0.9 proto 4")
	if f := r.Foreign(); len(f) > 0 {
		t.Errorf("what is in our way: %v", f)
	}
	nstest.Run(t, "ip route del 10.5.3.0/24")

	// The next process wants none of them.
	r.Close()
	next := idler(t)
	apply(t, next)
	if got := showTable(t); got != before {
		t.Errorf("there remains\n%s\nbefore\n%s", got, before)
	}
}

// A rule that another program adds, equal to ours, is ours, and not added once more.
func TestRuleIsThere(t *testing.T) {
	quietHost(t)
	r := idler(t)
	apply(t, r)
	rule := Rule{Dst: prefix("10.5.0.0/16"), Table: 7070, Priority: 1001}
	nstest.Run(t, rule.String())
	r.Set("all", []Object{rule})
	apply(t, r)
	e := r.entries.Get(rule.Key())
	e.have = nil // as if the notification were still to come
	r.queue(e)
	apply(t, r)
	if got := nstest.Run(t, "ip rule"); strings.Count(got, "7070") != 1 {
		t.Errorf("there is\n%s", got)
	}
}

// What another program has in a table of its own stays there, also on our device.
func TestOtherTable(t *testing.T) {
	host(t)
	r := start(t)
	nstest.Run(t, "ip route add 10.99.0.0/24 dev flannel.1 table 7071 proto 4")
	apply(t, r)
	if err := r.compare(); err != nil {
		t.Fatal(err)
	}
	apply(t, r)
	if got := nstest.Run(t, "ip route show table 7071"); !strings.Contains(got, "10.99.0.0/24") {
		t.Errorf("the table has %q", got)
	}
}
