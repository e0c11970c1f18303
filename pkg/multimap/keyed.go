package multimap

import (
	"hash/maphash"
	"iter"
	"slices"
)

// A Keyed is a map whose values know their keys. It keeps hashes of eight bytes in the place of the keys, which would take
// more memory than all else where keys are large and values are pointers.
type Keyed[K, V comparable] struct {
	key    func(V) K
	hash   func(K) uint64
	values Map[uint64, V] // by the hash of the key: several where hashes collide
}

// NewKeyed returns a map without values. key returns the key of a value that is in the map, when Get is called.
func NewKeyed[K, V comparable](key func(V) K) Keyed[K, V] {
	seed := maphash.MakeSeed()
	return Keyed[K, V]{key: key, hash: func(k K) uint64 { return maphash.Comparable(seed, k) }}
}

// Get returns the value of a key, or the zero V.
func (m *Keyed[K, V]) Get(k K) (v V) {
	h := m.hash(k)
	first, ok := m.values.first[h]
	if !ok {
		return v
	}
	if m.key(first) == k {
		return first
	}
	for _, other := range m.values.more[h] {
		if m.key(other) == k {
			return other
		}
	}
	return v
}

// Add adds the value of a key that has none.
func (m *Keyed[K, V]) Add(k K, v V) { m.values.Add(m.hash(k), v) }

// Remove removes the value of a key.
func (m *Keyed[K, V]) Remove(k K, v V) { m.values.Remove(m.hash(k), v) }

// All yields all values. The present one may be removed meanwhile.
func (m *Keyed[K, V]) All() iter.Seq[V] {
	return func(yield func(V) bool) {
		for h, first := range m.values.first {
			more := slices.Clone(m.values.more[h])
			if !yield(first) {
				return
			}
			for _, v := range more {
				if !yield(v) {
					return
				}
			}
		}
	}
}
