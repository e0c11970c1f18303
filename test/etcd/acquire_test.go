package etcd_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flanneld/flanneld/subnet"
)

const small = `{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}`

// record is the value that want's lease has in etcd.
func record(ip string) string {
	if strings.Contains(ip, ":") {
		return fmt.Sprintf(`{"PublicIP":"0.0.0.0","PublicIPv6":"%s","BackendType":"vxlan"}`, ip)
	}
	return fmt.Sprintf(`{"PublicIP":"%s","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1}}`, ip)
}

func TestFreshLeaseIsAsUpstreamWritesIt(t *testing.T) {
	s := newSite(t)
	cfg := s.configure(small)
	m := s.manager("a")
	began := time.Now()
	l := s.acquire(m, cfg, want("198.18.0.1"))

	if !cfg.Fits(l.Subnets) {
		t.Errorf("%v does not fit %v", l.Subnets, cfg.IPv4)
	}
	if day := l.Expires.Sub(began); day < 24*time.Hour-patience || day > 24*time.Hour+patience {
		t.Errorf("the lease lasts %v, want 24h", day)
	}
	if l.Attrs.PublicIP != netip.MustParseAddr("198.18.0.1") {
		t.Errorf("the lease has attributes %+v", l.Attrs)
	}
	e := s.get("subnets/" + l.Key())
	if e.value != record("198.18.0.1") {
		t.Errorf("etcd has %+v, want the value %s", e, record("198.18.0.1"))
	}
	if ttl, err := s.client.TimeToLive(s.ctx(), e.lease); err != nil || ttl.GrantedTTL != 86400 {
		t.Errorf("the etcd lease is %+v, %v", ttl, err)
	}
	if n := s.get("nodes/198.18.0.1"); !strings.Contains(n.value, `"Identity":"a"`) || n.lease == clientv3.NoLease {
		t.Errorf("the claim is %+v", n)
	}
}

func TestRestartTakesTheLeaseUpWithoutAnEvent(t *testing.T) {
	s := newSite(t)
	cfg := s.configure(small)
	first := s.acquire(s.manager("a"), cfg, want("198.18.0.1"))
	before := s.list("subnets/")

	// The earlier daemon's claim is still there: this is its own machine.
	second := s.acquire(s.manager("a"), cfg, want("198.18.0.1"))
	if second.Subnets != first.Subnets {
		t.Errorf("got %v, had %v", second.Subnets, first.Subnets)
	}
	if after := s.list("subnets/"); len(after) != 1 || after[0] != before[0] {
		t.Errorf("etcd has %+v, had %+v", after, before)
	}
}

func TestChangedAttributesKeepTheEtcdLease(t *testing.T) {
	s := newSite(t)
	cfg := s.configure(small)
	s.putLeased("subnets/10.5.9.0-24", `{"PublicIP":"198.18.0.1","PublicIPv6":null,"BackendType":"host-gw"}`)
	before := s.get("subnets/10.5.9.0-24")
	l := s.acquire(s.manager("a"), cfg, want("198.18.0.1"))
	after := s.get("subnets/10.5.9.0-24")
	if l.Key() != "10.5.9.0-24" || after.value != record("198.18.0.1") || after.lease != before.lease ||
		after.created != before.created {
		t.Errorf("lease %v: %+v became %+v", l, before, after)
	}
}

func TestPreviousSubnet(t *testing.T) {
	s := newSite(t)
	cfg := s.configure(small)
	w := want("198.18.0.1")
	w.Subnets = subnets("10.5.77.0/24")
	if l := s.acquire(s.manager("a"), cfg, w); l.Subnets != w.Subnets {
		t.Errorf("got %v, want the free %v", l.Subnets, w.Subnets)
	}
	w.Attrs.PublicIP = netip.MustParseAddr("198.18.0.2")
	if l := s.acquire(s.manager("b"), cfg, w); l.Subnets == w.Subnets {
		t.Errorf("got %v, which is taken", l.Subnets)
	}
}

