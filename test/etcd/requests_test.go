package etcd_test

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

// testAgent is the name by which a site's own client is known to etcd.
const testAgent = "test"

// A recorder has the requests that an etcd gets from managers, in their order. A message of a stream is a request, too.
type recorder struct {
	t *testing.T

	mu      sync.Mutex
	all     []any
	grown   chan struct{}     // closed, and replaced, when there are more requests
	before  func(request any) // called before etcd gets a request; nil: nothing
	watches map[*stream]bool  // that are open
}

// newRecordedSite returns a site of its own that is up, and what etcd gets there.
func newRecordedSite(t *testing.T) (*site, *recorder) {
	t.Helper()
	s := newOwnSite(t)
	r := &recorder{t: t, grown: make(chan struct{}), watches: map[*stream]bool{}}
	s.server.options = func(cfg *embed.Config) {
		cfg.GRPCAdditionalServerOptions = []grpc.ServerOption{
			grpc.ChainUnaryInterceptor(r.serveUnary), grpc.ChainStreamInterceptor(r.serveStream),
		}
	}
	s.up()
	return s, r
}

// ofTest tells whether a request comes from the site's own client.
func ofTest(ctx context.Context) bool {
	sent, _ := metadata.FromIncomingContext(ctx)
	return strings.HasPrefix(strings.Join(sent.Get("user-agent"), ""), testAgent)
}

func (r *recorder) serveUnary(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (
	any, error,
) {
	if !ofTest(ctx) {
		r.record(request)
	}
	return handle(ctx, request)
}

// A stream records what comes through it. It can be ended.
type stream struct {
	grpc.ServerStream
	ctx      context.Context
	recorder *recorder
	end      context.CancelFunc
}

func (s *stream) Context() context.Context { return s.ctx }

func (s *stream) RecvMsg(m any) error {
	err := s.ServerStream.RecvMsg(m)
	if err == nil {
		s.recorder.record(m)
	}
	return err
}

func (r *recorder) serveStream(server any, in grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler,
) error {
	if ofTest(in.Context()) {
		return handle(server, in)
	}
	s := &stream{ServerStream: in, recorder: r}
	s.ctx, s.end = context.WithCancel(in.Context())
	defer s.end()
	if info.FullMethod == pb.Watch_Watch_FullMethodName {
		r.mu.Lock()
		r.watches[s] = true
		r.mu.Unlock()
	}
	err := handle(server, s)
	r.mu.Lock()
	delete(r.watches, s)
	r.mu.Unlock()
	if in.Context().Err() == nil && s.ctx.Err() != nil {
		return rpctypes.ErrGRPCNoLeader
	}
	return err
}

func (r *recorder) record(request any) {
	r.mu.Lock()
	r.all = append(r.all, request)
	close(r.grown)
	r.grown = make(chan struct{})
	before := r.before
	r.mu.Unlock()
	if before != nil {
		before(request)
	}
}

// onEach has f called with each request before etcd gets the request.
func (r *recorder) onEach(f func(request any)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.before = f
}

// forget drops what is recorded.
func (r *recorder) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = nil
}

// endWatches ends all watches as an etcd does that has lost its leader.
func (r *recorder) endWatches() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for s := range r.watches {
		s.end()
	}
}

// requests returns the requests of a type that match, and a channel that is closed when there may be more.
func requests[T any](r *recorder, match func(T) bool) (found []T, grown <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, request := range r.all {
		if one, ok := request.(T); ok && match(one) {
			found = append(found, one)
		}
	}
	return found, r.grown
}

// awaitRequests waits until there are n requests of a type that match.
func awaitRequests[T any](r *recorder, n int, match func(T) bool) []T {
	r.t.Helper()
	timeout := time.After(patience)
	for {
		found, grown := requests(r, match)
		if len(found) >= n {
			return found
		}
		select {
		case <-grown:
		case <-timeout:
			r.t.Fatalf("%d requests, want %d", len(found), n)
		}
	}
}

// reads matches requests for keys from one on, or for that key alone.
func reads(key string) func(*pb.RangeRequest) bool {
	return func(request *pb.RangeRequest) bool { return string(request.Key) == key }
}

// watches matches requests to watch a key, or what begins with it.
func watches(key string) func(*pb.WatchRequest) bool {
	return func(request *pb.WatchRequest) bool {
		return string(request.GetCreateRequest().GetKey()) == key
	}
}

// all matches all requests of a type.
func all[T any](T) bool { return true }

