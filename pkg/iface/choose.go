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
	"github.com/flanneld/flanneld/pkg/plain"
)

// A candidate is a link that the selector matches.
type candidate struct {
	*link
	selectedBy string       // the flag and its value: "--iface=eth0"
	matched    []netip.Addr // the addresses that the selector matched: the first of a family becomes the node's own
	exact      netip.Addr   // the address that the selector names, if it names one
}

// hostInternal matches the interfaces that connect the host with its containers and virtual machines, not with other
// hosts, by the names that the usual tools give these interfaces. A pattern may match their addresses, so they come
// after all other interfaces.
var hostInternal = regexp.MustCompile(
	`^lo$|^(cni|cbr|docker|podman|virbr)[0-9]+$|^br-[0-9a-f]{12}$|^(kube-ipvs0|nodelocaldns)$`)

// overlay reports whether a device belongs to the overlay network.
func (s Selector) overlay(device string) bool { return s.Overlay != nil && s.Overlay(device) }

// chooseEach returns the uplink that Find returns, from the state of the host.
func (h host) chooseEach(sel Selector, ipv4, ipv6 bool) (Uplink, error) {
	if !ipv6 || !sel.Apart() {
		return h.choose(sel, ipv4, ipv6)
	}
	six, err := h.choose(sel.ofIPv6(), false, true)
	if !ipv4 {
		return six, err
	}
	four, fourErr := h.choose(sel, true, false)
	switch {
	case fourErr != nil && err != nil:
		return Uplink{}, fmt.Errorf("IPv4: %w; IPv6: %w", fourErr, err)
	case fourErr != nil:
		return Uplink{}, fourErr
	case err != nil:
		return Uplink{}, err
	}
	return Uplink{IPv4: four.IPv4, IPv6: six.IPv6}, nil
}

// choose returns the uplink with one interface for all families that are on.
func (h host) choose(sel Selector, ipv4, ipv6 bool) (Uplink, error) {
	slices.SortStableFunc(h.links, func(a, b link) int {
		switch x, y := hostInternal.MatchString(a.name), hostInternal.MatchString(b.name); {
		case x == y:
			return cmp.Compare(a.index, b.index)
		case x:
			return 1
		}
		return -1
	})
	on := func(ip netip.Addr) bool { return ip.Is4() && ipv4 || ip.Is6() && ipv6 }
	found, missed := h.candidates(sel, on, ipv4)
	var reasons []string
	settling := false
	for _, c := range found {
		u, err := h.uplink(c, sel, ipv4, ipv6)
		if err == nil {
			return u, nil
		}
		settling = settling || c.settling()
		if !slices.Contains(reasons, err.Error()) {
			reasons = append(reasons, err.Error())
		}
	}
	const most = 3 // a pattern may match an interface for every pod
	if n := len(reasons) - most; n > 1 {
		reasons = append(reasons[:most], fmt.Sprintf("%d more interfaces cannot be used either", n))
	}
	if len(missed) > 0 {
		reasons = append(reasons, fmt.Sprintf("%s: this host has %s; set --iface%s to the name or an address of one of them",
			strings.Join(missed, ", "), h, sel.suffix))
	}
	err := errors.New(strings.Join(reasons, "; "))
	if settling {
		err = settlingError{err}
	}
	return Uplink{}, err
}

// candidates returns the links that sel matches, the best first, and a description of each selector that matches none.
func (h host) candidates(sel Selector, on func(netip.Addr) bool, ipv4 bool) (found []candidate, missed []string) {
	var unmatched []string
	match := func(selector string, links []candidate) {
		if len(links) == 0 {
			unmatched = append(unmatched, selector)
		}
		for _, c := range links {
			c.selectedBy = selector
			found = append(found, c)
		}
	}
	for _, name := range sel.Names {
		match("--iface"+sel.suffix+"="+name, h.named(name))
	}
	for _, re := range sel.Regexps {
		match("--iface-regex"+sel.suffix+"="+re.String(), h.matching(sel, re, on))
	}
	if to := sel.CanReach; to.IsValid() {
		selector, reach := "--iface-can-reach"+sel.suffix+"="+to.String(), h.reach[to]
		switch l := h.at(reach.index); {
		case reach.err != nil:
			missed = append(missed, fmt.Sprintf("no route for %s (%v)", selector, reach.err))
		case reach.local: // the route leads to lo; peers reach the address on the interface that has it
			match(selector, h.holding(to))
		case l == nil || sel.overlay(l.name):
			missed = append(missed, fmt.Sprintf("the only route for %s is in the overlay network itself", selector))
		default:
			match(selector, []candidate{{link: l, matched: []netip.Addr{reach.src}}})
		}
	}
	if len(unmatched) > 0 {
		missed = append([]string{"no interface matches " + strings.Join(unmatched, " or ")}, missed...)
	}
	if !sel.Criteria.empty() {
		return found, missed
	}
	for f, public := range sel.publicIPs().Each() {
		if !on(public) {
			continue
		}
		for _, c := range h.holding(public) {
			// A router may have its address on lo. Peers then reach the address on the interface of the default route.
			if !hostInternal.MatchString(c.name) {
				c.selectedBy = PublicIPFlags.Of(f) + "=" + public.String()
				return []candidate{c}, nil
			}
		}
	}
	f := family.IPv6
	if ipv4 {
		f = family.IPv4
	}
	if l := h.at(h.gateway); l != nil {
		return []candidate{{link: l, selectedBy: fmt.Sprintf("the %s default route", f)}}, nil
	}
	return nil, []string{fmt.Sprintf("there is no %s default route", f)}
}

