package subnet

import (
	"maps"
	"reflect"
	"sync"
	"testing"
	"time"
)

// updateOf makes an update of leases, and of subnets that are gone.
func updateOf(put []*Lease, gone ...*Lease) Update {
	var u Update
	for _, l := range gone {
		u.Delete(l.Subnets)
	}
	for _, l := range put {
		u.Put(l)
	}
	return u
}

func TestMailboxMerges(t *testing.T) {
	one, two, three := lease(1, 1), lease(2, 2), lease(3, 3)
	early, late := time.Unix(1, 0), time.Unix(2, 0)
	snapshot := func(leases ...*Lease) Update {
		u := updateOf(leases)
		u.Snapshot = true
		return u
	}
	since := func(u Update, at time.Time) Update {
		u.Since = at
		return u
	}
	for _, c := range []struct {
		name string
		puts []Update
		want Update
	}{
		{"one", []Update{updateOf([]*Lease{one}, two)}, updateOf([]*Lease{one}, two)},
		{"changes", []Update{updateOf([]*Lease{one, two}), updateOf([]*Lease{lease(1, 9)}, two)},
			updateOf([]*Lease{lease(1, 9)}, two)},
		{"a subnet that moves to another node", []Update{updateOf(nil, one), updateOf([]*Lease{lease(1, 9)})},
			Update{Leases: map[Subnets]*Lease{one.Subnets: lease(1, 9)}, Gone: map[Subnets]bool{}}},
		{"a change of a snapshot", []Update{snapshot(one, two), updateOf([]*Lease{three}, one)}, snapshot(two, three)},
		{"a snapshot after changes", []Update{updateOf([]*Lease{one}, two), snapshot(three)}, snapshot(three)},
		{"nothing", []Update{updateOf([]*Lease{one}), since(Update{}, early)}, updateOf([]*Lease{one})},
		{"an empty snapshot", []Update{snapshot()}, snapshot()},
		{"the first time counts", []Update{since(updateOf([]*Lease{one}), early), since(updateOf([]*Lease{two}), late)},
			since(updateOf([]*Lease{one, two}), early)},
		{"a time after none", []Update{snapshot(one), since(updateOf([]*Lease{two}), late)}, since(snapshot(one, two), late)},
	} {
		m := NewMailbox()
		for _, u := range c.puts {
			m.Put(u)
		}
		if got := <-m.C(); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s:\n got %+v\nwant %+v", c.name, got, c.want)
		}
		select {
		case u := <-m.C():
			t.Errorf("%s: there is another update: %+v", c.name, u)
		default:
		}
	}
}

func TestMailboxClose(t *testing.T) {
	m := NewMailbox()
	m.Put(updateOf([]*Lease{lease(1, 1)}))
	m.Close()
	m.Close()
	m.Put(updateOf([]*Lease{lease(2, 2)}))
	if u, open := <-m.C(); open {
		t.Errorf("after Close, the reader receives %+v", u)
	}
}

// Close may come while others put.
func TestMailboxCloseWhilePutting(t *testing.T) {
	m := NewMailbox()
	var writers sync.WaitGroup
	for i := range byte(4) {
		writers.Go(func() {
			for n := range byte(100) {
				m.Put(updateOf([]*Lease{lease(i, n)}))
			}
		})
	}
	m.Close()
	writers.Wait()
	if u, open := <-m.C(); open {
		t.Errorf("after Close, the reader receives %+v", u)
	}
}

// However reads and writes interleave, the reader ends with what was written last.
func TestMailboxWithManyWriters(t *testing.T) {
	m := NewMailbox()
	var writers sync.WaitGroup
	for i := range byte(8) {
		writers.Go(func() {
			for n := range byte(200) {
				m.Put(updateOf([]*Lease{lease(i, n)}, lease(i+100, 0)))
				m.Put(updateOf([]*Lease{lease(i+100, n)}, lease(i, 0)))
			}
		})
	}
	written := make(chan struct{})
	go func() { writers.Wait(); close(written) }()
	leases := map[Subnets]*Lease{}
	for reading := true; reading; {
		select {
		case u := <-m.C():
			u.Apply(leases)
		case <-written:
			reading = false
		}
	}
	select {
	case u := <-m.C():
		u.Apply(leases)
	default:
	}
	want := map[Subnets]*Lease{}
	for i := range byte(8) {
		l := lease(i+100, 199)
		want[l.Subnets] = l
	}
	if !maps.EqualFunc(leases, want, func(a, b *Lease) bool { return a.Attrs.Equal(b.Attrs) }) {
		t.Errorf("the reader has %v\nwant %v", leases, want)
	}
}