// The configuration is read once, and then watched from there.
func TestConfigurationIsReadOnce(t *testing.T) {
	s, r := newRecordedSite(t)
	s.put("config", small)
	m := s.manager("a")
	if _, err := m.Config(s.ctx()); err != nil {
		t.Fatal(err)
	}
	configs := m.Configs(s.ctx())
	awaitRequests(r, 1, watches(s.prefix+"/config"))
	if read, _ := requests(r, reads(s.prefix+"/config")); len(read) != 1 {
		t.Errorf("the configuration was read %d times", len(read))
	}
	s.put("config", `{"Network": "10.6.0.0/16", "Backend": {"Type": "vxlan"}}`)
	if cfg := receive(t, configs); cfg.IPv4.Networks()[0] != netip.MustParsePrefix("10.6.0.0/16") {
		t.Errorf("got %v", cfg.IPv4)
	}
}

// A lease that is new is not renewed, and a claim neither.
func TestNewLeaseIsNotRenewed(t *testing.T) {
	s, r := newRecordedSite(t)
	cfg := s.configure(small)
	r.forget()
	m := s.manager("a")
	l := s.acquire(m, cfg, want("198.18.0.1"))
	s.keep(m, l)
	for _, key := range []string{"/subnets/" + l.Key(), "/nodes/198.18.0.1"} {
		awaitRequests(r, 1, watches(s.prefix+key)) // nothing is left to be done
	}
	granted, _ := requests(r, all[*pb.LeaseGrantRequest])
	renewed, _ := requests(r, all[*pb.LeaseKeepAliveRequest])
	if len(granted) != 2 || len(renewed) > 0 {
		t.Errorf("etcd leases granted: %v; renewed: %v", granted, renewed)
	}
}

// A machine that was suspended finds its claim gone, and its lease older than it believes: it renews the lease at once.
func TestLeaseAfterTheClaimHasEnded(t *testing.T) {
	s, r := newRecordedSite(t)
	key, _, _ := kept(t, s)
	awaitRequests(r, 1, watches(s.prefix+"/nodes/198.18.0.1"))
	r.forget()
	before := s.get(key)
	if _, err := s.client.Revoke(s.ctx(), s.get("nodes/198.18.0.1").lease); err != nil {
		t.Fatal(err)
	}
	awaitRequests(r, 1, func(renewal *pb.LeaseKeepAliveRequest) bool { return renewal.ID == int64(before.lease) })
	awaitRequests(r, 1, watches(s.prefix+"/nodes/198.18.0.1"))
	if after := s.get(key); after != before {
		t.Errorf("renewal changed %+v to %+v", before, after)
	}
}

// leasesOf matches requests for a part of the leases.
func leasesOf(s *site) func(*pb.RangeRequest) bool {
	return func(request *pb.RangeRequest) bool {
		return strings.HasPrefix(string(request.Key), s.prefix+"/subnets/")
	}
}

// Many leases are read in pages, all as of one revision.
func TestPages(t *testing.T) {
	s, r := newRecordedSite(t)
	fill(s, 2500, 1)
	v := newView(t, s.manager("a").Watch(s.ctx()))
	if v.read(); len(v.leases) != 2500 {
		t.Errorf("%d leases", len(v.leases))
	}
	pages, _ := requests(r, leasesOf(s))
	if len(pages) != 3 {
		t.Fatalf("read with %d requests", len(pages))
	}
	for i, page := range pages {
		if page.Limit != 1000 || i > 0 && (page.Revision == 0 || page.Revision != pages[1].Revision) {
			t.Errorf("page %d: %v", i, page)
		}
	}
}

// meanwhile has f called once, when etcd is about to answer the request for the second page of leases.
func (r *recorder) meanwhile(s *site, f func()) {
	var once sync.Once
	r.onEach(func(request any) {
		page, ok := request.(*pb.RangeRequest)
		if ok && leasesOf(s)(page) && page.Revision > 0 {
			once.Do(f)
		}
	})
}

