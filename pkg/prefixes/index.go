// Package prefixes finds overlaps among many IP prefixes.
package prefixes

import (
	"cmp"
	"iter"
	"net/netip"
	"slices"

	"github.com/flanneld/flanneld/pkg/multimap"
)

// An Index holds prefixes, each with the values that it was added for. The zero Index is empty.
type Index[T comparable] struct {
	values  multimap.Map[netip.Prefix, T]
	lengths map[length]int // how many of the prefixes have so many bits

	// sorted are the prefixes, those that are parts of another right behind it. It is nil until somebody asks for the
	// parts of a prefix.
	sorted []netip.Prefix
}

// A length is that of a prefix, in a family: of 32 or 128 bits.
type length struct{ bits, of int }

func lengthOf(p netip.Prefix) length { return length{p.Bits(), p.Addr().BitLen()} }

// Add adds a prefix for a value.
func (x *Index[T]) Add(p netip.Prefix, v T) {
	if x.lengths == nil {
		x.lengths = map[length]int{}
	}
	before := x.values.Len()
	x.values.Add(p, v)
	x.lengths[lengthOf(p)]++
	if x.sorted != nil && x.values.Len() > before {
		at, _ := slices.BinarySearchFunc(x.sorted, p, compare)
		x.sorted = slices.Insert(x.sorted, at, p)
	}
}

// compare sorts by address, and of one address the shortest prefix first.
func compare(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

// Remove removes a prefix that was added for a value.
func (x *Index[T]) Remove(p netip.Prefix, v T) {
	before := x.values.Len()
	if !x.values.Remove(p, v) {
		return
	}
	if x.sorted != nil && x.values.Len() < before {
		if at, found := slices.BinarySearchFunc(x.sorted, p, compare); found {
			x.sorted = slices.Delete(x.sorted, at, at+1)
		}
	}
	l := lengthOf(p)
	if x.lengths[l]--; x.lengths[l] == 0 {
		delete(x.lengths, l)
	}
}

// Of yields the values that a prefix was added for.
func (x *Index[T]) Of(p netip.Prefix) iter.Seq[T] { return x.values.Of(p) }

// First returns the first value that a prefix was added for.
func (x *Index[T]) First(p netip.Prefix) (T, bool) { return x.values.First(p) }

// SetOrder has the values of a prefix in an order, rather than in that in which they were added. The index is empty.
func (x *Index[T]) SetOrder(compare func(a, b T) int) { x.values.Compare = compare }

// Overlapping yields the prefixes that overlap p, with each of their values.
func (x *Index[T]) Overlapping(p netip.Prefix) iter.Seq2[netip.Prefix, T] {
	return func(yield func(netip.Prefix, T) bool) {
		for at := range x.Prefixes(p) {
			for v := range x.values.Of(at) {
				if !yield(at, v) {
					return
				}
			}
		}
	}
}

// Prefixes yields the prefixes that overlap p. As a rule, all prefixes of a family have
// the same length: then only p itself overlaps p, and is found at once. Where there are others, it takes no longer than
// what overlaps p: anybody may publish a prefix of another length.
func (x *Index[T]) Prefixes(p netip.Prefix) iter.Seq[netip.Prefix] {
	return func(yield func(netip.Prefix) bool) {
		inside := false // there may be prefixes that are parts of p
		for l := range x.lengths {
			if l.of != p.Addr().BitLen() {
				continue
			}
			if l.bits > p.Bits() {
				inside = true
				continue
			}
			at := netip.PrefixFrom(p.Addr(), l.bits).Masked()
			if _, there := x.values.First(at); there && !yield(at) {
				return
			}
		}
		if !inside {
			return
		}
		if x.sorted == nil {
			x.sorted = slices.SortedFunc(x.values.Keys(), compare)
		}
		first, _ := slices.BinarySearchFunc(x.sorted, p, compare)
		for _, at := range x.sorted[first:] {
			if !p.Overlaps(at) || at.Bits() > p.Bits() && !yield(at) {
				return
			}
		}
	}
}
