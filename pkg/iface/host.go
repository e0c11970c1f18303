package iface

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/rtnl"
)

// host is the state of the host from which the uplink is chosen.
type host struct {
	links   []link
	gateway int // index of the link of the default route; 0: there is none, or the selector does not need it

	reach map[netip.Addr]route // the routes to the addresses of CanReach
}

type link struct {
	index, mtu int
	name       string
	altNames   []string
	mac        string
	up         bool // administratively; the link may have no carrier
	carrier    bool
	addrs      []addr
}

type addr struct {
	ip     netip.Addr   // the local address, also on a point-to-point link
	bits   int          // the prefix length of ip
	onLink netip.Prefix // the addresses that are on the link
	scope  int          // RT_SCOPE_*
	flags  int          // IFA_F_*
}

// route is the kernel's answer to "ip route get".
type route struct {
	index int
	src   netip.Addr
	local bool // the destination is this host
	err   error
}

// readHost reads the state that sel needs.
func readHost(sel Selector, ipv4 bool) (host, error) {
	h := host{reach: map[netip.Addr]route{}}
	links, err := rtnl.Dump(netlink.LinkList)
	if err != nil {
		return h, fmt.Errorf("listing interfaces: %w", err)
	}
	addrs, err := rtnl.Dump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return h, fmt.Errorf("listing addresses: %w", err)
	}
	for _, l := range links {
		a := l.Attrs()
		h.links = append(h.links, link{
			index: a.Index, mtu: a.MTU, name: a.Name, altNames: a.AltNames,
			mac: a.HardwareAddr.String(), up: a.RawFlags&unix.IFF_UP != 0, carrier: a.RawFlags&unix.IFF_LOWER_UP != 0,
		})
	}
	for _, a := range addrs {
		if l := h.at(a.LinkIndex); l != nil && a.IPNet != nil {
			l.addrs = append(l.addrs, newAddr(a))
		}
	}
	for _, to := range []netip.Addr{sel.CanReach, sel.IPv6.CanReach} {
		if to.IsValid() {
			h.reach[to] = routeTo(to)
		}
	}
	if sel.Criteria.empty() {
		if h.gateway, err = defaultRoute(ipv4); err != nil {
			return h, fmt.Errorf("listing routes: %w", err)
		}
	}
	return h, nil
}

// at returns the link with an index, nil if there is none.
func (h host) at(index int) *link {
	if i := slices.IndexFunc(h.links, func(l link) bool { return l.index == index }); i >= 0 {
		return &h.links[i]
	}
	return nil
}

func newAddr(a netlink.Addr) addr {
	ip, _ := netip.AddrFromSlice(a.IP)
	bits, _ := a.Mask.Size()
	onLink := netip.PrefixFrom(ip.Unmap(), bits)
	if a.Peer != nil {
		peer, _ := netip.AddrFromSlice(a.Peer.IP)
		peerBits, _ := a.Peer.Mask.Size()
		onLink = netip.PrefixFrom(peer.Unmap(), peerBits)
	}
	return addr{ip: ip.Unmap(), bits: bits, onLink: onLink.Masked(), scope: a.Scope, flags: a.Flags}
}

// routeTo returns the route by which the kernel would send to ip.
func routeTo(ip netip.Addr) route { return newRoute(netlink.RouteGet(ip.AsSlice())) }

func newRoute(routes []netlink.Route, err error) route {
	if err != nil {
		return route{err: err}
	}
	if len(routes) == 0 {
		return route{err: unix.ENETUNREACH}
	}
	src, _ := netip.AddrFromSlice(routes[0].Src)
	return route{index: routes[0].LinkIndex, src: src.Unmap(), local: routes[0].Type == unix.RTN_LOCAL}
}

