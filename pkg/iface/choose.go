package iface

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/flanneld/flanneld/pkg/family"
)

// A candidate is a link that the selector points to.
type candidate struct {
	*link
	asked string       // what points to it, as typed: "--iface=eth0"
	by    []netip.Addr // its addresses that made it one: the first of a family becomes the node's own
	exact netip.Addr   // the one of them that was asked for by itself
}

// inner are interfaces that lead to what runs on the host rather than to other
// hosts, by the names that container and virtual machine tools give them. They
// hold addresses that a pattern may well match, so they come after all others.
var inner = regexp.MustCompile(`^lo$|^(cni|cbr|docker|podman|virbr)[0-9]+$|^br-[0-9a-f]{12}$|^(kube-ipvs0|nodelocaldns)$`)

// overlay reports whether the device is one of the overlay network's own.
func (s Selector) overlay(device string) bool { return s.Overlay != nil && s.Overlay(device) }

// byDefault tells whether the selector leaves the interface open.
func (s Selector) byDefault() bool {
	return len(s.Names) == 0 && len(s.Regexps) == 0 && !s.CanReach.IsValid()
}

// choose is Find on what look saw.
func (h host) choose(sel Selector, ipv4, ipv6 bool) (Uplink, error) {
	slices.SortStableFunc(h.links, func(a, b link) int {
		switch x, y := inner.MatchString(a.name), inner.MatchString(b.name); {
		case x == y:
			return cmp.Compare(a.index, b.index)
		case x:
			return 1
		}
		return -1
	})
	on := func(ip netip.Addr) bool { return ip.Is4() && ipv4 || ip.Is6() && ipv6 }
	found, missed := h.candidates(sel, on, ipv4)
	var faults []string
	for _, c := range found {
		u, err := c.uplink(sel, ipv4, ipv6)
		if err == nil {
			return u, nil
		}
		if !slices.Contains(faults, err.Error()) {
			faults = append(faults, err.Error())
		}
	}
	const enough = 3 // a pattern may match an interface for every pod
	if n := len(faults) - enough; n > 1 {
		faults = append(faults[:enough], fmt.Sprintf("nor will %d more interfaces do", n))
	}
	if len(missed) > 0 {
		faults = append(faults, fmt.Sprintf("%s: this host has %s; give --iface the name or an address of the one to use", strings.Join(missed, ", "), h))
	}
	return Uplink{}, errors.New(strings.Join(faults, "; "))
}

// candidates returns the links that sel points to, best first, and what it
// asks for in vain.
func (h host) candidates(sel Selector, on func(netip.Addr) bool, ipv4 bool) (found []candidate, missed []string) {
	var unmatched []string
	match := func(asked string, links []candidate) {
		if len(links) == 0 {
			unmatched = append(unmatched, asked)
		}
		for _, c := range links {
			c.asked = asked
			found = append(found, c)
		}
	}
	for _, name := range sel.Names {
		match("--iface="+name, h.named(name))
	}
	for _, re := range sel.Regexps {
		match("--iface-regex="+re.String(), h.matching(sel, re, on))
	}
	if to := sel.CanReach; to.IsValid() {
		asked := "--iface-can-reach=" + to.String()
		switch l := h.at(h.reach.index); {
		case h.reach.err != nil:
			missed = append(missed, fmt.Sprintf("no route for %s (%v)", asked, h.reach.err))
		case h.reach.local: // the route is lo's, while the others reach us on the address's own interface
			match(asked, h.holding(to))
		case l == nil || sel.overlay(l.name):
			missed = append(missed, fmt.Sprintf("no route for %s but over the overlay itself", asked))
		default:
			match(asked, []candidate{{link: l, by: []netip.Addr{h.reach.src}}})
		}
	}
	if len(unmatched) > 0 {
		missed = append([]string{"no interface matches " + strings.Join(unmatched, " or ")}, missed...)
	}
	if !sel.byDefault() {
		return found, missed
	}
	for f, public := range sel.publicIPs().Each() {
		if !on(public) {
			continue
		}
		for _, c := range h.holding(public) {
			// A router's address may sit on lo; peers then come in by the
			// interface of the default route.
			if !inner.MatchString(c.name) {
				c.asked = PublicIPFlags.Of(f) + "=" + public.String()
				return []candidate{c}, nil
			}
		}
	}
	f := family.IPv6
	if ipv4 {
		f = family.IPv4
	}
	if l := h.at(h.gateway); l != nil {
		return []candidate{{link: l, asked: fmt.Sprintf("the %s default route", f)}}, nil
	}
	return nil, []string{fmt.Sprintf("there is no %s default route", f)}
}

