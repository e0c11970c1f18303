package etcd_test

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/subnet/etcd"
)

// An operator changes the leases of a site.
type operator struct {
	*site
	*etcd.Manager
}

func (s *site) operator() operator { return operator{s, s.manager("operator")} }

// attrs are the public addresses of a node.
func attrs(ips ...string) subnet.Attrs {
	var a family.Pair[netip.Addr]
	for _, text := range ips {
		ip := netip.MustParseAddr(text)
		*a.At(family.Of(ip)) = ip
	}
	return subnet.Attrs{PublicIP: a.IPv4, PublicIPv6: a.IPv6}
}

// makes makes a change, which must be possible.
func (o operator) makes(c *etcd.Change, err error) *etcd.Change {
	o.t.Helper()
	if err == nil {
		err = o.Make(o.ctx(), c)
	}
	if err != nil {
		o.t.Fatal(err)
	}
	return c
}

func (o operator) reserves(s subnet.Subnets, ips ...string) *etcd.Change {
	o.t.Helper()
	return o.makes(o.Reserve(o.ctx(), s, attrs(ips...)))
}

func (o operator) releases(s subnet.Subnets) *etcd.Change {
	o.t.Helper()
	return o.makes(o.Release(o.ctx(), s))
}

// nobodyHas checks that no node's lease is seen, and returns the view.
func (o operator) nobodyHas() *view {
	o.t.Helper()
	v := newView(o.t, o.Watch(o.ctx()))
	if v.read(); v.String() != "" {
		o.t.Fatalf("peers see %s", v)
	}
	return v
}

// holdings are what there is, as text.
func (o operator) holdings() string {
	o.t.Helper()
	all, err := o.Holdings(o.ctx())
	if err != nil {
		o.t.Fatal(err)
	}
	var lines []string
	for _, h := range all {
		end := "never"
		if !h.Expires.IsZero() {
			end = "some day"
		}
		lines = append(lines, fmt.Sprintf("%s %v reserved=%v ends=%s %s", h.Subnets, h.Attrs.PublicIPs(), h.Reserved, end, h.Note))
	}
	return strings.Join(lines, "\n")
}

// TestReserve: the node that a subnet is reserved for takes it, and no other node does; peers do not take the
// reservation for a node's lease before.
func TestReserve(t *testing.T) {
	for _, c := range []struct {
		name, config string
		subnets      subnet.Subnets
		ips          []string
	}{
		{"IPv4", `{"Network": "10.5.0.0/28", "SubnetLen": 30, "SubnetMax": "10.5.0.8"}`, subnets("10.5.0.4/30"), []string{"198.18.0.1"}},
		{"IPv6", `{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:5::/124", "IPv6SubnetMax": "fd00:5::8"}`,
			subnets("fd00:5::4/126"), []string{"fd18::1"}},
		{"both", `{"Network": "10.5.0.0/28", "SubnetLen": 30, "SubnetMax": "10.5.0.8",
			"EnableIPv6": true, "IPv6Network": "fd00:5::/124", "IPv6SubnetMax": "fd00:5::8"}`,
			subnets("10.5.0.4/30", "fd00:5::8/126"), []string{"198.18.0.1", "fd18::1"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSite(t)
			cfg := s.configure(c.config)
			o := s.operator()
			v := o.nobodyHas()
			o.reserves(c.subnets, c.ips...)
			if got, want := o.holdings(), fmt.Sprintf("%s %v reserved=true ends=never not used yet", c.subnets, c.ips); got != want {
				t.Fatalf("there is %q, want %q", got, want)
			}
			o.nobodyHas()
			if v.read(); v.String() != "" {
				t.Fatalf("peers see %s", v)
			}

			// Two subnets can be had: the other node gets the other one.
			other := subnet.Lease{Attrs: attrs("198.18.0.2", "fd18::2")}
			if l := s.acquire(s.manager("b"), cfg, other); l.Subnets.IPv4.Overlaps(c.subnets.IPv4) ||
				l.Subnets.IPv6.Overlaps(c.subnets.IPv6) {
				t.Errorf("another node gets %s", l.Subnets)
			}
			l := s.acquire(s.manager("a"), cfg, subnet.Lease{Attrs: attrs(c.ips...)})
			if l.Subnets != c.subnets || !l.Expires.IsZero() {
				t.Errorf("the node gets %s until %v", l.Subnets, l.Expires)
			}
			for len(v.leases) < 2 {
				v.read()
			}
			if strings.Contains(o.holdings(), "not used yet") {
				t.Errorf("there is %q", o.holdings())
			}
		})
	}
}

