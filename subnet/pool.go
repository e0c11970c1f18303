package subnet

import (
	"net/netip"
	"slices"
)

// A Pool is the part of the configuration for one address family. The zero Pool is a family that is off.
type Pool struct {
	Ranges    []Range // in the order in which subnets are taken from them
	SubnetLen int     // prefix length of a node's subnet

	divided bool // by Config.Divide: otherwise the store assigns subnets, of any size
}

// A Range is one network of a Pool.
type Range struct {
	Network  netip.Prefix
	Min, Max netip.Addr // base addresses of the first and the last subnet handed out

	// Retired is set for a network that the configuration no longer has, but nodes still have subnets of: they keep them,
	// and nobody gets another one.
	Retired bool
}

// Enabled tells whether the family is on.
func (p Pool) Enabled() bool { return len(p.Ranges) > 0 }

// Networks returns the networks of the ranges.
func (p Pool) Networks() []netip.Prefix {
	var all []netip.Prefix
	for _, r := range p.Ranges {
		all = append(all, r.Network)
	}
	return all
}

// Range returns the range whose network has the subnet.
func (p Pool) Range(s netip.Prefix) (Range, bool) {
	i := slices.IndexFunc(p.Ranges, func(r Range) bool { return within(s, r.Network) })
	if i < 0 {
		return Range{}, false
	}
	return p.Ranges[i], true
}

// Fits tells whether a node may hold the subnet under this configuration. Only the zero subnet fits a family that is
// off.
func (p Pool) Fits(s netip.Prefix) bool {
	if !p.Enabled() || !s.IsValid() {
		return p.Enabled() == s.IsValid()
	}
	r, ok := p.Range(s)
	if r.Retired {
		return p.Admits(s)
	}
	return ok && s.Bits() == p.SubnetLen && r.Min.Compare(s.Addr()) <= 0 && s.Addr().Compare(r.Max) <= 0
}

// Admits tells whether another node can have the subnet. It may have had it under another SubnetLen. A network that is
// divided (see Config.Divide) holds at least four subnets: a larger one is nobody's, and could keep new nodes out.
func (p Pool) Admits(s netip.Prefix) bool {
	r, ok := p.Range(s)
	return ok && (!p.divided || s.Bits() >= r.Network.Bits()+fourSubnets)
}

// Free returns the first subnets, limit at most, that overlap none of taken: of the first network that has any.
func (p Pool) Free(taken []netip.Prefix, limit int) []netip.Prefix {
	taken = slices.Clone(taken)
	slices.SortFunc(taken, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
	for _, r := range p.Ranges {
		if free := r.free(p.SubnetLen, taken, limit); len(free) > 0 {
			return free
		}
	}
	return nil
}

// free returns the first subnets of a length. The prefixes of taken are sorted by address.
func (r Range) free(length int, taken []netip.Prefix, limit int) (free []netip.Prefix) {
	next := r.Min
	for !r.Retired && next.IsValid() && next.Compare(r.Max) <= 0 && len(free) < limit {
		s := netip.PrefixFrom(next, length)
		for len(taken) > 0 && last(taken[0]).Less(next) {
			taken = taken[1:]
		}
		end := last(s)
		if len(taken) > 0 && taken[0].Overlaps(s) {
			if t := last(taken[0]); end.Less(t) {
				end = t
			}
		} else {
			free = append(free, s)
		}
		next = end.Next() // invalid after the last address there is
	}
	return free
}

// last returns the highest address of a prefix.
func last(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for bit := p.Bits(); bit < len(b)*8; bit++ {
		b[bit/8] |= 0x80 >> (bit % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
