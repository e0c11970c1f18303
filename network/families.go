package network

import (
	"fmt"
	"net/netip"

	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/subnet"
)

// A family may not work on a node, although the network has it: the host has IPv6 off. The node then works with the
// other family alone. Its lease still has subnets of both, and publishes no address of the family that does not work,
// so that peers have no routes for it, and nothing need change but the address when the family works again.

// findUplink finds the uplink: with addresses of both families, or else, if partly, with those of one family. missing
// is then why there is none of the other. An address of the other that is about to be usable is waited for: that takes
// seconds, and pods that start meanwhile would have the MTU of one family alone.
func findUplink(sel iface.Selector, cfg *subnet.Config, partly bool) (u iface.Uplink, missing map[family.Family]error,
	err error) {
	u, err = iface.Find(sel, cfg.IPv4.Enabled(), cfg.IPv6.Enabled())
	if err == nil || !partly || !cfg.IPv4.Enabled() || !cfg.IPv6.Enabled() {
		return u, nil, err
	}
	for _, f := range family.All {
		if part, partErr := iface.Find(sel, f == family.IPv4, f == family.IPv6); partErr == nil && !part.Settling {
			other := family.All[1-f]
			return part, map[family.Family]error{other: fmt.Errorf("%s does not work on this node, which goes on "+
				"without: %w", other, err)}, nil
		}
	}
	return u, nil, err
}

// works tells whether a family works on this node.
func (s setup) works(f family.Family) bool { return s.uplink.PublicIPs().Of(f).IsValid() }

// partial tells whether a family of the network does not work on this node.
func (s setup) partial() bool {
	for f, pool := range s.cfg.Pools().Each() {
		if pool.Enabled() && !s.works(f) {
			return true
		}
	}
	return false
}

// backendConfig returns the configuration for the backend, without the families that do not work.
func backendConfig(cfg *subnet.Config, uplink iface.Uplink) *subnet.Config {
	s := setup{cfg: cfg, uplink: uplink}
	if !s.partial() {
		return cfg
	}
	c := *cfg
	if !s.works(family.IPv4) {
		c.IPv4 = subnet.Pool{}
	}
	if !s.works(family.IPv6) {
		c.IPv6 = subnet.Pool{}
	}
	return &c
}

// working returns our lease without the subnets of families that do not work.
func (s *state) working() subnet.Lease {
	own := *s.own
	if !s.works(family.IPv4) {
		own.IPv4 = netip.Prefix{}
	}
	if !s.works(family.IPv6) {
		own.IPv6 = netip.Prefix{}
	}
	return own
}
