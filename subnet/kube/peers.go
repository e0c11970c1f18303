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

	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/prefixes"
	"github.com/flanneld/flanneld/subnet"
)

// Watch implements subnet.Manager.
func (m *Manager) Watch(ctx context.Context) <-chan subnet.Update {
	p := newPeers(m)
	go func() {
		defer p.updates.Close()
		for ctx.Err() == nil {
			on, changed := m.networks()
			p.setNetworks(on)
			unchanged, cancel := context.WithCancel(ctx)
			go func() {
				select {
				case <-changed:
					cancel()
				case <-unchanged.Done():
				}
			}()
			m.reflectNodes(unchanged, "", "watch the Nodes", p)
			cancel()
		}
	}()
	return p.updates.C()
}

// peers are all Nodes, and the updates about their leases that the reader has not received yet. No two leases that the
// reader knows overlap. A reflector fills peers; the Nodes themselves are not kept.
type peers struct {
	manager *Manager
	on      subnet.Networks // of the families that are on
	byName  map[string]*peer
	subnets prefixes.Index[*peer] // podCIDRs
	publics prefixes.Index[*peer] // public addresses, as prefixes of full length
	synced  bool                  // the reader has got a snapshot

	// changed are the nodes whose claims have changed, or an overlapping claim of another node, as they were before; nil
	// for a new node.
	changed map[string]*peer

	updates *subnet.Mailbox
}

func newPeers(m *Manager) *peers {
	on, _ := m.networks()
	return &peers{
		manager: m, on: on, byName: map[string]*peer{}, changed: map[string]*peer{}, updates: subnet.NewMailbox(),
	}
}

// setNetworks sets the networks of the families that are on, before all Nodes are read: leases have the podCIDRs of
// these families. The reader then learns what differs.
func (p *peers) setNetworks(on subnet.Networks) {
	if on.Equal(p.on) {
		return
	}
	for _, n := range p.byName {
		p.replace(n, nil)
	}
	p.on = on
}

// A peer is what is kept of a Node.
type peer struct {
	name     string
	lease    *subnet.Lease // without subnets: the node has none; Created is the node's in any case, in seconds since 1970
	accepted bool          // the reader knows the lease

	conflicts []conflict // with older nodes
}

// older tells which of two nodes wins a conflict. Their ages are known to the second only: then the names decide.
func (n *peer) older(than *peer) bool {
	return cmp.Or(cmp.Compare(n.lease.Created, than.lease.Created), strings.Compare(n.name, than.name)) < 0
}

var _ cache.ReflectorStore = (*peers)(nil)

// Add implements cache.ReflectorStore.
func (p *peers) Add(n any) error { return p.Update(n) }

// Update implements cache.ReflectorStore.
func (p *peers) Update(n any) error {
	p.put(n.(*Node))
	p.resolveConflicts()
	return nil
}

// Delete implements cache.ReflectorStore.
func (p *peers) Delete(n any) error {
	if old := p.byName[n.(*Node).Name]; old != nil {
		p.replace(old, nil)
	}
	p.resolveConflicts()
	return nil
}

// Replace implements cache.ReflectorStore. It takes the whole state: nodes that are not in it are gone.
func (p *peers) Replace(nodes []any, _ string) error {
	exists := make(map[string]bool, len(nodes))
	for _, n := range nodes {
		exists[n.(*Node).Name] = true
		p.put(n.(*Node))
	}
	for name, n := range p.byName {
		if !exists[name] {
			p.replace(n, nil)
		}
	}
	p.resolveConflicts()
	if p.synced {
		return nil
	}
	p.synced = true
	snapshot := subnet.Update{Snapshot: true, Leases: make(map[subnet.Subnets]*subnet.Lease, len(p.byName))}
	for _, n := range p.byName {
		if n.accepted {
			snapshot.Put(n.lease)
		}
	}
	p.updates.Put(snapshot)
	return nil
}

// Resync implements cache.ReflectorStore; none is asked for.
func (p *peers) Resync() error { return nil }

// put takes a Node as it is now. It ignores heartbeats of kubelet, which do not change the lease.
func (p *peers) put(n *Node) {
	now := &subnet.Lease{Created: n.CreationTimestamp.Unix()}
	if n.annotation(managed) == "true" {
		subnets, attrs := subnetsOf(n.podCIDRs, p.on), attrsOf(n.annotation)
		if len(subnets.Each()) > 0 && len(attrs.PublicIPs()) > 0 { // else the node is not ready to have one
			now.Subnets, now.Attrs = subnets, attrs
		}
	}
	old := p.byName[n.Name]
	if old != nil && old.lease.Created == now.Created &&
		old.lease.Subnets == now.Subnets && old.lease.Attrs.Equal(now.Attrs) {
		return
	}
	p.replace(old, &peer{name: strings.Clone(n.Name), lease: now})
}

