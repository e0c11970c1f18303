package kernel

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/rtnl"
)

// encode returns the netlink request that brings an object about (add), or
// removes it. dev is the number of its device, via that of the nexthop that a
// route goes through, 0 if none. Links are not among the objects it knows: they
// take more than one message.
func encode(o Object, dev int, via uint32, add bool) request {
	r := request{flags: unix.NLM_F_CREATE | unix.NLM_F_REPLACE}
	var undo uint16
	switch o := o.(type) {
	case Addr:
		r.kind, undo, r.body = unix.RTM_NEWADDR, unix.RTM_DELADDR, addrBody(o, dev)
	case Neighbor:
		r.kind, undo, r.body = unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH, neighborBody(o, dev)
	case FDBEntry:
		r.kind, undo, r.body = unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH, fdbBody(o, dev)
	case Route:
		r.kind, undo, r.body = unix.RTM_NEWROUTE, unix.RTM_DELROUTE, routeBody(o, dev, via, add)
	case nexthop:
		r.kind, undo, r.body = unix.RTM_NEWNEXTHOP, unix.RTM_DELNEXTHOP, nexthopBody(o, dev, add)
	case Policy:
		r.kind, undo, r.body = nl.XFRM_MSG_UPDPOLICY, nl.XFRM_MSG_DELPOLICY, policyBody(o, add)
	case foreign:
		return encode(o.Route, dev, via, add)
	default:
		panic(fmt.Sprintf("kernel: no message for a %T", o))
	}
	if !add {
		r.kind, r.flags = undo, 0
	}
	return r
}

