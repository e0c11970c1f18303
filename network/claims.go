package network

import (
	"cmp"
	"fmt"
	"hash/maphash"
	"iter"
	"net/netip"
	"slices"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/multimap"
	"github.com/flanneld/flanneld/pkg/prefixes"
	"github.com/flanneld/flanneld/subnet"
)

// claims are what leases say that only one node can have: subnets, public addresses inside the network, which no other
// node's subnet can contain, and the identities that the backend knows peers by. A program that may write to the store
// can publish what belongs to another node. The oldest lease counts: a record may not take anything from the node that
// had it first.
//
// Such a program can also publish any number of leases that all claim the same. So the oldest lease comes first in each
// of the indexes: no decision about a lease takes a look at all of its rivals.
type claims struct {
	networks   subnet.Networks
	leases     multimap.Keyed[subnet.Subnets, *claimant]
	subnets    prefixes.Index[*claimant]
	publics    prefixes.Index[*claimant]       // as prefixes of full length
	identities multimap.Map[uint64, *claimant] // by hash: the texts would take more memory than all else
	seed       maphash.Seed
}

// A claimant is a lease that could be a peer's, or our own.
type claimant struct {
	*subnet.Lease
	publics    []netip.Prefix // inside the network: there are none, as a rule
	identities []uint64
}

func newClaims(networks subnet.Networks) *claims {
	c := &claims{
		networks: networks, seed: maphash.MakeSeed(),
		leases: multimap.NewKeyed(func(n *claimant) subnet.Subnets { return n.Subnets }),
	}
	c.subnets.SetOrder(compareAge)
	c.publics.SetOrder(compareAge)
	c.identities.Compare = compareAge
	return c
}

func (c *claims) hash(identity string) uint64 { return maphash.String(c.seed, identity) }

// put records what a lease claims.
func (c *claims) put(b backend.Backend, l *subnet.Lease) {
	n := &claimant{Lease: l}
	for _, id := range backend.Identities(b, *l) {
		n.identities = append(n.identities, c.hash(id))
	}
	for _, f := range family.All {
		if ip := l.Attrs.PublicIPOf(f); ip.IsValid() && c.networks.Network(netip.PrefixFrom(ip, ip.BitLen())).IsValid() {
			n.publics = append(n.publics, netip.PrefixFrom(ip, ip.BitLen()))
		}
	}
	c.leases.Add(n.Subnets, n)
	for _, id := range n.identities {
		c.identities.Add(id, n)
	}
	for _, p := range n.Each() {
		c.subnets.Add(p, n)
	}
	for _, p := range n.publics {
		c.publics.Add(p, n)
	}
}

// remove forgets what the lease with these subnets claims.
func (c *claims) remove(s subnet.Subnets) {
	n := c.leases.Get(s)
	if n == nil {
		return
	}
	c.leases.Remove(s, n)
	for _, id := range n.identities {
		c.identities.Remove(id, n)
	}
	for _, p := range n.Each() {
		c.subnets.Remove(p, n)
	}
	for _, p := range n.publics {
		c.publics.Remove(p, n)
	}
}

// A claim is what two leases claim.
type claim struct {
	identity uint64       // 0: addresses
	public   netip.Prefix // a public address of one of the two, which is in the subnet of the other; zero: none
	ours     bool         // it is that of the lease that was asked about
}

// A scope tells which rivals are asked for.
type scope int

const (
	all     scope = iota
	oldest        // those that are the oldest of all that claim one thing: the oldest rival is among them
	decided       // those that may be left out, or not, because of the lease that is asked about
)

