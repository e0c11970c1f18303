package etcd

import (
	"testing"
	"time"
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
		if p.reread() > mostReread {
			t.Errorf("%d nodes read all leases again after %v", nodes, p.reread())
		}
	}
	if p := (pace{100}); p.reread() > 100*time.Millisecond {
		t.Errorf("100 nodes read all leases again after %v", p.reread())
	}
}
