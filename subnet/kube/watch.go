package kube

import (
	"cmp"
	"context"
	"hash/maphash"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/subnet"
)

// ownFollower keeps Manager.own.
type ownFollower struct {
	*Manager
	found bool
}

func (f *ownFollower) begin() { f.found = false }

func (f *ownFollower) put(n *fields) {
	f.found = true
	own := &ownNode{subnets: subnetsOf(n.podCIDRs, bothFamilies), annotations: map[string]string{}, conditioned: n.networkUp}
	for _, a := range n.annotations {
		own.annotations[string(a.key)] = string(a.value)
	}
	for _, text := range n.internalIPs {
		if ip, err := netip.ParseAddr(string(text)); err == nil {
			own.addresses = append(own.addresses, ip)
		}
	}
	f.set(own)
}

func (f *ownFollower) drop([]byte) { f.set(nil) }

func (f *ownFollower) end() {
	if !f.found {
		f.set(nil)
	}
}

func (m *Manager) set(own *ownNode) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.own, m.told = own, true
	m.signal()
}

// Watch implements subnet.Manager.
func (m *Manager) Watch(ctx context.Context) <-chan subnet.Update {
	out := make(chan subnet.Update)
	p := &peers{manager: m, byName: map[string]*peer{}, bySubnet: map[subnet.Subnets][]*peer{}, seed: maphash.MakeSeed(), wake: make(chan struct{}, 1)}
	var running sync.WaitGroup
	running.Go(func() { m.follow(ctx, "", "follow the nodes", p) })
	go func() {
		defer close(out)
		defer running.Wait()
		for {
			select {
			case <-p.wake:
			case <-ctx.Done():
				return
			}
			select {
			case out <- p.take():
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}

// peers are all nodes that take part, and what of them the reader has not been
// told yet.
type peers struct {
	manager  *Manager
	seed     maphash.Seed
	byName   map[string]*peer
	bySubnet map[subnet.Subnets][]*peer // of nodes that claim the same, the one that counts first
	round    uint                       // of the whole state
	whole    bool                       // has been told once

	mu   sync.Mutex
	news subnet.Update
	wake chan struct{} // there is news
}

// A peer is what is kept of a Node.
type peer struct {
	name    string
	sum     uint64 // of the fields that it was made from
	round   uint   // that saw it last
	created uint64
	lease   subnet.Lease // zero: the node takes no part
}

func (p *peers) begin() { p.round++ }

func (p *peers) put(n *fields) {
	sum := n.sum(p.seed)
	if old := p.byName[string(n.name)]; old != nil { // no allocation: heartbeats end here
		old.round = p.round
		if old.sum == sum {
			return
		}
	}
	annotations := map[string]string{}
	for _, a := range n.annotations {
		annotations[string(a.key)] = string(a.value)
	}
	now := &peer{name: string(n.name), sum: sum, round: p.round, created: n.created}
	if annotations[managed] == "true" {
		now.lease = subnet.Lease{Subnets: subnetsOf(n.podCIDRs, p.manager.on), Attrs: attrsOf(annotations)}
		if len(now.lease.Each()) == 0 || len(now.lease.Attrs.PublicIPs()) == 0 {
			now.lease = subnet.Lease{} // it has not got so far yet
		}
	}
	p.replace(p.byName[now.name], now)
}

func (p *peers) drop(name []byte) {
	if old := p.byName[string(name)]; old != nil {
		p.replace(old, nil)
	}
}

func (p *peers) end() {
	for _, n := range p.byName {
		if n.round != p.round {
			p.replace(n, nil) // went while nobody could tell
		}
	}
	if p.whole {
		return
	}
	p.whole = true
	p.mu.Lock()
	defer p.mu.Unlock()
	p.news = subnet.Update{Snapshot: true, Leases: make(map[subnet.Subnets]subnet.Lease, len(p.bySubnet))}
	for _, claims := range p.bySubnet {
		p.news.Put(claims[0].lease)
	}
	p.call()
}

// replace puts a node in the place of what was known of it; either may be nil.
func (p *peers) replace(old, now *peer) {
	if old != nil {
		delete(p.byName, old.name)
		p.claim(old.lease.Subnets, func(claims []*peer) []*peer {
			return slices.DeleteFunc(claims, func(c *peer) bool { return c == old })
		})
	}
	if now != nil {
		p.byName[now.name] = now
		p.claim(now.lease.Subnets, func(claims []*peer) []*peer {
			claims = append(claims, now)
			slices.SortFunc(claims, func(a, b *peer) int {
				return cmp.Or(cmp.Compare(a.created, b.created), strings.Compare(a.name, b.name))
			})
			if len(claims) > 1 {
				klog.Errorf("Nodes %s and %s both have the podCIDR %s: it counts as %s's, the older one's. Delete one of the Nodes, or correct its spec.podCIDR",
					claims[0].name, claims[1].name, now.lease.Subnets, claims[0].name)
			}
			return claims
		})
	}
}

// claim changes who claims some subnets, and notes the news that makes.
func (p *peers) claim(s subnet.Subnets, change func([]*peer) []*peer) {
	if len(s.Each()) == 0 {
		return
	}
	var before *peer
	if claims := p.bySubnet[s]; len(claims) > 0 {
		before = claims[0]
	}
	claims := change(p.bySubnet[s])
	if len(claims) == 0 {
		delete(p.bySubnet, s)
	} else {
		p.bySubnet[s] = claims
	}
	if !p.whole {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case len(claims) == 0:
		p.news.Delete(s)
	case claims[0] != before:
		p.news.Put(claims[0].lease)
	default:
		return
	}
	p.call()
}

// call tells the reader that there is news. The caller holds p.mu.
func (p *peers) call() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

func (p *peers) take() subnet.Update {
	p.mu.Lock()
	defer p.mu.Unlock()
	news := p.news
	p.news = subnet.Update{}
	return news
}