// named returns the links that --iface may mean.
func (h host) named(name string) []candidate {
	for i, l := range h.links {
		if l.name == name || slices.Contains(l.altNames, name) {
			return []candidate{{link: &h.links[i]}}
		}
	}
	ip, err := netip.ParseAddr(name)
	if err != nil {
		return nil
	}
	return h.holding(ip.Unmap())
}

// holding returns the links that have an address.
func (h host) holding(ip netip.Addr) []candidate {
	var out []candidate
	for i, l := range h.links {
		if l.find(ip) != nil {
			out = append(out, candidate{link: &h.links[i], by: []netip.Addr{ip}, exact: ip})
		}
	}
	return out
}

// matching returns the links with a usable address that matches, and after them
// those whose name does.
func (h host) matching(sel Selector, re *regexp.Regexp, on func(netip.Addr) bool) []candidate {
	var byAddr, byName []candidate
	for i, l := range h.links {
		if sel.overlay(l.name) {
			continue
		}
		c := candidate{link: &h.links[i]}
		for _, a := range l.usable(on) {
			if re.MatchString(a.ip.String()) {
				c.by = append(c.by, a.ip)
			}
		}
		if len(c.by) > 0 {
			byAddr = append(byAddr, c)
		} else if re.MatchString(l.name) {
			byName = append(byName, c)
		}
	}
	return append(byAddr, byName...)
}

// uplink returns the candidate as the uplink, or why it cannot be that.
func (c candidate) uplink(sel Selector, ipv4, ipv6 bool) (Uplink, error) {
	if !c.up {
		return Uplink{}, fmt.Errorf("%s (%s) is down: ip link set %s up", c.name, c.asked, c.name)
	}
	if a := c.find(c.exact); a != nil && a.defect(true) != "" {
		return Uplink{}, fmt.Errorf("%s (%s) cannot be reached at %s: the address is %s", c.name, c.asked, c.exact, a.defect(true))
	}
	u := Uplink{Name: c.name, Index: c.index, MTU: c.mtu, MAC: c.mac}
	var own, public family.Pair[netip.Addr]
	for f, on := range (family.Pair[bool]{IPv4: ipv4, IPv6: ipv6}).Each() {
		if !on {
			continue
		}
		usable, asked := c.usable(f.Has), sel.publicIPs().Of(f)
		ip := c.ownAddr(f.Has, usable, asked, sel.Prefer)
		if !ip.IsValid() {
			return Uplink{}, fmt.Errorf("%s (%s) has no usable %s address%s: give it one, or set Enable%s to false in the network configuration",
				c.name, c.asked, f, c.defects(f.Has), f)
		}
		*own.At(f), *public.At(f) = ip, cmp.Or(asked, ip)
		for _, a := range usable {
			u.Prefixes = append(u.Prefixes, a.onLink)
		}
		if a := c.find(ip); a.defect(false) != "" { // asked for by name
			u.Prefixes = append(u.Prefixes, a.onLink)
		}
	}
	u.IPv4, u.IPv6, u.PublicIP, u.PublicIPv6 = own.IPv4, own.IPv6, public.IPv4, public.IPv6
	slices.SortFunc(u.Prefixes, netip.Prefix.Compare)
	u.Prefixes = slices.Compact(u.Prefixes)
	return u, nil
}

// ownAddr picks the node's own address of a family: the one that the link was
// chosen by, the public one, one that is in use already, the first.
func (c candidate) ownAddr(is func(netip.Addr) bool, usable []addr, public netip.Addr, prefer []netip.Addr) netip.Addr {
	has := func(ip netip.Addr) bool {
		return slices.ContainsFunc(usable, func(a addr) bool { return a.ip == ip })
	}
	for _, ip := range c.by {
		if is(ip) && (ip == c.exact || has(ip)) {
			return ip
		}
	}
	if a := c.find(public); a != nil && a.defect(true) == "" {
		return public
	}
	for _, ip := range prefer {
		if has(ip) {
			return ip
		}
	}
	if len(usable) > 0 {
		return usable[0].ip
	}
	return netip.Addr{}
}

// defects lists the addresses of a family that will not do: " (fe80::1/64 is
// link-local)".
func (c candidate) defects(is func(netip.Addr) bool) string {
	var out []string
	for _, a := range c.addrs {
		if is(a.ip) {
			out = append(out, fmt.Sprintf("%s is %s", a, a.defect(false)))
		}
	}
	if len(out) == 0 {
		return ""
	}
	return " (" + strings.Join(out, ", ") + ")"
}
