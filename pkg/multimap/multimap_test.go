package multimap

import (
	"fmt"
	"slices"
	"testing"
)

func TestMap(t *testing.T) {
	var m Map[string, int]
	expect := func(want string) {
		t.Helper()
		got := ""
		for _, k := range slices.Sorted(m.Keys()) {
			got += fmt.Sprintf("%s:%v ", k, slices.Sorted(m.Of(k)))
		}
		if got != want || m.Len() != len(slices.Collect(m.Keys())) {
			t.Errorf("there is %q, want %q", got, want)
		}
	}
	remove := func(k string, v int, want bool) {
		t.Helper()
		if got := m.Remove(k, v); got != want {
			t.Errorf("removing %d of %q: %v", v, k, got)
		}
	}
	expect("")
	remove("a", 1, false)
	m.Add("a", 1)
	m.Add("a", 2)
	m.Add("a", 3)
	m.Add("b", 1)
	expect("a:[1 2 3] b:[1] ")
	remove("a", 4, false)
	remove("b", 2, false)
	remove("a", 1, true) // the first
	expect("a:[2 3] b:[1] ")
	remove("a", 3, true)
	expect("a:[2] b:[1] ")
	for range m.Of("a") {
		break // must not call yield again, which panics
	}
	for range m.Keys() {
		break
	}
	remove("a", 2, true)
	remove("b", 1, true)
	expect("")
	if len(m.first)+len(m.more) > 0 {
		t.Errorf("left over: %v", m)
	}
}
