package kernel

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/plain"
)

// An FDBEntry is a permanent entry of a VTEP's forwarding database: frames to MAC go to the host Dst.
type FDBEntry struct {
	Dev string
	MAC MAC
	Dst netip.Addr
}

func (f FDBEntry) Key() Key       { return Key{Kind: KindFDB, Dev: f.Dev, MAC: f.MAC} }
func (f FDBEntry) device() string { return f.Dev }
func (f FDBEntry) Undo() string {
	return fmt.Sprintf("bridge fdb del %s dev %s dst %s self", f.MAC, plain.Shell(f.Dev), f.Dst)
}
func (f FDBEntry) String() string {
	return fmt.Sprintf("bridge fdb replace %s dev %s dst %s self permanent", f.MAC, plain.Shell(f.Dev), f.Dst)
}

// fdbBody is a struct ndmsg with attributes.
func fdbBody(o Object, dev int, _ uint32, _ bool) []byte {
	f := o.(FDBEntry)
	b := ndmsg(unix.AF_BRIDGE, dev, unix.NUD_PERMANENT, unix.NTF_SELF)
	b = appendAttr(b, unix.NDA_DST, f.Dst.AsSlice())
	return appendAttr(b, unix.NDA_LLADDR, f.MAC[:])
}

func decodeFDB(body []byte, devices devices) decoded {
	n, ok := parseEntry(body, true, devices)
	if !ok || n.flags&unix.NTF_SELF == 0 || n.mac == (MAC{}) {
		return decoded{}
	}
	return n.decoded(FDBEntry{Dev: n.dev, MAC: n.mac, Dst: n.dst})
}

// dumpFDB asks for the FDB entries of our devices. The kernel filters FDB entries by device only when it is asked
// with the older struct ifinfomsg (rtnl_fdb_dump, net/core/rtnetlink.c).
func dumpFDB(r *Reconciler) (requests [][]byte) {
	for index := range r.ownDevices() {
		request := make([]byte, unix.SizeofIfInfomsg)
		request[0] = unix.AF_BRIDGE
		binary.NativeEndian.PutUint32(request[4:], uint32(index))
		requests = append(requests, request)
	}
	return requests
}
