package subnet

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"time"

	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/retry"
)

// A Manager leases subnets to this node, and follows the leases of all nodes. It keeps both in its store, such as etcd.
//
// A Manager waits for whatever waiting can repair: the store is away, the network is not configured yet. It logs the
// cause once. An error that it returns is final and meant for the operator, unless it is the error of a context or one
// of the errors below.
//
// subnettest.Run checks all that is said here.
type Manager interface {
	// Config returns the network's configuration. It waits until there is a configuration; a configuration that
	// cannot work is an error.
	Config(ctx context.Context) (*Config, error)

	// Configs sends each configuration that replaces the one that Config returned. A configuration that cannot work is
	// logged and not sent. The channel is closed when ctx ends.
	Configs(ctx context.Context) <-chan *Config

	// Select sends the selector by which this node's uplink is found: sel, completed by what the store knows about
	// this node. The first one is sent once the store knows this node, another one whenever the selector changes. The
	// channel is closed when ctx ends or the Manager is closed.
	Select(ctx context.Context, sel iface.Selector) <-chan iface.Selector

	// Previous returns what this node published with its last lease, and the zero Attrs if nothing is left of that. The
	// node is known by the public addresses of self. Backends keep what peers already know, such as a VTEP's MAC.
	Previous(ctx context.Context, self Attrs) (Attrs, error)

	// Acquire leases subnets of cfg's network for this node and publishes want.Attrs with them. It takes the lease that
	// this node already holds; or else want.Subnets, if they are set, fit cfg and are free; or else free subnets. It
	// waits while no subnets are free. Subnets that conflict with an obstacle of cfg are not free, and not held.
	Acquire(ctx context.Context, cfg *Config, want Lease) (Lease, error)

	// Keep renews the lease, and restores it when somebody deletes or changes it, until ctx ends. It returns ErrLost
	// when the subnets went to another node, and ErrChanged when the store wants other addresses published: the lease
	// must then be acquired again.
	Keep(ctx context.Context, lease Lease) error

	// Ready makes known in the store that this node's network is up. It does not wait.
	Ready()

	// Watch sends the leases of all nodes, this node's own included: first a snapshot, and then changes. After a gap in
	// which changes may have been missed, it sends a snapshot, or the changes that the gap hid. A slow reader receives
	// several changes merged into one update, see Mailbox. The channel is closed when ctx ends.
	Watch(ctx context.Context) <-chan Update

	// State returns how this node stands with the store. It does not wait.
	State() State

	// Expiries asks the store when leases end: the leases of the given subnets, or all leases if none are given. Leases
	// that never end are left out.
	Expiries(ctx context.Context, of ...Subnets) (map[Subnets]time.Time, error)

	// Clock asks the store for its time, which is good to the second.
	Clock(ctx context.Context) (time.Time, error)

	// Close ends all that the Manager runs, and calls in progress fail. The lease stays in the store: this node takes it
	// again when it starts the next time. Close may be called again.
	Close() error
}

// An EventRecorder is a Manager whose store has a place for events about this node, as Kubernetes has.
type EventRecorder interface {
	// RecordEvent records a problem that a person should act on, with a short reason in CamelCase. The event goes on
	// until the next call with the same subject: with another message, or with "" when the problem is over. RecordEvent
	// does not wait.
	RecordEvent(subject, reason, message string)
}

// A FileKeeper is a Manager that keeps a file beside the subnet file, whose name begins with the subnet file's.
type FileKeeper interface {
	// RestoreFile writes the file again if it is missing, or could not be written. It may be called at any time, and does
	// not wait for the store.
	RestoreFile()
}

// A State is how a node stands with its Manager's store.
type State struct {
	Kind      string       // of the store: "etcd", "kubernetes"
	Store     string       // its name for people: "etcd at http://127.0.0.1:2379"
	Endpoints []string     // its URLs
	Addresses []netip.Addr // of those that this node is connected to
	Check     string       // a command that asks the store whether it works
	Connected bool         // the store does what it is asked
	Problem   string       // why it does not, once the reason is known
	Waiting   string       // what a lease waits for, and what to do about that; "": nothing, or there is a lease
	Expires   time.Time    // when this node's lease ends unless it is renewed; zero: never, or there is no lease
}

// Backoff returns the pauses between attempts to use a store. After an outage of the store, nodes come back soon, but
// not all at once.
func Backoff() retry.Backoff {
	return retry.Backoff{First: 100 * time.Millisecond, Most: 3 * time.Second, Jitter: true}
}

// Errors of Manager.Keep.
var (
	// ErrLost is returned when a lease's subnets belong to another node now.
	ErrLost = errors.New("the lease went to another node")

	// ErrChanged is returned when this node still holds the lease, but has to publish other addresses with it.
	ErrChanged = errors.New("the lease is to be published with other addresses")
)

// An Update is a change of the leases that there are. If Snapshot is set, Leases are all leases; otherwise Leases are
// the new and the changed ones, and Gone are the subnets whose leases are gone. Nobody changes a lease of an Update: all
// who know the lease share it.
type Update struct {
	Snapshot bool
	Leases   map[Subnets]*Lease
	Gone     map[Subnets]bool // nil in a snapshot
	Since    time.Time        // when the first of the changes became known; zero: not known
}

// Put records a new or changed lease.
func (u *Update) Put(l *Lease) {
	if u.Leases == nil {
		u.Leases = map[Subnets]*Lease{}
	}
	u.Leases[l.Subnets] = l
	delete(u.Gone, l.Subnets)
}

// Delete records that the lease of the subnets is gone.
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

// Apply updates a map of all leases, and returns the subnets whose leases it removed.
func (u Update) Apply(all map[Subnets]*Lease) (gone []Subnets) {
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