// replace replaces a node by its present state. Either may be nil.
func (p *peers) replace(old, now *peer) {
	if old != nil {
		p.markChanged(old)
		delete(p.byName, old.name)
		for c, claim := range p.claimed(old) {
			c.Remove(claim, old)
			for _, other := range c.Overlapping(claim) {
				p.markChanged(other)
			}
		}
	}
	if now != nil {
		if _, known := p.changed[now.name]; !known {
			p.changed[now.name] = nil
		}
		p.byName[now.name] = now
		for c, claim := range p.claimed(now) {
			for _, other := range c.Overlapping(claim) {
				p.markChanged(other)
			}
			c.Add(claim, now)
		}
	}
}

// markChanged makes resolveConflicts check a node.
func (p *peers) markChanged(n *peer) {
	if _, known := p.changed[n.name]; !known {
		p.changed[n.name] = n
	}
}

// claimed returns a node's claims of the families that are on, each with the index that it belongs to. A podCIDR that is
// not in the network claims nothing: 0.0.0.0/0 would keep all younger nodes out.
func (p *peers) claimed(n *peer) iter.Seq2[*prefixes.Index[*peer], netip.Prefix] {
	return func(yield func(*prefixes.Index[*peer], netip.Prefix) bool) {
		for _, s := range n.lease.Each() {
			if !p.on.Network(s).IsValid() {
				continue
			}
			if !yield(&p.subnets, s) {
				return
			}
		}
		if n.lease.Attrs.SharesAddresses() {
			return
		}
		for _, ip := range n.lease.Attrs.PublicIPs() {
			if len(p.on.Of(family.Of(ip))) == 0 {
				continue
			}
			if !yield(&p.publics, netip.PrefixFrom(ip, ip.BitLen())) {
				return
			}
		}
	}
}

// resolveConflicts decides which leases of the changed nodes are accepted: those that no subnets of an older node
// overlap. It puts the difference into updates, and logs conflicts that are new or over.
func (p *peers) resolveConflicts() {
	if len(p.changed) == 0 {
		return
	}
	changes := subnet.Update{Since: time.Now()}
	var put []*peer
	for name, before := range p.changed {
		// These two are the same node where only a claim of another node has changed.
		now := p.byName[name]
		var was, is peer
		if before != nil {
			was = *before
		}
		if now != nil {
			now.conflicts = p.conflicts(now)
			overlaps := slices.ContainsFunc(now.conflicts, func(c conflict) bool { return !c.public })
			now.accepted = len(now.lease.Each()) > 0 && !overlaps
			is = *now
		}
		p.logConflicts(name, was.conflicts, is.conflicts)
		same := was.accepted && is.accepted && is.lease.Subnets == was.lease.Subnets
		if was.accepted && !same {
			changes.Delete(was.lease.Subnets)
		}
		// The age of a Node that was registered again during a gap decides conflicts of the reader, too.
		if is.accepted && !(same && is.lease.Created == was.lease.Created && is.lease.Attrs.Equal(was.lease.Attrs)) {
			put = append(put, now)
		}
	}
	for _, n := range put { // after all deletions: a subnet may go from one node to another
		changes.Put(n.lease)
	}
	p.changed = map[string]*peer{}
	if p.synced {
		p.updates.Put(changes)
	}
}

// conflicts returns the conflicts of a node with older nodes: for each of its claims, the one with the oldest node.
func (p *peers) conflicts(n *peer) []conflict {
	var all []conflict
	for c, claim := range p.claimed(n) {
		var oldest *peer
		var overlaps netip.Prefix
		for theirs, other := range c.Overlapping(claim) {
			if other.older(n) && (oldest == nil || other.older(oldest)) {
				oldest, overlaps = other, theirs
			}
		}
		if oldest != nil {
			all = append(all, conflict{oldest.name, overlaps, claim, c == &p.publics})
		}
	}
	return all
}

// A conflict is between a node and an older node that claims the same, or an overlapping prefix.
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

// logConflicts logs the conflicts of a node that are new, and those that are over. The two nodes record them as Events,
// too.
func (p *peers) logConflicts(name string, before, now []conflict) {
	record := func(c conflict, reason, message string) {
		if own := p.manager.node(); own == name || own == c.with {
			p.manager.RecordEvent(fmt.Sprintf("%s and %s: %s", c.with, name, c), reason, message)
		}
	}
	for _, c := range now {
		if slices.Contains(before, c) {
			continue
		}
		reason := "DuplicatePublicIP"
		fix := "delete the Node that no longer exists, or give flanneld on one of them --iface, --iface-node-address or " +
			"--public-ip, for an address of its own"
		if !c.public {
			reason = "OverlappingPodCIDRs"
			fix = fmt.Sprintf("%s, the older one, counts, and pods on %s cannot be reached. "+
				"Delete the Node that no longer exists; or delete %s and restart its kubelet, for another podCIDR",
				c.with, name, name)
		}
		p.manager.log.Error(nil, "Two Nodes conflict", "older", c.with, "younger", name, "conflict", c.String(), "fix", fix)
		record(c, reason, fmt.Sprintf("Nodes %s and %s both have %s: %s", c.with, name, c, fix))
	}
	for _, c := range before {
		if !slices.Contains(now, c) {
			p.manager.log.Info("Two Nodes no longer conflict", "older", c.with, "younger", name, "conflict", c.String())
			record(c, "", "")
		}
	}
}
