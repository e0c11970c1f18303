package cloudroute

import (
	"net/netip"
	"strings"
	"testing"
)

// table makes a route table of lines: destination, next hop, "blackhole" where it is gone. A gateway, "igw-1", is no
// node's next hop.
func table(lines ...string) Table {
	t := Table{ID: "rtb-1"}
	for _, line := range lines {
		f := strings.Fields(line + " active")
		r := Route{Name: f[0] + "@" + f[1], Destination: netip.MustParsePrefix(f[0]), Blackhole: f[2] == "blackhole"}
		if strings.HasPrefix(f[1], "eni-") {
			r.NextHop = f[1]
		}
		t.Routes = append(t.Routes, r)
	}
	return t
}

func prefixes(texts ...string) []netip.Prefix {
	var all []netip.Prefix
	for _, text := range texts {
		all = append(all, netip.MustParsePrefix(text))
	}
	return all
}

func TestPlan(t *testing.T) {
	four := desired{hop: "eni-1", own: prefixes("10.5.1.0/24"), networks: prefixes("10.5.0.0/16"), known: true}
	dual := desired{hop: "eni-1", own: prefixes("10.5.1.0/24", "fd05:0:0:1::/64"),
		networks: prefixes("10.5.0.0/16", "fd05::/48"), known: true}
	unknown := four
	unknown.known = false
	peer := four
	peer.peers = prefixes("10.5.2.0/24")
	for _, test := range []struct {
		name    string
		desired desired
		table   Table
		want    string
		waits   bool
	}{
		{"an empty table", dual, table(), "create 10.5.1.0/24 eni-1, create fd05:0:0:1::/64 eni-1", false},
		{"all is there", dual, table("10.5.1.0/24 eni-1", "fd05:0:0:1::/64 eni-1"), "", false},
		{"the interface is stopped", four, table("10.5.1.0/24 eni-1 blackhole"), "", false},
		{"an earlier interface", dual, table("10.5.1.0/24 eni-9 blackhole", "fd05:0:0:1::/64 eni-8"),
			"replace 10.5.1.0/24 eni-1 for 10.5.1.0/24@eni-9, replace fd05:0:0:1::/64 eni-1 for fd05:0:0:1::/64@eni-8", false},
		{"something else", four, table("10.5.1.0/24 nat-1"), "replace 10.5.1.0/24 eni-1 for 10.5.1.0/24@nat-1", false},
		{"two to the same", four, table("10.5.1.0/24 eni-2", "10.5.1.0/24 eni-1", "10.5.1.0/24 eni-1"),
			"delete 10.5.1.0/24@eni-2, delete 10.5.1.0/24@eni-1", false},
		{"two wrong ones", four, table("10.5.1.0/24 eni-2", "10.5.1.0/24 eni-3"),
			"delete 10.5.1.0/24@eni-3, replace 10.5.1.0/24 eni-1 for 10.5.1.0/24@eni-2", false},
		{"a peer's", peer, table("10.5.1.0/24 eni-1", "10.5.2.0/24 eni-2"), "", false},
		{"a peer's, gone", peer, table("10.5.1.0/24 eni-1", "10.5.2.0/24 eni-2 blackhole"), "", false},
		{"a peer's, once ours", peer, table("10.5.1.0/24 eni-1", "10.5.2.0/24 eni-1"), "", false},
		{"part of a peer's", peer, table("10.5.1.0/24 eni-1", "10.5.2.128/25 eni-2 blackhole"), "", false},
		{"nobody's", peer, table("10.5.3.0/24 eni-2 blackhole"), "delete 10.5.3.0/24@eni-2, create 10.5.1.0/24 eni-1", false},
		{"nobody's, several", peer, table("10.5.3.0/24 eni-2 blackhole", "10.5.4.0/24 eni-2 blackhole", "10.5.5.0/24 eni-2 blackhole"),
			"delete 10.5.3.0/24@eni-2, create 10.5.1.0/24 eni-1, delete 10.5.4.0/24@eni-2, delete 10.5.5.0/24@eni-2", false},
		{"nobody's, IPv6", dual, table("10.5.1.0/24 eni-1", "fd05:0:0:1::/64 eni-1", "fd05:0:0:3::/64 eni-2 blackhole"),
			"delete fd05:0:0:3::/64@eni-2", false},
		{"nobody's, and alive", peer, table("10.5.1.0/24 eni-1", "10.5.3.0/24 eni-2"), "", false},
		{"an earlier lease", peer, table("10.5.1.0/24 eni-1", "10.5.3.0/24 eni-1"), "delete 10.5.3.0/24@eni-1", false},
		{"an earlier lease, or a peer's", unknown, table("10.5.1.0/24 eni-1", "10.5.3.0/24 eni-1"), "", true},
		{"nobody's, or a peer's", unknown, table("10.5.1.0/24 eni-1", "10.5.3.0/24 eni-2 blackhole"), "", true},
		{"the network's", four, table("10.5.1.0/24 eni-1", "10.5.0.0/16 eni-2 blackhole"), "", false},
		{"outside", four, table("10.5.1.0/24 eni-1", "10.6.0.0/24 eni-2 blackhole", "10.6.1.0/24 eni-1", "0.0.0.0/0 igw-1"),
			"", false},
		{"a gateway's", four, table("10.5.1.0/24 eni-1", "10.5.7.0/24 tgw-1 blackhole"), "", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			steps, waits := plan(test.table, test.desired)
			var got []string
			for _, s := range steps {
				if s.Table != "rtb-1" {
					t.Errorf("%+v is for another table", s)
				}
				text := string(s.Verb) + " " + s.Route.Destination.String() + " " + s.Route.NextHop
				switch s.Verb {
				case Delete:
					text = "delete " + s.Route.Name
				case Replace:
					text += " for " + s.Old.Name
				}
				got = append(got, text)
			}
			if strings.Join(got, ", ") != test.want || waits != test.waits {
				t.Errorf("got %v, waits %t, want %s", got, waits, test.want)
			}
		})
	}
}
