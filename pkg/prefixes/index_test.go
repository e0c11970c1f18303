package prefixes

import (
	"math/rand/v2"
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

// TestOverlappingAtRandom compares an Index with a plain list while prefixes of all lengths come and go.
func TestOverlappingAtRandom(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	prefix := func() netip.Prefix {
		ip := netip.AddrFrom4([4]byte{10, 0, byte(random.IntN(2)), byte(random.IntN(256))})
		if random.IntN(4) == 0 {
			ip = netip.AddrFrom16([16]byte{0: 0xfd, 15: byte(random.IntN(256))})
		}
		return netip.PrefixFrom(ip, random.IntN(ip.BitLen()+1)).Masked()
	}
	var x Index[int]
	x.SetOrder(func(a, b int) int { return b - a })
	var plain []netip.Prefix // the value is the place
	for i := range 3000 {
		if n := random.IntN(100); n < len(plain) {
			x.Remove(plain[n], n)
			plain[n] = prefix()
			x.Add(plain[n], n)
		} else {
			plain = append(plain, prefix())
			x.Add(plain[len(plain)-1], len(plain)-1)
		}
		p := prefix()
		var got, want []int
		for at, v := range x.Overlapping(p) {
			if plain[v] != at {
				t.Fatalf("%d is at %v, want %v", v, at, plain[v])
			}
			if first, ok := x.First(at); !ok || first < v {
				t.Fatalf("the first of %v is %d, want the largest, at least %d", at, first, v)
			}
			got = append(got, v)
		}
		for v, at := range plain {
			if at.Overlaps(p) {
				want = append(want, v)
			}
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Fatalf("step %d: %v overlaps %v, want %v", i, p, got, want)
		}
		if len(x.sorted) != x.values.Len() && x.sorted != nil || !slices.IsSortedFunc(x.sorted, compare) {
			t.Fatalf("step %d: the prefixes %v are not those of %v", i, x.sorted, x.values)
		}
	}
}
