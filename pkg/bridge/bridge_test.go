package bridge

import (
	"net/netip"
	"reflect"
	"testing"

	"github.com/flanneld/flanneld/pkg/nstest"
)

func prefixes(texts ...string) (all []netip.Prefix) {
	for _, text := range texts {
		all = append(all, netip.MustParsePrefix(text))
	}
	return all
}

func TestAll(t *testing.T) {
	nstest.New(t)
	nstest.Need(t, "ip")
	for _, line := range []string{
		"ip link add cni0 type bridge", "ip link add other type bridge",
		"ip addr add 10.5.1.1/24 dev cni0", "ip addr add 169.254.1.1/16 scope link dev cni0",
		"ip link add pod1 type veth peer name pod2", "ip link set pod1 master cni0", "ip link set pod2 master cni0",
	} {
		nstest.Run(t, line)
	}
	all, err := All()
	if err != nil || len(all) != 2 {
		t.Fatalf("got %+v, %v", all, err)
	}
	cni0, other := all[0], all[1]
	if cni0.Name != "cni0" || cni0.Ports != 2 || !reflect.DeepEqual(cni0.Addrs, prefixes("10.5.1.1/24")) ||
		other.Name != "other" || other.Ports != 0 || len(other.Addrs) > 0 {
		t.Errorf("got %+v", all)
	}
	for range 2 { // the second time, the address is gone
		if err := cni0.RemoveAddr(cni0.Addrs[0]); err != nil {
			t.Error(err)
		}
	}
	if all, err := All(); err != nil || len(all[0].Addrs) > 0 {
		t.Errorf("got %+v, %v", all, err)
	}
}

func TestStale(t *testing.T) {
	networks := prefixes("10.5.0.0/16", "fd05::/48")
	for _, c := range []struct{ addrs, subnets, want []netip.Prefix }{
		{prefixes("10.5.1.1/24", "fd05:0:0:1::1/64"), prefixes("10.5.1.0/24", "fd05:0:0:1::/64"), nil},
		{prefixes("10.5.1.1/24", "fd05:0:0:1::1/64"), prefixes("10.5.2.0/24", "fd05:0:0:2::/64"),
			prefixes("10.5.1.1/24", "fd05:0:0:1::1/64")},
		{prefixes("10.6.1.1/24", "fd06::1/64"), prefixes("10.5.2.0/24", "fd05:0:0:2::/64"), prefixes("10.6.1.1/24")},
		{prefixes("10.5.1.1/24", "fd05:0:0:1::1/64"), prefixes("10.5.1.0/24"), nil},
	} {
		if got := (Bridge{Addrs: c.addrs}).Stale(networks, c.subnets); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%v, with the subnets %v: got %v, want %v", c.addrs, c.subnets, got, c.want)
		}
	}
}