// Leases that come, change and go while a node reads all of them are in what the node knows in the end, and no node sees
// a part of one revision and a part of another.
func TestLeasesThatChangeBetweenPages(t *testing.T) {
	s, r := newRecordedSite(t)
	const n = 2500
	fill(s, n, 1)
	first, last := subnets("10.6.0.0/24"), subnets("10.15.195.0/24")
	added := subnets("10.99.0.0/24")
	r.meanwhile(s, func() {
		s.delete("subnets/" + first.Key())
		s.put("subnets/"+last.Key(), record("198.18.0.1"))
		s.put("subnets/"+added.Key(), record("198.18.0.2"))
	})
	v := newView(t, s.manager("a").Watch(s.ctx()))
	v.read()
	_, hasFirst := v.leases[first]
	_, hasAdded := v.leases[added]
	if before := v.leases[last].Attrs.PublicIP; !hasFirst || hasAdded || before != netip.MustParseAddr("198.19.9.195") {
		t.Errorf("the snapshot has the first lease: %t, and the new one: %t; the last one is of %v", hasFirst, hasAdded, before)
	}
	for _, ok := v.leases[added]; !ok; _, ok = v.leases[added] {
		v.read()
	}
	if _, ok := v.leases[first]; ok || len(v.leases) != n || v.leases[last].Attrs.PublicIP != netip.MustParseAddr("198.18.0.1") {
		t.Errorf("%d leases; the first one is there: %t; the last one is of %v", len(v.leases), ok, v.leases[last].Attrs.PublicIP)
	}
	if v.snapshots != 1 {
		t.Errorf("%d snapshots", v.snapshots)
	}
}

// Where etcd has no history any more between two pages, the node begins again.
func TestCompactionBetweenPages(t *testing.T) {
	s, r := newRecordedSite(t)
	const n = 2500
	fill(s, n, 1)
	r.meanwhile(s, func() {
		answer, err := s.client.Put(s.ctx(), s.prefix+"/subnets/10.99.0.0-24", record("198.18.0.1"))
		if err == nil {
			_, err = s.client.Compact(s.ctx(), answer.Header.Revision)
		}
		if err != nil {
			t.Error(err)
		}
	})
	v := newView(t, s.manager("a").Watch(s.ctx()))
	if v.read(); len(v.leases) != n+1 {
		t.Errorf("%d leases", len(v.leases))
	}
	if pages, _ := requests(r, leasesOf(s)); len(pages) != 2+3 {
		t.Errorf("read with %d requests", len(pages))
	}
}

// Of two readings of all leases, the second one has only what has changed since, unless a lease has gone.
func TestWhatChangedSince(t *testing.T) {
	s, r := newRecordedSite(t)
	fill(s, 3, 1)
	cfg := s.configure(`{"Network": "10.6.0.0/16", "SubnetMin": "10.6.0.0", "SubnetMax": "10.6.3.0"}`)
	m := s.manager("a")
	if _, err := m.Previous(s.ctx(), want("198.18.0.1").Attrs); err != nil {
		t.Fatal(err)
	}
	since, err := s.client.Get(s.ctx(), "x")
	if err != nil {
		t.Fatal(err)
	}
	r.forget()
	if l := s.acquire(m, cfg, want("198.18.0.1")); l.Key() != "10.6.3.0-24" {
		t.Errorf("got %v", l.Subnets)
	}
	read, _ := requests(r, leasesOf(s))
	for _, request := range read {
		if request.MinModRevision <= since.Header.Revision {
			t.Errorf("after the first time, the node reads %v", request)
		}
	}
}

// What is done with one reading of all leases does not change the next one.
func TestReadingsAreIndependent(t *testing.T) {
	s := newSite(t)
	fill(s, 3, 1)
	m := s.manager("a")
	for range 2 {
		if ends, err := m.Expiries(s.ctx(), subnets("10.6.2.0/24")); err != nil || len(ends) > 0 { // they have no end
			t.Errorf("%v, %v", ends, err)
		}
	}
	v := newView(t, m.Watch(s.ctx()))
	v.until("10.6.0.0/24=198.19.0.0 10.6.1.0/24=198.19.0.1 10.6.2.0/24=198.19.0.2")
}

