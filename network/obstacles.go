package network

import (
	"fmt"
	"net/netip"
	"net/url"
	"slices"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/subnet"
)

// This file is a part of the pure core: what of the networks belongs to the host, and what follows from that.

// A host is what the network may not take from this host.
type host struct {
	routes []kernel.ForeignRoute
	store  string       // what it is: "etcd"
	stores []netip.Addr // where it is, as far as known
}

func (h host) equal(to host) bool {
	return h.store == to.store && slices.Equal(h.routes, to.routes) && slices.Equal(h.stores, to.stores)
}

// storeOf returns what and where the store is.
func storeOf(s subnet.State) (name string, at []netip.Addr) {
	at = slices.Clone(s.Addresses)
	for _, endpoint := range s.Endpoints {
		u, err := url.Parse(endpoint)
		if err != nil {
			continue
		}
		if ip, err := netip.ParseAddr(u.Hostname()); err == nil && !ip.IsLoopback() {
			at = append(at, ip.Unmap().WithZone(""))
		}
	}
	slices.SortFunc(at, netip.Addr.Compare)
	if name = s.Kind; name == "kubernetes" {
		name = "the API server"
	}
	return name, slices.Compact(at)
}

// obstacles returns what belongs to the host inside the networks of the configuration. A prefix that contains a whole
// network is none: it is wider than the subnets, so that a route to a subnet does not displace it.
func (s setup) obstacles(h host) []subnet.Obstacle {
	var all []subnet.Obstacle
	add := func(o subnet.Obstacle) {
		inside := slices.ContainsFunc(s.cfg.Each(), func(pool subnet.Pool) bool {
			r, ok := pool.Range(o.Prefix)
			return ok && r.Network.Bits() < o.Prefix.Bits()
		})
		known := slices.ContainsFunc(all, func(k subnet.Obstacle) bool {
			return k.Prefix == o.Prefix && k.Route == o.Route && (k.Name == o.Name || k.Prefix.IsSingleIP())
		})
		if inside && !known {
			all = append(all, o)
		}
	}
	for _, l := range s.uplink.Links() {
		for _, p := range l.Prefixes {
			add(subnet.Obstacle{Prefix: p, Name: linkName(p, l.Name)})
		}
	}
	for _, ips := range []family.Pair[netip.Addr]{s.uplink.Addrs(), s.uplink.PublicIPs()} {
		for _, ip := range ips.Each() {
			if ip.IsValid() {
				add(subnet.Obstacle{Prefix: netip.PrefixFrom(ip, ip.BitLen()), Name: "this node's address " + ip.String()})
			}
		}
	}
	for _, ip := range h.stores {
		add(subnet.Obstacle{Prefix: netip.PrefixFrom(ip, ip.BitLen()), Name: fmt.Sprintf("%s at %s", h.store, ip)})
	}
	foreignRoutes := s.backend != nil && s.backend.Info().ForeignRoutes
	for _, r := range h.routes {
		switch {
		case backend.Device(r.Dev):
		case r.Dst.Bits() == 0:
			add(subnet.Obstacle{Prefix: netip.PrefixFrom(r.Via, r.Via.BitLen()), Name: "the gateway " + r.Via.String()})
		case foreignRoutes && !r.Kernel: // it is how packets reach peers
		case r.Connected:
			add(subnet.Obstacle{Prefix: r.Dst, Name: linkName(r.Dst, r.Dev), Pods: r.Bridge || r.Dst.IsSingleIP()})
		default:
			o := subnet.Obstacle{Prefix: r.Dst, Name: fmt.Sprintf("another program's route (%s)", r.Text), Route: true, Pods: true}
			if r.Beside {
				o.Via = r.Via
			}
			add(o)
		}
	}
	return all
}

func linkName(p netip.Prefix, dev string) string { return fmt.Sprintf("%s of %s", p, dev) }

// networkKey returns the configuration's key of a network, by its index.
func networkKey(f family.Family, index int) string {
	if index > 0 {
		return "Networks"
	}
	return [...]string{"Network", "IPv6Network"}[f]
}

