package subnet

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func prefixes(text string) []netip.Prefix {
	var all []netip.Prefix
	for _, f := range strings.Fields(text) {
		all = append(all, netip.MustParsePrefix(f))
	}
	return all
}

func TestFree(t *testing.T) {
	four := pool("10.5.0.0/16", 24, "10.5.1.0", "10.5.4.0")
	for _, c := range []struct {
		name  string
		pool  Pool
		taken string
		limit int
		want  string
	}{
		{"empty", four, "", 100, "10.5.1.0/24 10.5.2.0/24 10.5.3.0/24 10.5.4.0/24"},
		{"limit", four, "", 2, "10.5.1.0/24 10.5.2.0/24"},
		{"none", four, "", 0, ""},
		{"in any order", four, "10.5.4.0/24 10.5.2.0/24", 100, "10.5.1.0/24 10.5.3.0/24"},
		{"full", four, "10.5.1.0/24 10.5.2.0/24 10.5.3.0/24 10.5.4.0/24", 100, ""},
		{"twice the same", four, "10.5.1.0/24 10.5.1.0/24 10.5.2.0/24", 100, "10.5.3.0/24 10.5.4.0/24"},
		{"outside", four, "10.4.0.0/16 10.5.0.0/24 10.5.5.0/24 10.6.0.0/16", 100,
			"10.5.1.0/24 10.5.2.0/24 10.5.3.0/24 10.5.4.0/24"},
		{"shorter", four, "10.5.2.0/23", 100, "10.5.1.0/24 10.5.4.0/24"},
		{"longer", four, "10.5.2.128/25 10.5.2.0/30 10.5.4.7/32", 100, "10.5.1.0/24 10.5.3.0/24"},
		{"nested", four, "10.5.0.0/23 10.5.0.0/24 10.5.1.64/26 10.5.3.0/24", 100, "10.5.2.0/24 10.5.4.0/24"},
		{"all at once", four, "10.0.0.0/8", 100, ""},
		{"the other family", four, "fd00:5::/48 ::/8", 100, "10.5.1.0/24 10.5.2.0/24 10.5.3.0/24 10.5.4.0/24"},
		{"single", pool("10.5.0.0/16", 24, "10.5.9.0", "10.5.9.0"), "", 100, "10.5.9.0/24"},
		{"to the last address", pool("255.255.0.0/16", 18, "255.255.64.0", "255.255.192.0"), "255.255.128.0/18", 100,
			"255.255.64.0/18 255.255.192.0/18"},
		{"to the last IPv6 address", pool("ffff::/16", 18, "ffff:8000::", "ffff:c000::"), "", 100,
			"ffff:8000::/18 ffff:c000::/18"},
		{"the next network when one is full", join(pool("10.5.0.0/16", 24, "10.5.1.0", "10.5.2.0"), pool("10.4.0.0/16", 24, "10.4.1.0", "10.4.2.0")),
			"10.5.1.0/24 10.5.2.0/24 10.4.1.0/24", 100, "10.4.2.0/24"},
		{"not both at once", join(pool("10.5.0.0/16", 24, "10.5.1.0", "10.5.2.0"), pool("10.4.0.0/16", 24, "10.4.1.0", "10.4.2.0")),
			"10.5.1.0/24", 100, "10.5.2.0/24"},
		{"IPv6", pool("fd00:5::/48", 64, "fd00:5:0:1::", "fd00:5:0:ffff::"), "fd00:5:0:1::/64 10.0.0.0/8 fd00:5:0:3::/80", 3,
			"fd00:5:0:2::/64 fd00:5:0:4::/64 fd00:5:0:5::/64"},
	} {
		taken := prefixes(c.taken)
		if got := c.pool.Free(taken, c.limit); !slices.Equal(got, prefixes(c.want)) {
			t.Errorf("%s: got %v, want %s", c.name, got, c.want)
		}
		if !slices.Equal(taken, prefixes(c.taken)) {
			t.Errorf("%s: the caller's slice became %v", c.name, taken)
		}
	}
}

