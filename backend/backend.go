// Package backend, which other programs may import, defines how pods' packets get
// from one node to another. Each backend is a folder beside this file; importing
// the folder registers it. A program can register backends of its own.
package backend

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/subnet"
)

// A Backend computes what the kernel of this node must hold for pods' packets
// to reach the peers. It is a value made from the configuration and the uplink:
// where either changes, a new one is made. Its methods touch nothing, except
// Attrs.
//
// A backend that does more than that implements some of Worker, StatsReporter,
// Differ, SessionReporter and Identifier.
type Backend interface {
	// Info returns what the rest of the node must know of the backend. The
	// answer is always the same.
	Info() Info

	// Attrs returns what this node publishes with its lease, without the
	// addresses. previous is what the node published last, maybe before a
	// restart, or zero: peers have fewer changes to make where it stays. Attrs
	// may act and take its time; the caller retries what fails.
	Attrs(ctx context.Context, previous subnet.Attrs) (subnet.Attrs, error)

	// Local returns the objects that the node's own lease calls for, such as
	// the device and its address.
	Local(own subnet.Lease) []kernel.Object

	// Peer returns the objects that it takes to reach one peer. The error says
	// what is wrong with the peer's lease; objects that do not depend on the
	// faulty part are returned all the same.
	Peer(own, peer subnet.Lease) ([]kernel.Object, error)
}

// Info is what the rest of the node must know of a backend.
type Info struct {
	MTU       int              // the largest packet, in bytes, that pods may send
	Overhead  family.Pair[int] // the bytes that the backend puts around a packet of pods
	Endpoints []Endpoint       // where peers send packets to: firewalls must accept these

	// NoPeers is set where the backend needs no peers: leases are not watched.
	NoPeers bool

	// ForeignRoutes is set where commands that the backend runs, a routing
	// daemon or the operator make the routes inside the network. Such routes
	// are not taken for those of an earlier daemon, and stay.
	ForeignRoutes bool
}

// An Endpoint is an address that peers send packets to.
type Endpoint struct {
	Addr     netip.Addr // of this node
	Protocol string     // as iptables and nft know it without /etc/protocols: "udp", "esp", "4"
	Port     int        // of UDP
	Program  string     // the program that has the port; empty: flanneld or the kernel
}

// A Worker is a Backend that keeps more than kernel state: it moves packets
// itself, fills a cloud's route table, runs programs.
type Worker interface {
	// Work runs for one lease of this node until ctx ends, and returns when
	// everything that it started has ended. Work is called again, with another
	// lease or on another backend, only after that. Updates of peers come as
	// from subnet.Manager's Watch: first a snapshot, then changes, merged while
	// nobody reads. Leases that cannot be a peer's, our own among them, are left
	// out. Work logs and retries failures itself; an error that it returns ends
	// flanneld and is meant for the operator.
	Work(ctx context.Context, own subnet.Lease, peers <-chan subnet.Update) error
}

// ErrStopping is the cause (context.Cause) of the end of a Worker's context when
// flanneld stops, rather than the lease or the configuration changing.
var ErrStopping = errors.New("flanneld stops")

// A StatsReporter is a Backend that moves packets itself, and counts them.
type StatsReporter interface {
	// QueueStats returns what has been moved since Work began; nothing while
	// Work does not run. It may be called at any time.
	QueueStats() []QueueStats
}

// QueueStats are the counters of one queue in one direction.
type QueueStats struct {
	Queue          int
	Direction      string // "sent" to peers, "received" from them
	Packets, Bytes uint64
	Drops          map[string]uint64 // packets, by reason
}

// A Differ is a Backend that keeps state outside of the tables that pkg/kernel
// reconciles: a device's peers, a cloud's routes, a program's connections.
type Differ interface {
	// Diff returns the commands that would make that state what this node's
	// lease and the leases of its peers call for. It changes nothing.
	Diff(ctx context.Context, own subnet.Lease, peers []subnet.Lease) ([]string, error)
}

// A SessionReporter is a Backend that agrees on keys with each peer.
type SessionReporter interface {
	// Sessions returns when keys were agreed on last with each of the peers that
	// there is a session with. It changes nothing.
	Sessions(ctx context.Context, peers []subnet.Lease) (map[subnet.Subnets]time.Time, error)
}

// An Identifier is a Backend that knows a peer by other, or more, than its
// public addresses, such as the MAC of a VTEP or a public key.
type Identifier interface {
	// Identities returns all that a lease publishes and only one node can have,
	// in words: "VTEP MAC 0e:00:00:00:00:01". Of two leases with the same
	// identity, the younger one is left out.
	Identities(subnet.Lease) []string
}

// Identities returns all that a lease publishes and only one node can have: what
// b says or else the public addresses.
func Identities(b Backend, l subnet.Lease) []string {
	if b, ok := b.(Identifier); ok {
		return b.Identities(l)
	}
	return PublicAddresses(l)
}

// PublicAddresses returns the identities that are the public addresses of a lease.
func PublicAddresses(l subnet.Lease) (identities []string) {
	for _, f := range family.All {
		if ip := l.Attrs.PublicIPOf(f); ip.IsValid() && l.Of(f).IsValid() {
			identities = append(identities, "public address "+ip.String())
		}
	}
	return identities
}

// New makes the backend that the configuration asks for.
func New(cfg *subnet.Config, uplink iface.Uplink) (Backend, error) {
	t, err := typeOf(cfg.BackendType)
	if err != nil {
		return nil, err
	}
	return t.make(cfg, uplink)
}
