// Package kernel makes the kernel's links, addresses, routes, neighbours and
// FDB entries what they are wanted to be, and keeps them so. It is the only
// code that writes them.
package kernel

import (
	"encoding"
	"fmt"
	"net"
	"net/netip"
	"strings"
)

// RouteProtocol marks the routes that this daemon writes (rtm_protocol,
// linux/rtnetlink.h). Numbers above RTPROT_STATIC (4) are user space's own;
// 70 is 'F' and in nobody's /etc/iproute2/rt_protos.
const RouteProtocol = 70

// An Object is something that the kernel is wanted to hold: a Link, Addr,
// Neighbor, FDBEntry, Route or Policy. Objects are values and compare with ==.
type Object interface {
	// Key identifies the object in the kernel. Two objects with one key
	// cannot be there together.
	Key() Key
	// String returns the ip or bridge command that brings the object about.
	String() string
	// Undo returns the command that removes it.
	Undo() string
	// device is the name of the device that the object lives on.
	device() string
}

// Kind tells one type of object from another. Objects are applied in the order
// of their kinds, and removed in the opposite one.
type Kind uint8

const (
	KindLink Kind = iota
	KindAddr
	KindNeighbor
	KindFDB
	KindNexthop
	KindRoute
	KindPolicy
	kinds // how many there are
)

// Key identifies an object. Which fields count depends on the kind.
type Key struct {
	Kind   Kind
	Dev    string       // all but routes and nexthops; of policies: "out 10.5.1.0/24", direction and source
	Prefix netip.Prefix // addresses, neighbours (as /32 or /128), nexthops (their number), routes, policies (where to)
	MAC    MAC          // FDB entries
	Metric uint32       // routes
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
	if err != nil {
		return err
	}
	if len(hw) != len(m) {
		return fmt.Errorf("%s is not an Ethernet address", hw)
	}
	*m = MAC(hw)
	return nil
}

// A Link is a device that is ours: created if missing, replaced if of the wrong
// kind, and up.
type Link struct {
	Name string
	MAC  MAC // zero: any
	MTU  int // in bytes
	Type LinkType

	// TXChecksumOff has the kernel compute the checksums of what it sends,
	// rather than leave it to the hardware. False: as it is.
	TXChecksumOff bool

	down bool // read from the kernel: it is there, but not up
}

// A LinkType is what makes a device the sort of device it is. It cannot be
// changed once the device exists: VXLAN, TUN, IPIP or WireGuard.
type LinkType interface {
	String() string // as it follows "type" in "ip link add"
	lower() string  // the device that it sits on, "" if none
}

// VXLAN is the type of a VTEP (RFC 7348).
type VXLAN struct {
	VNI      int
	Port     int        // UDP, of the peers as well as our own
	Local    netip.Addr // outer source address
	Dev      string     // the uplink
	Learning bool       // learn peers' MACs from what they send
	GBP      bool       // group based policy extension
}

func (v VXLAN) lower() string { return v.Dev }

func (v VXLAN) String() string {
	s := fmt.Sprintf("vxlan id %d local %s dev %s dstport %d", v.VNI, v.Local, v.Dev, v.Port)
	if !v.Learning {
		s += " nolearning"
	}
	if v.GBP {
		s += " gbp"
	}
	return s
}

func (l Link) Key() Key       { return Key{Kind: KindLink, Dev: l.Name} }
func (l Link) device() string { return l.Name }
func (l Link) Undo() string   { return "ip link del " + l.Name }
func (l Link) String() string {
	var b strings.Builder
	if _, ok := l.Type.(TUN); ok {
		fmt.Fprintf(&b, "ip tuntap add %s mode %v && ip link set %s mtu %d", l.Name, l.Type, l.Name, l.MTU)
		if !l.down {
			b.WriteString(" up")
		}
		return b.String()
	}
	fmt.Fprintf(&b, "ip link add %s", l.Name)
	if l.MAC != (MAC{}) {
		fmt.Fprintf(&b, " address %s", l.MAC)
	}
	fmt.Fprintf(&b, " mtu %d", l.MTU)
	if !l.down {
		b.WriteString(" up")
	}
	fmt.Fprintf(&b, " type %v", l.Type)
	if l.TXChecksumOff {
		fmt.Fprintf(&b, " && ethtool -K %s tx-checksum-ip-generic off", l.Name)
	}
	return b.String()
}

