package etcd

import (
	"net/netip"
	"testing"

	"github.com/flanneld/flanneld/subnet"
)

// TestChooseAroundObstacles: a lease that conflicts with what this host uses is given up, a reservation is not used, and
// what is chosen instead conflicts with nothing.
func TestChooseAroundObstacles(t *testing.T) {
	cfg, err := subnet.ParseConfig([]byte(`{"Network": "10.5.0.0/16", "SubnetMin": "10.5.1.0", "SubnetMax": "10.5.3.0"}`))
	if err != nil {
		t.Fatal(err)
	}
	if err := cfg.Divide(); err != nil {
		t.Fatal(err)
	}
	lan := subnet.Obstacle{Prefix: netip.MustParsePrefix("10.5.1.0/24"), Name: "10.5.1.0/24 of eth1"}
	bridge := subnet.Obstacle{Prefix: netip.MustParsePrefix("10.5.1.0/24"), Name: "10.5.1.0/24 of cni0", Pods: true}
	want := subnet.Lease{Subnets: subnet.Subnets{IPv4: lan.Prefix}, Attrs: subnet.Attrs{PublicIP: netip.MustParseAddr("198.18.0.1")}}
	for _, c := range []struct {
		records string
		on      subnet.Obstacle
		choice  string
	}{
		{"10.5.1.0-24 198.18.0.1", lan, "drop 10.5.1.0-24, create 10.5.2.0-24"},
		{"10.5.1.0-24 198.18.0.1 reserved", lan, "unfit 10.5.1.0-24, create 10.5.2.0-24"},
		{"10.5.1.0-24 198.18.0.1", bridge, "take 10.5.1.0-24"},
		{"", lan, "create 10.5.2.0-24"},
		{"", bridge, "create 10.5.1.0-24"}, // which this node had before
	} {
		first := func(int) int { return 0 }
		got := choose(records(t, c.records), cfg.Around([]subnet.Obstacle{c.on}), want, record{}, freeEnough, first).String()
		if got != c.choice {
			t.Errorf("%q with %s: %s, not %s", c.records, c.on.Name, got, c.choice)
		}
	}
}
