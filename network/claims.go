package network

import (
	"cmp"
	"fmt"
	"iter"
	"net/netip"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/prefixes"
	"github.com/flanneld/flanneld/subnet"
)

// claims are what leases say that only one node can have: subnets, public addresses, and what the backend knows peers
// by. Whoever may write to the store can publish what belongs to another node. The oldest lease counts: a record may
// not take anything from the node that had it first.
type claims struct {
	claimants  map[subnet.Subnets]*claimant
	identities map[string][]*claimant
	subnets    prefixes.Index[*claimant]
}

// A claimant is a lease that could be a peer's, or our own.
type claimant struct {
	subnet.Subnets
	address    netip.Addr // the first public address, which names the node in texts
	created    int64
	identities []string
}

func newClaims() claims {
	return claims{claimants: map[subnet.Subnets]*claimant{}, identities: map[string][]*claimant{}}
}

// put records what a lease claims.
func (c *claims) put(b backend.Backend, l subnet.Lease) {
	n := &claimant{Subnets: l.Subnets, created: l.Created, identities: backend.Identities(b, l)}
	if ips := l.Attrs.PublicIPs(); len(ips) > 0 {
		n.address = ips[0]
	}
	c.claimants[n.Subnets] = n
	for _, id := range n.identities {
		c.identities[id] = append(c.identities[id], n)
	}
	for _, p := range n.Each() {
		c.subnets.Add(p, n)
	}
}

// remove forgets what the lease with these subnets claims.
func (c *claims) remove(s subnet.Subnets) {
	n := c.claimants[s]
	if n == nil {
		return
	}
	delete(c.claimants, s)
	for _, id := range n.identities {
		if rest := without(c.identities[id], n); len(rest) > 0 {
			c.identities[id] = rest
		} else {
			delete(c.identities, id)
		}
	}
	for _, p := range n.Each() {
		c.subnets.Remove(p, n)
	}
}

func without(all []*claimant, n *claimant) (rest []*claimant) {
	for _, other := range all {
		if other != n {
			rest = append(rest, other)
		}
	}
	return rest
}

// rivals yields the other leases that claim something of what a lease claims, and what that is.
func (c *claims) rivals(s subnet.Subnets) iter.Seq2[*claimant, string] {
	return func(yield func(*claimant, string) bool) {
		n := c.claimants[s]
		if n == nil {
			return
		}
		for _, id := range n.identities {
			for _, other := range c.identities[id] {
				if other != n && !yield(other, id) {
					return
				}
			}
		}
		for _, p := range n.Each() {
			for at, other := range c.subnets.Overlapping(p) {
				if other != n && !yield(other, "subnet "+at.String()) {
					return
				}
			}
		}
	}
}

// conflict returns why a lease is left out that claims what belongs to another lease. What is ours stays ours, whichever
// lease is older.
func (c *claims) conflict(s, own subnet.Subnets) error {
	n := c.claimants[s]
	var owner *claimant
	var claim string
	for other, id := range c.rivals(s) {
		switch {
		case other.Subnets == own:
			if n.olderThan(other) {
				return fmt.Errorf("left out, since its %s is this node's own, too. The lease of %s is older than ours: "+
					"the other nodes leave this node out. Delete that lease if no node holds it", id, s)
			}
			return fmt.Errorf("left out, since its %s is this node's own", id)
		case other.olderThan(n) && (owner == nil || other.olderThan(owner)):
			owner, claim = other, id
		}
	}
	if owner == nil {
		return nil
	}
	return fmt.Errorf("left out, since its %s belongs to the node at %s, whose lease of %s is older. "+
		"Delete the older lease if no node holds it", claim, owner.address, owner.Subnets)
}

// olderThan tells which of two leases keeps what both claim. Where the store cannot tell their ages apart, the smaller
// subnet keeps it, so that all nodes decide alike.
func (n *claimant) olderThan(other *claimant) bool {
	return cmp.Or(cmp.Compare(n.created, other.created), n.IPv4.Compare(other.IPv4), n.IPv6.Compare(other.IPv6)) < 0
}
