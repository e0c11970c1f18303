package kube

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strings"
	"time"

	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/subnet"
)

// Watch implements subnet.Manager.
func (m *Manager) Watch(ctx context.Context) <-chan subnet.Update {
	p := newPeers(m)
	go func() {
		defer p.updates.Close()
		m.reflectNodes(ctx, "", "follow the nodes", p)
	}()
	return p.updates.C()
}

// peers are all nodes that take part, and what of them the reader has not been
// told yet. No two leases that it is told of overlap. A reflector fills them; of
// the Nodes themselves nothing is kept.
type peers struct {
	manager *Manager
	byName  map[string]*peer
	subnets claims // podCIDRs
	publics claims // public addresses, as prefixes of full length
	whole   bool   // the whole state has been told once

	// unsettled are the nodes whose claims, or whose rivals', have changed, as
	// they were; nil for one that is new.
	unsettled map[string]*peer

	updates *subnet.Mailbox
}

func newPeers(m *Manager) *peers {
	return &peers{
		manager: m, byName: map[string]*peer{}, unsettled: map[string]*peer{},
		subnets: newClaims(), publics: newClaims(), updates: subnet.NewMailbox(),
	}
}

// A peer is what is kept of a Node.
type peer struct {
	name    string
	created int64        // seconds since 1970
	lease   subnet.Lease // zero: the node takes no part
	counts  bool         // the lease is one that the reader is told of

	conflicts []conflict // with older nodes
}

// older tells which of two nodes is in the right. Seconds are all that is known
// of their ages.
func (n *peer) older(than *peer) bool {
	return cmp.Or(cmp.Compare(n.created, than.created), strings.Compare(n.name, than.name)) < 0
}

var _ cache.ReflectorStore = (*peers)(nil)

// Add implements cache.ReflectorStore.
func (p *peers) Add(n any) error { return p.Update(n) }

// Update implements cache.ReflectorStore.
func (p *peers) Update(n any) error {
	p.put(n.(*Node))
	p.settle()
	return nil
}

// Delete implements cache.ReflectorStore.
func (p *peers) Delete(n any) error {
	if old := p.byName[n.(*Node).Name]; old != nil {
		p.replace(old, nil)
	}
	p.settle()
	return nil
}

// Replace implements cache.ReflectorStore: the whole state, after which a node
// that was there before may be gone.
func (p *peers) Replace(nodes []any, _ string) error {
	there := make(map[string]bool, len(nodes))
	for _, n := range nodes {
		there[n.(*Node).Name] = true
		p.put(n.(*Node))
	}
	for name, n := range p.byName {
		if !there[name] {
			p.replace(n, nil)
		}
	}
	p.settle()
	if p.whole {
		return nil
	}
	p.whole = true
	snapshot := subnet.Update{Snapshot: true, Leases: make(map[subnet.Subnets]subnet.Lease, len(p.byName))}
	for _, n := range p.byName {
		if n.counts {
			snapshot.Put(n.lease)
		}
	}
	p.updates.Put(snapshot)
	return nil
}

// Resync implements cache.ReflectorStore; none is asked for.
func (p *peers) Resync() error { return nil }

// put takes a Node as it is now. Heartbeats end here: they change nothing of the
// lease.
func (p *peers) put(n *Node) {
	prefix := p.manager.options.AnnotationPrefix
	annotation := func(name string) string { return n.Annotations[prefix+name] }
	now := &peer{name: n.Name, created: n.CreationTimestamp.Unix()}
	if annotation(managed) == "true" {
		now.lease = subnet.Lease{Subnets: subnetsOf(n.podCIDRs, p.manager.on), Attrs: attrsOf(annotation)}
		if len(now.lease.Each()) == 0 || len(now.lease.Attrs.PublicIPs()) == 0 {
			now.lease = subnet.Lease{} // it has not got so far yet
		}
	}
	old := p.byName[n.Name]
	if old != nil && old.created == now.created && old.lease.Subnets == now.lease.Subnets && old.lease.Attrs.Equal(now.lease.Attrs) {
		return
	}
	p.replace(old, now)
}

// replace puts a node in the place of what was known of it; either may be nil.
func (p *peers) replace(old, now *peer) {
	if old != nil {
		p.unsettle(old)
		delete(p.byName, old.name)
		for c, claim := range p.claimed(old) {
			c.remove(claim, old)
			c.rivals(claim, old, func(r *peer, _ netip.Prefix) { p.unsettle(r) })
		}
	}
	if now != nil {
		if _, known := p.unsettled[now.name]; !known {
			p.unsettled[now.name] = nil
		}
		p.byName[now.name] = now
		for c, claim := range p.claimed(now) {
			c.add(claim, now)
			c.rivals(claim, now, func(r *peer, _ netip.Prefix) { p.unsettle(r) })
		}
	}
}

// unsettle has a node looked at again.
func (p *peers) unsettle(n *peer) {
	if _, known := p.unsettled[n.name]; !known {
		p.unsettled[n.name] = n
	}
}

// claimed are a node's claims of the families that are on, and where they are
// kept.
func (p *peers) claimed(n *peer) iter.Seq2[*claims, netip.Prefix] {
	return func(yield func(*claims, netip.Prefix) bool) {
		for _, s := range n.lease.Each() {
			if !yield(&p.subnets, s) {
				return
			}
		}
		for _, ip := range n.lease.Attrs.PublicIPs() {
			if on := p.manager.on; ip.Is4() && !on.IPv4.IsValid() || ip.Is6() && !on.IPv6.IsValid() {
				continue
			}
			if !yield(&p.publics, netip.PrefixFrom(ip, ip.BitLen())) {
				return
			}
		}
	}
}