func TestNewPublicAddressKeepsTheSubnet(t *testing.T) {
	s := newSite(t)
	cfg := s.configure(small)
	m := s.manager("a")
	old := s.acquire(m, cfg, want("198.18.0.1"))
	w := want("198.18.0.2")
	w.Subnets = old.Subnets
	if l := s.acquire(m, cfg, w); l.Subnets != old.Subnets {
		t.Errorf("got %v, had %v", l.Subnets, old.Subnets)
	}
	if e := s.list("subnets/"); len(e) != 1 || e[0].value != record("198.18.0.2") {
		t.Errorf("etcd has %+v", e)
	}
	s.until("nodes/198.18.0.1", func(e entry) bool { return e == entry{} })
	if e := s.get("nodes/198.18.0.2"); e.lease == clientv3.NoLease {
		t.Errorf("the new address's claim is %+v", e)
	}
}

func TestReservation(t *testing.T) {
	s := newSite(t)
	cfg := s.configure(small)
	s.put("subnets/10.5.40.0-24", `{"PublicIP": "198.18.0.1"}`)
	s.putLeased("subnets/10.5.41.0-24", record("198.18.0.1"))
	m := s.manager("a")
	l := s.acquire(m, cfg, want("198.18.0.1"))
	if l.Key() != "10.5.40.0-24" || !l.Expires.IsZero() {
		t.Errorf("got %v until %v, want the reservation", l.Subnets, l.Expires)
	}
	if e := s.list("subnets/"); len(e) != 1 || e[0].lease != clientv3.NoLease || e[0].value != record("198.18.0.1") {
		t.Errorf("etcd has %+v", e)
	}
	// It stays a reservation while it is kept, also when it is overwritten.
	s.keep(m, l)
	s.put("subnets/10.5.40.0-24", `{"PublicIP": "198.18.0.1"}`)
	e := s.until("subnets/10.5.40.0-24", func(e entry) bool { return e.value == record("198.18.0.1") })
	if e.lease != clientv3.NoLease {
		t.Errorf("the reservation became %+v", e)
	}
}

func TestLeasesThatDoNotFit(t *testing.T) {
	s := newSite(t)
	cfg := s.configure(small)
	s.putLeased("subnets/10.6.1.0-24", record("198.18.0.1"))
	s.put("subnets/10.6.2.0-24", record("198.18.0.1"))
	s.putLeased("subnets/10.6.3.0-24", record("198.18.0.2"))
	l := s.acquire(s.manager("a"), cfg, want("198.18.0.1"))
	if !cfg.Fits(l.Subnets) {
		t.Errorf("got %v", l.Subnets)
	}
	var keys []string
	for _, e := range s.list("subnets/") {
		keys = append(keys, strings.TrimPrefix(e.key, "subnets/"))
	}
	if got := strings.Join(keys, " "); got != l.Key()+" 10.6.2.0-24 10.6.3.0-24" {
		t.Errorf("etcd has %s: the own lease should be gone, the reservation and the other's stay", got)
	}
	log.await(t, 1, "The reservation of this node cannot be used", s.prefix+"/subnets/10.6.2.0-24")
}

func TestOlderOverlapWins(t *testing.T) {
	for _, c := range []struct{ name, config, theirs, ours, ip string }{
		{"dual stack", `{"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:5::/48"}`,
			"10.5.1.0-24&fd00:5:0:1::-64", "10.5.1.0-24&fd00:5:0:2::-64", "198.18.0.1"},
		{"another length", small, "10.5.0.0-22", "10.5.1.0-24", "198.18.0.1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSite(t)
			cfg := s.configure(c.config)
			s.putLeased("subnets/"+c.theirs, record("198.18.0.9"))
			s.putLeased("subnets/"+c.ours, record(c.ip))
			w := want(c.ip)
			if cfg.IPv6.Enabled() {
				w.Attrs.PublicIPv6 = netip.MustParseAddr("fd18::1")
			}
			l := s.acquire(s.manager("a"), cfg, w)
			if l.Key() == c.ours || s.get("subnets/"+c.ours) != (entry{}) {
				t.Errorf("got %v; etcd has %+v", l.Subnets, s.list("subnets/"))
			}
			if s.get("subnets/"+c.theirs) == (entry{}) {
				t.Error("the older lease is gone")
			}
		})
	}
}