func family(a netip.Addr) uint8 {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// addrBody is a struct ifaddrmsg with attributes.
func addrBody(a Addr, dev int) []byte {
	ip := a.Prefix.Addr()
	flags := uint8(0)
	if ip.Is6() {
		flags = unix.IFA_F_NODAD
	}
	b := []byte{family(ip), uint8(a.Prefix.Bits()), flags, unix.RT_SCOPE_UNIVERSE}
	b = binary.NativeEndian.AppendUint32(b, uint32(dev))
	b = appendAttr(b, unix.IFA_LOCAL, ip.AsSlice())
	return appendAttr(b, unix.IFA_ADDRESS, ip.AsSlice())
}

// neighborBody is a struct ndmsg with attributes; so is fdbBody.
func neighborBody(n Neighbor, dev int) []byte {
	b := ndmsg(family(n.IP), dev, unix.NUD_PERMANENT, 0)
	b = appendAttr(b, unix.NDA_DST, n.IP.AsSlice())
	return appendAttr(b, unix.NDA_LLADDR, n.MAC[:])
}

func fdbBody(f FDBEntry, dev int) []byte {
	b := ndmsg(unix.AF_BRIDGE, dev, unix.NUD_PERMANENT, unix.NTF_SELF)
	b = appendAttr(b, unix.NDA_DST, f.Dst.AsSlice())
	return appendAttr(b, unix.NDA_LLADDR, f.MAC[:])
}

func ndmsg(family uint8, dev int, state uint16, flags uint8) []byte {
	b := []byte{family, 0, 0, 0}
	b = binary.NativeEndian.AppendUint32(b, uint32(dev))
	b = binary.NativeEndian.AppendUint16(b, state)
	return append(b, flags, 0)
}

// routeBody is a struct rtmsg with attributes. To remove a route, its
// destination and metric say enough, and they still do where a fellow daemon
// has another protocol or gateway there: what is removed is what has our key.
// A route through a nexthop must name that, and nothing that it implies.
func routeBody(r Route, dev int, via uint32, add bool) []byte {
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
	protocol := uint8(RouteProtocol)
	if !add {
		kind, scope, protocol = unix.RTN_UNSPEC, unix.RT_SCOPE_NOWHERE, unix.RTPROT_UNSPEC // wildcards
	}
	b := []byte{family(r.Dst.Addr()), uint8(r.Dst.Bits()), 0, 0, unix.RT_TABLE_MAIN, protocol, scope, kind}
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
	return b
}

// decoded is an object as the kernel holds it, and what tells whether it could
// be ours.
type decoded struct {
	Object          // nil: something that we never make
	protocol uint8  // of a route
	dev      string // also of a blackhole, which the kernel may put on lo
	via      uint32 // the nexthop that a route goes through, 0 if none
}

// decode reads the body of an RTM_NEW* or RTM_DEL* message of an address,
// neighbour, FDB entry, nexthop or route. name gives the name of a device, "" if gone.
// What cannot be one of our objects decodes to a nil Object.
func decode(kind uint16, body []byte, name func(int) string) decoded {
	switch kind {
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		return decodeAddr(body, name)
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		return decodeNeighbor(body, name)
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		return decodeRoute(body, name)
	case unix.RTM_NEWNEXTHOP, unix.RTM_DELNEXTHOP:
		return decodeNexthop(body, name)
	}
	return decoded{}
}

func decodeAddr(body []byte, name func(int) string) decoded {
	if len(body) < unix.SizeofIfAddrmsg {
		return decoded{}
	}
	d := decoded{dev: name(int(binary.NativeEndian.Uint32(body[4:])))}
	var local, address netip.Addr
	rtnl.EachAttr(body[unix.SizeofIfAddrmsg:], func(kind uint16, value []byte) {
		switch kind {
		case unix.IFA_LOCAL:
			local, _ = netip.AddrFromSlice(value)
		case unix.IFA_ADDRESS:
			address, _ = netip.AddrFromSlice(value)
		}
	})
	if !local.IsValid() {
		local = address // IPv6 has the latter only, except on point-to-point links
	}
	if d.dev == "" || !local.IsValid() || local.IsLinkLocalUnicast() {
		return d // a link-local address is the kernel's own
	}
	d.Object = Addr{Dev: d.dev, Prefix: netip.PrefixFrom(local, int(body[1]))}
	return d
}

func decodeNeighbor(body []byte, name func(int) string) decoded {
	if len(body) < unix.SizeofNdMsg {
		return decoded{}
	}
	d := decoded{dev: name(int(binary.NativeEndian.Uint32(body[4:])))}
	state, flags := binary.NativeEndian.Uint16(body[8:]), body[10]
	var dst netip.Addr
	var mac MAC
	rtnl.EachAttr(body[unix.SizeofNdMsg:], func(kind uint16, value []byte) {
		switch kind {
		case unix.NDA_DST:
			dst, _ = netip.AddrFromSlice(value)
		case unix.NDA_LLADDR:
			copy(mac[:], value)
		}
	})
	switch {
	case d.dev == "" || !dst.IsValid() || flags&unix.NTF_PROXY != 0:
	case body[0] == unix.AF_BRIDGE:
		// The state of what somebody deletes or lets age is not PERMANENT.
		if flags&unix.NTF_SELF != 0 && mac != (MAC{}) {
			d.Object = FDBEntry{Dev: d.dev, MAC: mac, Dst: dst}
		}
	case !dst.IsMulticast():
		d.Object = Neighbor{Dev: d.dev, IP: dst, MAC: mac}
	}
	if state&unix.NUD_PERMANENT == 0 && d.Object != nil {
		d.Object = transient{d.Object}
	}
	return d
}

// transient is a neighbour or FDB entry that the kernel made, may change and
// will drop: never the object that is wanted, and never one to clear away.
type transient struct{ Object }

func decodeRoute(body []byte, name func(int) string) decoded {
	if len(body) < unix.SizeofRtMsg {
		return decoded{}
	}
	fam, bits, table, kind := body[0], int(body[1]), uint32(body[4]), body[7]
	d := decoded{protocol: body[5]}
	flags := binary.NativeEndian.Uint32(body[8:])
	r := Route{Onlink: flags&unix.RTNH_F_ONLINK != 0}
	dst := netip.IPv4Unspecified()
	if fam == unix.AF_INET6 {
		dst = netip.IPv6Unspecified()
	}
	plain := true // one next hop, which we can tell in full
	rtnl.EachAttr(body[unix.SizeofRtMsg:], func(kind uint16, value []byte) {
		switch kind {
		case unix.RTA_DST:
			dst, _ = netip.AddrFromSlice(value)
		case unix.RTA_GATEWAY:
			r.Via, _ = netip.AddrFromSlice(value)
		case unix.RTA_OIF:
			d.dev = name(int(binary.NativeEndian.Uint32(value)))
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
	if table != unix.RT_TABLE_MAIN || flags&unix.RTM_F_CLONED != 0 || !dst.IsValid() {
		return decoded{}
	}
	switch kind {
	case unix.RTN_UNICAST:
		r.Dev = d.dev
	case unix.RTN_BLACKHOLE:
		r.Blackhole = true
	default:
		return decoded{}
	}
	if fam == unix.AF_INET6 && r.Metric == defaultMetricIPv6 {
		r.Metric = 0
	}
	r.Dst = netip.PrefixFrom(dst, bits)
	d.Object = r
	if !plain || d.protocol != RouteProtocol {
		// It holds the place of a route that we may want, but is not it.
		d.Object = foreign{r, d.protocol}
	}
	return d
}

// foreign is a route that somebody else wrote, with a key that ours may have.
type foreign struct {
	Route
	protocol uint8
}

// connects tells whether it is a route to a device's own link, through which
// gateways can be reached.
func (d decoded) connects() bool {
	f, ok := d.Object.(foreign)
	return ok && !f.Via.IsValid() && !f.Blackhole
}

// defaultMetricIPv6 is what the kernel gives to a route that names no metric
// (IP6_RT_PRIO_USER, linux/ipv6_route.h).
const defaultMetricIPv6 = 1024