// defaultRoute returns the index of the link of the main table's best default route: the route with the lowest metric,
// and the first of its next hops.
func defaultRoute(ipv4 bool) (int, error) {
	family := netlink.FAMILY_V6
	if ipv4 {
		family = netlink.FAMILY_V4
	}
	// The routes are read one at a time, because a node has a route to each peer.
	routes, err := rtnl.Dump(func() (found []netlink.Route, err error) {
		err = netlink.RouteListFilteredIter(family, &netlink.Route{}, 0, func(r netlink.Route) bool {
			if ones, _ := r.Dst.Mask.Size(); ones == 0 && r.Type == unix.RTN_UNICAST {
				found = append(found, r)
			}
			return true
		})
		return found, err
	})
	if err != nil {
		return 0, err
	}
	best, index := 0, 0
	for _, r := range routes {
		via := r.LinkIndex
		if len(r.MultiPath) > 0 {
			via = r.MultiPath[0].LinkIndex
		}
		if via > 0 && (index == 0 || r.Priority < best) {
			best, index = r.Priority, via
		}
	}
	return index, nil
}

// find returns the link's address ip, nil if the link has no such address.
func (l link) find(ip netip.Addr) *addr {
	if i := slices.IndexFunc(l.addrs, func(a addr) bool { return a.ip == ip }); i >= 0 {
		return &l.addrs[i]
	}
	return nil
}

// usable returns the link's addresses of a family that can be a node's own, in the kernel's order.
func (l link) usable(family func(netip.Addr) bool) []addr {
	var out []addr
	for _, a := range l.addrs {
		if family(a.ip) && a.unusable(false) == "" {
			out = append(out, a)
		}
	}
	return out
}

// settling tells whether duplicate address detection (RFC 4862) runs for an address of the link. It ends within seconds,
// unless the link has no carrier.
func (l link) settling() bool {
	return l.carrier && slices.ContainsFunc(l.addrs, func(a addr) bool {
		return !a.ip.IsLinkLocalUnicast() && a.unusable(true) == "tentative"
	})
}

// unusable returns the reason why an address cannot be this node's own, "" if it can be. An address that the operator
// has named may be of a kind that is never chosen by itself.
func (a addr) unusable(named bool) string {
	switch {
	case a.flags&unix.IFA_F_DADFAILED != 0:
		return "duplicate"
	case a.flags&unix.IFA_F_TENTATIVE != 0:
		return "tentative"
	case a.ip.IsLoopback():
		return "loopback"
	case a.ip.Is6() && a.ip.IsLinkLocalUnicast():
		return "link-local"
	case named:
		return ""
	case a.ip.IsLinkLocalUnicast():
		return "link-local"
	case a.scope != unix.RT_SCOPE_UNIVERSE:
		return "not of global scope"
	case a.ip.Is6() && a.flags&unix.IFA_F_TEMPORARY != 0: // the same bit says "secondary" of an IPv4 address
		return "temporary"
	case a.flags&unix.IFA_F_DEPRECATED != 0:
		return "deprecated"
	}
	return ""
}

func (a addr) String() string { return fmt.Sprintf("%s/%d", a.ip, a.bits) }

// maxBare is how many interfaces without an address a message lists by name. A node has one or two such interfaces,
// and one more for each pod.
const maxBare = 4

// String lists the interfaces by name: "eth0 (198.18.0.1/24), eth1 (10.0.2.15/24, down), lo (127.0.0.1/8)". It leaves
// out IPv6 link-local addresses, because every interface has one.
func (h host) String() string {
	links := slices.SortedFunc(slices.Values(h.links), func(a, b link) int { return strings.Compare(a.name, b.name) })
	var out, bare []string
	for _, l := range links {
		var notes []string
		for _, a := range l.addrs {
			if a.ip.Is4() || !a.ip.IsLinkLocalUnicast() {
				notes = append(notes, a.String())
			}
		}
		named := len(notes) > 0
		if !named {
			notes = append(notes, "no address")
		}
		if !l.up {
			notes = append(notes, "down")
		}
		text := fmt.Sprintf("%s (%s)", l.name, strings.Join(notes, ", "))
		if named {
			out = append(out, text)
		} else {
			bare = append(bare, text)
		}
	}
	if len(bare) > maxBare {
		bare = append(bare[:maxBare], fmt.Sprintf("%d more without an address", len(bare)-maxBare))
	}
	return strings.Join(append(out, bare...), ", ")
}
