// Package multimap holds maps whose keys may have several values, and most have one: these take no more memory than in
// a plain map.
package multimap

import (
	"iter"
	"slices"
)

// A Map has any number of values for a key. The zero Map is empty.
type Map[K, V comparable] struct {
	// Compare orders the values of a key. Nil: they are in the order in which they were added.
	Compare func(a, b V) int

	first map[K]V
	more  map[K][]V // beside the first
}

// Add adds a value of a key.
func (m *Map[K, V]) Add(k K, v V) {
	if m.first == nil {
		m.first, m.more = map[K]V{}, map[K][]V{}
	}
	first, taken := m.first[k]
	if !taken {
		m.first[k] = v
		return
	}
	more := m.more[k]
	at := len(more)
	if m.Compare != nil {
		if m.Compare(v, first) < 0 {
			m.first[k], v = v, first
		}
		at, _ = slices.BinarySearchFunc(more, v, m.Compare)
	}
	m.more[k] = slices.Insert(more, at, v)
}

// Remove removes a value of a key, and reports whether it was there.
func (m *Map[K, V]) Remove(k K, v V) bool {
	first, ok := m.first[k]
	more := m.more[k]
	switch i := slices.Index(more, v); {
	case !ok || first != v && i < 0:
		return false
	case first != v:
		more = slices.Delete(more, i, i+1)
	case len(more) == 0:
		delete(m.first, k)
	default:
		m.first[k] = more[0]
		more = slices.Delete(more, 0, 1)
	}
	if len(more) > 0 {
		m.more[k] = more
	} else {
		delete(m.more, k)
	}
	return true
}

// Of yields the values of a key.
func (m *Map[K, V]) Of(k K) iter.Seq[V] {
	return func(yield func(V) bool) {
		first, ok := m.first[k]
		if !ok || !yield(first) {
			return
		}
		for _, v := range m.more[k] {
			if !yield(v) {
				return
			}
		}
	}
}

// First returns the first value of a key.
func (m *Map[K, V]) First(k K) (first V, ok bool) {
	first, ok = m.first[k]
	return first, ok
}

// Keys yields the keys that have values.
func (m *Map[K, V]) Keys() iter.Seq[K] {
	return func(yield func(K) bool) {
		for k := range m.first {
			if !yield(k) {
				return
			}
		}
	}
}

// Len returns how many keys have values.
func (m *Map[K, V]) Len() int { return len(m.first) }