// crowd acquires leases for n nodes in the same instant.
func crowd(s *site, cfg *subnet.Config, n int, want func(int) subnet.Lease) []subnet.Lease {
	s.t.Helper()
	leases := make([]subnet.Lease, n)
	errs := make([]error, n)
	start := make(chan struct{})
	var all sync.WaitGroup
	for i := range n {
		m := s.manager(fmt.Sprint("machine ", i))
		all.Go(func() {
			<-start
			leases[i], errs[i] = m.Acquire(s.ctx(), cfg, want(i))
		})
	}
	close(start)
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		s.t.Fatal(err)
	}
	for i, a := range leases {
		for _, b := range leases[:i] {
			if a.IPv4.Overlaps(b.IPv4) || a.IPv6.Overlaps(b.IPv6) {
				s.t.Errorf("%v and %v overlap", a.Subnets, b.Subnets)
			}
		}
	}
	if e := s.list("subnets/"); len(e) != n {
		s.t.Errorf("etcd has %d leases of %d nodes: %+v", len(e), n, e)
	}
	return leases
}

func TestTwelveNodesTwelveSubnets(t *testing.T) {
	s := newSite(t)
	cfg := s.configure(`{"Network": "10.5.0.0/16", "SubnetMin": "10.5.1.0", "SubnetMax": "10.5.12.0"}`)
	crowd(s, cfg, 12, func(i int) subnet.Lease { return want(fmt.Sprintf("198.18.1.%d", i+1)) })
}

func TestDualStackCrowd(t *testing.T) {
	s := newSite(t)
	// 36 keys, of which six can be had together.
	cfg := s.configure(`{"Network": "10.5.0.0/16", "SubnetMin": "10.5.1.0", "SubnetMax": "10.5.6.0", "EnableIPv6": true,
		"IPv6Network": "fd00:5::/48", "IPv6SubnetMin": "fd00:5:0:1::", "IPv6SubnetMax": "fd00:5:0:6::"}`)
	crowd(s, cfg, 6, func(i int) subnet.Lease {
		w := want(fmt.Sprintf("198.18.1.%d", i+1))
		w.Attrs.PublicIPv6 = netip.MustParseAddr(fmt.Sprintf("fd18::%d", i+1))
		return w
	})
}

func TestNoGrantIsLeftBehind(t *testing.T) {
	s := newOwnSite(t)
	s.up()
	cfg := s.configure(`{"Network": "10.5.0.0/16", "SubnetMin": "10.5.1.0", "SubnetMax": "10.5.6.0"}`)
	crowd(s, cfg, 6, func(i int) subnet.Lease { return want(fmt.Sprintf("198.18.1.%d", i+1)) })
	leases, err := s.client.Leases(s.ctx())
	if err != nil || len(leases.Leases) != 12 {
		t.Errorf("etcd has %d etcd leases (%v), want a lease and a claim of each of six nodes", len(leases.Leases), err)
	}
}

func TestOutOfSubnets(t *testing.T) {
	s := newSite(t)
	cfg := s.configure(`{"Network": "10.5.0.0/16", "SubnetMin": "10.5.1.0", "SubnetMax": "10.5.1.0"}`)
	s.putLeased("subnets/10.5.1.0-24", record("198.18.0.9"))
	done := s.acquireLater(s.ctx(), s.manager("a"), cfg, want("198.18.0.1"))
	said := log.await(t, 1, "No subnet is free", s.prefix)[0]
	for _, part := range []string{"leases=1", "10.5.1.0 to 10.5.1.0", "flannelctl leases release", s.prefix + "/config"} {
		if !strings.Contains(said, part) {
			t.Errorf("%q does not say %q", said, part)
		}
	}
	s.delete("subnets/10.5.1.0-24")
	if got := receive(t, done); got.err != nil || got.lease.Key() != "10.5.1.0-24" {
		t.Errorf("got %v, %v", got.lease.Subnets, got.err)
	}
	if again, _ := log.lines("No subnet is free", s.prefix); len(again) != 1 {
		t.Errorf("said %d times", len(again))
	}
}

