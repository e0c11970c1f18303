// Package iface, which other programs may import, finds the interfaces and the addresses on which peers reach this node,
// and signals when they may have changed.
package iface

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/flanneld/flanneld/pkg/family"
)

// Criteria are what an operator chooses an interface by. Find tries Names first, in their order, then Regexps, then
// CanReach, and takes the first interface that matches and can be used.
type Criteria struct {
	Names    []string         // --iface: names of interfaces, or addresses they hold
	Regexps  []*regexp.Regexp // --iface-regex: each matched with addresses, then with names
	CanReach netip.Addr       // --iface-can-reach: the interface of the route to it
}

// empty reports whether the criteria match no interface.
func (c Criteria) empty() bool {
	return len(c.Names) == 0 && len(c.Regexps) == 0 && !c.CanReach.IsValid()
}

// A Selector holds the operator's criteria for the uplink. Without any, Find takes the interface that has PublicIP
// (PublicIPv6 if IPv4 is off), else the interface of the default route.
type Selector struct {
	Criteria // of the interface, which has addresses of both families

	// IPv6 (--iface-v6, --iface-regex-v6, --iface-can-reach-v6) is where IPv6 has an interface of its own. The criteria
	// above are then for IPv4 alone. Empty: both families have one interface.
	IPv6 Criteria

	// PublicIP and PublicIPv6 (--public-ip, --public-ipv6) are the addresses that peers use instead of the interface's
	// own addresses.
	PublicIP, PublicIPv6 netip.Addr

	// Prefer are the addresses of the Uplink in use, and those that this node published before a restart. If an interface
	// has several usable addresses, Find takes the first of these: the kernel lists a new IPv6 address before the older
	// ones, and keepalived's may be the first on the link. A new address should not change the node's.
	Prefer []netip.Addr

	// Overlay reports whether a device belongs to the overlay network; nil: none does. A pattern or a route never selects
	// such a device, since an overlay cannot run over itself.
	Overlay func(device string) bool

	suffix string // of the names of the flags that the criteria come from
}

// PublicIPFlags are the flags that set Selector.PublicIP and PublicIPv6.
var PublicIPFlags = family.Pair[string]{IPv4: "--public-ip", IPv6: "--public-ipv6"}

func (s Selector) publicIPs() family.Pair[netip.Addr] {
	return family.Pair[netip.Addr]{IPv4: s.PublicIP, IPv6: s.PublicIPv6}
}

// Apart reports whether IPv6 has criteria of its own: the interfaces of the two families are then found, and get lost,
// independently of each other.
func (s Selector) Apart() bool { return !s.IPv6.empty() }

// ofIPv6 returns the selector of an uplink of IPv6 alone, where IPv6 has criteria of its own.
func (s Selector) ofIPv6() Selector {
	s.Criteria, s.IPv6, s.suffix = s.IPv6, Criteria{}, "-v6"
	return s
}

// An Uplink is where peers reach this node: the Link of each family. Usually both families have one interface. The Link
// of a family that is off is zero.
type Uplink family.Pair[Link]

// A Link is an interface, with its addresses of one family.
type Link struct {
	Name  string
	Index int
	MTU   int    // bytes
	MAC   string // "0e:aa:bb:cc:dd:ee"; empty if the device has none, such as wg0

	Addr     netip.Addr     // the interface's own address
	PublicIP netip.Addr     // the address that peers use: that of the Selector, else Addr
	Prefixes []netip.Prefix // the prefixes on the link, sorted
}

// Of returns the Link of one family.
func (u Uplink) Of(f family.Family) Link { return family.Pair[Link](u).Of(f) }

// Links returns the Link of each family that is on, IPv4's first.
func (u Uplink) Links() []Link {
	return family.Valid(family.Pair[Link](u))
}

// IsValid reports whether the Link is that of a family that is on.
func (l Link) IsValid() bool { return l.Name != "" }

// Apart reports whether the two families have different interfaces.
func (u Uplink) Apart() bool {
	return u.IPv4.IsValid() && u.IPv6.IsValid() && u.IPv4.Name != u.IPv6.Name
}

// Names returns "eth0", or "eth0 and eth1" if the families have different interfaces.
func (u Uplink) Names() string {
	if u.Apart() {
		return u.IPv4.Name + " and " + u.IPv6.Name
	}
	return cmp.Or(u.IPv4.Name, u.IPv6.Name)
}

// MTU returns the smallest MTU of the interfaces, in bytes: packets of that size can leave in any family.
func (u Uplink) MTU() int {
	mtu := 0
	for _, l := range u.Links() {
		if mtu == 0 || l.MTU < mtu {
			mtu = l.MTU
		}
	}
	return mtu
}

// Addrs returns the interfaces' own addresses.
func (u Uplink) Addrs() family.Pair[netip.Addr] {
	return family.Pair[netip.Addr]{IPv4: u.IPv4.Addr, IPv6: u.IPv6.Addr}
}

