package network

import (
	"cmp"
	"fmt"
	"hash/maphash"
	"iter"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/multimap"
	"github.com/flanneld/flanneld/pkg/prefixes"
	"github.com/flanneld/flanneld/subnet"
)

// claims are what leases say that only one node can have: subnets, and the identities that the backend knows peers by.
// A program that may write to the store can publish what belongs to another node. The oldest lease counts: a record may
// not take anything from the node that had it first.
type claims struct {
	subnets    prefixes.Index[*claimant]
	identities multimap.Map[uint64, *claimant] // by hash: the texts would take more memory than all else
	seed       maphash.Seed
}

// A claimant is a lease that could be a peer's, or our own.
type claimant struct {
	subnet.Subnets
	created    int64
	identities []uint64
}

func newClaims() *claims { return &claims{seed: maphash.MakeSeed()} }

func (c *claims) hash(identity string) uint64 { return maphash.String(c.seed, identity) }

// put records what a lease claims.
func (c *claims) put(b backend.Backend, l subnet.Lease) {
	n := &claimant{Subnets: l.Subnets, created: l.Created}
	for _, id := range backend.Identities(b, l) {
		n.identities = append(n.identities, c.hash(id))
	}
	for _, id := range n.identities {
		c.identities.Add(id, n)
	}
	for _, p := range n.Each() {
		c.subnets.Add(p, n)
	}
}

// of returns the claimant that is the lease with these subnets; nil: there is none.
func (c *claims) of(s subnet.Subnets) *claimant {
	for _, p := range s.Each() {
		for n := range c.subnets.Of(p) {
			if n.Subnets == s {
				return n
			}
		}
	}
	return nil
}

// remove forgets what the lease with these subnets claims.
func (c *claims) remove(s subnet.Subnets) {
	n := c.of(s)
	if n == nil {
		return
	}
	for _, id := range n.identities {
		c.identities.Remove(id, n)
	}
	for _, p := range n.Each() {
		c.subnets.Remove(p, n)
	}
}

// A claim is what two leases claim: an identity or, if that is 0, their subnets.
type claim struct{ identity uint64 }

// rivals yields the other leases that claim something of what a lease claims, and what that is.
func (c *claims) rivals(s subnet.Subnets) iter.Seq2[*claimant, claim] {
	return func(yield func(*claimant, claim) bool) {
		n := c.of(s)
		if n == nil {
			return
		}
		for _, id := range n.identities {
			for other := range c.identities.Of(id) {
				if other != n && !yield(other, claim{id}) {
					return
				}
			}
		}
		for _, p := range n.Each() {
			for _, other := range c.subnets.Overlapping(p) {
				if other != n && !yield(other, claim{}) {
					return
				}
			}
		}
	}
}

// describe returns what a lease claims, in words.
func (c *claims) describe(b backend.Backend, l subnet.Lease, what claim) string {
	for _, id := range backend.Identities(b, l) {
		if c.hash(id) == what.identity {
			return id
		}
	}
	return "subnet " + l.Subnets.String()
}

// checkClaims returns why a lease is left out that claims what belongs to another lease. What is ours stays ours,
// whichever lease is older.
func (s *state) checkClaims(l subnet.Lease) error {
	n := s.claims.of(l.Subnets)
	var owner *claimant
	var what claim
	for other, shared := range s.claims.rivals(l.Subnets) {
		switch {
		case other.Subnets == s.own.Subnets:
			text := fmt.Sprintf("left out, since its %s is this node's own", s.claims.describe(s.backend, l, shared))
			if n.olderThan(other) {
				return fmt.Errorf("%s, too. The lease of %s is older than ours: "+
					"the other nodes leave this node out. Delete that lease if no node holds it", text, l.Subnets)
			}
			return fmt.Errorf("%s", text)
		case other.olderThan(n) && (owner == nil || other.olderThan(owner)):
			owner, what = other, shared
		}
	}
	if owner == nil {
		return nil
	}
	return fmt.Errorf("left out, since its %s belongs to the node at %v, whose lease of %s is older. "+
		"Delete the older lease if no node holds it",
		s.claims.describe(s.backend, l, what), firstAddress(s.leases[owner.Subnets]), owner.Subnets)
}

// firstAddress returns the public address that names a node in texts.
func firstAddress(l subnet.Lease) any {
	for _, ip := range l.Attrs.PublicIPs() {
		return ip
	}
	return "an unknown address"
}

// olderThan tells which of two leases keeps what both claim. Where the store cannot tell their ages apart, the smaller
// subnet keeps it, so that all nodes decide alike.
func (n *claimant) olderThan(other *claimant) bool {
	return cmp.Or(cmp.Compare(n.created, other.created), n.IPv4.Compare(other.IPv4), n.IPv6.Compare(other.IPv6)) < 0
}