// TestLeaseBecomesReservation: a lease that a node keeps becomes a reservation and a lease again. The node keeps it all
// the time, knows when it ends, and peers see no change.
func TestLeaseBecomesReservation(t *testing.T) {
	s := newSite(t)
	cfg := s.configure(small)
	o := s.operator()
	m := s.manager("a")
	l := s.acquire(m, cfg, want("198.18.0.1"))
	key := "subnets/" + l.Key()
	before := s.get(key)
	lost, _ := s.keep(m, l)
	until := func(what string, ok func() bool) {
		t.Helper()
		for ctx := s.ctx(); !ok(); time.Sleep(time.Millisecond) {
			if ctx.Err() != nil {
				t.Fatal(what)
			}
		}
	}
	until("the lease has no end", func() bool { return !m.State().Expires.IsZero() })
	if c := o.reserves(l.Subnets, "198.18.0.1"); len(c.Cuts) > 0 {
		t.Errorf("it cuts off %q", c.Cuts)
	}
	if e := s.get(key); e.lease != clientv3.NoLease || e.value != before.value || e.created != before.created {
		t.Errorf("the reservation is %+v, the lease was %+v", e, before)
	}
	until("the reservation has an end", func() bool { return m.State().Expires.IsZero() })
	if c := o.reserves(l.Subnets, "198.18.0.1"); !strings.Contains(c.Effect, "already") {
		t.Errorf("reserved again: %s", c.Effect)
	}
	if c := o.releases(l.Subnets); len(c.Cuts) > 0 {
		t.Errorf("it cuts off %q", c.Cuts)
	}
	if e := s.get(key); e.lease == clientv3.NoLease || e.value != before.value || e.created != before.created {
		t.Errorf("the lease is %+v, it was %+v", e, before)
	}
	until("the lease has no end any more", func() bool { return !m.State().Expires.IsZero() })
	if _, err := o.Release(s.ctx(), l.Subnets); err == nil || !strings.Contains(err.Error(), "flanneld runs on 198.18.0.1") {
		t.Errorf("the lease of a node that lives: %v", err)
	}
	select {
	case err := <-lost:
		t.Errorf("Keep returns %v", err)
	default:
	}
}

// TestReserveWhatAnotherHas: a node whose lease is reserved for another one gives it up.
func TestReserveWhatAnotherHas(t *testing.T) {
	s := newSite(t)
	cfg := s.configure(small)
	o := s.operator()
	m := s.manager("a")
	l := s.acquire(m, cfg, want("198.18.0.1"))
	lost, _ := s.keep(m, l)
	if c := o.reserves(l.Subnets, "198.18.0.2"); len(c.Cuts) != 1 || !strings.Contains(c.Cuts[0], "198.18.0.1") {
		t.Errorf("it cuts off %q", c.Cuts)
	}
	if err := receive(t, lost); err != subnet.ErrLost {
		t.Errorf("Keep returns %v", err)
	}
	o.nobodyHas()
	if now := s.acquire(m, cfg, want("198.18.0.1")); now.Subnets == l.Subnets {
		t.Error("the node has the same subnet again")
	}
	if now := s.acquire(s.manager("b"), cfg, want("198.18.0.2")); now.Subnets != l.Subnets {
		t.Errorf("the other node has %s", now.Subnets)
	}
}

// TestChangeThatIsLate: a change is not made when records have changed since it was decided.
func TestChangeThatIsLate(t *testing.T) {
	s := newSite(t)
	s.configure(small)
	o := s.operator()
	nine := subnets("10.5.9.0/24")
	for name, meanwhile := range map[string]func(){
		"another lease":     func() { s.put("subnets/10.5.9.0-24", record("198.18.0.9")) },
		"one that overlaps": func() { s.put("subnets/10.5.8.0-23", record("198.18.0.9")) },
	} {
		late, err := o.Reserve(s.ctx(), nine, attrs("198.18.0.1"))
		if err != nil {
			t.Fatal(err)
		}
		meanwhile()
		before := fmt.Sprint(s.list("subnets/"))
		if err := o.Make(s.ctx(), late); err == nil || !strings.Contains(err.Error(), "nothing was done") {
			t.Errorf("%s: %v", name, err)
		}
		if now := fmt.Sprint(s.list("subnets/")); now != before {
			t.Errorf("%s: there is %s", name, now)
		}
		for _, e := range s.list("subnets/") {
			s.delete(e.key)
		}
	}
	s.putLeased("subnets/10.5.9.0-24", record("198.18.0.1"))
	late, err := o.Release(s.ctx(), nine)
	if err != nil || len(late.Cuts) != 1 {
		t.Fatal(late, err)
	}
	s.put("subnets/10.5.9.0-24", record("198.18.0.2"))
	if err := o.Make(s.ctx(), late); err == nil || s.get("subnets/10.5.9.0-24") == (entry{}) {
		t.Errorf("what another node has by now is deleted: %v", err)
	}
}

// TestHoldings: what there is, with the names of nodes that are alive.
func TestHoldings(t *testing.T) {
	s := newSite(t)
	cfg := s.configure(small)
	o := s.operator()
	s.put("subnets/10.5.42.0-24", "{}")
	l := s.acquire(s.manager("a"), cfg, want("198.18.0.1"))
	all, err := o.Holdings(s.ctx())
	if err != nil || len(all) != 2 {
		t.Fatal(all, err)
	}
	for _, h := range all {
		if h.Subnets == l.Subnets {
			if h.Node == "" || time.Until(h.Expires) < 23*time.Hour || h.Note != "" {
				t.Errorf("the node's is %+v", h)
			}
		} else if h.Reserved || h.Note != "cannot be read: no node is reached with it" {
			t.Errorf("the other is %+v", h)
		}
	}
	if _, err := s.operator().Reserve(context.Background(), subnets("10.9.0.0/24"), attrs("198.18.0.3")); err == nil {
		t.Error("a subnet of another network is reserved")
	}
}