// PublicIPs returns the addresses that peers use.
func (u Uplink) PublicIPs() family.Pair[netip.Addr] {
	return family.Pair[netip.Addr]{IPv4: u.IPv4.PublicIP, IPv6: u.IPv6.PublicIP}
}

// CheckPublicIPs returns an error if the node's public addresses are not the interfaces' own, as behind NAT.
func (u Uplink) CheckPublicIPs() error {
	for _, l := range u.Links() {
		if l.Addr != l.PublicIP {
			return fmt.Errorf("%s, which is not an address of %s (that is %s): leave out %s",
				l.PublicIP, l.Name, l.Addr, PublicIPFlags.Of(family.Of(l.PublicIP)))
		}
	}
	return nil
}

// reserved4 is IPv4's class E, which no host has (RFC 1112, section 4); 255.255.255.255 is in it.
var reserved4 = netip.MustParsePrefix("240.0.0.0/4")

// CheckPeer returns an error if an address cannot be that of a host that u sends packets to. A link-local address can be
// only where u has no other.
func (u Uplink) CheckPeer(peer netip.Addr) error {
	l, what := u.Of(family.Of(peer)), ""
	switch {
	case peer.IsUnspecified() || peer.Is4() && netip.PrefixFrom(netip.IPv4Unspecified(), 8).Contains(peer):
		what = "no host's address"
	case peer.IsLoopback():
		what = "a loopback address"
	case peer.IsMulticast():
		what = "a multicast address"
	case reserved4.Contains(peer):
		what = "an address that no host has"
	case peer.IsLinkLocalUnicast() && !l.Addr.IsLinkLocalUnicast():
		what = "a link-local address, and " + l.Name + " has others"
	}
	for _, p := range l.Prefixes {
		if peer.Is4() && p.Contains(peer) && p.Bits() < 31 && (peer == p.Masked().Addr() || peer == broadcast(p)) {
			what = "the broadcast address or the base of " + p.Masked().String()
		}
	}
	if what != "" {
		return fmt.Errorf("%s is %s", peer, what)
	}
	return nil
}

// broadcast returns the last address of an IPv4 prefix.
func broadcast(p netip.Prefix) netip.Addr {
	a := p.Addr().As4()
	n := binary.BigEndian.Uint32(a[:]) | ^uint32(0)>>p.Bits()
	binary.BigEndian.PutUint32(a[:], n)
	return netip.AddrFrom4(a)
}

// Equal reports whether u and v have the same values.
func (u Uplink) Equal(v Uplink) bool { return u.IPv4.equal(v.IPv4) && u.IPv6.equal(v.IPv6) }

func (l Link) equal(m Link) bool {
	return l.Name == m.Name && l.Index == m.Index && l.MTU == m.MTU && l.MAC == m.MAC &&
		l.Addr == m.Addr && l.PublicIP == m.PublicIP && slices.Equal(l.Prefixes, m.Prefixes)
}

// OnLink reports whether a peer's address is on the link of its family, so that packets need no gateway.
func (u Uplink) OnLink(peer netip.Addr) bool {
	return slices.ContainsFunc(u.Of(family.Of(peer)).Prefixes, func(p netip.Prefix) bool { return p.Contains(peer) })
}

// String returns a text for the log: "eth0 198.18.0.1 (known to peers as 203.0.113.7), 2001:db8::1, mtu 1500", or, with
// different interfaces, "eth0 198.18.0.1, mtu 1500; eth1 2001:db8::1, mtu 1400".
func (u Uplink) String() string {
	if u.Apart() {
		return Uplink{IPv4: u.IPv4}.String() + "; " + Uplink{IPv6: u.IPv6}.String()
	}
	var parts []string
	for _, l := range u.Links() {
		text := l.Addr.String()
		if l.Addr != l.PublicIP {
			text += fmt.Sprintf(" (known to peers as %s)", l.PublicIP)
		}
		parts = append(parts, text)
	}
	return fmt.Sprintf("%s %s, mtu %d", u.Names(), strings.Join(parts, ", "), u.MTU())
}

// ErrSettling means that an address is about to be usable: duplicate address detection (RFC 4862) runs for it, which
// takes seconds. Changes signals the end.
var ErrSettling = errors.New("an address is about to be usable")

// settlingError is an ErrSettling with a text of its own.
type settlingError struct{ error }

func (settlingError) Is(target error) bool { return target == ErrSettling }

// Find returns the uplink in the calling thread's network namespace. Its interface, or the one of each family, must be up
// and have a usable address of each family that is on: of global scope, and neither link-local, temporary, deprecated,
// tentative nor a duplicate. An address that the operator names may be temporary, deprecated or of a smaller scope.
//
// An error is one line that names the criteria and the interfaces of the host. Find may succeed later, when Changes has
// signalled; it is ErrSettling if that takes only seconds.
func Find(sel Selector, ipv4, ipv6 bool) (Uplink, error) {
	h, err := readHost(sel, ipv4)
	if err != nil {
		return Uplink{}, fmt.Errorf("reading the interfaces: %w", err)
	}
	return h.chooseEach(sel, ipv4, ipv6)
}
