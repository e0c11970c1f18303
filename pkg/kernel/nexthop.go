package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/pkg/rtnl"
)

// A nexthop is a nexthop object of the kernel (ip-nexthop(8), since 5.3): a gateway with a number, and routes can
// name the number instead of the gateway. Each gateway of IPv4 routes gets a nexthop, because the kernel files plain
// IPv4 routes by device alone, and searches all of a device's routes for each that is added (fib_find_info,
// net/ipv4/fib_semantics.c): 20000 routes take ten times as long. IPv6 does not search, and needs no nexthops.
//
// Nexthops are best effort: a route is as right without one, and plain routes are left as they are. A nexthop is
// claimed together with its route, added when its route is set, and removed when no route claims it. Where it cannot
// be had, for whatever reason, the route is plain.
type nexthop struct {
	id     uint32
	via    netip.Addr
	dev    string
	onlink bool

	foreign bool // another program's, of which we know only the number
}

// nexthopOf returns the nexthop that a route could go through. Its number is the gateway's address, so that the
// number is the same after a restart. The numbers that the kernel or a routing daemon assigns begin at 1.
func nexthopOf(o Object) (nexthop, bool) {
	r, ok := o.(Route)
	if !ok || !r.Via.Is4() || r.Via.IsUnspecified() {
		return nexthop{}, false
	}
	ip := r.Via.As4()
	return nexthop{id: binary.BigEndian.Uint32(ip[:]), via: r.Via, dev: r.Dev, onlink: r.Onlink}, true
}

func (n nexthop) Key() Key       { return Key{Kind: KindNexthop, ID: n.id} }
func (n nexthop) device() string { return n.dev }
func (n nexthop) Undo() string   { return fmt.Sprintf("ip nexthop del id %d", n.id) }
func (n nexthop) String() string {
	s := fmt.Sprintf("ip nexthop replace id %d via %s dev %s", n.id, n.via, plain.Shell(n.dev))
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
func nexthopBody(o Object, dev int, _ uint32, add bool) []byte {
	n := o.(nexthop)
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

func decodeNexthop(body []byte, devices devices) decoded {
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
			n.dev = devices.name(int(binary.NativeEndian.Uint32(value)))
		case unix.NHA_GROUP, unix.NHA_BLACKHOLE, unix.NHA_ENCAP, attrNexthopFDB:
			n.foreign = true
		}
	})
	if n.foreign {
		n = nexthop{id: n.id, foreign: true}
	}
	return decoded{Object: n, dev: n.dev}
}

// ownsNexthop tells whether a nexthop is ours. Where several networks may be on this host, a nexthop on the uplink that
// an earlier process left stays: another network may use it, and without routes it does nothing.
func (r *Reconciler) ownsNexthop(o Object) bool {
	n := o.(nexthop)
	e := r.entries.Get(n.Key())
	return !n.foreign && (r.within == nil || r.ownsDevice(n.dev) || e != nil && e.claimed)
}

// probeNexthops returns an error if the kernel has no nexthop objects.
func probeNexthops(s *socket) error {
	err := s.dump(unix.RTM_GETNEXTHOP, make([]byte, unix.SizeofNhmsg), func(uint16, []byte) {})
	if err != nil && !errors.Is(err, errInterrupted) {
		return fmt.Errorf("nexthop objects need Linux 5.3: %w", err)
	}
	return nil
}

// dumpNexthops also finds out whether our routes may go through nexthops. It is called before routes are read.
func dumpNexthops(r *Reconciler) [][]byte {
	r.nexthops = routesShowGateway()
	return [][]byte{make([]byte, unix.SizeofNhmsg)}
}

// routesShowGateway tells whether a route through a nexthop shows its gateway and device to those who read the route.
// An operator can turn this off (net.ipv4.nexthop_compat_mode is 0). Then other programs could not see where our
// routes go, and we could not either.
func routesShowGateway() bool {
	// Kernels without the setting always show them.
	text, err := os.ReadFile("/proc/sys/net/ipv4/nexthop_compat_mode")
	return err != nil || strings.TrimSpace(string(text)) != "0"
}

// fewGateways is how many gateways the kernel can search fast enough.
const fewGateways = 256

// useNexthops tells whether routes that are set now go through nexthops. While there are few gateways they do not:
// plain routes stay when the uplink loses its carrier, and commands that name their gateway can remove them.
func (r *Reconciler) useNexthops() bool { return r.nexthops && r.wanted[KindNexthop] > r.fewGateways }

// skipNexthop tells that a nexthop is not to be added: it would not be used, or another program has its number.
func (r *Reconciler) skipNexthop(e *entry) bool {
	n, ok := e.have.(nexthop)
	return !r.useNexthops() || ok && n.foreign
}

// nexthop returns the entry of the nexthop that an entry's route could go through, nil if there is none.
func (r *Reconciler) nexthop(e *entry) *entry {
	if n, ok := nexthopOf(e.want); ok {
		return r.entries.Get(n.Key())
	}
	return nil
}

// viaNexthop returns the number of the nexthop that an entry's route is to go through, 0 for a plain route.
func (r *Reconciler) viaNexthop(e *entry) uint32 {
	if n := r.nexthop(e); n != nil && n.have != nil && r.useNexthops() {
		if own, _ := nexthopOf(e.want); own == n.have {
			return own.id
		}
	}
	return 0
}
