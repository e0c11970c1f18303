package etcd

import (
	"math/rand/v2"
	"time"

	"golang.org/x/time/rate"

	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/subnet"
)

// A pace is how often a node sends requests to an etcd that many nodes share. The more nodes there are, the more seldom
// each of them beats, so that etcd has no more than restRate requests a second of all nodes at rest. And the longer are
// the pauses after which requests are retried: what makes one node's requests fail, such as an election, makes those of
// all nodes fail at the same time.
type pace struct{ nodes int64 }

const (
	// leastBeat is how soon a node of a small network notices an outage, or another etcd in the place of the one that it
	// knew, while it has no requests to make. The claim is renewed as often.
	leastBeat = 10 * time.Second

	// restRate is how many beats of all nodes there are a second, at most: from 1500 nodes on.
	restRate = 150

	// retryRate is the same for requests that are retried, and have just failed for all nodes at once.
	retryRate = 2000

	// singleRate is how many messages about single changes etcd sends a second, at most, to all nodes.
	singleRate = 10000

	// gatherRate is how many watches of all nodes begin a second, at most, while many leases change.
	gatherRate = 2000

	// beatsOfClaim is how often a claim is renewed before it would end.
	beatsOfClaim = 3
)

// beat is how often the node beats, see runHeartbeat.
func (p pace) beat() time.Duration { return max(leastBeat, p.shared(restRate)) }

// claimTTL is how long a node counts as alive after it has died without releasing its claim, while no other node asks:
// see silent.
func (p pace) claimTTL() time.Duration { return beatsOfClaim * p.beat() }

// backoff returns the pauses between attempts to use etcd.
func (p pace) backoff() retry.Backoff {
	b := subnet.Backoff()
	b.First = max(b.First, p.shared(retryRate))
	b.Most = max(b.Most, 5*b.First)
	return b
}

// reread is how long nodes wait, each for a random part of this, before they read all leases again after a gap: what
// made one node miss something, such as a compaction during a partition, made many miss it. All answers together grow
// with the square of the nodes.
func (p pace) reread() time.Duration {
	thousands := float64(p.nodes) / 1000
	return min(time.Duration(thousands*thousands*float64(time.Second)), mostReread)
}

// untilReread returns how long this node waits before it reads all leases again.
func (p pace) untilReread() time.Duration { return rand.N(p.reread() + 1) }

// singles bounds how many changes of leases a node takes one by one. A watch gets a message for each of them: for N nodes
// that start at once etcd would send N times N, which is most of its work then. A node ends a watch that has got too
// many, and gets what happens during gather in one message from the next watch.
func (p pace) singles() (perSecond rate.Limit, burst int) {
	perSecond = singleRate / rate.Limit(max(1, p.nodes))
	return perSecond, max(1, int(perSecond/2))
}

// gather is how long a node waits for more changes, so that etcd has no more than gatherRate watches a second of all
// nodes.
func (p pace) gather() time.Duration { return p.shared(gatherRate) }

// mostReread bounds for how long a node knows nothing of what changed behind a gap.
const mostReread = 30 * time.Second

// shared returns the time in which each node does something once, so that all of them do it at a rate.
func (p pace) shared(perSecond int64) time.Duration {
	return time.Duration(p.nodes) * time.Second / time.Duration(perSecond)
}

func (m *Manager) pace() pace { return pace{m.nodes.Load()} }
