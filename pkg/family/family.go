// Package family, which other programs may import, holds what IPv4 and IPv6 differ
// in, and pairs of values, one for each of them.
package family

import (
	"iter"
	"net/netip"
)

// A Family is an address family. It is an index of arrays with two elements.
type Family int

const (
	IPv4 Family = iota
	IPv6
)

// All lists both families, IPv4 first.
var All = [2]Family{IPv4, IPv6}

// Of returns the family of an address. An IPv4-mapped IPv6 address is IPv6.
func Of(a netip.Addr) Family {
	if a.Is4() {
		return IPv4
	}
	return IPv6
}

// String returns "IPv4" or "IPv6".
func (f Family) String() string { return [...]string{"IPv4", "IPv6"}[f] }

// Has tells whether an address is of the family. The zero Addr is of none.
func (f Family) Has(a netip.Addr) bool { return a.IsValid() && Of(a) == f }

// HeaderLen returns the length of an IP header without options, in bytes.
func (f Family) HeaderLen() int { return [...]int{20, 40}[f] }

// MinMTU returns the packet size, in bytes, that every host must be able to
// receive (IPv4: RFC 791) or every link to carry (IPv6: RFC 8200, section 5).
func (f Family) MinMTU() int { return [...]int{576, 1280}[f] }

// A Pair is a value for each family.
type Pair[T any] struct{ IPv4, IPv6 T }

// Of returns the value of one family.
func (p Pair[T]) Of(f Family) T {
	if f == IPv4 {
		return p.IPv4
	}
	return p.IPv6
}

// At returns a pointer to the value of one family.
func (p *Pair[T]) At(f Family) *T {
	if f == IPv4 {
		return &p.IPv4
	}
	return &p.IPv6
}

// Each yields both values, IPv4's first.
func (p Pair[T]) Each() iter.Seq2[Family, T] {
	return func(yield func(Family, T) bool) {
		_ = yield(IPv4, p.IPv4) && yield(IPv6, p.IPv6)
	}
}

// Valid returns the values of the pair that are valid, IPv4's first.
func Valid[T interface{ IsValid() bool }](p Pair[T]) []T {
	var all []T
	for _, v := range p.Each() {
		if v.IsValid() {
			all = append(all, v)
		}
	}
	return all
}
