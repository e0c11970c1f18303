package family

import (
	"net/netip"
	"slices"
	"testing"
)

func TestOf(t *testing.T) {
	for text, want := range map[string]Family{"198.18.0.1": IPv4, "fd00::1": IPv6, "::ffff:198.18.0.1": IPv6} {
		a := netip.MustParseAddr(text)
		if got := Of(a); got != want || !want.Has(a) || All[1-want].Has(a) {
			t.Errorf("%s is %v, want %v", text, got, want)
		}
	}
	if IPv4.Has(netip.Addr{}) || IPv6.Has(netip.Addr{}) {
		t.Error("the zero address has a family")
	}
}

func TestPair(t *testing.T) {
	var p Pair[netip.Addr]
	six := netip.MustParseAddr("fd00::1")
	*p.At(IPv6) = six
	if p.Of(IPv6) != six || p.Of(IPv4).IsValid() || !slices.Equal(Valid(p), []netip.Addr{six}) {
		t.Errorf("got %v", p)
	}
	*p.At(IPv4) = netip.MustParseAddr("198.18.0.1")
	var order []Family
	for f, a := range p.Each() {
		order = append(order, f)
		if Of(a) != f {
			t.Errorf("%v holds %s", f, a)
		}
	}
	if !slices.Equal(order, All[:]) {
		t.Errorf("the order is %v", order)
	}
	for range p.Each() {
		break // must not call yield again, which panics
	}
}
