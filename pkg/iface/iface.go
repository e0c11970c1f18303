// Package iface finds the interface, and its addresses, that peers reach this
// node on, and tells when that may have changed.
package iface

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/flanneld/flanneld/pkg/family"
)

// A Selector says how the operator wants the uplink chosen. Names are tried
// first, in their order, then Regexps, then CanReach: the first interface that
// matches and can serve is taken. With none of the three it is the interface
// that holds PublicIP (PublicIPv6 where IPv4 is off), else the one of the
// default route.
type Selector struct {
	Names    []string         // --iface: names of interfaces, or addresses they hold
	Regexps  []*regexp.Regexp // --iface-regex: each matched with addresses, then with names
	CanReach netip.Addr       // --iface-can-reach: the interface of the route to it

	// PublicIP and PublicIPv6 (--public-ip, --public-ipv6) are what peers are
	// to use in place of the interface's own addresses.
	PublicIP, PublicIPv6 netip.Addr

	// Prefer are addresses to stay with where an interface has several that
	// would do: those of the Uplink in use. The kernel lists a new IPv6 address
	// before the older ones, which is no reason for a node to move.
	Prefer []netip.Addr

	// Overlay reports whether a device is one of the overlay network's own; nil:
	// none is. A pattern or a route never selects such a device, since an overlay
	// cannot run over itself.
	Overlay func(device string) bool
}

// PublicIPFlags are the flags that set Selector.PublicIP and PublicIPv6.
var PublicIPFlags = family.Pair[string]{IPv4: "--public-ip", IPv6: "--public-ipv6"}

func (s Selector) publicIPs() family.Pair[netip.Addr] {
	return family.Pair[netip.Addr]{IPv4: s.PublicIP, IPv6: s.PublicIPv6}
}

// An Uplink is the interface that peers reach this node on. Addresses are zero
// where the family is off.
type Uplink struct {
	Name  string
	Index int
	MTU   int    // bytes
	MAC   string // "0e:aa:bb:cc:dd:ee"; empty where the device has none, as wg0

	IPv4, IPv6           netip.Addr     // the interface's own
	PublicIP, PublicIPv6 netip.Addr     // what peers use: as asked for, else the above
	Prefixes             []netip.Prefix // that are on the link, both families, sorted
}

// Addrs returns the interface's own addresses.
func (u Uplink) Addrs() family.Pair[netip.Addr] {
	return family.Pair[netip.Addr]{IPv4: u.IPv4, IPv6: u.IPv6}
}

// PublicIPs returns the addresses that peers use.
func (u Uplink) PublicIPs() family.Pair[netip.Addr] {
	return family.Pair[netip.Addr]{IPv4: u.PublicIP, IPv6: u.PublicIPv6}
}

// CheckPublicIPs returns an error where peers cannot use the node's public
// addresses since they are not the interface's own, as behind NAT.
func (u Uplink) CheckPublicIPs() error {
	for f, own := range u.Addrs().Each() {
		if public := u.PublicIPs().Of(f); own != public {
			return fmt.Errorf("%s, which is not an address of %s (that is %s): leave out %s", public, u.Name, own, PublicIPFlags.Of(f))
		}
	}
	return nil
}

// Equal tells whether nothing differs.
func (u Uplink) Equal(v Uplink) bool {
	return u.Name == v.Name && u.Index == v.Index && u.MTU == v.MTU && u.MAC == v.MAC &&
		u.IPv4 == v.IPv4 && u.IPv6 == v.IPv6 && u.PublicIP == v.PublicIP && u.PublicIPv6 == v.PublicIPv6 &&
		slices.Equal(u.Prefixes, v.Prefixes)
}

// OnLink tells whether a peer's address is on the uplink's own link, so that no
// gateway lies between.
func (u Uplink) OnLink(peer netip.Addr) bool {
	return slices.ContainsFunc(u.Prefixes, func(p netip.Prefix) bool { return p.Contains(peer) })
}

// String is for the log: "eth0 198.18.0.1, 2001:db8::1 (known to peers as
// 203.0.113.7), mtu 1500".
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

// Find looks for the uplink in the calling thread's network namespace. It must
// be up and have a usable address of each family that is on: of global scope,
// and neither link-local, temporary, deprecated, tentative nor a duplicate. An
// address that the operator names may be temporary, deprecated or of a smaller
// scope.
//
// An error is one line that says what was asked for and what there is; Find
// may succeed later, when Changes has signalled.
func Find(sel Selector, ipv4, ipv6 bool) (Uplink, error) {
	h, err := look(sel, ipv4)
	if err != nil {
		return Uplink{}, fmt.Errorf("looking for the uplink: %w", err)
	}
	return h.choose(sel, ipv4, ipv6)
}
