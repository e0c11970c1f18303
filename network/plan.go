package network

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/firewall"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/pkg/prefixes"
	"github.com/flanneld/flanneld/pkg/probe"
	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/subnet"
)

// This file is the pure core: it decides what the node and its peers need, and
// does no I/O. The main loop executes what it returns; flannelctl without a
// daemon compares it with the host. Scenarios are in testdata/*.txt.

// A setup is what a node's network is made from.
type setup struct {
	cfg     *subnet.Config
	uplink  iface.Uplink
	backend backend.Backend // nil: there is no uplink yet
}

// state is what is known of this node and its peers.
type state struct {
	setup
	table    uint32                           // that routes to other nodes are in; 0: the main table
	own      *subnet.Lease                    // nil: none yet
	leases   map[subnet.Subnets]*subnet.Lease // of all nodes, our own too; nil: not known yet
	claims   *claims                          // of those leases that could be a peer's, and of our own
	host     host                             // what the network may not take from the host
	problems retry.LastErrors[subnet.Subnets] // what is wrong with leases of peers

	obstacleList []subnet.Obstacle // of the setup and the host
	obstacles    prefixes.Index[subnet.Obstacle]
}

// A nodePlan is what the node itself needs, independent of the peers.
type nodePlan struct {
	networks []netip.Prefix // inside these, gateway routes without a protocol are an earlier daemon's
	objects  []kernel.Object
	rules    firewall.Desired
	nftables bool // that rules are in, or else iptables
	env      subnet.Env
}

// nodeOwner owns the kernel objects of the node itself. The objects of a peer are
// owned by the text of its subnets.
const nodeOwner = "this node"

// blackholeMetric makes the blackhole the last choice: the route of the bridge
// that holds the pods, with the same destination, comes first.
const blackholeMetric = 1 << 31

// planNode returns what the node needs by its own lease.
func (s *state) planNode(o Options) nodePlan {
	p := nodePlan{
		objects:  append(s.inTable(s.backend.Local(s.working())), s.planTableRules(o)...),
		nftables: s.cfg.EnableNFTables,
		env: subnet.Env{Networks: s.cfg.Networks(), Subnets: s.own.Subnets, MTU: s.backend.Info().MTU,
			IPMasq: o.masquerades()}, // false: the CNI plugin has the bridge masquerade both families
	}
	if !s.backend.Info().ForeignRoutes {
		p.networks = s.cfg.Networks().Each()
	}
	if o.Blackhole {
		for _, subnet := range s.working().Each() {
			p.objects = append(p.objects, kernel.Route{Dst: subnet, Blackhole: true, Metric: blackholeMetric})
		}
	}
	for f, pool := range s.cfg.Pools().Each() {
		if s.works(f) {
			rules := firewall.Options{Masquerade: o.IPMasq.Of(f), Except: s.cfg.NonMasqueradeCIDRs, RandomFully: o.RandomFully,
				Forward: o.Forward}
			*p.rules.At(f) = firewall.For(pool.Networks(), s.own.Of(f), rules)
		}
	}
	return p
}

// A peersPlan is what changes for the peers.
type peersPlan struct {
	objects  map[string][]kernel.Object // by owner; those of owners that are not in the map stay
	paths    map[string][]probe.Path    // to the peers among these owners
	update   subnet.Update              // the same leases, for a backend.Worker: peers' alone
	problems []problem                  // that were not known before
}

// A problem is what is wrong with a peer's lease.
type problem struct {
	lease subnet.Lease
	text  string
}

// applyUpdate takes an update of leases and returns what changes for the peers.
// Without a lease of our own nothing is decided yet: planAllPeers does that later.
func (s *state) applyUpdate(u subnet.Update) peersPlan {
	if s.leases == nil {
		s.leases, s.claims = map[subnet.Subnets]*subnet.Lease{}, nil
	}
	p := peersPlan{
		objects: make(map[string][]kernel.Object, len(u.Leases)+len(u.Gone)), paths: map[string][]probe.Path{},
		update: subnet.Update{Snapshot: u.Snapshot},
	}
	gone := u.Apply(s.leases)
	for _, gone := range gone {
		delete(s.problems, gone)
		p.objects[gone.String()] = nil
	}
	for gone := range u.Gone {
		p.update.Delete(gone)
	}
	switch {
	case s.own == nil:
	case u.Snapshot || s.claims == nil:
		s.claimAll()
		s.planPeers(&p, s.leases)
	default:
		s.planPeers(&p, s.updateClaims(u, gone))
	}
	return p
}

