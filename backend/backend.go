// Package backend is how pods' packets get from one node to another. Each
// backend is a folder beside this file; importing it registers it.
package backend

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/subnet"
)

// A Backend says what the kernel of this node must hold for pods' packets to
// reach its peers. It is a value made from the configuration and the uplink:
// where either changes, a new one is made. Its methods touch nothing, except
// Attrs.
type Backend interface {
	// Attrs returns what peers must know of this node: the type and the data
	// of its lease, without the addresses. previous is what the node
	// published last, maybe before a restart, or zero: what peers know is best
	// kept. A backend may have to do something for it, and take its time; what
	// fails is asked again.
	Attrs(ctx context.Context, previous subnet.Attrs) (subnet.Attrs, error)

	// Local returns what the node's own lease calls for: the device and its
	// address.
	Local(own subnet.Lease) []kernel.Object

	// Peer returns what it takes to reach one peer. The error says what is
	// wrong with the peer's lease; what is right of it is returned all the
	// same.
	Peer(own, peer subnet.Lease) ([]kernel.Object, error)

	// MTU returns the largest packet, in bytes, that pods may send.
	MTU() int
}

// A Worker is a Backend that takes more than kernel state: it moves packets
// itself, fills a cloud's route table, runs programs.
type Worker interface {
	Backend

	// Work does so for one lease of this node's until ctx ends, and returns
	// when all it started has ended. It is called again, with another lease or
	// on another backend, only then. Peers come as subnet.Manager's Watch tells
	// of them, a snapshot and then changes, merged while nobody reads; leases
	// that cannot be a peer's, our own among them, are left out. Failures are
	// Work's own to say and to retry; an error ends flanneld, and is for the
	// operator.
	Work(ctx context.Context, own subnet.Lease, peers <-chan subnet.Update) error
}

// ErrStopping is why (context.Cause) the context of a Worker ends when flanneld
// does, rather than the lease or the configuration changing.
var ErrStopping = errors.New("flanneld ends")

// A Solitary backend needs no peers: nobody is asked for them.
type Solitary interface {
	Backend
	Solitary()
}

// A Bystander lets others make the routes inside the network: commands that it
// runs, a routing daemon, the operator. They are not taken for what an earlier
// daemon has left.
type Bystander interface {
	Backend
	StandBy()
}

// A Metered backend moves packets itself, and counts them.
type Metered interface {
	Backend

	// Flows tells what has been moved since Work began; nothing while it does
	// not run. It may be called at any time.
	Flows() []Flow
}

// A Flow is what one queue has moved in one direction.
type Flow struct {
	Queue          int
	Direction      string // "sent" to peers, "received" from them
	Packets, Bytes uint64
	Drops          map[string]uint64 // packets, by reason
}

// A Tunnel is a Backend whose peers put something around pods' packets: it is
// this that firewalls must let in.
type Tunnel interface {
	Backend
	Endpoints() []Endpoint
}

// An Endpoint is where peers send packets to.
type Endpoint struct {
	Addr     netip.Addr // of this node
	Protocol string     // as iptables and nft know it without /etc/protocols: "udp", "esp", "4"
	Port     int        // of UDP
}

// A Factory makes a backend. The errors it returns are for the operator:
// neither waiting nor retrying will mend them.
type Factory func(cfg *subnet.Config, uplink iface.Uplink) (Backend, error)

var factories = map[string]Factory{}

// Register makes a backend known by the Type of its configuration. It is
// called from init.
func Register(name string, f Factory) { factories[name] = f }

// New makes the backend that the configuration asks for.
func New(cfg *subnet.Config, uplink iface.Uplink) (Backend, error) {
	f, ok := factories[cfg.BackendType]
	if !ok {
		return nil, fmt.Errorf("Backend Type %q is not known: known are %s", cfg.BackendType, strings.Join(slices.Sorted(maps.Keys(factories)), ", "))
	}
	b, err := f(cfg, uplink)
	if err != nil {
		return nil, fmt.Errorf("Backend %s: %w", cfg.BackendType, err)
	}
	return b, nil
}

// Leftovers are what a backend keeps on a node outside of the kernel's tables,
// and leaves there when flanneld ends.
type Leftovers struct {
	Undo  []Undo   // what to do, in this order
	Files []string // to be deleted after that, if they are there: patterns, as filepath.Glob takes them
	Notes []string // on what is for the operator to remove
}

// An Undo is a command, and how it is done without it.
type Undo struct {
	Command string
	Do      func(context.Context) error
}

// A Finder looks for what a backend may have left on this node, which had the
// subnets own. It finds what it can without cfg, which is nil where the
// configuration is not known.
type Finder func(ctx context.Context, cfg *subnet.Config, own subnet.Subnets) (Leftovers, error)

var finders []Finder

// RegisterLeftovers has a Finder asked by Left. It is called from init.
func RegisterLeftovers(f Finder) { finders = append(finders, f) }

// Left returns what all backends have left on this node, whichever it had.
func Left(ctx context.Context, cfg *subnet.Config, own subnet.Subnets) (Leftovers, error) {
	var all Leftovers
	var errs []error
	for _, find := range finders {
		l, err := find(ctx, cfg, own)
		errs = append(errs, err)
		all.Undo, all.Files, all.Notes = append(all.Undo, l.Undo...), append(all.Files, l.Files...), append(all.Notes, l.Notes...)
	}
	return all, errors.Join(errs...)
}

// Options reads the keys of the configuration's Backend into the struct that
// into points to. Keys that it does not have are noted in cfg.Warnings.
func Options(cfg *subnet.Config, into any) error {
	if cfg.Backend == nil {
		return nil
	}
	hint := "it has none beside Type"
	if known := subnet.Keys(into); len(known) > 0 {
		hint = "known are Type, " + strings.Join(known, ", ")
	}
	unknown, err := subnet.Decode(cfg.Backend, into)
	for _, key := range unknown {
		if !strings.EqualFold(key, "Type") {
			cfg.Warnings = append(cfg.Warnings, fmt.Sprintf("unknown key %q of Backend %s is ignored: %s", key, cfg.BackendType, hint))
		}
	}
	return err
}

// A Family is one address family's side of a peer, as its lease tells it.
type Family struct {
	On       bool         // both nodes have a subnet of the family, and the peer an address
	Peer     netip.Prefix // the peer's subnet
	PublicIP netip.Addr   // the peer's
	Data     []byte       // the peer's backend data
}

// Families returns the two sides of a peer, IPv4's and IPv6's.
func Families(own, peer subnet.Lease) [2]Family {
	a := peer.Attrs
	return [2]Family{
		{own.IPv4.IsValid() && peer.IPv4.IsValid() && a.PublicIP.IsValid(), peer.IPv4, a.PublicIP, a.BackendData},
		{own.IPv6.IsValid() && peer.IPv6.IsValid() && a.PublicIPv6.IsValid(), peer.IPv6, a.PublicIPv6, a.BackendV6Data},
	}
}

// Direct returns the route to the peer's subnet through the peer itself, with
// nothing around the packets: for peers on the uplink's own link.
func (f Family) Direct(uplink iface.Uplink) kernel.Route {
	return kernel.Route{Dst: f.Peer, Via: f.PublicIP, Dev: uplink.Name}
}