func TestAcquireEndsWithItsContext(t *testing.T) {
	s := newSite(t)
	cfg := s.configure(`{"Network": "10.5.0.0/16", "SubnetMin": "10.5.1.0", "SubnetMax": "10.5.1.0"}`)
	s.putLeased("subnets/10.5.1.0-24", record("198.18.0.9"))
	ctx, cancel := context.WithCancel(s.ctx())
	m := s.manager("a")
	done := s.acquireLater(ctx, m, cfg, want("198.18.0.1"))
	log.await(t, 1, "No subnet is free", s.prefix)
	if got := m.State().Waiting; !strings.Contains(got, "flannelctl leases release") {
		t.Errorf("it waits for %q", got)
	}
	cancel()
	if got := receive(t, done); !errors.Is(got.err, context.Canceled) {
		t.Errorf("got %v", got.err)
	}
}

func TestPublicAddressOfAnotherNode(t *testing.T) {
	s := newSite(t)
	cfg := s.configure(small)
	holder := s.manager("a")
	held := s.acquire(holder, cfg, want("10.0.2.15"))
	s.keep(holder, held)
	before := s.list("subnets/")

	waits := s.manager("b")
	done := s.acquireLater(s.ctx(), waits, cfg, want("10.0.2.15"))
	said := log.await(t, 1, "Another node holds the public address", `address="10.0.2.15"`, s.prefix+"/nodes/10.0.2.15")[0]
	if !strings.HasPrefix(said, "E") {
		t.Errorf("not an error: %s", said)
	}
	for _, part := range []string{"is alive", "--iface", "--iface-regex", "--iface-can-reach", "--public-ip", "stop flanneld"} {
		if !strings.Contains(said, part) {
			t.Errorf("%q does not say %q", said, part)
		}
	}
	for _, part := range []string{"the public address 10.0.2.15", s.prefix + "/nodes/10.0.2.15", "--public-ip", "stop flanneld"} {
		if got := waits.State().Waiting; !strings.Contains(got, part) {
			t.Errorf("%q does not say %q", got, part)
		}
	}
	if after := s.list("subnets/"); !slices.Equal(after, before) {
		t.Errorf("touched: %+v, was %+v", after, before)
	}
	if e := s.get("nodes/10.0.2.15"); !strings.Contains(e.value, `"Identity":"a"`) || strings.Contains(e.value, "AskedBy") {
		t.Errorf("the claim is %+v", e)
	}
	log.await(t, 1, "Another node wants the public address", s.prefix+"/nodes/10.0.2.15")
	holder.Close()
	if got := receive(t, done); got.err != nil || got.lease.Subnets != held.Subnets {
		t.Errorf("got %v, %v; the address had %v", got.lease.Subnets, got.err, held.Subnets)
	}
	if got := waits.State().Waiting; got != "" {
		t.Errorf("with a lease, it waits for %s", got)
	}
}