// An Addr is an address on one of our own devices.
type Addr struct {
	Dev    string
	Prefix netip.Prefix // the address itself, with its prefix length
}

func (a Addr) Key() Key       { return Key{Kind: KindAddr, Dev: a.Dev, Prefix: a.Prefix} }
func (a Addr) device() string { return a.Dev }
func (a Addr) Undo() string   { return fmt.Sprintf("ip addr del %s dev %s", a.Prefix, a.Dev) }
func (a Addr) String() string {
	s := fmt.Sprintf("ip addr replace %s dev %s", a.Prefix, a.Dev)
	if a.Prefix.Addr().Is6() {
		s += " nodad" // nobody else can hold it, and it must serve at once
	}
	return s
}

// A Neighbor is a permanent ARP or NDP entry on one of our own devices.
type Neighbor struct {
	Dev string
	IP  netip.Addr
	MAC MAC
}

func (n Neighbor) Key() Key {
	return Key{Kind: KindNeighbor, Dev: n.Dev, Prefix: netip.PrefixFrom(n.IP, n.IP.BitLen())}
}
func (n Neighbor) device() string { return n.Dev }
func (n Neighbor) Undo() string   { return fmt.Sprintf("ip neigh del %s dev %s", n.IP, n.Dev) }
func (n Neighbor) String() string {
	return fmt.Sprintf("ip neigh replace %s lladdr %s dev %s nud permanent", n.IP, n.MAC, n.Dev)
}

// An FDBEntry is a permanent entry of a VTEP's forwarding database: frames to
// MAC go to the host Dst.
type FDBEntry struct {
	Dev string
	MAC MAC
	Dst netip.Addr
}

func (f FDBEntry) Key() Key       { return Key{Kind: KindFDB, Dev: f.Dev, MAC: f.MAC} }
func (f FDBEntry) device() string { return f.Dev }
func (f FDBEntry) Undo() string {
	return fmt.Sprintf("bridge fdb del %s dev %s dst %s self", f.MAC, f.Dev, f.Dst)
}
func (f FDBEntry) String() string {
	return fmt.Sprintf("bridge fdb replace %s dev %s dst %s self permanent", f.MAC, f.Dev, f.Dst)
}

// A Route is a route of the main table, with our RouteProtocol.
type Route struct {
	Dst    netip.Prefix
	Via    netip.Addr // zero: none
	Dev    string
	Onlink bool   // Via is on Dev's link whatever the addresses say
	Metric uint32 // zero: the kernel's default, 0 for IPv4 and 1024 for IPv6

	Blackhole bool // drops what it matches; no Via, no Dev
}

func (r Route) Key() Key       { return Key{Kind: KindRoute, Prefix: r.Dst, Metric: r.Metric} }
func (r Route) device() string { return r.Dev }
func (r Route) Undo() string   { return r.command("del") }
func (r Route) String() string { return r.command("replace") }

func (r Route) command(verb string) string {
	var b strings.Builder
	b.WriteString("ip ")
	if r.Dst.Addr().Is6() {
		b.WriteString("-6 ")
	}
	fmt.Fprintf(&b, "route %s ", verb)
	if r.Blackhole {
		b.WriteString("blackhole ")
	}
	b.WriteString(r.Dst.String())
	if r.Via.IsValid() {
		fmt.Fprintf(&b, " via %s", r.Via)
	}
	if r.Dev != "" {
		fmt.Fprintf(&b, " dev %s", r.Dev)
	}
	if r.Onlink {
		b.WriteString(" onlink")
	}
	if r.Metric != 0 {
		fmt.Fprintf(&b, " metric %d", r.Metric)
	}
	fmt.Fprintf(&b, " proto %d", RouteProtocol)
	return b.String()
}
