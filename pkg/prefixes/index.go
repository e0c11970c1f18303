// Package prefixes finds overlaps among many IP prefixes.
package prefixes

import (
	"iter"
	"net/netip"

	"github.com/flanneld/flanneld/pkg/multimap"
)

// An Index holds prefixes, each with the values that it was added for. The zero Index is empty.
type Index[T comparable] struct {
	values  multimap.Map[netip.Prefix, T]
	lengths map[length]int // how many of the prefixes have so many bits
}

// A length is that of a prefix, in a family: of 32 or 128 bits.
type length struct{ bits, of int }

func lengthOf(p netip.Prefix) length { return length{p.Bits(), p.Addr().BitLen()} }

// Add adds a prefix for a value.
func (x *Index[T]) Add(p netip.Prefix, v T) {
	if x.lengths == nil {
		x.lengths = map[length]int{}
	}
	x.values.Add(p, v)
	x.lengths[lengthOf(p)]++
}

// Remove removes a prefix that was added for a value.
func (x *Index[T]) Remove(p netip.Prefix, v T) {
	if !x.values.Remove(p, v) {
		return
	}
	l := lengthOf(p)
	if x.lengths[l]--; x.lengths[l] == 0 {
		delete(x.lengths, l)
	}
}

// Of yields the values that a prefix was added for.
func (x *Index[T]) Of(p netip.Prefix) iter.Seq[T] { return x.values.Of(p) }

// Overlapping yields the prefixes that overlap p, with each of their values. As a rule, all prefixes of a family have
// the same length: then only p itself overlaps p, and is found at once.
func (x *Index[T]) Overlapping(p netip.Prefix) iter.Seq2[netip.Prefix, T] {
	return func(yield func(netip.Prefix, T) bool) {
		visit := func(at netip.Prefix) bool {
			for v := range x.values.Of(at) {
				if !yield(at, v) {
					return false
				}
			}
			return true
		}
		inside := false // there may be prefixes that are parts of p
		for l := range x.lengths {
			switch {
			case l.of != p.Addr().BitLen():
			case l.bits > p.Bits():
				inside = true
			case !visit(netip.PrefixFrom(p.Addr(), l.bits).Masked()):
				return
			}
		}
		if !inside {
			return
		}
		for at := range x.values.Keys() {
			if at.Bits() > p.Bits() && p.Overlaps(at) && !visit(at) {
				return
			}
		}
	}
}
