// Package ipsec carries pods' packets in ESP tunnels of the kernel. charon, of strongSwan, negotiates the keys of the
// tunnels with the peers. See README.md.
package ipsec

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/command"
	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/subnet"
)

// Type is the backend's name in configurations and leases.
const Type = "ipsec"

const leastPSK = 96 // characters

// ESP adds at most (RFC 4303): header 8, IV 16, padding 15, trailer 2, ICV 16, and the outer IP header. UDPEncap adds a
// UDP header.
const (
	overhead  = 8 + 16 + 15 + 2 + 16
	udpHeader = 8
)

func init() {
	backend.Register(backend.Type{Name: Type, New: New, Checks: checks, Cleanup: cleanup})
}

// options are the backend's keys in the configuration. make docs writes the comments of the fields into README.md.
type options struct {
	// pre-shared key of all nodes, at least 96 characters, for example of `openssl rand -hex 48`
	PSK secret

	// send ESP inside UDP port 4500, for networks that do not let ESP through
	UDPEncap bool

	// algorithms of the tunnels, in the format of swanctl.conf
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
	info   backend.Info

	socket                   string         // charon's
	check                    time.Duration  // interval of the checks of charon's state
	startLimit, startTimeout time.Duration  // of a charon that was started
	waits                    *command.Waits // for answers of charon
}

var (
	_ backend.Worker = (*ipsec)(nil)
	_ backend.Differ = (*ipsec)(nil)
)

// New makes the backend.
func New(cfg *subnet.Config, uplink iface.Uplink) (backend.Backend, error) {
	b := &ipsec{options: defaults, uplink: uplink, socket: charonSocket, check: checkEvery, startLimit: startLimit,
		startTimeout: startTimeout, waits: &command.Waits{}}
	if err := backend.Options(cfg, &b.options); err != nil {
		return nil, err
	}
	if n := len(b.PSK); n < leastPSK {
		return nil, fmt.Errorf("PSK has %d characters: it must have at least %d, the same on all nodes, for example of: "+
			"openssl rand -hex 48", n, leastPSK)
	}
	if err := uplink.CheckPublicIPs(); err != nil {
		return nil, fmt.Errorf("peers cannot have a tunnel with %w, or use the wireguard backend across NAT", err)
	}
	around := overhead
	if b.UDPEncap {
		around += udpHeader
	}
	var err error
	headers := func(f family.Family) int { return f.HeaderLen() + around }
	if _, b.info, err = backend.PodMTU(cfg, uplink, 0, headers); err != nil {
		return nil, err
	}
	for _, ip := range family.Valid(uplink.Addrs()) {
		// The ports of charon (RFC 7296, section 2.23) and, without UDPEncap, the ESP packets.
		b.info.Endpoints = append(b.info.Endpoints,
			backend.Endpoint{Addr: ip, Protocol: "udp", Port: 500, Program: "charon"},
			backend.Endpoint{Addr: ip, Protocol: "udp", Port: 4500, Program: "charon"})
		if !b.UDPEncap {
			b.info.Endpoints = append(b.info.Endpoints, backend.Endpoint{Addr: ip, Protocol: "esp"})
		}
	}
	return b, nil
}

func (b *ipsec) Info() backend.Info { return b.info }

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

// A tunnel carries the packets of one family between the pods of two nodes.
type tunnel struct {
	own, peer netip.Prefix
	from, to  netip.Addr
}

// tunnels returns the tunnels to a peer, one for each family that both nodes have.
func (b *ipsec) tunnels(own, peer subnet.Lease) []tunnel {
	var all []tunnel
	for f, s := range backend.Sides(own, peer).Each() {
		if s.On {
			all = append(all, tunnel{own: s.Own, peer: s.Peer, from: b.uplink.Addrs().Of(f), to: s.PublicIP})
		}
	}
	return all
}
