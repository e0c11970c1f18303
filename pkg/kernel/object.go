// Package kernel, which other programs may import, makes the kernel hold the desired links, addresses, neighbours, FDB
// entries, routes, rules and IPsec policies, and restores them when another program changes them. No other code of this project
// writes them.
package kernel

import (
	"encoding"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/plain"
)

// RouteProtocol marks the routes that this daemon writes (rtm_protocol, linux/rtnetlink.h). Numbers above
// RTPROT_STATIC (4) are for programs like ours; 70 is 'F', and no /etc/iproute2/rt_protos has it.
const RouteProtocol = 70

// An Object is something that the kernel can hold: a Link, Addr, Neighbor, FDBEntry, Route, Rule or Policy. Objects are
// values and compare with ==.
type Object interface {
	// Key identifies the object in the kernel. The kernel cannot hold two objects with one key.
	Key() Key
	// String returns the ip or bridge command that makes the kernel hold the object.
	String() string
	// Undo returns the command that removes the object.
	Undo() string
	// device is the name of the device that the object is on; "": none.
	device() string
}

// Key identifies an object. The kind decides which of the other fields are set.
type Key struct {
	Kind   Kind
	Dir    PolicyDir // policies
	MAC    MAC       // FDB entries
	ID     uint32    // nexthops; the table of rules, and of routes in another table than main
	Metric uint32    // routes; the priority of rules
	Dev    string    // links, addresses, neighbours, FDB entries
	Dst    KeyPrefix // addresses, neighbours (as /32 or /128), routes, rules, policies
	Src    KeyPrefix // policies
}

// A KeyPrefix is a netip.Prefix as part of a Key: it takes 18 bytes instead of 32, and there are tens of thousands of
// keys.
type KeyPrefix struct {
	addr [16]byte
	bits uint8
	is4  bool
}

func keyPrefix(p netip.Prefix) KeyPrefix {
	return KeyPrefix{p.Addr().As16(), uint8(p.Bits()), p.Addr().Is4()}
}

// A MAC is an Ethernet address. Its text is "0e:aa:bb:cc:dd:ee".
type MAC [6]byte

var _ encoding.TextUnmarshaler = (*MAC)(nil)

// String returns the address in colon form.
func (m MAC) String() string { return net.HardwareAddr(m[:]).String() }

// MarshalText returns the address in colon form.
func (m MAC) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText parses any form that net.ParseMAC knows, of six bytes.
func (m *MAC) UnmarshalText(text []byte) error {
	hw, err := net.ParseMAC(string(text))
	if err != nil || len(hw) != len(m) {
		return fmt.Errorf("%s is not an Ethernet address", plain.Quote(text))
	}
	*m = MAC(hw)
	return nil
}

func family(a netip.Addr) uint8 {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
