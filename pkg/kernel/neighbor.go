package kernel

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/pkg/rtnl"
)

// A Neighbor is a permanent ARP or NDP entry on one of our own devices.
type Neighbor struct {
	Dev string
	IP  netip.Addr
	MAC MAC
}

func (n Neighbor) Key() Key {
	return Key{Kind: KindNeighbor, Dev: n.Dev, Dst: keyPrefix(netip.PrefixFrom(n.IP, n.IP.BitLen()))}
}
func (n Neighbor) device() string { return n.Dev }
func (n Neighbor) Undo() string {
	return fmt.Sprintf("ip neigh del %s dev %s", n.IP, plain.Shell(n.Dev))
}
func (n Neighbor) String() string {
	return fmt.Sprintf("ip neigh replace %s lladdr %s dev %s nud permanent", n.IP, n.MAC, plain.Shell(n.Dev))
}

// transient is a neighbour or FDB entry that the kernel made, may change and will drop. It is never equal to a
// desired object, and never ours.
type transient struct{ Object }

// neighborBody is a struct ndmsg with attributes.
func neighborBody(o Object, dev int, _ uint32, _ bool) []byte {
	n := o.(Neighbor)
	b := ndmsg(family(n.IP), dev, unix.NUD_PERMANENT, 0)
	b = appendAttr(b, unix.NDA_DST, n.IP.AsSlice())
	return appendAttr(b, unix.NDA_LLADDR, n.MAC[:])
}

func ndmsg(family uint8, dev int, state uint16, flags uint8) []byte {
	b := []byte{family, 0, 0, 0}
	b = binary.NativeEndian.AppendUint32(b, uint32(dev))
	b = binary.NativeEndian.AppendUint16(b, state)
	return append(b, flags, 0)
}

func decodeNeighbor(body []byte, devices devices) decoded {
	n, ok := parseEntry(body, false, devices)
	if !ok || n.dst.IsMulticast() {
		return decoded{}
	}
	return n.decoded(Neighbor{Dev: n.dev, IP: n.dst, MAC: n.mac})
}

// An ndEntry is what a struct ndmsg with attributes says, of a neighbour or an FDB entry.
type ndEntry struct {
	dev   string
	dst   netip.Addr
	mac   MAC
	state uint16
	flags uint8
}

// parseEntry reads an FDB entry (fdb) or a neighbour. It returns false for another, and for what cannot be ours.
func parseEntry(body []byte, fdb bool, devices devices) (n ndEntry, ok bool) {
	if len(body) < unix.SizeofNdMsg || (body[0] == unix.AF_BRIDGE) != fdb {
		return n, false
	}
	n.dev = devices.name(int(binary.NativeEndian.Uint32(body[4:])))
	n.state, n.flags = binary.NativeEndian.Uint16(body[8:]), body[10]
	rtnl.EachAttr(body[unix.SizeofNdMsg:], func(kind uint16, value []byte) {
		switch kind {
		case unix.NDA_DST:
			n.dst, _ = netip.AddrFromSlice(value)
		case unix.NDA_LLADDR:
			copy(n.mac[:], value)
		}
	})
	return n, n.dev != "" && n.dst.IsValid() && n.flags&unix.NTF_PROXY == 0
}

// decoded returns the object of an entry. An entry that a program deletes or lets age is not permanent any more.
func (n ndEntry) decoded(o Object) decoded {
	if n.state&unix.NUD_PERMANENT == 0 {
		o = transient{o}
	}
	return decoded{Object: o, dev: n.dev}
}

// ownsEntry tells whether a neighbour or an FDB entry is ours.
func (r *Reconciler) ownsEntry(o Object) bool {
	_, transient := o.(transient)
	return !transient && r.ownsDevice(o.device())
}

// dumpNeighbors asks for the neighbours on our devices.
func dumpNeighbors(r *Reconciler) (requests [][]byte) {
	for index := range r.ownDevices() {
		for _, fam := range []uint8{unix.AF_INET, unix.AF_INET6} {
			requests = append(requests, appendAttr32(ndmsg(fam, 0, 0, 0), unix.NDA_IFINDEX, uint32(index)))
		}
	}
	return requests
}
