package etcd

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/flanneld/flanneld/subnet"
)

// A choice is what to do to get a lease, given all records. Steps come in this
// order: where there is something to drop, that is done, and chosen again.
type choice struct {
	drop   []record       // our own, of no use
	unfit  []record       // reservations for us that cannot be used: to be warned of
	take   record         // ours, to be taken up, if it exists
	create subnet.Subnets // else free ones, to be created; zero when there are none
}

// freeEnough is how many free subnets the random pick is among: upstream's
// number, enough that nodes which start together rarely collide.
const freeEnough = 100

// choose decides which subnets the node takes that wants to publish want, and
// had want.Subnets before. Wrote is what this process knows to be its own,
// whatever public address it carries. pick returns a number below n.
func choose(records []record, cfg *subnet.Config, want subnet.Lease, wrote record, pick func(n int) int) choice {
	ours := func(r record) bool {
		return r.valid && sameNode(r.attrs, want.Attrs) || r.key == wrote.key && r.changed == wrote.changed
	}
	var c choice
	var own, others, usable []record
	for _, r := range records {
		if ours(r) {
			own = append(own, r)
		} else {
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
	if len(usable) > 0 {
		best := slices.MinFunc(usable, func(a, b record) int {
			for _, prefer := range []func(record) bool{
				record.reserved,
				func(r record) bool { return r.subnets == want.Subnets },
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
		c.take = best
		for _, r := range usable {
			if r.key != best.key && !r.reserved() {
				c.drop = append(c.drop, r)
			}
		}
		return c
	}

	free := func(s subnet.Subnets) bool {
		return !slices.ContainsFunc(records, func(r record) bool { return r.overlaps(s) })
	}
	if len(want.Each()) > 0 && cfg.Fits(want.Subnets) && free(want.Subnets) {
		c.create = want.Subnets
		return c
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
		free := family.pool.Free(taken, freeEnough)
		if len(free) == 0 {
			return c
		}
		*family.into = free[pick(len(free))]
	}
	c.create = random
	return c
}

// oldest tells that none of the other nodes' records that shares an address
// with r was there before it. Keys keep two nodes from creating the same
// subnets, but not from creating different ones that overlap: a dual-stack key
// holds two subnets, and configurations change. The newer one gives way.
func oldest(r record, others []record) bool {
	return !slices.ContainsFunc(others, func(o record) bool { return o.created < r.created && o.overlaps(r.subnets) })
}
