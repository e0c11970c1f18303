package subnet

import (
	"net/netip"
	"reflect"
	"testing"
)

func TestUpdate(t *testing.T) {
	lease := func(third byte, host byte) Lease {
		return Lease{
			Subnets: Subnets{IPv4: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 5, third, 0}), 24)},
			Attrs:   Attrs{PublicIP: netip.AddrFrom4([4]byte{192, 0, 2, host})},
		}
	}
	one, two := lease(1, 1), lease(2, 2)
	for _, c := range []struct {
		name  string
		start Update
		do    func(*Update)
		want  Update
	}{
		{"put", Update{}, func(u *Update) { u.Put(one) }, Update{Leases: map[Subnets]Lease{one.Subnets: one}}},
		{"put again", Update{}, func(u *Update) { u.Put(one); u.Put(lease(1, 9)) }, Update{Leases: map[Subnets]Lease{one.Subnets: lease(1, 9)}}},
		{"delete", Update{}, func(u *Update) { u.Delete(one.Subnets) }, Update{Gone: map[Subnets]bool{one.Subnets: true}}},
		{"put, delete", Update{}, func(u *Update) { u.Put(one); u.Put(two); u.Delete(one.Subnets) },
			Update{Leases: map[Subnets]Lease{two.Subnets: two}, Gone: map[Subnets]bool{one.Subnets: true}}},
		{"delete, put", Update{}, func(u *Update) { u.Delete(one.Subnets); u.Put(one) },
			Update{Leases: map[Subnets]Lease{one.Subnets: one}, Gone: map[Subnets]bool{}}},
		{"put in a snapshot", Update{Snapshot: true}, func(u *Update) { u.Put(one) }, Update{Snapshot: true, Leases: map[Subnets]Lease{one.Subnets: one}}},
		{"delete in a snapshot", Update{Snapshot: true}, func(u *Update) { u.Put(one); u.Put(two); u.Delete(one.Subnets) },
			Update{Snapshot: true, Leases: map[Subnets]Lease{two.Subnets: two}}},
	} {
		got := c.start
		c.do(&got)
		if !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s:\n got %+v\nwant %+v", c.name, got, c.want)
		}
	}
}
