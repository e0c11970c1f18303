package subnet

import (
	"context"
	"errors"
	"maps"
	"time"

	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/retry"
)

// A Manager hands out leases and tells of everyone's. Implementations wait out
// whatever waiting can mend (the store is away, the network is not configured
// yet), saying so once; the errors they return are final.
type Manager interface {
	// Config returns the network's configuration, waiting until there is one.
	// One that is there but cannot work is an error.
	Config(ctx context.Context) (*Config, error)

	// Configs tells of each configuration that takes the place of the one that
	// Config returned. One that cannot work is said, and not told. The channel
	// is closed when ctx ends; a nil one never tells anything.
	Configs(ctx context.Context) <-chan *Config

	// Select tells by which selector this node's uplink is found: sel with what
	// the store says of it, once it says so, and again each time that it says
	// otherwise. The channel is closed when ctx or the manager ends.
	Select(ctx context.Context, sel iface.Selector) <-chan iface.Selector

	// Previous returns what this node, known by the given public addresses,
	// published when it last held a lease; zero when there is nothing left of
	// it. Backends keep what peers already know, such as a VTEP's MAC.
	Previous(ctx context.Context, self Attrs) (Attrs, error)

	// Acquire leases subnets of cfg's network for this node and publishes
	// want.Attrs. A lease that the node already holds is taken up again; else
	// want.Subnets, if they are set, free and fit; else free ones.
	Acquire(ctx context.Context, cfg *Config, want Lease) (Lease, error)

	// Keep renews the lease and restores it when somebody deletes or changes
	// it, until ctx ends. It returns ErrLost when the subnets went to another
	// node, and ErrChanged when the store wants something else published: then
	// the lease must be acquired again.
	Keep(ctx context.Context, lease Lease) error

	// Ready says that the node's network is up, for all the store to know.
	Ready()

	// Watch tells of all leases, the node's own among them: first a snapshot,
	// then changes, and a snapshot again after any gap. A slow reader gets
	// the changes merged, never a backlog. The channel is closed when ctx ends.
	Watch(ctx context.Context) <-chan Update

	// State tells how things stand. It may be called at any time, and does not
	// wait.
	State() State
}

// A Herald is a Manager whose store is a place to tell people, beside the log,
// what needs a hand on this node.
type Herald interface {
	Manager

	// Notify tells of something, for a short reason in CamelCase, until it is
	// called again with the same about: with another message, or with "" when
	// it is over. It does not wait.
	Notify(about, reason, message string)
}

// A State is how a Manager stands with its store.
type State struct {
	Store     string    // "etcd at http://127.0.0.1:2379"
	Connected bool      // the store does what it is asked
	Trouble   string    // why it does not, once that is known
	Expires   time.Time // when this node's lease ends unless it is renewed; zero: never, or there is none
}

// A Reporter is a Manager that tells operators more than the daemon needs.
type Reporter interface {
	Manager

	// Expiries asks the store when leases end, the named ones or else all. Those
	// that never do are left out.
	Expiries(ctx context.Context, of ...Subnets) (map[Subnets]time.Time, error)

	// Clock asks for the store's time, which is good to the second.
	Clock(ctx context.Context) (time.Time, error)
}

// Backoff returns what paces attempts at a store: nodes are back soon after it
// is, but not all at once.
func Backoff() retry.Backoff {
	return retry.Backoff{First: 100 * time.Millisecond, Most: 3 * time.Second, Jitter: true}
}

// ErrLost says that a lease's subnets now belong to another node.
var ErrLost = errors.New("the lease went to another node")

// ErrChanged says that a lease is this node's still, and has to be acquired again
// for what is to be published with it.
var ErrChanged = errors.New("the lease is to be published with other addresses")

// An Update is news of leases. With Snapshot set, Leases is all there is;
// otherwise it holds the new and changed ones, and Gone the removed.
type Update struct {
	Snapshot bool
	Leases   map[Subnets]Lease
	Gone     map[Subnets]bool // nil in a snapshot
	Since    time.Time        // when the first of the changes was learned; zero: not known
}

// Put records a new or changed lease.
func (u *Update) Put(l Lease) {
	if u.Leases == nil {
		u.Leases = map[Subnets]Lease{}
	}
	u.Leases[l.Subnets] = l
	delete(u.Gone, l.Subnets)
}

// Delete records that a lease is gone.
func (u *Update) Delete(s Subnets) {
	delete(u.Leases, s)
	if u.Snapshot {
		return
	}
	if u.Gone == nil {
		u.Gone = map[Subnets]bool{}
	}
	u.Gone[s] = true
}

// Apply brings a record of all leases up to date, and returns which are no
// longer in it.
func (u Update) Apply(all map[Subnets]Lease) (gone []Subnets) {
	drop := func(s Subnets) {
		if _, known := all[s]; known {
			delete(all, s)
			gone = append(gone, s)
		}
	}
	for s := range u.Gone {
		drop(s)
	}
	if u.Snapshot {
		for s := range all {
			if _, still := u.Leases[s]; !still {
				drop(s)
			}
		}
	}
	maps.Copy(all, u.Leases)
	return gone
}
