package multimap

import (
	"slices"
	"testing"
)

// Values are found, also where all hashes collide, and only as long as they are there.
func TestKeyed(t *testing.T) {
	for _, collide := range []bool{false, true} {
		m := NewKeyed(func(v *string) string { return *v })
		if collide {
			m.hash = func(string) uint64 { return 1 }
		}
		expect := func(want ...string) {
			t.Helper()
			var got []string
			for v := range m.All() {
				got = append(got, *v)
			}
			if slices.Sort(got); !slices.Equal(got, want) {
				t.Errorf("there is %q, want %q", got, want)
			}
			for _, k := range []string{"a", "b", "c"} {
				v := m.Get(k)
				if (v != nil) != slices.Contains(want, k) || v != nil && *v != k {
					t.Errorf("%q has the value %v, of %q", k, v, want)
				}
			}
		}
		expect()
		for _, k := range []string{"a", "b", "c"} {
			m.Add(k, &k)
		}
		expect("a", "b", "c")
		b := m.Get("b")
		*b = "" // it does not know its key any more
		m.Remove("b", b)
		expect("a", "c")
		for v := range m.All() {
			m.Remove(*v, v)
		}
		expect()
	}
}
