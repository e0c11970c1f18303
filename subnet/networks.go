package subnet

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/flanneld/flanneld/pkg/family"
)

// Networks are the networks that nodes' subnets are parts of, of each family that is on.
type Networks family.Pair[[]netip.Prefix]

// NetworksOf returns networks, by family.
func NetworksOf(networks ...netip.Prefix) (n Networks) {
	for _, p := range networks {
		if p.Addr().Is4() {
			n.IPv4 = append(n.IPv4, p)
		} else {
			n.IPv6 = append(n.IPv6, p)
		}
	}
	return n
}

// Of returns the networks of one family.
func (n Networks) Of(f family.Family) []netip.Prefix { return family.Pair[[]netip.Prefix](n).Of(f) }

// Each returns all networks, those of IPv4 first.
func (n Networks) Each() []netip.Prefix { return slices.Concat(n.IPv4, n.IPv6) }

// First returns the first network of each family, which is the key Network's.
func (n Networks) First() (first Subnets) {
	for _, f := range []struct {
		networks []netip.Prefix
		into     *netip.Prefix
	}{{n.IPv4, &first.IPv4}, {n.IPv6, &first.IPv6}} {
		if len(f.networks) > 0 {
			*f.into = f.networks[0]
		}
	}
	return first
}

// Network returns the network that a subnet is part of; the zero Prefix if there is none.
func (n Networks) Network(of netip.Prefix) netip.Prefix {
	all := n.Each()
	if i := slices.IndexFunc(all, func(network netip.Prefix) bool { return within(of, network) }); i >= 0 {
		return all[i]
	}
	return netip.Prefix{}
}

// String returns the networks with commas between them.
func (n Networks) String() string {
	var texts []string
	for _, p := range n.Each() {
		texts = append(texts, p.String())
	}
	return strings.Join(texts, ",")
}

// Equal tells whether both have the same networks in the same order.
func (n Networks) Equal(o Networks) bool {
	return slices.Equal(n.IPv4, o.IPv4) && slices.Equal(n.IPv6, o.IPv6)
}

// Contain tells whether each of the subnets is part of a network.
func (n Networks) Contain(s Subnets) bool {
	for _, p := range s.Each() {
		if !n.Network(p).IsValid() {
			return false
		}
	}
	return true
}

// within tells whether p is all of a network or a part of it.
func within(p, network netip.Prefix) bool {
	return p.IsValid() && network.Bits() <= p.Bits() && network.Contains(p.Addr())
}

// Removed returns the networks of before that the configuration no longer has, of families that have kept another one.
func (c *Config) Removed(before Networks) Networks {
	var all []netip.Prefix
	now := c.Networks()
	for _, f := range [][2][]netip.Prefix{{before.IPv4, now.IPv4}, {before.IPv6, now.IPv6}} {
		stays := func(p netip.Prefix) bool { return slices.Contains(f[1], p) }
		if slices.ContainsFunc(f[0], stays) {
			all = append(all, slices.DeleteFunc(slices.Clone(f[0]), stays)...)
		}
	}
	return NetworksOf(all...)
}

// Retain returns the configuration with networks that it no longer has: these are retired, and no others. Those that
// overlap what the configuration has are left out, as are networks of a family that is off.
func (c *Config) Retain(networks Networks) *Config {
	with := *c
	for _, f := range []struct {
		pool     *Pool
		networks []netip.Prefix
	}{{&with.IPv4, networks.IPv4}, {&with.IPv6, networks.IPv6}} {
		f.pool.Ranges = slices.DeleteFunc(slices.Clone(f.pool.Ranges), func(r Range) bool { return r.Retired })
		for _, n := range f.networks {
			if f.pool.Enabled() && !slices.ContainsFunc(f.pool.Networks(), n.Overlaps) {
				f.pool.Ranges = append(f.pool.Ranges, Range{Network: n, Retired: true})
			}
		}
	}
	return &with
}

// Retired returns the networks that are retired.
func (c *Config) Retired() (n Networks) {
	for _, f := range []struct {
		pool Pool
		into *[]netip.Prefix
	}{{c.IPv4, &n.IPv4}, {c.IPv6, &n.IPv6}} {
		for _, r := range f.pool.Ranges {
			if r.Retired {
				*f.into = append(*f.into, r.Network)
			}
		}
	}
	return n
}
