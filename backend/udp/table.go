package udp

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"github.com/gaissmai/bart"
	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/subnet"
)

// A table holds which peer has an address, and which peers may send to this node. A table is never changed, only
// replaced, so that moving packets takes no lock.
type table struct {
	own   [2]netip.Prefix
	peers bart.Table[*endpoint]       // by their subnets
	known map[netip.AddrPort]struct{} // the addresses of peers
}

// An endpoint is where the proxy of a peer listens, in the form of the kernel.
type endpoint struct {
	addr   netip.AddrPort
	name   unix.RawSockaddrAny
	size   uint32 // of name
	family int    // 0 for IPv4, 1 for IPv6
}

// newTable returns the table of the peers of a node.
func newTable(own subnet.Lease, peers map[subnet.Subnets]*subnet.Lease, port int) *table {
	t := &table{own: [2]netip.Prefix{own.IPv4, own.IPv6}, known: map[netip.AddrPort]struct{}{}}
	for _, l := range peers {
		for _, s := range backend.Sides(own, *l).Each() {
			if s.On {
				e := newEndpoint(netip.AddrPortFrom(s.PublicIP, uint16(port)))
				t.peers.Insert(s.Peer, e)
				t.known[e.addr] = struct{}{}
			}
		}
	}
	return t
}

// lookup returns the peer that has an address; nil: no peer.
func (t *table) lookup(dst netip.Addr) *endpoint {
	e, _ := t.peers.Lookup(dst)
	return e
}

// isPeer reports whether the proxy of a peer sends from an address.
func (t *table) isPeer(from netip.AddrPort) bool {
	_, ok := t.known[from]
	return ok
}

// isOurs reports whether an address is in a subnet of this node.
func (t *table) isOurs(dst netip.Addr) bool {
	return t.own[0].Contains(dst) || t.own[1].Contains(dst)
}

func newEndpoint(addr netip.AddrPort) *endpoint {
	e := &endpoint{addr: addr}
	if ip := addr.Addr(); ip.Is4() {
		name := (*unix.RawSockaddrInet4)(unsafe.Pointer(&e.name))
		name.Family, name.Addr, e.size = unix.AF_INET, ip.As4(), unix.SizeofSockaddrInet4
		binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&name.Port))[:], addr.Port())
	} else {
		name := (*unix.RawSockaddrInet6)(unsafe.Pointer(&e.name))
		name.Family, name.Addr, e.size, e.family = unix.AF_INET6, ip.As16(), unix.SizeofSockaddrInet6, 1
		binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&name.Port))[:], addr.Port())
	}
	return e
}

// addrPort returns the address that the kernel wrote.
func addrPort(name *unix.RawSockaddrAny) netip.AddrPort {
	switch name.Addr.Family {
	case unix.AF_INET:
		four := (*unix.RawSockaddrInet4)(unsafe.Pointer(name))
		port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&four.Port))[:])
		return netip.AddrPortFrom(netip.AddrFrom4(four.Addr), port)
	case unix.AF_INET6:
		six := (*unix.RawSockaddrInet6)(unsafe.Pointer(name))
		port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&six.Port))[:])
		return netip.AddrPortFrom(netip.AddrFrom16(six.Addr), port)
	}
	return netip.AddrPort{}
}