// A node that loses its subnet to another node again and again picks among more free ones each time.
func TestLostRaces(t *testing.T) {
	s, r := newRecordedSite(t)
	cfg := s.configure(`{"Network": "10.0.0.0/8", "SubnetLen": 24}`)
	const races = 4
	var lost []string
	r.onEach(func(request any) {
		txn, ok := request.(*pb.TxnRequest)
		if !ok || len(lost) == races || len(txn.Success) == 0 {
			return
		}
		key := strings.TrimPrefix(string(txn.Success[0].GetRequestPut().GetKey()), s.prefix+"/")
		if strings.HasPrefix(key, "subnets/") {
			lost = append(lost, key)
			s.put(key, record(fmt.Sprintf("198.18.1.%d", len(lost))))
		}
	})
	l := s.acquire(s.manager("a"), cfg, want("198.18.0.1"))
	if len(lost) != races {
		t.Fatalf("lost %q", lost)
	}
	// The chance that all picks after the first one are among the first hundred is below 1 in 10 million.
	index := func(key string) int {
		t.Helper()
		ip := netip.MustParsePrefix(strings.ReplaceAll(strings.TrimPrefix(key, "subnets/"), "-", "/")).Addr().As4()
		return int(ip[1])<<8 + int(ip[2])
	}
	most := index(l.Key())
	for _, key := range lost {
		most = max(most, index(key))
	}
	if most <= 100+races || index(lost[0]) > 100 || index(lost[1]) > 6400+1 {
		t.Errorf("lost %q, and got %v", lost, l.Subnets)
	}
}

// A watch that etcd ends because it has no leader goes on from where it was.
func TestWatchGoesOnWithoutReading(t *testing.T) {
	s, r := newRecordedSite(t)
	s.put("subnets/10.5.1.0-24", record("198.18.0.1"))
	v := newView(t, s.manager("a").Watch(s.ctx()))
	v.until("10.5.1.0/24=198.18.0.1")
	s.put("subnets/10.5.2.0-24", record("198.18.0.2"))
	v.until("10.5.1.0/24=198.18.0.1 10.5.2.0/24=198.18.0.2")
	known := s.get("subnets/10.5.2.0-24").changed
	s.put("unrelated", "")
	r.forget()
	r.endWatches()
	again := awaitRequests(r, 1, watches(s.prefix+"/subnets/"))
	if from := again[0].GetCreateRequest().StartRevision; from != known+1 {
		t.Errorf("goes on from revision %d, and knows %d", from, known)
	}
	s.put("subnets/10.5.3.0-24", record("198.18.0.3"))
	v.until("10.5.1.0/24=198.18.0.1 10.5.2.0/24=198.18.0.2 10.5.3.0/24=198.18.0.3")
	if read, _ := requests(r, leasesOf(s)); len(read) > 0 {
		t.Errorf("it reads leases again: %v", read)
	}
}

// The time of a claim shrinks with the network, and a node that asks about a claim need not wait for its end.
func TestClaimOfAShrunkenNetwork(t *testing.T) {
	s, r := newRecordedSite(t)
	const nodes = 4500
	fill(s, nodes, 1)
	cfg := s.configure(small)
	m := s.manager("a")
	v := newView(t, m.Watch(s.ctx()))
	v.read()
	r.forget()
	s.acquire(m, cfg, want("198.18.7.1"))
	times := func() (all []int64) {
		granted, _ := requests(r, func(*pb.LeaseGrantRequest) bool { return true })
		for _, request := range granted {
			all = append(all, request.TTL)
		}
		return all
	}
	if got := fmt.Sprint(times()); got != "[90 86400]" {
		t.Errorf("among %d nodes, etcd leases were granted for %s", nodes, got)
	}
	// Nobody answers for the first daemon, since it does not keep its lease.
	r.forget()
	other := s.manager("b")
	if _, err := other.Previous(s.ctx(), want("198.18.7.1").Attrs); err != nil {
		t.Fatal(err)
	}
	l := s.acquire(other, cfg, want("198.18.7.1"))
	if got := fmt.Sprint(times()); got != "[30 90]" {
		t.Errorf("for the question and the claim, etcd leases were granted for %s", got)
	}
	// Most nodes leave. The next claim is that of a small network.
	v = newView(t, other.Watch(s.ctx()))
	v.read()
	s.keep(other, l)
	awaitRequests(r, 1, watches(s.prefix+"/nodes/198.18.7.1"))
	for i := range nodes / 125 {
		var drop []clientv3.Op
		for j := range 125 {
			n := 125*i + j
			drop = append(drop, clientv3.OpDelete(fmt.Sprintf("%s/subnets/10.%d.%d.0-24", s.prefix, 6+n>>8, n&255)))
		}
		if _, err := s.client.Txn(s.ctx()).Then(drop...).Commit(); err != nil {
			t.Fatal(err)
		}
	}
	for len(v.leases) > 1 {
		v.read()
	}
	r.forget()
	s.delete("nodes/198.18.7.1")
	awaitRequests(r, 1, func(*pb.LeaseGrantRequest) bool { return true })
	if got := fmt.Sprint(times()); got != "[30]" {
		t.Errorf("in a small network, etcd leases were granted for %s", got)
	}
}