// planAllPeers returns what all peers need, as when the setup or our lease has
// changed.
func (s *state) planAllPeers() peersPlan {
	p := peersPlan{
		objects: make(map[string][]kernel.Object, len(s.leases)), paths: map[string][]probe.Path{},
		update: subnet.Update{Snapshot: true},
	}
	s.claimAll()
	s.planPeers(&p, s.leases)
	return p
}

// claimAll records what all leases claim, and what the host does.
func (s *state) claimAll() {
	s.updateObstacles()
	s.claims = newClaims(s.cfg.Networks())
	s.claim(s.own)
	for subnets, l := range s.leases {
		if subnets != s.own.Subnets {
			s.claim(l)
		}
	}
}

// claim records what a lease claims now. A lease that cannot be a peer's claims
// nothing. Our own lease claims what we publish, whatever the store has.
func (s *state) claim(l *subnet.Lease) {
	s.claims.remove(l.Subnets)
	switch {
	case l.Subnets == s.own.Subnets:
		own := *s.own
		if stored := s.leases[own.Subnets]; stored != nil {
			own.Created = stored.Created
		}
		l = &own
	case s.checkLease(*l) != nil:
		return
	}
	s.claims.put(s.backend, l)
}

// updateClaims records what leases claim after an update. It returns the leases to
// plan for: the new and the changed ones, and those that may be left out because of
// one of these or because of a lease that is gone.
func (s *state) updateClaims(u subnet.Update, gone []subnet.Subnets) map[subnet.Subnets]*subnet.Lease {
	leases := make(map[subnet.Subnets]*subnet.Lease, len(u.Leases))
	maps.Copy(leases, u.Leases)
	addRivals := func(of subnet.Subnets) {
		n := s.claims.leases.Get(of)
		if n == nil {
			return
		}
		which := decided
		if of == s.own.Subnets { // what is ours stays ours, even if it is the younger one
			which = all
		}
		for rival := range s.claims.rivals(n, which) {
			if l, ok := s.leases[rival.Subnets]; ok {
				leases[rival.Subnets] = l
			}
		}
	}
	for _, subnets := range gone {
		if subnets != s.own.Subnets { // ours will be restored
			addRivals(subnets)
			s.claims.remove(subnets)
		}
	}
	for subnets, l := range u.Leases {
		addRivals(subnets)
		s.claim(l)
		addRivals(subnets)
	}
	return leases
}

// planPeers plans for leases whose claims, and those of all others, are recorded.
func (s *state) planPeers(p *peersPlan, leases map[subnet.Subnets]*subnet.Lease) {
	own, devices := s.working(), s.overlayAddrs()
	for subnets, l := range leases {
		objects, isPeer, err := s.planPeer(*l)
		owner := subnets.String()
		p.objects[owner] = objects
		if isPeer {
			p.update.Put(l)
			p.paths[owner] = s.pathsTo(own, *l, devices)
		} else {
			p.update.Delete(subnets)
		}
		if s.problems == nil {
			s.problems = retry.LastErrors[subnet.Subnets]{}
		}
		if s.problems.Changed(subnets, err) && err != nil {
			p.problems = append(p.problems, problem{*l, err.Error()})
		}
	}
}

// planPeer returns what a lease needs of the kernel, whether it is a peer's, and
// what is wrong with it.
func (s *state) planPeer(l subnet.Lease) (objects []kernel.Object, isPeer bool, err error) {
	if l.Subnets == s.own.Subnets || s.isNext(l) {
		return nil, false, nil
	}
	if err := s.checkPeer(l); err != nil {
		return nil, false, err
	}
	objects, err = s.backend.Peer(s.working(), l)
	return s.inTable(objects), true, err
}

// inTable puts routes to other nodes into the table for these.
func (s *state) inTable(objects []kernel.Object) []kernel.Object {
	for i, o := range objects {
		if r, ok := o.(kernel.Route); ok && s.table != 0 {
			r.Table = s.table
			objects[i] = r
		}
	}
	return objects
}

// planTableRules returns the rules that lead to the table for routes to other nodes. Packets to this node's own pods stay
// with the main table, which has the route of the pods' bridge, and so do packets to what the host uses.
func (s *state) planTableRules(o Options) (rules []kernel.Object) {
	if s.table == 0 {
		return nil
	}
	for f, networks := range family.Pair[[]netip.Prefix](s.cfg.Networks()).Each() {
		own := s.working().Of(f)
		if !own.IsValid() {
			continue
		}
		for _, p := range append(s.hidden(own), own) {
			rules = append(rules, kernel.Rule{Dst: p, Table: kernel.MainTable, Priority: o.RulePriority})
		}
		for _, network := range networks {
			rules = append(rules, kernel.Rule{Dst: network, Table: s.table, Priority: o.RulePriority + 1})
		}
	}
	return rules
}

