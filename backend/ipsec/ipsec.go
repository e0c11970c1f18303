// Package ipsec carries pods' packets in ESP tunnels of the kernel, whose keys
// strongSwan's charon agrees on with the peers. See README.md.
package ipsec

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/subnet"
)

// Type is the backend's name in configurations and leases.
const Type = "ipsec"

const leastPSK = 96 // characters

// What ESP adds at most (RFC 4303): header 8, IV 16, padding 15, trailer 2, ICV
// 16, and the outer IP header. With UDPEncap there is a UDP header, too.
const (
	overhead  = 8 + 16 + 15 + 2 + 16
	udpHeader = 8
)

func init() {
	backend.Register(Type, New)
	backend.RegisterLeftovers(leftovers)
}

// options are the backend's keys in the configuration. What is said of them here
// is what README.md says: make docs writes it there.
type options struct {
	// the key that all nodes share, at least 96 characters: `openssl rand -hex 48`
	PSK secret

	// ESP inside UDP port 4500, where the network does not let ESP through
	UDPEncap bool

	// the algorithms of the tunnels, as in swanctl.conf
	ESPProposal string
}

var defaults = options{ESPProposal: "aes128gcm16-sha256-prfsha256-ecp256"}

// secret is a text that no log shows.
type secret string

func (secret) String() string   { return "…" }
func (secret) GoString() string { return "…" }

type ipsec struct {
	options
	uplink iface.Uplink
	locals []netip.Addr // ends of the tunnels
	mtu    int
	socket string        // charon's
	check  time.Duration // between looks at what charon has
}

// New makes the backend.
func New(cfg *subnet.Config, uplink iface.Uplink) (backend.Backend, error) {
	b := &ipsec{options: defaults, uplink: uplink, socket: charonSocket, check: checkEvery}
	if err := backend.Options(cfg, &b.options); err != nil {
		return nil, err
	}
	if n := len(b.PSK); n < leastPSK {
		return nil, fmt.Errorf("PSK has %d characters: it must have at least %d, the same on all nodes, for example of: openssl rand -hex 48", n, leastPSK)
	}
	for _, f := range []struct {
		pool        subnet.Pool
		flag        string
		own, public netip.Addr
		header      int // outer
		least       int // what a host, or a link, must be able to carry
	}{
		{cfg.IPv4, "--public-ip", uplink.IPv4, uplink.PublicIP, 20, 576},      // RFC 791
		{cfg.IPv6, "--public-ipv6", uplink.IPv6, uplink.PublicIPv6, 40, 1280}, // RFC 8200, section 5
	} {
		if !f.pool.Enabled() {
			continue
		}
		if f.own != f.public {
			return nil, fmt.Errorf("peers cannot have a tunnel with %s, which is not an address of %s (that is %s): "+
				"leave out %s, or use the wireguard backend across NAT", f.public, uplink.Name, f.own, f.flag)
		}
		b.locals = append(b.locals, f.own)
		around := f.header + overhead
		if b.UDPEncap {
			around += udpHeader
		}
		if b.mtu = uplink.MTU - around; b.mtu < f.least { // IPv6's is the smaller one
			return nil, fmt.Errorf("MTU %d of the uplink %s leaves %d for pods: it must be at least %d", uplink.MTU, uplink.Name, b.mtu, f.least+around)
		}
	}
	return b, nil
}

func (b *ipsec) MTU() int { return b.mtu }

func (b *ipsec) Attrs(context.Context, subnet.Attrs) (subnet.Attrs, error) {
	return subnet.Attrs{BackendType: Type}, nil
}

func (b *ipsec) Local(subnet.Lease) []kernel.Object { return nil }

func (b *ipsec) Peer(own, peer subnet.Lease) ([]kernel.Object, error) {
	var objects []kernel.Object
	for _, t := range b.tunnels(own, peer) {
		for _, dir := range []kernel.PolicyDir{kernel.PolicyOut, kernel.PolicyIn, kernel.PolicyFwd} {
			p := kernel.Policy{Dir: dir, Src: t.own, Dst: t.peer, From: t.from, To: t.to}
			if dir != kernel.PolicyOut {
				p.Src, p.Dst, p.From, p.To = p.Dst, p.Src, p.To, p.From
			}
			objects = append(objects, p)
		}
	}
	return objects, nil
}

// A tunnel is what pods' packets between two nodes take.
type tunnel struct {
	own, peer netip.Prefix
	from, to  netip.Addr
}

// tunnels returns those to a peer, one for each family that both nodes have.
func (b *ipsec) tunnels(own, peer subnet.Lease) []tunnel {
	var all []tunnel
	for i, f := range backend.Families(own, peer) {
		if f.On {
			all = append(all, tunnel{
				own: [2]netip.Prefix{own.IPv4, own.IPv6}[i], peer: f.Peer,
				from: [2]netip.Addr{b.uplink.IPv4, b.uplink.IPv6}[i], to: f.PublicIP,
			})
		}
	}
	return all
}

// Endpoints implements backend.Tunnel: charon's ports (RFC 7296, section 2.23)
// and, unless they are in UDP, the packets themselves.
func (b *ipsec) Endpoints() []backend.Endpoint {
	var all []backend.Endpoint
	for _, ip := range b.locals {
		all = append(all, backend.Endpoint{Addr: ip, Protocol: "udp", Port: 500}, backend.Endpoint{Addr: ip, Protocol: "udp", Port: 4500})
		if !b.UDPEncap {
			all = append(all, backend.Endpoint{Addr: ip, Protocol: "esp"})
		}
	}
	return all
}