// rivals yields the other leases that claim something of what a lease claims, and what that is.
func (c *claims) rivals(n *claimant, of scope) iter.Seq2[*claimant, claim] {
	return func(yield func(*claimant, claim) bool) {
		visit := func(values iter.Seq[*claimant], what claim) bool {
			for other := range values {
				if other != n && !yield(other, what) {
					return false
				}
				if of == oldest {
					break
				}
			}
			return true
		}
		for _, id := range n.identities {
			if first, _ := c.identities.First(id); of == decided && first != n {
				continue
			}
			if !visit(c.identities.Of(id), claim{identity: id}) {
				return
			}
		}
		for _, p := range n.Each() {
			switch first, _ := c.subnets.First(p); {
			case of == decided && first != n:
				continue
			case of == oldest && first != n: // which has the same rivals
				if !yield(first, claim{}) {
					return
				}
				continue
			}
			for q := range c.subnets.Prefixes(p) {
				if !visit(c.subnets.Of(q), claim{}) {
					return
				}
			}
			for q := range c.publics.Prefixes(p) {
				if !visit(c.publics.Of(q), claim{public: q}) {
					return
				}
			}
		}
		for _, ip := range n.publics {
			if first, _ := c.publics.First(ip); of == decided && first != n {
				continue
			}
			for q := range c.subnets.Prefixes(ip) {
				if !visit(c.subnets.Of(q), claim{public: ip, ours: true}) {
					return
				}
			}
		}
	}
}

// common returns what two leases claim, if they claim the same.
func (n *claimant) common(other *claimant) (what claim, ok bool) {
	for _, id := range n.identities {
		if slices.Contains(other.identities, id) {
			return claim{identity: id}, true
		}
	}
	if n.overlaps(other.IPv4) || n.overlaps(other.IPv6) {
		return claim{}, true
	}
	for _, ip := range n.publics {
		if other.overlaps(ip) {
			return claim{public: ip, ours: true}, true
		}
	}
	for _, ip := range other.publics {
		if n.overlaps(ip) {
			return claim{public: ip}, true
		}
	}
	return claim{}, false
}

// overlaps tells whether a prefix shares an address with the subnets.
func (n *claimant) overlaps(p netip.Prefix) bool { return n.IPv4.Overlaps(p) || n.IPv6.Overlaps(p) }

// describe returns what a lease claims, in words.
func (c *claims) describe(b backend.Backend, l subnet.Lease, what claim) string {
	for _, id := range backend.Identities(b, l) {
		if c.hash(id) == what.identity {
			return id
		}
	}
	switch {
	case !what.public.IsValid():
		return "subnet " + l.Subnets.String()
	case what.ours:
		return "public address " + what.public.Addr().String() + ", which is in a subnet,"
	}
	return "subnet " + l.Subnets.String() + ", which contains the public address " + what.public.Addr().String() + ","
}

// checkClaims returns why a lease is left out that claims what belongs to another lease. What is ours stays ours,
// whichever lease is older.
func (s *state) checkClaims(l subnet.Lease) error {
	n, own := s.claims.leases.Get(l.Subnets), s.claims.leases.Get(s.own.Subnets)
	if what, ok := n.common(own); ok {
		text := fmt.Sprintf("left out, since its %s is this node's own", s.claims.describe(s.backend, l, what))
		if n.olderThan(own) {
			return fmt.Errorf("%s, too. The lease of %s is older than ours: "+
				"the other nodes leave this node out. Delete that lease if no node holds it", text, l.Subnets)
		}
		return fmt.Errorf("%s", text)
	}
	var owner *claimant
	var what claim
	for other, common := range s.claims.rivals(n, oldest) {
		if other.olderThan(n) && (owner == nil || other.olderThan(owner)) {
			owner, what = other, common
		}
	}
	if owner == nil {
		return nil
	}
	return fmt.Errorf("left out, since its %s belongs to the node at %v, whose lease of %s is older. "+
		"Delete the older lease if no node holds it",
		s.claims.describe(s.backend, l, what), firstAddress(owner.Attrs), owner.Subnets)
}

// firstAddress returns the public address that names a node in texts.
func firstAddress(a subnet.Attrs) any {
	for _, ip := range a.PublicIPs() {
		return ip
	}
	return "an unknown address"
}

// olderThan tells which of two leases keeps what both claim.
func (n *claimant) olderThan(other *claimant) bool { return compareAge(n, other) < 0 }

// compareAge sorts by age, the oldest first. Where the store cannot tell the ages apart, the smaller subnet counts as
// older, so that all nodes decide alike.
func compareAge(n, other *claimant) int {
	return cmp.Or(cmp.Compare(n.Created, other.Created), n.IPv4.Compare(other.IPv4), n.IPv6.Compare(other.IPv6))
}
