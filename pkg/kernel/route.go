package kernel

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/pkg/rtnl"
)

// A Route is a route with our RouteProtocol.
type Route struct {
	Table  uint32 // zero: the main table
	Dst    netip.Prefix
	Via    netip.Addr // zero: none
	Dev    string
	Onlink bool   // Via is on Dev's link whatever the addresses say
	Metric uint32 // zero: the kernel's default, 0 for IPv4 and 1024 for IPv6

	Blackhole bool // drops what it matches; no Via, no Dev
}

func (r Route) Key() Key {
	return Key{Kind: KindRoute, Dst: keyPrefix(r.Dst), ID: r.Table, Metric: r.Metric}
}
func (r Route) device() string { return r.Dev }
func (r Route) Undo() string   { return r.command("del", RouteProtocol) }
func (r Route) String() string { return r.command("replace", RouteProtocol) }

func (r Route) command(verb string, protocol uint8) string {
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
		fmt.Fprintf(&b, " dev %s", plain.Shell(r.Dev))
	}
	if r.Onlink {
		b.WriteString(" onlink")
	}
	if r.Metric != 0 {
		fmt.Fprintf(&b, " metric %d", r.Metric)
	}
	if r.Table != 0 {
		fmt.Fprintf(&b, " table %d", r.Table)
	}
	fmt.Fprintf(&b, " proto %d", protocol)
	return b.String()
}

// defaultMetricIPv6 is the metric of IPv6 routes that were added without one (IP6_RT_PRIO_USER, linux/ipv6_route.h).
const defaultMetricIPv6 = 1024

// routeBody is a struct rtmsg with attributes. To remove a route, the request names destination, metric, gateway and
// protocol, so that the kernel removes no route of another program with the same key. A route through a nexthop must
// name the nexthop, and nothing that the nexthop implies.
func routeBody(o Object, dev int, via uint32, add bool) []byte {
	protocol := uint8(RouteProtocol)
	r, ok := o.(Route)
	if !ok {
		f := o.(foreign)
		r, protocol = f.Route, f.protocol
	}
	kind, flags := uint8(unix.RTN_UNICAST), uint32(0)
	if r.Blackhole {
		kind = unix.RTN_BLACKHOLE
	}
	if r.Onlink && add && via == 0 {
		flags = unix.RTNH_F_ONLINK
	}
	scope := uint8(unix.RT_SCOPE_UNIVERSE)
	if !r.Via.IsValid() && !r.Blackhole && r.Dst.Addr().Is4() {
		scope = unix.RT_SCOPE_LINK
	}
	if !add {
		kind, scope = unix.RTN_UNSPEC, unix.RT_SCOPE_NOWHERE // wildcards
	}
	table := uint8(MainTable)
	if r.Table != 0 {
		table = uint8(min(r.Table, unix.RT_TABLE_COMPAT)) // larger numbers are in the attribute
	}
	b := []byte{family(r.Dst.Addr()), uint8(r.Dst.Bits()), 0, 0, table, protocol, scope, kind}
	b = binary.NativeEndian.AppendUint32(b, flags)
	b = appendAttr(b, unix.RTA_DST, r.Dst.Addr().AsSlice())
	if via != 0 {
		b = appendAttr32(b, attrNexthop, via)
	} else {
		if r.Via.IsValid() {
			b = appendAttr(b, unix.RTA_GATEWAY, r.Via.AsSlice())
		}
		if dev != 0 {
			b = appendAttr32(b, unix.RTA_OIF, uint32(dev))
		}
	}
	if r.Metric != 0 {
		b = appendAttr32(b, unix.RTA_PRIORITY, r.Metric)
	}
	if r.Table != 0 {
		b = appendAttr32(b, unix.RTA_TABLE, r.Table)
	}
	return b
}

