package main

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"github.com/flanneld/flanneld/network"
	"github.com/flanneld/flanneld/pkg/family"
)

// A measurement measures the paths from this node to peers.
type measurement struct {
	status  network.Status
	local   map[netip.Addr]bool // of this host
	probers family.Pair[*prober]

	blackhole bool // nodes drop packets to their subnets as long as they have no pods
}

// The kinds of datagrams, which have different ports.
const (
	toHost uint16 = iota
	toOverlay
	toOverlayOwn
	toPods
	fromBridge
)

// addresses returns the addresses of this node and the peer between which the legs of a path are.
func (m measurement) addresses(peer network.Lease, subnet netip.Prefix) (p path) {
	f := family.Of(subnet.Addr())
	for _, ip := range peer.PublicIPs {
		if !p.Underlay.To.IsValid() || f.Has(ip) {
			p.Underlay.To = ip
		}
	}
	var device, bridge netip.Addr
	for _, s := range m.status.Lease.Subnets {
		if f.Has(s.Addr()) && m.local[s.Addr()] {
			device = s.Addr()
		}
		if f.Has(s.Addr()) && m.local[s.Addr().Next()] {
			bridge = s.Addr().Next()
		}
	}
	first, second := subnet.Addr(), subnet.Addr().Next()
	switch {
	case device.IsValid() && bridge.IsValid():
		p.Bridge = leg{From: bridge, To: second}
		fallthrough
	case device.IsValid():
		p.Overlay = leg{From: device, To: first}
	case bridge.IsValid() || len(m.status.Endpoints) == 0: // or else no packet gets into a tunnel
		p.Overlay = leg{From: bridge, To: second}
	}
	return p
}

// paths measures the ways to each of a peer's subnets.
func (m measurement) paths(ctx context.Context, peer network.Lease) []path {
	paths := make([]path, len(peer.Subnets))
	var all sync.WaitGroup
	for i, s := range peer.Subnets {
		all.Go(func() {
			paths[i] = m.addresses(peer, s)
			m.path(ctx, &paths[i], m.probers.Of(family.Of(s.Addr())), m.probers.Of(family.Of(paths[i].Underlay.To)))
		})
	}
	all.Wait()
	return paths
}

// path measures the legs of a path.
func (m measurement) path(ctx context.Context, p *path, over, under *prober) {
	var all sync.WaitGroup
	if p.Underlay.findRoute() {
		all.Go(func() {
			if under.measurePing(ctx, &p.Underlay); p.Underlay.Ping == silent {
				under.measurePorts(ctx, &p.Underlay, toHost)
			}
		})
	}
	if p.Overlay.findRoute() {
		all.Go(func() { over.measurePing(ctx, &p.Overlay) })
		all.Go(func() { over.measurePorts(ctx, &p.Overlay, toOverlay) })
	}
	if p.Bridge.findRoute() {
		all.Go(func() { over.measurePing(ctx, &p.Bridge) })
		all.Go(func() {
			p.Bridge.SeenAs, _ = over.reject(ctx, tries, datagram{from: p.Bridge.From, to: p.Overlay.To, kind: fromBridge})
		})
	}
	all.Wait()
	if p.Underlay.Ping == silent && !p.Underlay.alive() {
		if err := checkNeighbour(p.Underlay.To); err != nil {
			p.Underlay.Ping = outcomeOf(err)
		}
	}
	// Without a tunnel and without a direct route, a router on the way may reply in the place of the peer.
	direct := !p.isBridge(m.status) || p.Overlay.via == p.Underlay.To && !m.blackhole
	switch {
	case !p.Overlay.replies() && p.Overlay.Device != "" && direct:
		over.measureForward(ctx, &p.Overlay, p.Underlay.To)
	case p.Overlay.UDP == silent && p.Overlay.replies():
		over.compareChecksums(ctx, &p.Overlay)
	}
	if p.Overlay.Ping == answered {
		over.measureSize(ctx, &p.Overlay, m.status.MTU)
	}
	if p.Overlay.Carries < p.Overlay.Size && p.Underlay.Ping == answered {
		under.measureSize(ctx, &p.Underlay, m.status.MTU+m.status.Overhead.Of(family.Of(p.Overlay.To)))
	}
	p.Overlay.Heard = over.hears(p.Overlay.To)
}

// measurePing finds whether there is a reply to a small packet.
func (p *prober) measurePing(ctx context.Context, l *leg) {
	rtt, err := p.echo(ctx, l.From, l.To, smallPacket, tries, patience)
	if l.Ping = outcomeOf(err); err == nil {
		l.RTT = rtt
	}
}

// measurePorts finds whether the host refuses packets to closed ports, which it does only if their checksums are right.
func (p *prober) measurePorts(ctx context.Context, l *leg, kind uint16) {
	var tcp sync.WaitGroup
	tcp.Go(func() { l.TCP = outcomeOf(connect(ctx, l.From, l.To)) })
	seen, err := p.reject(ctx, tries, datagram{from: l.From, to: l.To, kind: kind})
	l.UDP, l.SeenAs = outcomeOf(err), seen
	tcp.Wait()
}

// compareChecksums finds whether datagrams get through only if their checksums are computed here. Either kind is sent
// in turn, and not sooner than the limit of the host for ICMP errors allows: or else the limit might hit one kind alone.
func (p *prober) compareChecksums(ctx context.Context, l *leg) {
	for range few {
		_, err := p.reject(ctx, tries, datagram{from: l.From, to: l.To, kind: toOverlayOwn, own: true})
		if l.OwnUDP = outcomeOf(err); err != nil {
			return
		}
		select {
		case <-time.After(2 * patience):
		case <-ctx.Done():
			return
		}
		if seen, err := p.reject(ctx, few, datagram{from: l.From, to: l.To, kind: toOverlay}); err == nil {
			l.UDP, l.SeenAs = answered, seen
			return
		}
	}
}

// measureForward finds whether packets to a pod arrive at its node. They get no further: the node has to forward them,
// and reports that they must not be forwarded, whatever its firewall drops of the packets to the node itself.
func (p *prober) measureForward(ctx context.Context, l *leg, host netip.Addr) {
	second := l.To.Next()
	by := []netip.Addr{l.To, second, host}
	_, err := p.reject(ctx, few, datagram{from: l.From, to: second.Next(), by: by, kind: toPods, oneHop: true})
	l.Forward = outcomeOf(err)
}

// measureSize finds the largest packet that gets through, up to a size, and what becomes of a packet that is one byte
// longer.
func (p *prober) measureSize(ctx context.Context, l *leg, size int) {
	wait := min(patience, patience/4+4*l.RTT)
	l.Size, l.Carries = size, size
	if _, err := p.echo(ctx, l.From, l.To, size, tries, wait); err != nil {
		l.Carries = p.largest(ctx, l.From, l.To, smallPacket, size, wait)
		return
	}
	_, err := p.echo(ctx, l.From, l.To, size+1, few, wait)
	l.OneMore = outcomeOf(err)
}
