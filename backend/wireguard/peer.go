package wireguard

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/subnet"
)

// A config is the desired configuration of a device.
type config struct {
	Private   secret // exported, so that fmt calls String
	keyFile   string // which holds it
	port      int
	PSK       secret
	automatic bool // keepalives are sent through NAT: the configuration does not say otherwise
	peers     map[wgtypes.Key]peer
}

// A peer is the desired configuration of one node.
type peer struct {
	endpoint  netip.AddrPort // in its lease; packets may come from another endpoint
	allowed   []netip.Prefix // the destinations sent to the peer and the sources accepted from it; sorted
	nat       nat            // between this node and the endpoint
	keepalive time.Duration  // where the peer is at the endpoint
}

// config returns the desired configuration of a device for this node and its peers. Invalid leases are left out; Peer
// returns their errors.
func (w *wireguard) config(t tunnel, private secret, own subnet.Lease, leases map[subnet.Subnets]*subnet.Lease) config {
	c := config{
		Private: private, keyFile: w.host.KeyFile, port: t.port, PSK: w.PSK,
		automatic: w.PersistentKeepaliveInterval == nil, peers: map[wgtypes.Key]peer{},
	}
	mixed := w.hasPublic(t, leases)
	// Two leases of a node, from times with IPv4 and with both families, may have the same subnet. A device accepts a
	// subnet for one peer; the choice should always be the same.
	holder := map[netip.Prefix]wgtypes.Key{}
	ours := published(own)
	for _, s := range slices.SortedFunc(maps.Keys(leases), func(a, b subnet.Subnets) int {
		return cmp.Or(a.IPv4.Compare(b.IPv4), a.IPv6.Compare(b.IPv6))
	}) {
		key, p, err := w.peerOf(t, own, *leases[s], ours)
		if err != nil || !p.endpoint.IsValid() {
			continue
		}
		for _, a := range p.allowed {
			holder[a] = key
		}
		n := w.natTo(p.endpoint.Addr(), mixed)
		c.peers[key] = peer{endpoint: p.endpoint, nat: n, keepalive: w.keepaliveTo(n)}
	}
	for a, key := range holder {
		p := c.peers[key]
		p.allowed = append(p.allowed, a)
		c.peers[key] = p
	}
	for _, p := range c.peers {
		slices.SortFunc(p.allowed, netip.Prefix.Compare)
	}
	return c
}

// Identities implements backend.Identifier. A device has one peer for a public key. Nodes behind one NAT share a public
// address.
func (w *wireguard) Identities(l subnet.Lease) (identities []string) {
	for _, key := range published(l) {
		if id := "public key " + key.String(); !slices.Contains(identities, id) {
			identities = append(identities, id)
		}
	}
	return identities
}

// published returns the public keys of a lease.
func published(l subnet.Lease) (keys []wgtypes.Key) {
	for _, text := range []json.RawMessage{l.Attrs.BackendData, l.Attrs.BackendV6Data} {
		if d, err := parse(text); err == nil {
			keys = append(keys, d.PublicKey)
		}
	}
	return keys
}

// peerOf returns the desired configuration of a peer, without an endpoint if the nodes have no family in common. ours
// are the keys of this node, which no peer can have.
func (w *wireguard) peerOf(t tunnel, own, l subnet.Lease, ours []wgtypes.Key) (wgtypes.Key, peer, error) {
	var p peer
	var text json.RawMessage
	for i, f := range []struct {
		own, peer netip.Prefix
		data      json.RawMessage
	}{{own.IPv4, l.IPv4, l.Attrs.BackendData}, {own.IPv6, l.IPv6, l.Attrs.BackendV6Data}} {
		if !t.families[i] || !f.own.IsValid() || !f.peer.IsValid() {
			continue
		}
		p.allowed = append(p.allowed, f.peer)
		if len(f.data) > 0 { // with one device for both families, both are the same
			text = f.data
		}
	}
	ip := w.publicIP(t, l.Attrs)
	if len(p.allowed) == 0 || !ip.IsValid() {
		return wgtypes.Key{}, peer{}, nil
	}
	d, err := parse(text)
	if err != nil {
		return wgtypes.Key{}, peer{}, err
	}
	if slices.Contains(ours, d.PublicKey) {
		return wgtypes.Key{}, peer{}, fmt.Errorf("its public key %v is this node's own: delete %s on one of them, "+
			"and start its flanneld again", d.PublicKey, DefaultKeyFile)
	}
	port := d.Port
	if port == 0 {
		port = t.port
	}
	p.endpoint = netip.AddrPortFrom(ip, uint16(port))
	return d.PublicKey, p, nil
}

// publicIP returns the address of a peer for the packets of a device.
func (w *wireguard) publicIP(t tunnel, a subnet.Attrs) netip.Addr {
	four, six := a.PublicIP, a.PublicIPv6
	switch {
	case w.Mode == overIPv4 || w.Mode == separate && t.families[0]:
		return four
	case w.Mode == overIPv6 || w.Mode == separate:
		return six
	}
	// The family that both nodes have. If they have both families: IPv4, unless IPv4 is behind NAT and IPv6 is not, on
	// both sides.
	canFour, canSix := four.IsValid() && w.uplink.IPv4.IsValid(), six.IsValid() && w.uplink.IPv6.IsValid()
	if canSix && (!canFour || four.IsPrivate() && !six.IsPrivate() && !w.uplink.IPv6.Addr.IsPrivate()) {
		return six
	}
	return four
}

// parse reads the backend data of a node.
func parse(text json.RawMessage) (data, error) {
	if len(text) == 0 {
		return data{}, errors.New("the lease has no backend data")
	}
	var d struct {
		PublicKey string
		Port      int
	}
	if err := json.Unmarshal(text, &d); err != nil {
		return data{}, backend.DataError(text, err.Error())
	}
	key, err := wgtypes.ParseKey(d.PublicKey)
	if err != nil || key == (wgtypes.Key{}) {
		return data{}, backend.DataError(text, "PublicKey must be 32 bytes in base64")
	}
	if d.Port < 0 || d.Port > 65535 {
		return data{}, backend.DataError(text, "Port must be 1 to 65535")
	}
	return data{key, d.Port}, nil
}

// MarshalJSON writes the key in base64.
func (d data) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		PublicKey string
		Port      int
	}{d.PublicKey.String(), d.Port})
}
