package wireguard

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/subnet"
)

const (
	// natKeepalive is the keepalive interval through NAT, unless the configuration has an interval. Routers forget a
	// mapping after 30 seconds without a packet, or later.
	natKeepalive = 25 * time.Second

	// sessionWait is how long a session with a peer takes to begin before its absence is logged.
	sessionWait = 30 * time.Second
)

// A nat is what the addresses of this node and of a peer say about NAT between them. A host with a private address
// reaches public addresses through NAT alone, and nobody reaches a private address from outside.
type nat int

const (
	noNAT   nat = iota // as far as the addresses say
	ownNAT             // this node is behind NAT: only this node can start a session
	peerNAT            // the peer is behind NAT: only the peer can start a session, and its lease does not say from where
	bothNAT            // both have private addresses, in a cluster that has nodes with public addresses, too
)

// shared is the range of providers whose customers share public addresses (RFC 6598).
var shared = netip.MustParsePrefix("100.64.0.0/10")

// isPublic reports whether an address can be reached from everywhere.
func isPublic(ip netip.Addr) bool {
	return ip.IsValid() && !ip.IsPrivate() && !ip.IsLinkLocalUnicast() && !shared.Contains(ip)
}

// natTo returns what is between this node and a peer with this endpoint. mixed: there are peers with public endpoints.
func (w *wireguard) natTo(endpoint netip.Addr, mixed bool) nat {
	f := family.Of(endpoint)
	own, published := w.uplink.Addrs().Of(f), w.uplink.PublicIPs().Of(f)
	switch {
	case !own.IsValid():
		return noNAT
	case isPublic(endpoint):
		if isPublic(own) {
			return noNAT
		}
		return ownNAT
	case isPublic(own) || isPublic(published):
		return peerNAT
	case mixed:
		return bothNAT
	}
	return noNAT
}

// hasPublic reports whether a device has a peer with a public endpoint.
func (w *wireguard) hasPublic(t tunnel, leases map[subnet.Subnets]*subnet.Lease) bool {
	for _, l := range leases {
		if isPublic(w.publicIP(t, l.Attrs)) {
			return true
		}
	}
	return false
}

// keepaliveTo returns the keepalive interval for a peer that is where its lease says.
func (w *wireguard) keepaliveTo(n nat) time.Duration {
	switch {
	case w.PersistentKeepaliveInterval != nil:
		return time.Duration(*w.PersistentKeepaliveInterval) * time.Second
	case n == ownNAT:
		return natKeepalive
	}
	return 0
}

// noSession returns why there may be no session with a peer, and what to do.
func (p peer) noSession(port int) string {
	switch p.nat {
	case ownNAT:
		return fmt.Sprintf("this node is behind NAT, so that only this node can start the session, and %s does not "+
			"answer: UDP to this port must be let through there. If the peer is behind NAT, too, its router must forward the "+
			"port to it", p.endpoint)
	case peerNAT:
		return fmt.Sprintf("the peer is behind NAT, since %s is a private address, so that only the peer can start the "+
			"session, and nothing has arrived: UDP to port %d must be let through to this node, at an address that the peer "+
			"can reach", p.endpoint.Addr(), port)
	case bothNAT:
		return fmt.Sprintf("both nodes have private addresses: unless their networks are connected, both are behind NAT, "+
			"and neither can reach the other. Connect the networks; or forward UDP port %d of one router to its node, and start "+
			"flanneld there with --public-ip and the router's address", port)
	}
	return ""
}
