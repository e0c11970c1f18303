package iface

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// host is what the uplink is chosen from.
type host struct {
	links   []link
	gateway int   // index of the link of the default route; 0: there is none, or nobody asked
	reach   route // to Selector.CanReach
}

type link struct {
	index, mtu int
	name       string
	altNames   []string
	mac        string
	up         bool // administratively: a cable may be out for a moment
	addrs      []addr
}

type addr struct {
	ip     netip.Addr   // our end, also on a point-to-point link
	bits   int          // the length that belongs to ip
	onLink netip.Prefix // what the kernel takes to be on the link
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

// look reads what choosing by sel takes.
func look(sel Selector, ipv4 bool) (host, error) {
	var h host
	links, err := dump(netlink.LinkList)
	if err != nil {
		return h, fmt.Errorf("listing interfaces: %w", err)
	}
	addrs, err := dump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return h, fmt.Errorf("listing addresses: %w", err)
	}
	for _, l := range links {
		a := l.Attrs()
		h.links = append(h.links, link{
			index: a.Index, mtu: a.MTU, name: a.Name, altNames: a.AltNames,
			mac: a.HardwareAddr.String(), up: a.RawFlags&unix.IFF_UP != 0,
		})
	}
	for _, a := range addrs {
		if l := h.at(a.LinkIndex); l != nil && a.IPNet != nil {
			l.addrs = append(l.addrs, newAddr(a))
		}
	}
	if sel.CanReach.IsValid() {
		h.reach = routeTo(sel.CanReach)
	}
	if sel.byDefault() {
		if h.gateway, err = defaultRoute(ipv4); err != nil {
			return h, fmt.Errorf("listing routes: %w", err)
		}
	}
	return h, nil
}

// at returns the link with an index, nil where there is none.
func (h host) at(index int) *link {
	if i := slices.IndexFunc(h.links, func(l link) bool { return l.index == index }); i >= 0 {
		return &h.links[i]
	}
	return nil
}

// dump lists until the kernel's tables did not change meanwhile, which for
// tables of this size happens soon.
func dump[T any](list func() ([]T, error)) (got []T, err error) {
	for range 10 {
		if got, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return got, err
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

// routeTo asks the kernel which way it would send to ip.
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

// defaultRoute returns the index of the link of the main table's best default
// route: the one of the lowest metric, and the first of its next hops.
func defaultRoute(ipv4 bool) (int, error) {
	family := netlink.FAMILY_V6
	if ipv4 {
		family = netlink.FAMILY_V4
	}
	// One at a time: a node has a route to each peer.
	routes, err := dump(func() (found []netlink.Route, err error) {
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

// find returns the link's address ip, nil where it has no such address.
func (l link) find(ip netip.Addr) *addr {
	if i := slices.IndexFunc(l.addrs, func(a addr) bool { return a.ip == ip }); i >= 0 {
		return &l.addrs[i]
	}
	return nil
}

// usable returns the link's addresses of a family that any node could go by, in
// the kernel's order.
func (l link) usable(family func(netip.Addr) bool) []addr {
	var out []addr
	for _, a := range l.addrs {
		if family(a.ip) && a.defect(false) == "" {
			out = append(out, a)
		}
	}
	return out
}

// defect says why an address cannot be this node's, "" where it can. One that
// was asked for needs to work and no more.
func (a addr) defect(asked bool) string {
	switch {
	case a.flags&unix.IFA_F_DADFAILED != 0:
		return "duplicate"
	case a.flags&unix.IFA_F_TENTATIVE != 0:
		return "tentative"
	case a.ip.IsLoopback():
		return "loopback"
	case a.ip.Is6() && a.ip.IsLinkLocalUnicast():
		return "link-local"
	case asked:
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

// maxBare is how many interfaces without an address a message lists by name: a
// node has one or two of them, and one more for each of its pods.
const maxBare = 4

// String lists the interfaces by name: "eth0 (198.18.0.1/24), eth1
// (10.0.2.15/24, down), lo (127.0.0.1/8)". The link-local addresses that every
// interface has are left out.
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
