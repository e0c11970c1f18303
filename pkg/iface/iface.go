// Package iface, which other programs may import, finds the interface and the addresses on which peers reach this node,
// and signals when they may have changed.
package iface

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/flanneld/flanneld/pkg/family"
)

// A Selector holds the operator's criteria for the uplink. Find tries Names first, in their order, then Regexps, then
// CanReach, and takes the first interface that matches and can be used. Without these three, Find takes the interface
// that has PublicIP (PublicIPv6 if IPv4 is off), else the interface of the default route.
type Selector struct {
	Names    []string         // --iface: names of interfaces, or addresses they hold
	Regexps  []*regexp.Regexp // --iface-regex: each matched with addresses, then with names
	CanReach netip.Addr       // --iface-can-reach: the interface of the route to it

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
}

// PublicIPFlags are the flags that set Selector.PublicIP and PublicIPv6.
var PublicIPFlags = family.Pair[string]{IPv4: "--public-ip", IPv6: "--public-ipv6"}

func (s Selector) publicIPs() family.Pair[netip.Addr] {
	return family.Pair[netip.Addr]{IPv4: s.PublicIP, IPv6: s.PublicIPv6}
}

// An Uplink is the interface on which peers reach this node. The addresses of a family that is off are zero.
type Uplink struct {
	Name  string
	Index int
	MTU   int    // bytes
	MAC   string // "0e:aa:bb:cc:dd:ee"; empty if the device has none, such as wg0

	IPv4, IPv6           netip.Addr     // the interface's own addresses
	PublicIP, PublicIPv6 netip.Addr     // the addresses that peers use: those of the Selector, else IPv4 and IPv6
	Prefixes             []netip.Prefix // the prefixes on the link, of both families, sorted

	// Settling: another IPv6 address of the interface is about to be usable. Changes signals when it is.
	Settling bool
}

// Addrs returns the interface's own addresses.
func (u Uplink) Addrs() family.Pair[netip.Addr] {
	return family.Pair[netip.Addr]{IPv4: u.IPv4, IPv6: u.IPv6}
}

// PublicIPs returns the addresses that peers use.
func (u Uplink) PublicIPs() family.Pair[netip.Addr] {
	return family.Pair[netip.Addr]{IPv4: u.PublicIP, IPv6: u.PublicIPv6}
}

// CheckPublicIPs returns an error if the node's public addresses are not the interface's own, as behind NAT.
func (u Uplink) CheckPublicIPs() error {
	for f, own := range u.Addrs().Each() {
		if public := u.PublicIPs().Of(f); own != public {
			return fmt.Errorf("%s, which is not an address of %s (that is %s): leave out %s",
				public, u.Name, own, PublicIPFlags.Of(f))
		}
	}
	return nil
}

// reserved4 is IPv4's class E, which no host has (RFC 1112, section 4); 255.255.255.255 is in it.
var reserved4 = netip.MustParsePrefix("240.0.0.0/4")

// CheckPeer returns an error if an address cannot be that of a host that u sends packets to. A link-local address can be
// only where u has no other.
func (u Uplink) CheckPeer(peer netip.Addr) error {
	what := ""
	switch {
	case peer.IsUnspecified() || peer.Is4() && netip.PrefixFrom(netip.IPv4Unspecified(), 8).Contains(peer):
		what = "no host's address"
	case peer.IsLoopback():
		what = "a loopback address"
	case peer.IsMulticast():
		what = "a multicast address"
	case reserved4.Contains(peer):
		what = "an address that no host has"
	case peer.IsLinkLocalUnicast() && !u.Addrs().Of(family.Of(peer)).IsLinkLocalUnicast():
		what = "a link-local address, and " + u.Name + " has others"
	}
	for _, p := range u.Prefixes {
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
func (u Uplink) Equal(v Uplink) bool {
	return u.Name == v.Name && u.Index == v.Index && u.MTU == v.MTU && u.MAC == v.MAC &&
		u.IPv4 == v.IPv4 && u.IPv6 == v.IPv6 && u.PublicIP == v.PublicIP && u.PublicIPv6 == v.PublicIPv6 &&
		slices.Equal(u.Prefixes, v.Prefixes)
}

// OnLink reports whether a peer's address is on the uplink's own link, so that packets need no gateway.
func (u Uplink) OnLink(peer netip.Addr) bool {
	return slices.ContainsFunc(u.Prefixes, func(p netip.Prefix) bool { return p.Contains(peer) })
}

// String returns a text for the log: "eth0 198.18.0.1 (known to peers as 203.0.113.7), 2001:db8::1, mtu 1500".
func (u Uplink) String() string {
	var parts []string
	for f, own := range u.Addrs().Each() {
		switch public := u.PublicIPs().Of(f); {
		case !own.IsValid():
		case own == public:
			parts = append(parts, own.String())
		default:
			parts = append(parts, fmt.Sprintf("%s (known to peers as %s)", own, public))
		}
	}
	return fmt.Sprintf("%s %s, mtu %d", u.Name, strings.Join(parts, ", "), u.MTU)
}

// Find returns the uplink in the calling thread's network namespace. The uplink must be up and have a usable address of
// each family that is on: of global scope, and neither link-local, temporary, deprecated, tentative nor a duplicate. An
// address that the operator names may be temporary, deprecated or of a smaller scope.
//
// An error is one line that names the criteria and the interfaces of the host. Find may succeed later, when Changes has
// signalled.
func Find(sel Selector, ipv4, ipv6 bool) (Uplink, error) {
	h, err := readHost(sel, ipv4)
	if err != nil {
		return Uplink{}, fmt.Errorf("reading the interfaces: %w", err)
	}
	return h.choose(sel, ipv4, ipv6)
}