// UplinkOverlaps returns, in words, where the networks of a configuration overlap the uplink's prefixes.
func UplinkOverlaps(cfg *subnet.Config, uplink iface.Uplink) []string {
	var all []string
	for f, networks := range family.Pair[[]netip.Prefix](cfg.Networks()).Each() {
		link := uplink.Of(f)
		for i, network := range networks {
			for _, p := range link.Prefixes {
				if p.Overlaps(network) {
					all = append(all, fmt.Sprintf("%s %s overlaps %s, the uplink: %s", networkKey(f, i), network,
						linkName(p, link.Name), useAnother("prefix")))
				}
			}
		}
	}
	return all
}

// useAnother is the remedy for an overlap.
func useAnother(what string) string {
	return "use a network that the hosts do not use, or leave the " + what + " out with SubnetMin and SubnetMax"
}

// overlaps returns, in words, where the networks of the configuration, and this node's own subnets, overlap what belongs
// to the host. own may be nil.
func (s setup) overlaps(h host, own *subnet.Lease) []string {
	all := UplinkOverlaps(s.cfg, s.uplink)
	for f, networks := range family.Pair[[]netip.Prefix](s.cfg.Networks()).Each() {
		for i, network := range networks {
			for _, ip := range h.stores {
				if network.Contains(ip) {
					all = append(all, fmt.Sprintf("%s %s contains the address of %s, %s: %s", networkKey(f, i), network, h.store,
						ip, useAnother("address")))
				}
			}
		}
	}
	if own == nil {
		return all
	}
	for _, o := range s.obstacles(h) {
		for _, p := range own.Each() {
			if o.Conflicts(p) && !o.Pods {
				all = append(all, fmt.Sprintf("this node's own subnet %s overlaps %s: take that prefix off the host, or delete "+
					"the lease and restart flanneld, which then leases another subnet; pods must be restarted", p, o.Name))
			}
		}
	}
	return all
}

// checkObstacles returns why a lease is left out that conflicts with what belongs to the host. A route of another program
// through the node's own address, such as a routing daemon makes of what the node announces, leads to the same pods.
func (s *state) checkObstacles(l subnet.Lease) error {
	for _, p := range l.Each() {
		name := "" // the first of several, so that the text is always the same
		for _, o := range s.obstacles.Overlapping(p) {
			if slices.Contains(l.Attrs.PublicIPs(), o.Via) {
				continue
			}
			if o.Conflicts(p) && (name == "" || o.Name < name) {
				name = o.Name
			}
		}
		if name != "" {
			return fmt.Errorf("left out, since its subnet %s overlaps %s, which belongs to this host: "+
				"give the node another subnet, or the host another prefix", p, name)
		}
	}
	return nil
}

// setHost takes what belongs to the host now. It returns the leases that this concerns, to be planned for again.
func (s *state) setHost(h host) subnet.Update {
	s.host = h
	var u subnet.Update
	changed := s.updateObstacles()
	if len(changed) == 0 {
		return u
	}
	for subnets, l := range s.leases {
		for _, p := range subnets.Each() {
			if slices.ContainsFunc(changed, func(o subnet.Obstacle) bool { return o.Conflicts(p) }) {
				u.Put(l)
			}
		}
	}
	return u
}

// updateObstacles finds the obstacles of the setup in force, and returns those that are new or gone.
func (s *state) updateObstacles() (changed []subnet.Obstacle) {
	before := s.obstacleList
	now := s.setup.obstacles(s.host)
	if slices.Equal(before, now) {
		return nil
	}
	without := func(all, others []subnet.Obstacle) {
		for _, o := range all {
			if !slices.Contains(others, o) {
				changed = append(changed, o)
			}
		}
	}
	without(before, now)
	without(now, before)
	for _, o := range before {
		s.obstacles.Remove(o.Prefix, o)
	}
	for _, o := range now {
		s.obstacles.Add(o.Prefix, o)
	}
	s.obstacleList = now
	return changed
}
