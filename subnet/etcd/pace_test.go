package etcd

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/subnet"
)

// The more nodes there are, the more seldom each of them sends requests: all of them together never send more than etcd
// has for others. Small networks notice an outage soon.
func TestPace(t *testing.T) {
	for _, c := range []struct {
		nodes                       int64
		beat, claim, first, longest time.Duration
	}{
		{0, 10 * time.Second, 30 * time.Second, 100 * time.Millisecond, 3 * time.Second},
		{200, 10 * time.Second, 30 * time.Second, 100 * time.Millisecond, 3 * time.Second},
		{1500, 10 * time.Second, 30 * time.Second, 750 * time.Millisecond, 3750 * time.Millisecond},
		{3000, 20 * time.Second, time.Minute, 1500 * time.Millisecond, 7500 * time.Millisecond},
		{15000, 100 * time.Second, 5 * time.Minute, 7500 * time.Millisecond, 37500 * time.Millisecond},
	} {
		p := pace{c.nodes}
		b := p.backoff()
		if p.beat() != c.beat || p.claimTTL() != c.claim || b.First != c.first || b.Most != c.longest || !b.Jitter {
			t.Errorf("%d nodes: beat %v, claim %v, backoff %+v; want %+v", c.nodes, p.beat(), p.claimTTL(), b, c)
		}
	}
	for nodes := int64(1); nodes < 1<<20; nodes *= 2 {
		p := pace{nodes}
		// A beat comes up to an eighth early, see runHeartbeat.
		if rate := float64(nodes) / (p.beat() - p.beat()/8).Seconds(); rate > 200 {
			t.Errorf("%d nodes send %.0f requests a second at rest", nodes, rate)
		}
		// At rest, each change is taken as it comes; where they come fast, all nodes together bound their messages.
		each, burst := p.singles()
		if all := float64(each) * float64(nodes); each <= 0 || burst < 1 || all > singleRate+1 {
			t.Errorf("%d nodes take %v changes a second one by one, and %d at once", nodes, each, burst)
		}
		if p.gather() > time.Duration(nodes)*time.Millisecond {
			t.Errorf("%d nodes wait %v for more changes", nodes, p.gather())
		}
		if p.reread() > mostReread {
			t.Errorf("%d nodes read all leases again after %v", nodes, p.reread())
		}
	}
	if p := (pace{100}); p.reread() > 100*time.Millisecond {
		t.Errorf("100 nodes read all leases again after %v", p.reread())
	}
}

// Nodes that start together, or miss something together, do not send requests together.
func TestHerdIsSpread(t *testing.T) {
	const herd = 250
	m := &Manager{}
	m.nodes.Store(10000)
	for name, c := range map[string]struct {
		next        func() time.Duration
		least, most time.Duration
	}{
		"the next beat":                  {m.untilBeat, m.beat() * 7 / 8, m.beat()},
		"reading all leases after a gap": {m.pace().untilReread, 0, m.pace().reread()},
	} {
		first, last := time.Duration(1<<62), time.Duration(0)
		for range herd {
			d := c.next()
			first, last = min(first, d), max(last, d)
		}
		// The chance that 250 of them leave a tenth free at either end is below 1 in 10 billion.
		tenth := (c.most - c.least) / 10
		if first < c.least || last > c.most || first > c.least+tenth || last < c.most-tenth {
			t.Errorf("%s: after %v to %v, want %v to %v", name, first, last, c.least, c.most)
		}
	}
}

// What fails for all nodes at the same time is retried at different times, and the later the more nodes there are.
func TestRetriesAreSpread(t *testing.T) {
	for _, nodes := range []int64{10, 10000} {
		synctest.Test(t, func(t *testing.T) {
			const herd, attempts = 100, 5
			b := pace{nodes}.backoff()
			begun := time.Now()
			var mu sync.Mutex
			var at [attempts]map[time.Duration]bool // when the nodes made which attempt
			for i := range at {
				at[i] = map[time.Duration]bool{}
			}
			var all sync.WaitGroup
			for range herd {
				all.Go(func() {
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					q, n := newQueue(), 0
					q.retry(ctx, b, func() error {
						mu.Lock()
						defer mu.Unlock()
						at[n][time.Since(begun)] = true
						if n++; n == attempts {
							cancel()
						}
						return errors.New("away")
					})
				})
			}
			all.Wait()
			for i, times := range at {
				if len(times) < herd/2 {
					t.Errorf("of %d nodes, attempt %d of %d comes at %d times", nodes, i, herd, len(times))
				}
				for d := range times {
					if d < b.First/2 {
						t.Errorf("of %d nodes, one tries again after %v", nodes, d)
					}
				}
			}
		})
	}
}

// A claim is renewed in time even when there have come so many nodes that claims last longer now.
func TestBeatOfAShortClaim(t *testing.T) {
	m := &Manager{claim: &claim{ttl: pace{}.claimTTL()}}
	m.nodes.Store(10000)
	if got := m.beat(); got != leastBeat {
		t.Errorf("a claim of %v is renewed after %v", m.claim.ttl, got)
	}
	m.claim.ttl = m.pace().claimTTL()
	if got := m.beat(); got != m.pace().beat() {
		t.Errorf("a claim of %v is renewed after %v", m.claim.ttl, got)
	}
}

// Requests of a node among many are retried with the pauses that many nodes need.
func TestRetriesOfALargeNetwork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &Manager{
			ctx: t.Context(), failed: newQueue(), latest: watchPoint{invalid: make(chan struct{})},
			connection: newConnection(klog.Logger{}, clientConfig{}, "", ""), health: subnet.NewStoreHealth(klog.Logger{}, subnet.State{}),
		}
		m.connection.close() // so that nothing succeeds
		m.nodes.Store(10000)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		if _, err := m.do(ctx, "read", nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		if got, want := m.failed.pause, m.pace().backoff(); got.First != want.First || got.Most != want.Most {
			t.Errorf("the pauses are %+v, want %+v", got, want)
		}
	})
}

// What was read is kept while a node starts, and not for longer.
func TestListingIsDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, now := newListed(), &listing{}
		l.set(now)
		time.Sleep(keepListed - time.Nanosecond)
		if l.get() != now {
			t.Error("it is not kept")
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if l.get() != nil {
			t.Error("it is kept")
		}
	})
}