// settle decides anew which of the unsettled nodes count: those without an older
// rival for their subnets. What that changes is news, and conflicts that have
// come or gone are said.
func (p *peers) settle() {
	if len(p.unsettled) == 0 {
		return
	}
	changes := subnet.Update{Since: time.Now()}
	var put []*peer
	for name, before := range p.unsettled {
		// Where nothing but a rival has changed, these two are one.
		now := p.byName[name]
		var was, is peer
		if before != nil {
			was = *before
		}
		if now != nil {
			now.conflicts = p.conflicts(now)
			now.counts = len(now.lease.Each()) > 0 && !slices.ContainsFunc(now.conflicts, func(c conflict) bool { return !c.public })
			is = *now
		}
		p.say(name, was.conflicts, is.conflicts)
		if was.counts && !(is.counts && is.lease.Subnets == was.lease.Subnets) {
			changes.Delete(was.lease.Subnets)
		}
		if is.counts && !(was.counts && is.lease.Subnets == was.lease.Subnets && is.lease.Attrs.Equal(was.lease.Attrs)) {
			put = append(put, now)
		}
	}
	for _, n := range put { // after all deletions: what one node loses, another may get
		changes.Put(n.lease)
	}
	p.unsettled = map[string]*peer{}
	if p.whole {
		p.updates.Put(changes)
	}
}

// conflicts are those of a node with older ones: with the oldest, for each of
// its claims.
func (p *peers) conflicts(n *peer) []conflict {
	var all []conflict
	for c, claim := range p.claimed(n) {
		var oldest *peer
		var overlaps netip.Prefix
		c.rivals(claim, n, func(r *peer, theirs netip.Prefix) {
			if r.older(n) && (oldest == nil || r.older(oldest)) {
				oldest, overlaps = r, theirs
			}
		})
		if oldest != nil {
			all = append(all, conflict{oldest.name, overlaps, claim, c == &p.publics})
		}
	}
	return all
}

// A conflict is that of a node with an older one, which claims the same, or what
// overlaps.
type conflict struct {
	with         string // the older node
	theirs, ours netip.Prefix
	public       bool // they are addresses rather than podCIDRs
}

func (c conflict) String() string {
	switch {
	case c.public:
		return "the public address " + c.ours.Addr().String()
	case c.theirs == c.ours:
		return "the podCIDR " + c.ours.String()
	}
	return fmt.Sprintf("podCIDRs that overlap, %s and %s", c.theirs, c.ours)
}

// say logs the conflicts of a node that are new, and those that are over. The two
// nodes themselves make them known as Events, too.
func (p *peers) say(name string, before, now []conflict) {
	notify := func(c conflict, reason, message string) {
		if own := p.manager.node(); own == name || own == c.with {
			p.manager.RecordEvent(fmt.Sprintf("%s and %s: %s", c.with, name, c), reason, message)
		}
	}
	for _, c := range now {
		if slices.Contains(before, c) {
			continue
		}
		reason, text := "DuplicatePublicIP", fmt.Sprintf("Nodes %s and %s both have %s: delete the one that is no more, or give flanneld on one of them --iface, --iface-node-address or --public-ip, for an address of its own",
			c.with, name, c)
		if !c.public {
			reason, text = "OverlappingPodCIDRs", fmt.Sprintf("Nodes %s and %s both have %s: %s, the older one, counts, and pods on %s cannot be reached. Delete the Node that is no more; or delete %s and restart its kubelet, for another podCIDR",
				c.with, name, c, c.with, name, name)
		}
		klog.Error(text)
		notify(c, reason, text)
	}
	for _, c := range before {
		if !slices.Contains(now, c) {
			klog.Infof("Nodes %s and %s no longer both have %s", c.with, name, c)
			notify(c, "", "")
		}
	}
}

// claims are prefixes and the nodes that claim them.
type claims struct {
	nodes   map[netip.Prefix][]*peer
	lengths map[length]int // how many of the prefixes have so many bits
}

// A length is that of a prefix, in a family: of 32 or 128 bits.
type length struct{ bits, of int }

func newClaims() claims {
	return claims{nodes: map[netip.Prefix][]*peer{}, lengths: map[length]int{}}
}

func (c *claims) add(p netip.Prefix, n *peer) {
	c.nodes[p] = append(c.nodes[p], n)
	c.lengths[length{p.Bits(), p.Addr().BitLen()}]++
}

func (c *claims) remove(p netip.Prefix, n *peer) {
	rest := slices.DeleteFunc(c.nodes[p], func(other *peer) bool { return other == n })
	if len(rest) == 0 {
		delete(c.nodes, p)
	} else {
		c.nodes[p] = rest
	}
	l := length{p.Bits(), p.Addr().BitLen()}
	if c.lengths[l]--; c.lengths[l] == 0 {
		delete(c.lengths, l)
	}
}

// rivals calls each for the nodes other than n that claim something that
// overlaps p, and for what it is. As a rule, all prefixes of a family have one
// length: then it is p itself, and found at once.
func (c *claims) rivals(p netip.Prefix, n *peer, each func(*peer, netip.Prefix)) {
	visit := func(at netip.Prefix) {
		for _, other := range c.nodes[at] {
			if other != n {
				each(other, at)
			}
		}
	}
	inside := false // there may be claims inside of p
	for l := range c.lengths {
		switch {
		case l.of != p.Addr().BitLen():
		case l.bits <= p.Bits():
			visit(netip.PrefixFrom(p.Addr(), l.bits).Masked())
		default:
			inside = true
		}
	}
	if !inside {
		return
	}
	for at := range c.nodes {
		if at.Bits() > p.Bits() && p.Overlaps(at) {
			visit(at)
		}
	}
}
