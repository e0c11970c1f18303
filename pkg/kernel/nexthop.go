package kernel

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/rtnl"
)

// A nexthop is a nexthop object of the kernel (ip-nexthop(8), since 5.3): a
// gateway with a number, through which a route goes by naming the number. The
// routes of IPv4 get one each, since the kernel files plain ones by device
// alone and searches the pile for each that is added (fib_find_info,
// net/ipv4/fib_semantics.c): 20000 take ten times as long. IPv6 has no such
// pile and no need for them.
//
// A nexthop is a means only: a route is as right without one, and plain routes
// are left as they are. It is claimed with its route, made when its route is
// set, and removed when nobody claims it. Where it cannot be had, for whatever
// reason, the route is plain.
type nexthop struct {
	id     uint32
	via    netip.Addr
	dev    string
	onlink bool

	foreign bool // somebody else's, of whom we know no more than the number
}

// nexthopOf returns the nexthop that a route could go through. Its number is
// the gateway's address, so that it is the same after a restart. Numbers that
// the kernel or a routing daemon give out begin at 1.
func nexthopOf(o Object) (nexthop, bool) {
	r, ok := o.(Route)
	if !ok || !r.Via.Is4() || r.Via.IsUnspecified() {
		return nexthop{}, false
	}
	ip := r.Via.As4()
	return nexthop{id: binary.BigEndian.Uint32(ip[:]), via: r.Via, dev: r.Dev, onlink: r.Onlink}, true
}

func (n nexthop) Key() Key {
	var ip [4]byte
	binary.BigEndian.PutUint32(ip[:], n.id)
	return Key{Kind: KindNexthop, Prefix: netip.PrefixFrom(netip.AddrFrom4(ip), 32)}
}
func (n nexthop) device() string { return n.dev }
func (n nexthop) Undo() string   { return fmt.Sprintf("ip nexthop del id %d", n.id) }
func (n nexthop) String() string {
	s := fmt.Sprintf("ip nexthop replace id %d via %s dev %s", n.id, n.via, n.dev)
	if n.onlink {
		s += " onlink"
	}
	return s + fmt.Sprintf(" proto %d", RouteProtocol)
}

// What golang.org/x/sys/unix lacks of linux/rtnetlink.h and linux/nexthop.h.
const (
	attrNexthop    = 30 // RTA_NH_ID
	attrNexthopFDB = 11 // NHA_FDB
)

// nexthopBody is a struct nhmsg with attributes.
func nexthopBody(n nexthop, dev int, add bool) []byte {
	if !add {
		return appendAttr32(make([]byte, unix.SizeofNhmsg), unix.NHA_ID, n.id)
	}
	flags := uint32(0)
	if n.onlink {
		flags = unix.RTNH_F_ONLINK
	}
	b := []byte{unix.AF_INET, unix.RT_SCOPE_UNIVERSE, RouteProtocol, 0}
	b = binary.NativeEndian.AppendUint32(b, flags)
	b = appendAttr32(b, unix.NHA_ID, n.id)
	b = appendAttr(b, unix.NHA_GATEWAY, n.via.AsSlice())
	return appendAttr32(b, unix.NHA_OIF, uint32(dev))
}

func decodeNexthop(body []byte, name func(int) string) decoded {
	if len(body) < unix.SizeofNhmsg {
		return decoded{}
	}
	n := nexthop{
		onlink:  binary.NativeEndian.Uint32(body[4:])&unix.RTNH_F_ONLINK != 0,
		foreign: body[0] != unix.AF_INET || body[2] != RouteProtocol,
	}
	rtnl.EachAttr(body[unix.SizeofNhmsg:], func(kind uint16, value []byte) {
		switch kind {
		case unix.NHA_ID:
			n.id = binary.NativeEndian.Uint32(value)
		case unix.NHA_GATEWAY:
			n.via, _ = netip.AddrFromSlice(value)
		case unix.NHA_OIF:
			n.dev = name(int(binary.NativeEndian.Uint32(value)))
		case unix.NHA_GROUP, unix.NHA_BLACKHOLE, unix.NHA_ENCAP, attrNexthopFDB:
			n.foreign = true
		}
	})
	if n.foreign {
		n = nexthop{id: n.id, foreign: true}
	}
	return decoded{Object: n, dev: n.dev}
}

// nexthopsKnown tells whether the kernel has nexthop objects.
func nexthopsKnown(s *socket) bool {
	err := s.dump(unix.RTM_GETNEXTHOP, make([]byte, unix.SizeofNhmsg), func(uint16, []byte) {})
	if err != nil && err != errInterrupted {
		klog.V(1).Infof("The kernel has no nexthop objects (it has since 5.3): routes are plain: %v", err)
		return false
	}
	return true
}

// nexthopsTold tells whether a route through a nexthop shows its gateway and
// device to who reads it. Where it does not, by the operator's wish
// (net.ipv4.nexthop_compat_mode is 0), others could not tell where our routes
// go, and nor could we.
func nexthopsTold() bool {
	// Kernels without the setting always show them.
	text, err := os.ReadFile("/proc/sys/net/ipv4/nexthop_compat_mode")
	return err != nil || strings.TrimSpace(string(text)) != "0"
}

// fewGateways is how many gateways the kernel can well search.
const fewGateways = 256

// useNexthops tells whether routes that are set now go through nexthops. As
// long as they are few they do not: plain routes outlive a loss of the uplink's
// carrier, and can be removed by commands that name their gateway.
func (r *Reconciler) useNexthops() bool { return r.nexthops && r.wanted[KindNexthop] > r.fewGateways }
