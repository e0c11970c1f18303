package subnet

import (
	"net/netip"
	"testing"
)

func TestAroundObstacles(t *testing.T) {
	cfg, err := ParseConfig([]byte(`{"Network": "10.5.0.0/16", "SubnetMin": "10.5.1.0", "SubnetMax": "10.5.6.0",
		"EnableIPv6": true, "IPv6Network": "fd00:5::/48"}`))
	if err != nil {
		t.Fatal(err)
	}
	if err := cfg.Divide(); err != nil {
		t.Fatal(err)
	}
	prefix := netip.MustParsePrefix
	on := cfg.Around([]Obstacle{
		{Prefix: prefix("10.5.1.0/24"), Name: "a LAN"},
		{Prefix: prefix("10.5.2.1/32"), Name: "the gateway"},
		{Prefix: prefix("10.5.3.0/24"), Name: "a bridge", Pods: true},
		{Prefix: prefix("10.5.4.0/23"), Name: "another bridge", Pods: true},
		{Prefix: prefix("10.5.6.0/25"), Name: "a route", Route: true, Pods: true},
		{Prefix: prefix("fd00:5:0:1::/64"), Name: "a LAN's IPv6", Pods: false},
	})
	const v6, busy = "fd00:5:0:2::/64", "fd00:5:0:1::/64"
	for _, c := range []struct{ ipv4, ipv6, hinders string }{
		{"10.5.1.0/24", v6, "a LAN"},
		{"10.5.2.0/24", v6, "the gateway"},
		{"10.5.3.0/24", v6, ""},               // this node's pods may be on that bridge
		{"10.5.4.0/24", v6, "another bridge"}, // which is larger than a subnet
		{"10.5.6.0/24", v6, ""},
		{"10.5.3.0/24", busy, "a LAN's IPv6"},
	} {
		s := Subnets{prefix(c.ipv4), prefix(c.ipv6)}
		if o, _ := on.Hinders(s); o.Name != c.hinders || on.Fits(s) != (c.hinders == "") || !cfg.Fits(s) {
			t.Errorf("%v: hindered by %q, not by %q; fits %v", s, o.Name, c.hinders, on.Fits(s))
		}
	}
	if free := on.Free(on.IPv4, nil, 10); len(free) != 0 {
		t.Errorf("free are %v", free)
	}
	if free := on.Free(on.IPv6, []netip.Prefix{prefix(v6)}, 1); len(free) != 1 || free[0] != prefix("fd00:5:0:3::/64") {
		t.Errorf("free are %v", free)
	}
	if free := cfg.Free(cfg.IPv4, nil, 10); len(free) != 6 {
		t.Errorf("without obstacles, free are %v", free)
	}
}
