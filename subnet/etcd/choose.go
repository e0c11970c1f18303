package etcd

import (
	"cmp"
	"math"
	"net/netip"
	"slices"

	"github.com/flanneld/flanneld/subnet"
)

// A choice is what to do to get a lease, given all records. If there is something to drop, that is done first, and then
// the choice is made again.
type choice struct {
	drop   []record       // our own, which cannot be used, and others' that keep peers from us
	unfit  []record       // reservations for us that cannot be used: the operator is to know
	take   record         // our own, which we take if it exists
	create subnet.Subnets // else free subnets, whose record we create; zero when there are none
}

// freeEnough is how many free subnets the random pick is made from. The number is upstream's: it is enough that a few
// nodes which start together rarely collide. A node that has collided picks from freeMore times as many, up to freeMost.
const (
	freeEnough = 100
	freeMore   = 64
	freeMost   = freeEnough * freeMore * freeMore
)

// choose decides which subnets the node takes that wants to publish want, and had want.Subnets before. Wrote is the
// record that this node wrote last, whatever public address it carries. If that record is as it was, or is known to be
// gone, the other records with this node's address are other machines', which had the address before and may come for
// them; only reservations are this node's. The older ones are dropped: peers leave out the younger of two leases with
// one address, which would be this node's. A machine whose record is gone leases the same subnets again if they are
// free, or else one of enough free ones. Pick returns a number below n.
func choose(records []record, cfg *subnet.Config, want subnet.Lease, wrote record, enough int,
	pick func(n int) int) choice {
	var c choice
	var own, others, usable []record
	isWrote := func(r record) bool { return r.key == wrote.key && r.changed == wrote.changed }
	known, since := wrote.isGone(), int64(math.MaxInt64)
	if i := slices.IndexFunc(records, isWrote); i >= 0 {
		known, since = true, records[i].created
	}
	for _, r := range records {
		if byAddress := r.valid && sameNode(r.attrs, want.Attrs); isWrote(r) || byAddress && (!known || r.reserved()) {
			own = append(own, r)
		} else if byAddress && r.created < since {
			c.drop = append(c.drop, r)
		} else if canHave(cfg, r.subnets) {
			others = append(others, r)
		}
	}
	for _, r := range own {
		switch {
		case cfg.Fits(r.subnets) && oldest(r, others):
			usable = append(usable, r)
		case r.reserved():
			c.unfit = append(c.unfit, r)
		default:
			c.drop = append(c.drop, r)
		}
	}
	if len(usable) == 0 {
		own = slices.DeleteFunc(own, func(r record) bool { return !canHave(cfg, r.subnets) })
		c.create = freeSubnets(slices.Concat(own, others), cfg, want.Subnets, enough, pick)
		return c
	}
	c.take = preferred(usable, want.Subnets, wrote)
	for _, r := range usable {
		if r.key != c.take.key && !r.reserved() {
			c.drop = append(c.drop, r)
		}
	}
	return c
}

// canHave tells whether a node can have the subnets. What no node takes for a peer's occupies nothing: a single record
// could keep all new nodes out of the network.
func canHave(cfg *subnet.Config, s subnet.Subnets) bool {
	for f, pool := range cfg.Pools().Each() {
		p := s.Of(f)
		if slices.ContainsFunc(pool.Networks(), p.Overlaps) && !pool.Admits(p) {
			return false
		}
	}
	return true
}

// preferred returns the record that the node takes, of several of its own: a reservation before the wanted subnets,
// those before the record that it wrote, and then the oldest record.
func preferred(own []record, want subnet.Subnets, wrote record) record {
	return slices.MinFunc(own, func(a, b record) int {
		for _, prefer := range []func(record) bool{
			record.reserved,
			func(r record) bool { return r.subnets == want },
			func(r record) bool { return r.key == wrote.key },
		} {
			if prefer(a) != prefer(b) {
				if prefer(a) {
					return -1
				}
				return 1
			}
		}
		return cmp.Compare(a.created, b.created)
	})
}

// freeSubnets returns the wanted subnets, if they fit and are free, or else free subnets, at random from enough of them.
// It returns the zero Subnets when there are none.
func freeSubnets(records []record, cfg *subnet.Config, want subnet.Subnets, enough int,
	pick func(n int) int) subnet.Subnets {
	overlaps := func(r record) bool { return r.overlaps(want) }
	if len(want.Each()) > 0 && cfg.Fits(want) && !slices.ContainsFunc(records, overlaps) {
		return want
	}
	var random subnet.Subnets
	for _, family := range []struct {
		pool  subnet.Pool
		taken func(record) netip.Prefix
		into  *netip.Prefix
	}{
		{cfg.IPv4, func(r record) netip.Prefix { return r.subnets.IPv4 }, &random.IPv4},
		{cfg.IPv6, func(r record) netip.Prefix { return r.subnets.IPv6 }, &random.IPv6},
	} {
		if !family.pool.Enabled() {
			continue
		}
		var taken []netip.Prefix
		for _, r := range records {
			if p := family.taken(r); p.IsValid() {
				taken = append(taken, p)
			}
		}
		free := cfg.Free(family.pool, taken, enough)
		if len(free) == 0 {
			return subnet.Subnets{}
		}
		*family.into = free[pick(len(free))]
	}
	return random
}

// oldest tells whether r is older than all of the other nodes' records that share an address with it. Keys keep two
// nodes from creating the same subnets, but not from creating different subnets that overlap: a dual-stack key holds
// two subnets, and configurations change. The younger record gives way.
func oldest(r record, others []record) bool {
	return !slices.ContainsFunc(others, func(o record) bool { return o.created < r.created && o.overlaps(r.subnets) })
}