// Free must agree with looking at every subnet.
func TestFreeAgreesWithCounting(t *testing.T) {
	p := pool("10.5.0.0/16", 24, "10.5.1.0", "10.5.255.0")
	for seed := range uint64(200) {
		random := rand.New(rand.NewPCG(seed, 0))
		var taken []netip.Prefix
		for range random.IntN(200) {
			a := netip.AddrFrom4([4]byte{10, 5, byte(random.IntN(256)), byte(random.IntN(256))})
			taken = append(taken, netip.PrefixFrom(a, 20+random.IntN(13)).Masked())
		}
		var want []netip.Prefix
		for third := 1; third < 256; third++ {
			s := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 5, byte(third), 0}), 24)
			if !slices.ContainsFunc(taken, s.Overlaps) {
				want = append(want, s)
			}
		}
		if got := p.Free(taken, 1000); !slices.Equal(got, want) {
			t.Fatalf("seed %d, taken %v:\n got %v\nwant %v", seed, taken, got, want)
		}
	}
}

// TestRetain: in a network that the configuration no longer has, a node keeps what it has, and no other node gets any.
func TestRetain(t *testing.T) {
	cfg, err := read(`{"Network": "10.5.0.0/16", "SubnetMin": "10.5.1.0", "SubnetMax": "10.5.1.0"}`)
	if err != nil {
		t.Fatal(err)
	}
	with := cfg.Retain(NetworksOf(prefixes("10.5.0.0/16 10.6.0.0/16 10.0.0.0/8 10.6.128.0/17 fd06::/48")...))
	if got := with.Networks().String(); got != "10.5.0.0/16,10.6.0.0/16" || with.Retired().String() != "10.6.0.0/16" {
		t.Errorf("retained: %s; retired: %s", got, with.Retired())
	}
	if got := with.Retain(Networks{}).Networks().String(); got != "10.5.0.0/16" {
		t.Errorf("when none is retired any more: %s", got)
	}
	if len(cfg.IPv4.Ranges) != 1 {
		t.Errorf("the configuration itself became %+v", cfg.IPv4)
	}
	for _, c := range []struct {
		subnet       string
		fits, admits bool
	}{
		{"10.5.1.0/24", true, true}, {"10.5.2.0/24", false, true}, {"10.6.2.0/24", true, true}, {"10.6.2.0/26", true, true},
		{"10.6.0.0/17", false, false}, {"10.7.1.0/24", false, false},
	} {
		p := netip.MustParsePrefix(c.subnet)
		if fits, admits := with.IPv4.Fits(p), with.IPv4.Admits(p); fits != c.fits || admits != c.admits {
			t.Errorf("%s: fits %t, admitted %t", p, fits, admits)
		}
	}
	if free := with.IPv4.Free(prefixes("10.5.1.0/24"), 5); len(free) > 0 {
		t.Errorf("handed out: %v", free)
	}
}

// TestAdmitsWhatTheStoreAssigns: where the store assigns subnets, a node can have all of a network, also of one that is
// retired, and whatever SubnetMin is.
func TestAdmitsWhatTheStoreAssigns(t *testing.T) {
	cfg, err := ParseConfig([]byte(`{"Network": "10.5.0.0/23", "SubnetMin": "10.5.1.0"}`))
	if err != nil {
		t.Fatal(err)
	}
	pool := cfg.Retain(NetworksOf(prefixes("10.6.0.0/24")...)).IPv4
	for subnet, want := range map[string]bool{"10.5.0.0/24": true, "10.6.0.0/24": true, "10.6.0.0/23": false} {
		if got := pool.Admits(netip.MustParsePrefix(subnet)); got != want {
			t.Errorf("%s is admitted: %t, want %t", subnet, got, want)
		}
	}
}