func decodeRoute(body []byte, devices devices) decoded {
	if len(body) < unix.SizeofRtMsg {
		return decoded{}
	}
	fam, bits, tos, table, protocol, kind := body[0], int(body[1]), body[3], uint32(body[4]), body[5], body[7]
	var d decoded
	flags := binary.NativeEndian.Uint32(body[8:])
	r := Route{Onlink: flags&unix.RTNH_F_ONLINK != 0}
	var src netip.Addr
	dst := netip.IPv4Unspecified()
	if fam == unix.AF_INET6 {
		dst = netip.IPv6Unspecified()
	}
	plain := true // one next hop, and a Route can say everything about it
	rtnl.EachAttr(body[unix.SizeofRtMsg:], func(kind uint16, value []byte) {
		switch kind {
		case unix.RTA_DST:
			dst, _ = netip.AddrFromSlice(value)
		case unix.RTA_GATEWAY:
			r.Via, _ = netip.AddrFromSlice(value)
		case unix.RTA_PREFSRC:
			src, _ = netip.AddrFromSlice(value)
		case unix.RTA_OIF:
			d.dev = devices.name(int(binary.NativeEndian.Uint32(value)))
		case unix.RTA_PRIORITY:
			r.Metric = binary.NativeEndian.Uint32(value)
		case unix.RTA_TABLE:
			table = binary.NativeEndian.Uint32(value)
		case attrNexthop:
			d.via = binary.NativeEndian.Uint32(value)
		case unix.RTA_MULTIPATH, unix.RTA_ENCAP, unix.RTA_VIA:
			plain = false
		}
	})
	// The kernel keeps routes for packets of one type of service apart from those for all packets, which ours are.
	if table == unix.RT_TABLE_LOCAL || flags&unix.RTM_F_CLONED != 0 || !dst.IsValid() || tos != 0 {
		return decoded{}
	}
	other := uint8(0) // a kind that we never make
	switch kind {
	case unix.RTN_UNICAST:
		r.Dev = d.dev
	case unix.RTN_BLACKHOLE:
		r.Blackhole = true
	case unix.RTN_UNREACHABLE, unix.RTN_PROHIBIT, unix.RTN_THROW:
		other = kind
	default:
		return decoded{}
	}
	if fam == unix.AF_INET6 && r.Metric == defaultMetricIPv6 {
		r.Metric = 0
	}
	r.Dst = netip.PrefixFrom(dst, bits)
	if table != MainTable {
		r.Table = table
	}
	d.Object = r
	if !plain || protocol != RouteProtocol || other != 0 {
		// It has the key of a route that may be desired, but is another route.
		connected := plain && r.Dev != "" && !r.Via.IsValid() && d.via == 0
		d.Object = foreign{r, protocol, other, connected, src}
	}
	return d
}

// ownsRoute tells whether a route is ours: it carries our protocol, or another program put it on our device, or
// upstream flanneld left it before this process started.
func (r *Reconciler) ownsRoute(o Object) bool {
	f, ok := o.(foreign)
	switch {
	case !ok:
		return r.ownsMarked(o.(Route))
	case f.protocol == RouteProtocol:
		return r.ownsMarked(f.Route)
	case f.protocol == unix.RTPROT_KERNEL, f.Table != 0: // what others do in their own tables is their business
		return false
	}
	return r.ownsDevice(f.Dev) || !r.applied && f.protocol == unix.RTPROT_BOOT && f.Via.IsValid() && r.insideNetworks(f.Dst)
}

// ownsMarked tells whether a route with our protocol is ours, rather than another network's on this host.
func (r *Reconciler) ownsMarked(route Route) bool {
	return r.ownsDevice(route.Dev) || r.isWithin(route.Dst)
}

// isWithin tells whether a prefix is in the networks that this host's network has, or had.
func (r *Reconciler) isWithin(p netip.Prefix) bool {
	return r.within == nil || slices.ContainsFunc(r.within, func(n netip.Prefix) bool {
		return n.Bits() <= p.Bits() && n.Contains(p.Addr())
	})
}

func dumpRoutes(*Reconciler) (requests [][]byte) {
	for _, fam := range []uint8{unix.AF_INET, unix.AF_INET6} {
		requests = append(requests, append([]byte{fam}, make([]byte, unix.SizeofRtMsg-1)...))
	}
	return requests
}

// routeNotified follows up on a notification of a route through a device that is in use.
func (r *Reconciler) routeNotified(d decoded, gone bool) {
	if f, ok := d.Object.(foreign); ok && !gone && !f.Via.IsValid() && !f.Blackhole {
		r.retryFailed() // what failed because there was no route to the gateway on the device's link
	}
}