// named returns the links that a value of --iface names.
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
			out = append(out, candidate{link: &h.links[i], matched: []netip.Addr{ip}, exact: ip})
		}
	}
	return out
}

// matching returns the links that have a usable address that matches, and after them the links whose name matches.
func (h host) matching(sel Selector, re *regexp.Regexp, on func(netip.Addr) bool) []candidate {
	var byAddr, byName []candidate
	for i, l := range h.links {
		if sel.overlay(l.name) {
			continue
		}
		c := candidate{link: &h.links[i]}
		for _, a := range l.usable(on) {
			if re.MatchString(a.ip.String()) {
				c.matched = append(c.matched, a.ip)
			}
		}
		if len(c.matched) > 0 {
			byAddr = append(byAddr, c)
		} else if re.MatchString(l.name) {
			byName = append(byName, c)
		}
	}
	return append(byAddr, byName...)
}

// uplink returns a candidate as the uplink, or an error that says why the candidate cannot be the uplink.
func (h host) uplink(c candidate, sel Selector, ipv4, ipv6 bool) (Uplink, error) {
	if !c.up {
		return Uplink{}, fmt.Errorf("%s (%s) is down: ip link set %s up", c.name, c.selectedBy, plain.Shell(c.name))
	}
	if a := c.find(c.exact); a != nil && a.unusable(true) != "" {
		return Uplink{}, fmt.Errorf("%s (%s) cannot be reached at %s: the address is %s",
			c.name, c.selectedBy, c.exact, a.unusable(true))
	}
	var links family.Pair[Link]
	for f, on := range (family.Pair[bool]{IPv4: ipv4, IPv6: ipv6}).Each() {
		if !on {
			continue
		}
		usable, flag := c.usable(f.Has), sel.publicIPs().Of(f)
		ip := c.ownAddr(f.Has, usable, flag, sel.Prefer)
		if !ip.IsValid() {
			return Uplink{}, fmt.Errorf("%s (%s) has no usable %s address%s: "+
				"add an address, %sor set Enable%s to false in the network configuration",
				c.name, c.selectedBy, f, c.unusables(f.Has), h.hint(c, sel, f, ipv4), f)
		}
		l := Link{Name: c.name, Index: c.index, MTU: c.mtu, MAC: c.mac, Addr: ip, PublicIP: cmp.Or(flag, ip)}
		for _, a := range usable {
			l.Prefixes = append(l.Prefixes, a.onLink)
		}
		if a := c.find(ip); a.unusable(false) != "" { // named by --iface
			l.Prefixes = append(l.Prefixes, a.onLink)
		}
		slices.SortFunc(l.Prefixes, netip.Prefix.Compare)
		l.Prefixes = slices.Compact(l.Prefixes)
		*links.At(f) = l
	}
	return Uplink(links), nil
}

// hint names the flag for a host whose IPv6 comes in by another interface than IPv4, where IPv4 chose the candidate.
func (h host) hint(c candidate, sel Selector, f family.Family, ipv4 bool) string {
	if f != family.IPv6 || !ipv4 {
		return ""
	}
	for _, l := range h.links {
		if l.index != c.index && l.up && !sel.overlay(l.name) && !hostInternal.MatchString(l.name) && len(l.usable(f.Has)) > 0 {
			return fmt.Sprintf("set --iface-v6=%s if IPv6 comes in there, ", plain.Shell(l.name))
		}
	}
	return ""
}

// ownAddr returns the node's own address of a family: the address that the selector matched, else the public address,
// else an address that is in use already, else the first usable address.
func (c candidate) ownAddr(is func(netip.Addr) bool, usable []addr, public netip.Addr, prefer []netip.Addr) netip.Addr {
	has := func(ip netip.Addr) bool {
		return slices.ContainsFunc(usable, func(a addr) bool { return a.ip == ip })
	}
	for _, ip := range c.matched {
		if is(ip) && (ip == c.exact || has(ip)) {
			return ip
		}
	}
	if a := c.find(public); a != nil && a.unusable(true) == "" {
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

// unusables lists the addresses of a family that cannot be used: " (fe80::1/64 is link-local)".
func (c candidate) unusables(is func(netip.Addr) bool) string {
	var out []string
	for _, a := range c.addrs {
		if is(a.ip) {
			out = append(out, fmt.Sprintf("%s is %s", a, a.unusable(false)))
		}
	}
	if len(out) == 0 {
		return ""
	}
	return " (" + strings.Join(out, ", ") + ")"
}