// hidden returns the prefixes of own's family, outside own, that the host uses in the main table, and that a route of the
// backend to a whole network would hide: in one table, the longer prefix wins.
func (s *state) hidden(own netip.Prefix) (all []netip.Prefix) {
	objects := s.backend.Local(s.working())
	for _, obstacle := range s.setup.obstacles(s.host) {
		p := obstacle.Prefix
		isHidden := slices.ContainsFunc(objects, func(o kernel.Object) bool {
			r, ok := o.(kernel.Route)
			return ok && r.Dst.Overlaps(p)
		})
		ofPods := own.Bits() <= p.Bits() && own.Contains(p.Addr())
		if isHidden && !ofPods && p.Addr().Is4() == own.Addr().Is4() && !slices.Contains(all, p) {
			all = append(all, p)
		}
	}
	return all
}

// isNext tells whether a lease is ours that will be in force soon: it is published as ours is, while the store has no
// longer ours, since it was lost or exchanged for this one.
func (s *state) isNext(l subnet.Lease) bool {
	stored := s.leases[s.own.Subnets]
	return (stored == nil || !stored.Attrs.Equal(s.own.Attrs)) && l.Attrs.Equal(s.own.Attrs)
}

// checkPeer returns why a lease is not a peer's.
func (s *state) checkPeer(l subnet.Lease) error {
	if err := s.checkLease(l); err != nil {
		return err
	}
	return s.checkClaims(l)
}

// checkLease returns why a lease cannot be a peer's, whatever other leases there are.
func (s *state) checkLease(l subnet.Lease) error {
	own := s.own.Attrs
	// Some backends publish no type (see the lease that we publish ourselves), and
	// accept peers that do.
	if t := l.Attrs.BackendType; t != own.BackendType && t != s.cfg.BackendType {
		return fmt.Errorf("left out, since its backend is %q and ours %q: all nodes must use the same one",
			t, s.cfg.BackendType)
	}
	for _, ip := range l.Attrs.PublicIPs() {
		if (ip == own.PublicIP || ip == own.PublicIPv6) && !l.Attrs.SharesAddresses() {
			return fmt.Errorf("left out, since %s is this node's own address: this is the record of an earlier lease of ours, "+
				"or of a machine that this one replaced, and can be deleted; or a live node that needs an address of its own", ip)
		}
	}
	for f, pool := range s.cfg.Pools().Each() {
		peer, ip := l.Of(f), l.Attrs.PublicIPOf(f)
		if pool.Enabled() && ip.IsValid() && s.works(f) {
			if err := s.uplink.CheckPeer(ip); err != nil {
				return fmt.Errorf("left out, since its public address %w", err)
			}
			if peer.Contains(ip) {
				return fmt.Errorf("left out, since its public address %s is in its own subnet %s", ip, peer)
			}
		}
		in, ok := pool.Range(peer)
		switch {
		case !pool.Enabled() || !peer.IsValid():
		case !ok:
			return fmt.Errorf("left out, since %s is not in the network %s", peer, subnet.Networks{IPv4: pool.Networks()})
		case !pool.Admits(peer):
			return fmt.Errorf("left out, since %s is more than a quarter of the network %s: no node leases so much. "+
				"Delete that lease", peer, in.Network)
		case peer.Overlaps(s.own.Of(f)):
			return fmt.Errorf("left out, since %s overlaps this node's own %s", peer, s.own.Of(f))
		}
	}
	return s.checkObstacles(l)
}

// peers returns the leases that are peers'.
func (s *state) peers() []subnet.Lease {
	var all []subnet.Lease
	for subnets, l := range s.leases {
		if subnets != s.own.Subnets && s.checkPeer(*l) == nil {
			all = append(all, *l)
		}
	}
	return all
}

// others returns how many leases there are beside our own.
func (s *state) others() int {
	count := len(s.leases)
	if s.own != nil {
		if _, ok := s.leases[s.own.Subnets]; ok {
			count--
		}
	}
	return count
}

// ownLease finds this node's lease among all: that of the subnets, or else one that
// is published with the uplink's addresses.
func (s *state) ownLease(subnets subnet.Subnets) *subnet.Lease {
	if l := s.leases[subnets]; l != nil {
		return l
	}
	for l := range maps.Values(s.leases) {
		for _, f := range family.All {
			if ip := l.Attrs.PublicIPOf(f); ip.IsValid() {
				if ip == s.uplink.PublicIPs().Of(f) {
					return l
				}
				break
			}
		}
	}
	return nil
}
