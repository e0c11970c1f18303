package network

import (
	"errors"
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
//
// Where each family has an interface of its own, stay is the uplink in use: the family whose interface is away stays as
// it is, and the other one follows its interface.
func findUplink(sel iface.Selector, cfg *subnet.Config, stay iface.Uplink, partly bool) (u iface.Uplink,
	missing map[family.Family]error, err error) {
	u, err = iface.Find(sel, cfg.IPv4.Enabled(), cfg.IPv6.Enabled())
	switch {
	case err == nil || !cfg.IPv4.Enabled() || !cfg.IPv6.Enabled():
		return u, nil, err
	case sel.Apart():
		return findEach(sel, stay, partly, err)
	case !partly || errors.Is(err, iface.ErrSettling):
		return u, nil, err
	}
	for _, f := range family.All {
		if part, partErr := iface.Find(sel, f == family.IPv4, f == family.IPv6); partErr == nil {
			other := family.All[1-f]
			return part, map[family.Family]error{other: doesNotWork(other, err)}, nil
		}
	}
	return u, nil, err
}

// workingUplink returns the uplink that the node works with; zero: it does not work yet.
func (n *node) workingUplink() iface.Uplink {
	if n.backend == nil {
		return iface.Uplink{}
	}
	return n.target.uplink
}

func doesNotWork(f family.Family, err error) error {
	return fmt.Errorf("%s does not work on this node, which goes on without: %w", f, err)
}

// findEach is findUplink for an uplink with an interface for each family, which were not both found, because of err.
func findEach(sel iface.Selector, stay iface.Uplink, partly bool, err error) (iface.Uplink, map[family.Family]error,
	error) {
	var links family.Pair[iface.Link]
	missing := map[family.Family]error{}
	found := false
	for _, f := range family.All {
		part, partErr := iface.Find(sel, f == family.IPv4, f == family.IPv6)
		old := stay.Of(f)
		switch {
		case partErr == nil:
			*links.At(f), found = part.Of(f), true
		case old.IsValid():
			*links.At(f) = old
			missing[f] = fmt.Errorf("%s stays as it is, with %s of %s: %w", f, old.Addr, old.Name, partErr)
		case partly && !errors.Is(partErr, iface.ErrSettling):
			missing[f] = doesNotWork(f, partErr)
		default:
			return iface.Uplink{}, nil, err
		}
	}
	if !found {
		return iface.Uplink{}, nil, err
	}
	return iface.Uplink(links), missing, nil
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
