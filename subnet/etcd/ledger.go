package etcd

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/subnet"
)

// A ledger is what changes are decided by.
type ledger struct {
	cfg     *subnet.Config // nil: there is none, or it cannot work
	records []record
	at      watchPoint
	alive   living
}

// who names the node of a record.
func (l ledger) who(r record) string {
	ips := r.attrs.PublicIPs()
	if len(ips) == 0 {
		return "a node whose record cannot be read"
	}
	name := ips[0].String()
	if h := l.alive.of(r); h != nil && h.Hostname != "" {
		name += " (" + plain.Text(h.Hostname) + ")"
	}
	return name
}

// check tells what is wrong with a reservation, whatever records there are.
func (l ledger) check(s subnet.Subnets, self subnet.Attrs) error {
	if !l.cfg.Fits(s) {
		return fmt.Errorf("%s is not what a node can have: the configuration has /%s", s,
			strings.TrimPrefix(describePools(l.cfg), "/"))
	}
	var known netip.Addr
	for _, f := range family.All {
		ip := self.PublicIPOf(f)
		on := l.cfg.Pools().Of(f).Enabled()
		switch {
		case ip.IsValid() && !on:
			return fmt.Errorf("%s is an %s address, and the network has no %s: give the node's address of the network's family",
				ip, f, f)
		case on && !ip.IsValid() && !known.IsValid():
			return fmt.Errorf("a node is known by its %s address, since the network has %s: give that address, too", f, f)
		case ip.IsValid() && s.Of(f).Contains(ip):
			return fmt.Errorf("the public address %s is in the subnet %s itself", ip, s.Of(f))
		case on && ip.IsValid():
			known = ip
		}
	}
	return nil
}

const cutOff = "its pods are cut off until they are started again"

// reserve decides how subnets are reserved for the node with self's addresses.
func (l ledger) reserve(s subnet.Subnets, self subnet.Attrs) (*Change, error) {
	value, err := json.Marshal(reservation{text(self.PublicIP), text(self.PublicIPv6), true})
	if err != nil {
		return nil, err
	}
	c := &Change{put: record{value: value}, Effect: fmt.Sprintf(
		"%s is reserved for %s, which takes it when flanneld starts there the next time.", s, self.PublicIPs()[0])}
	for _, r := range l.records {
		mine := r.valid && sameNode(r.attrs, self)
		if r.subnets == s {
			c.put.changed = r.changed
		}
		switch {
		case r.reserved() && mine && r.subnets == s:
			return &Change{Effect: fmt.Sprintf("%s is reserved for %s already.", s, l.who(r))}, nil
		case r.reserved() && mine:
			return nil, fmt.Errorf("%s is reserved for %s, and a node takes one reservation: "+
				"release it first (flannelctl leases release %[1]s)", r.subnets, l.who(r))
		case r.reserved() && r.overlaps(s):
			return nil, fmt.Errorf("%s is reserved for %s: release it first (flannelctl leases release %[1]s)",
				r.subnets, l.who(r))
		case mine && r.subnets == s:
			c.put.value = r.value
			c.Effect = fmt.Sprintf("%s, which %s has, is reserved for it: the lease does not end any more.", s, l.who(r))
		case mine:
			c.Cuts = append(c.Cuts, fmt.Sprintf("%s has the lease of %s: when flanneld starts there the next time, "+
				"the node takes %s, and %s", l.who(r), r.subnets, s, cutOff))
		case r.overlaps(s):
			c.drop = append(c.drop, r)
			c.Cuts = append(c.Cuts, fmt.Sprintf("%s has the lease of %s: it loses the subnet, and %s", l.who(r), r.subnets,
				cutOff))
		}
	}
	return c, nil
}

// text returns an address as text; "" for none.
func text(ip netip.Addr) string {
	if !ip.IsValid() {
		return ""
	}
	return ip.String()
}

// release decides how the subnets are released.
func (l ledger) release(s subnet.Subnets) (*Change, error) {
	var r record
	for _, other := range l.records {
		has := true
		for f, p := range family.Pair[netip.Prefix](s).Each() {
			has = has && (!p.IsValid() || other.subnets.Of(f) == p)
		}
		switch {
		case has && r.exists():
			return nil, fmt.Errorf("both %s and %s have that subnet: give both subnets of one of them", r.subnets, other.subnets)
		case has:
			r = other
		}
	}
	if !r.exists() {
		return nil, fmt.Errorf("no node has %s, and it is not reserved: flannelctl leases list shows what there is", s)
	}
	others := func(o record) bool { return o.key != r.key && o.valid && sameNode(o.attrs, r.attrs) }
	works := l.alive.of(r) != nil && !r.unused() && (l.cfg == nil || l.cfg.Fits(r.subnets)) &&
		(r.reserved() || !slices.ContainsFunc(l.records, others))
	c := &Change{drop: []record{r}, Effect: fmt.Sprintf("%s is free.", r.subnets)}
	switch {
	case r.unused():
	case works && r.reserved():
		return &Change{put: r, leased: true, Effect: fmt.Sprintf("%s is not reserved any more: %s has it as a lease, "+
			"which ends a day after flanneld stops there.", r.subnets, l.who(r))}, nil
	case works:
		return nil, fmt.Errorf("flanneld runs on %s, and would write its lease of %s again at once: stop flanneld there first. "+
			"If the node is gone, wait for half a minute", l.who(r), r.subnets)
	default:
		what := "the lease of "
		if r.reserved() {
			what = "the reservation of "
		}
		c.Cuts = append(c.Cuts, fmt.Sprintf("%s has %s%s: if the node still works, another node may get the subnet, and %s",
			l.who(r), what, r.subnets, cutOff))
	}
	return c, nil
}
