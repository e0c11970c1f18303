package etcd_test

import (
	"context"
	"errors"
	"math"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flanneld/flanneld/subnet"
)

// kept is a node whose lease is being kept.
func kept(t *testing.T, s *site) (key string, done <-chan error, stop func()) {
	t.Helper()
	cfg := s.configure(small)
	m := s.manager("a")
	l := s.acquire(m, cfg, want("198.18.0.1"))
	done, stop = s.keep(m, l)
	return "subnets/" + l.Key(), done, stop
}

func TestDeletedLeaseComesBack(t *testing.T) {
	s := newSite(t)
	key, _, _ := kept(t, s)
	before := s.get(key)
	s.delete(key)
	after := s.until(key, func(e entry) bool { return e != entry{} && e.created > before.created })
	if after.value != before.value || after.lease != before.lease {
		t.Errorf("it was %+v and is %+v", before, after)
	}
	// And again, with its etcd lease gone too.
	if _, err := s.client.Revoke(s.ctx(), after.lease); err != nil {
		t.Fatal(err)
	}
	again := s.until(key, func(e entry) bool { return e != entry{} && e.created > after.created })
	if again.value != before.value || again.lease == clientv3.NoLease || again.lease == before.lease {
		t.Errorf("it was %+v and is %+v", before, again)
	}
}

func TestLeaseTakenByAnotherNode(t *testing.T) {
	s := newSite(t)
	key, done, _ := kept(t, s)
	s.put(key, record("198.18.0.9"))
	if err := receive(t, done); !errors.Is(err, subnet.ErrLost) {
		t.Errorf("got %v, want %v", err, subnet.ErrLost)
	}
	if e := s.get(key); e.value != record("198.18.0.9") {
		t.Errorf("the other's lease became %+v", e)
	}
}

func TestOverwrittenLeaseIsRestored(t *testing.T) {
	s := newSite(t)
	key, _, _ := kept(t, s)
	before := s.get(key)
	for _, other := range []string{`{"PublicIP":"198.18.0.1","PublicIPv6":null,"BackendType":"host-gw"}`, "nonsense", ""} {
		id := s.putLeased(key, other)
		e := s.until(key, func(e entry) bool { return e.value == before.value })
		if e.lease == clientv3.NoLease {
			t.Errorf("after %q the lease became a reservation, its overwriter's etcd lease was %x", other, id)
		}
	}
	if said := log.await(t, 1, "was overwritten", s.prefix, "198.18.0.1"); len(said) != 1 {
		t.Errorf("within a minute, logged %q", said)
	}
}

func TestOverlapAfterDeletion(t *testing.T) {
	s := newSite(t)
	key, done, _ := kept(t, s)
	// In one step the lease goes and one that overlaps it comes.
	other := s.prefix + "/subnets/10.5.0.0-17"
	if strings.HasPrefix(key, "subnets/10.5.1") || strings.HasPrefix(key, "subnets/10.5.2") {
		other = s.prefix + "/subnets/10.5.0.0-16"
	}
	_, err := s.client.Txn(s.ctx()).Then(clientv3.OpDelete(s.prefix+"/"+key),
		clientv3.OpPut(other, record("198.18.0.9"))).Commit()
	if err != nil {
		t.Fatal(err)
	}
	if err := receive(t, done); !errors.Is(err, subnet.ErrLost) {
		t.Errorf("got %v, want %v", err, subnet.ErrLost)
	}
	if e := s.get(key); e != (entry{}) {
		t.Errorf("it left %+v", e)
	}
}

func TestClaimComesBack(t *testing.T) {
	s := newSite(t)
	kept(t, s)
	before := s.get("nodes/198.18.0.1")
	s.delete("nodes/198.18.0.1")
	after := s.until("nodes/198.18.0.1", func(e entry) bool { return e != entry{} && e.created > before.created })
	if after.lease == clientv3.NoLease {
		t.Errorf("the claim is %+v", after)
	}
	if _, err := s.client.Revoke(s.ctx(), after.lease); err != nil {
		t.Fatal(err)
	}
	s.until("nodes/198.18.0.1", func(e entry) bool { return e != entry{} && e.created > after.created })
}

func TestClaimIsRenewed(t *testing.T) {
	s := newSite(t)
	kept(t, s)
	lease := s.get("nodes/198.18.0.1").lease
	least := int64(math.MaxInt64)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(200 * time.Millisecond) {
		answer, err := s.client.TimeToLive(s.ctx(), lease)
		switch {
		case err != nil:
			t.Fatal(err)
		case answer.TTL > least:
			return
		case answer.TTL <= 0 || time.Now().After(deadline):
			t.Fatalf("its lease has %d s left, of %d", answer.TTL, answer.GrantedTTL)
		}
		least = answer.TTL
	}
}

func TestClaimOfAnotherNode(t *testing.T) {
	s := newSite(t)
	_, done, _ := kept(t, s)
	s.put("nodes/198.18.0.1", `{"Identity":"b","Hostname":"other"}`)
	if err := receive(t, done); !errors.Is(err, subnet.ErrLost) {
		t.Errorf("got %v, want %v", err, subnet.ErrLost)
	}
	log.await(t, 1, "Another node holds the public address", `address="198.18.0.1"`, `hostname="other"`, s.prefix)
}

func TestTwinIsToldAndLeftAlone(t *testing.T) {
	s := newSite(t)
	kept(t, s)
	const twin = `{"Identity":"a","Hostname":"here"}`
	s.put("nodes/198.18.0.1", twin)
	log.await(t, 1, "Another daemon with this machine's identity claimed the public address", `address="198.18.0.1"`)
	if e := s.get("nodes/198.18.0.1"); e.value != twin {
		t.Errorf("the twin's claim became %+v", e)
	}
}

func TestStopGivesUpTheClaimAlone(t *testing.T) {
	s := newSite(t)
	key, done, stop := kept(t, s)
	before := s.get(key)
	stop()
	if err := receive(t, done); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if e := s.list("nodes/"); len(e) != 0 {
		t.Errorf("claims: %+v", e)
	}
	if after := s.get(key); after != before {
		t.Errorf("the lease was %+v and is %+v", before, after)
	}
}

func TestRenewal(t *testing.T) {
	s := newSite(t)
	cfg := s.configure(small)
	o := s.options("a")
	o.RenewMargin = 24*time.Hour - time.Second // due a second after each renewal
	m := s.managerWith(o)
	l := s.acquire(m, cfg, want("198.18.0.1"))
	s.keep(m, l)
	key := "subnets/" + l.Key()
	e := s.get(key)
	left := func() int64 {
		ttl, err := s.client.TimeToLive(s.ctx(), e.lease)
		if err != nil {
			t.Fatal(err)
		}
		return ttl.TTL
	}
	// The time that is left falls, and then rises: it was renewed.
	for was, is := left(), left(); is <= was; was, is = is, left() {
		if s.ctx().Err() != nil {
			t.Fatal("the lease is not renewed")
		}
	}
	if after := s.get(key); after != e {
		t.Errorf("renewal changed %+v to %+v", e, after)
	}
}
