package subnet

import (
	"net/netip"
	"slices"
)

// A Pool is the part of the configuration for one address family: its network, and how the network is divided into
// subnets of one length. The zero Pool is a family that is off.
type Pool struct {
	Network   netip.Prefix
	SubnetLen int        // prefix length of a node's subnet
	Min, Max  netip.Addr // base addresses of the first and the last subnet handed out
}

// Enabled tells whether the family is on.
func (p Pool) Enabled() bool { return p.Network.IsValid() }

// Fits tells whether a node may hold the subnet under this configuration. Only the zero subnet fits a family that is
// off.
func (p Pool) Fits(s netip.Prefix) bool {
	if !p.Enabled() || !s.IsValid() {
		return p.Enabled() == s.IsValid()
	}
	return s.Bits() == p.SubnetLen && p.Min.Compare(s.Addr()) <= 0 && s.Addr().Compare(p.Max) <= 0
}

// Admits tells whether another node can have the subnet. It may have had it under another SubnetLen. A network that is
// divided (see Config.Divide) holds at least four subnets: a larger one is nobody's, and could keep new nodes out.
func (p Pool) Admits(s netip.Prefix) bool {
	shortest := p.Network.Bits()
	if p.Min.IsValid() {
		shortest += fourSubnets
	}
	return p.Network.Contains(s.Addr()) && s.Bits() >= shortest
}

// Free returns the first subnets, limit at most, that overlap none of taken.
func (p Pool) Free(taken []netip.Prefix, limit int) []netip.Prefix {
	taken = slices.Clone(taken)
	slices.SortFunc(taken, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
	var free []netip.Prefix
	next := p.Min
	for next.IsValid() && next.Compare(p.Max) <= 0 && len(free) < limit {
		s := netip.PrefixFrom(next, p.SubnetLen)
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
