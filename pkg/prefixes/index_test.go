package prefixes

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func TestOverlapping(t *testing.T) {
	var x Index[string]
	add := func(p, v string) { x.Add(netip.MustParsePrefix(p), v) }
	remove := func(p, v string) { x.Remove(netip.MustParsePrefix(p), v) }
	expect := func(p, want string) {
		t.Helper()
		var got []string
		for at, v := range x.Overlapping(netip.MustParsePrefix(p)) {
			got = append(got, at.String()+"="+v)
		}
		slices.Sort(got)
		if strings.Join(got, " ") != want {
			t.Errorf("%s overlaps %q, want %q", p, got, want)
		}
	}
	expect("10.5.1.0/24", "")
	remove("10.5.1.0/24", "nobody")
	add("10.5.1.0/24", "a")
	add("10.5.1.0/24", "b")
	add("10.5.2.0/25", "c")
	add("10.5.0.0/16", "d")
	add("fd00:1::/64", "e")
	expect("10.5.1.0/24", "10.5.0.0/16=d 10.5.1.0/24=a 10.5.1.0/24=b")
	expect("10.5.2.0/24", "10.5.0.0/16=d 10.5.2.0/25=c")
	expect("10.5.2.7/32", "10.5.0.0/16=d 10.5.2.0/25=c")
	expect("10.0.0.0/8", "10.5.0.0/16=d 10.5.1.0/24=a 10.5.1.0/24=b 10.5.2.0/25=c")
	expect("fd00::/16", "fd00:1::/64=e")
	expect("10.6.0.0/16", "")
	remove("10.5.1.0/24", "a")
	remove("10.5.1.0/24", "nobody")
	remove("10.5.0.0/16", "d")
	expect("10.5.1.0/24", "10.5.1.0/24=b")
	remove("10.5.1.0/24", "b")
	remove("10.5.2.0/25", "c")
	remove("fd00:1::/64", "e")
	if x.values.Len()+len(x.lengths) > 0 {
		t.Errorf("left over: %v", x)
	}
	add("10.5.1.0/24", "a")
	add("10.5.0.0/16", "b")
	for range x.Overlapping(netip.MustParsePrefix("10.5.1.0/24")) {
		break // must not call yield again, which panics
	}
}
