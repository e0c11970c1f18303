// Package subnettest helps to test subnet managers, and what uses them: Run is the suite that every subnet.Manager
// passes, and Manager is one that keeps its leases in memory.
package subnettest

import (
	"net/netip"
	"sync"
	"time"

	"github.com/flanneld/flanneld/subnet"
)

// A Store is what the Managers of a test share in place of etcd or Kubernetes. The test acts on it as an operator, or
// another node, acts on theirs. The zero value is an empty store.
type Store struct {
	mu      sync.Mutex
	changed chan struct{} // closed, and replaced, at each change; nil: nobody waits
	config  string        // "": none
	problem string        // why no request succeeds; "": all do
	gaps    int           // how often watches have missed changes
	created int64         // of the youngest lease
	ready   map[string]bool
	leases  map[subnet.Subnets]leaseOf
	publish map[string]netip.Addr // see Republish
}

// leaseOf is a lease and the node that holds it.
type leaseOf struct {
	subnet.Lease
	node string
}

// change calls f, which changes the store, and wakes all who wait for a change.
func (s *Store) change(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	if s.changed != nil {
		close(s.changed)
		s.changed = nil
	}
}

// next returns a channel that is closed at the next change. The caller holds s.mu.
func (s *Store) next() <-chan struct{} {
	if s.changed == nil {
		s.changed = make(chan struct{})
	}
	return s.changed
}

// Configure writes the network's configuration; "" deletes it.
func (s *Store) Configure(config string) { s.change(func() { s.config = config }) }

// SetLease writes a lease of a node, in place of any lease with the same subnets.
func (s *Store) SetLease(node string, l subnet.Lease) { s.change(func() { s.put(node, l) }) }

// put is SetLease for callers that hold s.mu.
func (s *Store) put(node string, l subnet.Lease) {
	if s.leases == nil {
		s.leases = map[subnet.Subnets]leaseOf{}
	}
	if now, there := s.leases[l.Subnets]; there {
		l.Created = now.Created
	} else {
		s.created++
		l.Created = s.created
	}
	s.leases[l.Subnets] = leaseOf{l, node}
}

// DeleteLease deletes the lease with these subnets.
func (s *Store) DeleteLease(subnets subnet.Subnets) { s.change(func() { delete(s.leases, subnets) }) }

// Republish has a node publish another IPv4 address than the one that it found.
func (s *Store) Republish(node string, ip netip.Addr) {
	s.change(func() {
		if s.publish == nil {
			s.publish = map[string]netip.Addr{}
		}
		s.publish[node] = ip
	})
}

// Fail makes all requests fail for a reason, until it is called with "".
func (s *Store) Fail(reason string) { s.change(func() { s.problem = reason }) }

// Gap makes all watches miss what has changed since the last update that they sent: they begin again with a snapshot.
func (s *Store) Gap() { s.change(func() { s.gaps++ }) }

// Ready tells whether a node has made known that its network is up.
func (s *Store) Ready(node string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ready[node]
}

// Leases returns all leases.
func (s *Store) Leases() map[subnet.Subnets]subnet.Lease {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make(map[subnet.Subnets]subnet.Lease, len(s.leases))
	for subnets, l := range s.leases {
		all[subnets] = l.Lease
	}
	return all
}

// expiries returns when leases end, of all that end.
func (s *Store) expiries() map[subnet.Subnets]time.Time {
	ends := map[subnet.Subnets]time.Time{}
	for subnets, l := range s.Leases() {
		if !l.Expires.IsZero() {
			ends[subnets] = l.Expires
		}
	}
	return ends
}

// taken returns the subnets of all leases but those of a node. The caller holds s.mu.
func (s *Store) taken(except string) (taken []netip.Prefix) {
	for subnets, l := range s.leases {
		if l.node != except {
			taken = append(taken, subnets.Each()...)
		}
	}
	return taken
}
