package subnet

import (
	"net/netip"
	"reflect"
	"slices"
	"testing"
)

// lease makes one of 10.5.third.0/24, for 192.0.2.host.
func lease(third, host byte) *Lease {
	return &Lease{
		Subnets: Subnets{IPv4: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 5, third, 0}), 24)},
		Attrs:   Attrs{PublicIP: netip.AddrFrom4([4]byte{192, 0, 2, host})},
	}
}

func TestUpdate(t *testing.T) {
	one, two := lease(1, 1), lease(2, 2)
	for _, c := range []struct {
		name  string
		start Update
		do    func(*Update)
		want  Update
	}{
		{"put", Update{}, func(u *Update) { u.Put(one) }, Update{Leases: map[Subnets]*Lease{one.Subnets: one}}},
		{"put again", Update{}, func(u *Update) { u.Put(one); u.Put(lease(1, 9)) },
			Update{Leases: map[Subnets]*Lease{one.Subnets: lease(1, 9)}}},
		{"delete", Update{}, func(u *Update) { u.Delete(one.Subnets) }, Update{Gone: map[Subnets]bool{one.Subnets: true}}},
		{"put, delete", Update{}, func(u *Update) { u.Put(one); u.Put(two); u.Delete(one.Subnets) },
			Update{Leases: map[Subnets]*Lease{two.Subnets: two}, Gone: map[Subnets]bool{one.Subnets: true}}},
		{"delete, put", Update{}, func(u *Update) { u.Delete(one.Subnets); u.Put(one) },
			Update{Leases: map[Subnets]*Lease{one.Subnets: one}, Gone: map[Subnets]bool{}}},
		{"put in a snapshot", Update{Snapshot: true}, func(u *Update) { u.Put(one) },
			Update{Snapshot: true, Leases: map[Subnets]*Lease{one.Subnets: one}}},
		{"delete in a snapshot", Update{Snapshot: true}, func(u *Update) { u.Put(one); u.Put(two); u.Delete(one.Subnets) },
			Update{Snapshot: true, Leases: map[Subnets]*Lease{two.Subnets: two}}},
	} {
		got := c.start
		c.do(&got)
		if !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s:\n got %+v\nwant %+v", c.name, got, c.want)
		}
	}
}

func TestApply(t *testing.T) {
	record := func(leases ...*Lease) map[Subnets]*Lease {
		all := map[Subnets]*Lease{}
		for _, l := range leases {
			all[l.Subnets] = l
		}
		return all
	}
	one, two, three := lease(1, 1), lease(2, 2), lease(3, 3)
	for _, c := range []struct {
		name      string
		update    Update
		all, want map[Subnets]*Lease
		gone      []Subnets
	}{
		{"nothing", Update{}, record(one), record(one), nil},
		{"one more", Update{Leases: record(two)}, record(one), record(one, two), nil},
		{"one is another", Update{Leases: record(lease(1, 9))}, record(one, two), record(lease(1, 9), two), nil},
		{"one less", Update{Gone: map[Subnets]bool{one.Subnets: true}}, record(one, two), record(two),
			[]Subnets{one.Subnets}},
		{"one less, never seen", Update{Gone: map[Subnets]bool{three.Subnets: true}}, record(one), record(one), nil},
		{"one for another", Update{Leases: record(three), Gone: map[Subnets]bool{two.Subnets: true}}, record(one, two),
			record(one, three), []Subnets{two.Subnets}},
		{"a first snapshot", Update{Snapshot: true, Leases: record(one, two)}, record(), record(one, two), nil},
		{"a snapshot", Update{Snapshot: true, Leases: record(lease(1, 9), three)}, record(one, two),
			record(lease(1, 9), three), []Subnets{two.Subnets}},
		{"an empty snapshot", Update{Snapshot: true}, record(one), record(), []Subnets{one.Subnets}},
	} {
		if gone := c.update.Apply(c.all); !reflect.DeepEqual(c.all, c.want) || !slices.Equal(gone, c.gone) {
			t.Errorf("%s:\n got %v, gone %v\nwant %v, gone %v", c.name, c.all, gone, c.want, c.gone)
		}
	}
}