// A machine that died holds its addresses no longer than it takes to ask it; the one in its place gets its subnet. With
// two families, both are asked at the same time.
func TestHolderThatDied(t *testing.T) {
	s := newSite(t)
	cfg := s.configure(`{"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:5::/48"}`)
	w := want("10.0.2.15")
	w.Attrs.PublicIPv6 = netip.MustParseAddr("fd18::15")
	died := s.acquire(s.manager("a"), cfg, w) // and does not keep it
	got := s.acquire(s.manager("b"), cfg, w)
	if got.Subnets != died.Subnets {
		t.Errorf("got %v, want the subnet %v of the machine that it replaces", got.Subnets, died.Subnets)
	}
	for _, key := range []string{"nodes/10.0.2.15", "nodes/fd18::15"} {
		if e := s.get(key); !strings.Contains(e.value, `"Identity":"b"`) {
			t.Errorf("the claim is %+v", e)
		}
		log.await(t, 1, "does not answer. Taking its place", s.prefix+"/"+key)
	}
	if lines, _ := log.lines("Another node holds the public address", "10.0.2.15", s.prefix); len(lines) > 0 {
		t.Errorf("logged as alive: %q", lines)
	}
}

// TestHolderWhoseAskerDied: a question whose asker has died keeps nobody from the address, however long it stays in etcd.
func TestHolderWhoseAskerDied(t *testing.T) {
	s := newSite(t)
	cfg := s.configure(small)
	s.putLeased("nodes/10.0.2.15", `{"Identity":"dead","Hostname":"one","AskedBy":"two"}`)
	s.acquire(s.manager("b"), cfg, want("10.0.2.15"))
	if e := s.get("nodes/10.0.2.15"); !strings.Contains(e.value, `"Identity":"b"`) {
		t.Errorf("the claim is %+v", e)
	}
	if lines := log.await(t, 1, "does not answer. Taking its place", s.prefix); len(lines) != 1 {
		t.Errorf("logged %q", lines)
	}
}

func TestOneOfManyStrangersGetsTheAddress(t *testing.T) {
	s := newSite(t)
	cfg := s.configure(small)
	ctx, cancel := context.WithCancel(s.ctx())
	const n = 8
	results := make(chan acquired, n)
	start := make(chan struct{})
	for i := range n {
		m := s.manager(fmt.Sprint("machine ", i))
		go func() {
			<-start
			l, err := m.Acquire(ctx, cfg, want("10.0.2.15"))
			results <- acquired{l, err}
			if err == nil {
				m.Keep(s.t.Context(), l) // and so answers the others
			}
		}()
	}
	close(start)
	if got := receive(t, results); got.err != nil {
		t.Fatal(got.err)
	}
	log.await(t, n-1, "Another node holds the public address", `address="10.0.2.15"`, s.prefix+"/nodes/10.0.2.15")
	cancel()
	for range n - 1 {
		if got := receive(t, results); !errors.Is(got.err, context.Canceled) {
			t.Errorf("a second node got %v", got.lease.Subnets)
		}
	}
}

func TestPrevious(t *testing.T) {
	s := newSite(t)
	m := s.manager("a")
	self := want("198.18.0.1").Attrs
	if got, err := m.Previous(s.ctx(), self); err != nil || !got.Equal(subnet.Attrs{}) {
		t.Errorf("out of nothing: %+v, %v", got, err)
	}
	s.put("subnets/10.5.1.0-24", "nonsense")
	s.put("subnets/10.5.2.0-24", `{"PublicIP": "198.18.0.1"}`)
	s.put("subnets/10.5.3.0-24", `{"PublicIP":"198.18.0.2","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VtepMAC":"02:00:00:00:00:02"}}`)
	s.put("subnets/10.5.4.0-24", `{"PublicIP":"198.18.0.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VtepMAC":"02:00:00:00:00:01"}}`)
	got, err := m.Previous(s.ctx(), self)
	if err != nil || string(got.BackendData) != `{"VtepMAC":"02:00:00:00:00:01"}` {
		t.Errorf("got %+v, %v", got, err)
	}
	s.put("subnets/0.0.0.0-0&fd00:5:0:7::-64", `{"PublicIP":"0.0.0.0","PublicIPv6":"fd18::1","BackendV6Data":{"VNI":7}}`)
	if got, err = m.Previous(s.ctx(), want("fd18::1").Attrs); err != nil || string(got.BackendV6Data) != `{"VNI":7}` {
		t.Errorf("IPv6 alone: got %+v, %v", got, err)
	}
}
