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

// byDefault reports whether the selector does not restrict the interface.
func (s Selector) byDefault() bool {
	return len(s.Names) == 0 && len(s.Regexps) == 0 && !s.CanReach.IsValid()
}

// choose returns the uplink that Find returns, from the state of the host.
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
	for _, c := range found {
		u, err := c.uplink(sel, ipv4, ipv6)
		if err == nil {
			return u, nil
		}
		if !slices.Contains(reasons, err.Error()) {
			reasons = append(reasons, err.Error())
		}
	}
	const most = 3 // a pattern may match an interface for every pod
	if n := len(reasons) - most; n > 1 {
		reasons = append(reasons[:most], fmt.Sprintf("%d more interfaces cannot be used either", n))
	}
	if len(missed) > 0 {
		reasons = append(reasons, fmt.Sprintf("%s: this host has %s; set --iface to the name or an address of one of them",
			strings.Join(missed, ", "), h))
	}
	return Uplink{}, errors.New(strings.Join(reasons, "; "))
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
		match("--iface="+name, h.named(name))
	}
	for _, re := range sel.Regexps {
		match("--iface-regex="+re.String(), h.matching(sel, re, on))
	}
	if to := sel.CanReach; to.IsValid() {
		selector := "--iface-can-reach=" + to.String()
		switch l := h.at(h.reach.index); {
		case h.reach.err != nil:
			missed = append(missed, fmt.Sprintf("no route for %s (%v)", selector, h.reach.err))
		case h.reach.local: // the route leads to lo; peers reach the address on the interface that has it
			match(selector, h.holding(to))
		case l == nil || sel.overlay(l.name):
			missed = append(missed, fmt.Sprintf("the only route for %s is in the overlay network itself", selector))
		default:
			match(selector, []candidate{{link: l, matched: []netip.Addr{h.reach.src}}})
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

// uplink returns the candidate as the uplink, or an error that says why the candidate cannot be the uplink.
func (c candidate) uplink(sel Selector, ipv4, ipv6 bool) (Uplink, error) {
	if !c.up {
		return Uplink{}, fmt.Errorf("%s (%s) is down: ip link set %s up", c.name, c.selectedBy, plain.Shell(c.name))
	}
	if a := c.find(c.exact); a != nil && a.unusable(true) != "" {
		return Uplink{}, fmt.Errorf("%s (%s) cannot be reached at %s: the address is %s",
			c.name, c.selectedBy, c.exact, a.unusable(true))
	}
	u := Uplink{Name: c.name, Index: c.index, MTU: c.mtu, MAC: c.mac, Settling: c.settling()}
	var own, public family.Pair[netip.Addr]
	for f, on := range (family.Pair[bool]{IPv4: ipv4, IPv6: ipv6}).Each() {
		if !on {
			continue
		}
		usable, flag := c.usable(f.Has), sel.publicIPs().Of(f)
		ip := c.ownAddr(f.Has, usable, flag, sel.Prefer)
		if !ip.IsValid() {
			return Uplink{}, fmt.Errorf("%s (%s) has no usable %s address%s: "+
				"add an address, or set Enable%s to false in the network configuration",
				c.name, c.selectedBy, f, c.unusables(f.Has), f)
		}
		*own.At(f), *public.At(f) = ip, cmp.Or(flag, ip)
		for _, a := range usable {
			u.Prefixes = append(u.Prefixes, a.onLink)
		}
		if a := c.find(ip); a.unusable(false) != "" { // named by --iface
			u.Prefixes = append(u.Prefixes, a.onLink)
		}
	}
	u.IPv4, u.IPv6, u.PublicIP, u.PublicIPv6 = own.IPv4, own.IPv6, public.IPv4, public.IPv6
	slices.SortFunc(u.Prefixes, netip.Prefix.Compare)
	u.Prefixes = slices.Compact(u.Prefixes)
	return u, nil
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
