package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/pkg/netspace"
	"github.com/flanneld/flanneld/pkg/probe"
	"github.com/flanneld/flanneld/subnet"
)

// startProber starts to probe peers.
func (n *node) startProber(ctx context.Context) {
	if n.ProbeInterval <= 0 {
		return
	}
	n.prober = probe.New(n.ProbeInterval, n.metrics.observers())
	n.metrics.setProber(n.prober, n.PeerMetrics)
	n.events.probes = n.prober.Reports()
	n.group.Go(netspace.FromContext(ctx).In(func() {
		if err := n.prober.Run(ctx); err != nil {
			n.log.Error(err, "Cannot probe peers, which needs CAP_NET_RAW: that packets do not arrive is not noticed",
				"flag", "--probe-peers")
		}
	}))
}

// cannotProbe says why peers are not probed although they should be; "" if they are.
func (n *node) cannotProbe() string {
	if n.prober == nil || n.prober.Err() == nil {
		return ""
	}
	return fmt.Sprintf("%v: flanneld needs CAP_NET_RAW to probe peers, unless --probe-peers=false", n.prober.Err())
}

// probePeers has the prober follow a plan.
func (n *node) probePeers(p peersPlan) {
	if n.prober == nil {
		return
	}
	for owner := range p.objects {
		n.prober.Set(owner, p.paths[owner]...)
	}
}

// overlayAddrs returns the addresses of this node's devices in the overlay. Where there is one, each peer has one, too.
func (s *state) overlayAddrs() []netip.Addr {
	var addrs []netip.Addr
	for _, o := range s.backend.Local(s.working()) {
		if a, ok := o.(kernel.Addr); ok {
			addrs = append(addrs, a.Prefix.Addr())
		}
	}
	return addrs
}

// pathsTo returns the ways to a peer that are probed, one for each family. own is the node's lease, devices are its
// overlayAddrs.
func (s *state) pathsTo(own, peer subnet.Lease, devices []netip.Addr) []probe.Path {
	var paths []probe.Path
	for f, side := range backend.Sides(own, peer).Each() {
		if !side.On {
			continue
		}
		path := probe.Path{
			Overlay: side.Peer.Addr(), Source: side.Own.Addr(), Public: side.PublicIP, Local: s.uplink.Addrs().Of(f),
		}
		if !slices.Contains(devices, path.Source) {
			// Without a device, the bridge has the first address in the overlay, as soon as there has been a pod.
			path.Overlay, path.Source, path.Optional = path.Overlay.Next(), path.Source.Next(), true
		}
		paths = append(paths, path)
	}
	return paths
}

// A Reachability is what the daemon's probes know of the way to a peer in one family.
type Reachability struct {
	Address netip.Addr  `json:"address"` // of the peer, inside the overlay
	State   probe.State `json:"state"`
	Since   time.Time   `json:"since"`
	RTT     float64     `json:"rttSeconds,omitempty"` // of the latest reply through the overlay
	Problem string      `json:"problem,omitempty"`    // what is wrong, and what to do
}

// unreached tells whether packets do not arrive at the peer.
func (l Lease) unreached() bool {
	return slices.ContainsFunc(l.Reachability, func(r Reachability) bool { return r.Problem != "" })
}

// reachability returns what is known of the ways to a peer.
func (v view) reachability(l subnet.Lease) []Reachability {
	if v.prober == nil {
		return nil
	}
	var all []Reachability
	for _, r := range v.prober.Results(l.Subnets.String()) {
		all = append(all, Reachability{r.Overlay, r.State, byClock(r.Since).Round(time.Second), r.RTT.Seconds(), v.describe(l, r)})
	}
	return all
}

// describe says what is wrong with the way to a peer, and what to do; "" if nothing is.
func (s *state) describe(l subnet.Lease, r probe.Result) string {
	f := family.Of(r.Public)
	from, to := s.own.Attrs.PublicIPOf(f), r.Public
	switch r.State {
	case probe.Silent:
		if r.Arrives {
			return fmt.Sprintf("requests of %s arrive here through the overlay, but neither the overlay nor the host itself "+
				"replies any more: nothing that %s sends arrives there, as where reverse path filtering of %s drops it, or a "+
				"firewall has begun to drop ICMP", to, from, to)
		}
		return fmt.Sprintf("nothing from %s arrives any more, neither through the overlay nor from the host itself: "+
			"the host or the network between is down, a firewall has begun to drop ICMP, or reverse path filtering of this "+
			"host drops it (flannelctl doctor). If the node is gone for good, delete its lease", to)
	case probe.HostOnly:
	default:
		return ""
	}
	what, otherwise := s.carrier(l, f)
	switch {
	case errors.Is(r.Err, unix.EPERM):
		return fmt.Sprintf("this host does not let the requests to %s out: a firewall rule of this host drops ICMP. Accept "+
			"ICMP to and from %s in the chain OUTPUT, since nothing is known of this peer otherwise", r.Overlay,
			s.cfg.Networks().Network(l.Of(f)))
	case r.Heard && !r.Arrives:
		return fmt.Sprintf("%s from %s to %s does not arrive here, while packets to %s arrive there: open that in the "+
			"firewalls of this node and in between. %s", what, to, from, to, otherwise)
	case r.Arrives:
		return fmt.Sprintf("%s from %s to %s does not arrive there, while packets of %s arrive here: open that in the "+
			"firewalls of %s and in between. %s", what, from, to, to, to, otherwise)
	case r.Asks:
		return fmt.Sprintf("%s between %s and %s arrives in neither direction, while the hosts reply to each other: open "+
			"that in the firewalls of both nodes and in between. %s", what, from, to, otherwise)
	default:
		return fmt.Sprintf("%s replies, but not through the overlay. Either %s between %s and %s is blocked: open that in "+
			"the firewalls of both nodes and in between. Or no flanneld runs on %s, or its firewall drops ICMP in the overlay",
			to, what, from, to, to)
	}
}

// carrier returns what carries packets to a peer from host to host, as firewalls name it, and what else may drop them.
func (s *state) carrier(l subnet.Lease, f family.Family) (what, otherwise string) {
	objects, _ := s.backend.Peer(s.working(), l)
	direct := slices.ContainsFunc(objects, func(o kernel.Object) bool {
		r, ok := o.(kernel.Route)
		return ok && r.Via == l.Attrs.PublicIPOf(f)
	})
	var ports []string
	for _, e := range s.backend.Info().Endpoints {
		switch {
		case direct || !f.Has(e.Addr):
		case e.Port != 0:
			ports = append(ports, fmt.Sprintf("%s port %d", strings.ToUpper(e.Protocol), e.Port))
		default:
			ports = append(ports, "IP protocol "+e.Protocol)
		}
	}
	if len(ports) == 0 { // the hosts route the packets as they are
		return fmt.Sprintf("traffic of %s", s.cfg.Networks().Network(l.Of(f))), "If that is open, a host does not forward, or the network " +
			"between the hosts drops packets with addresses that it does not know, as clouds do"
	}
	return strings.Join(ports, ", "), "If that is open, a host drops the packets: by a rule for ICMP in the overlay, by " +
		"reverse path filtering, or since the devices of the two nodes differ, such as in the VNI"
}

// reportPause is the least time between two records of peers that are not reached. While thousands of peers fail, each is
// found in its turn, and each would be another line of the log and another Event.
const reportPause = time.Minute

// takeReport records what the prober reports. The next report stays in its channel, which holds one, for reportPause.
func (n *node) takeReport() {
	n.recordReachability(n.prober.Alarms())
	n.events.probes, n.events.reported = nil, time.After(reportPause)
}

// maxNamed is how many peers an event names.
const maxNamed = 3

// recordReachability logs and records that peers have not been reached for a while, or that all are reached again.
func (n *node) recordReachability(alarms map[string][]probe.Result) {
	var blocked, silent []string
	for subnets, l := range n.leases { // whose texts are sorted below
		for _, r := range alarms[subnets.String()] {
			text := fmt.Sprintf("%s: %s", subnets, n.describe(*l, r))
			if r.State == probe.HostOnly {
				blocked = append(blocked, text)
			} else {
				silent = append(silent, text)
			}
		}
	}
	message := summarize(blocked)
	if message != n.unreached {
		n.unreached = message
		n.recordEvent("reachability", "PeersUnreachable", message)
	}
	text := strings.Join(slices.DeleteFunc([]string{message, summarize(silent)}, func(s string) bool { return s == "" }), "; ")
	switch {
	case text == n.unreachedLogged:
	case text == "":
		n.log.Info("All peers are reached again")
	default:
		n.log.Error(nil, "Peers are not reached", "count", len(blocked)+len(silent), "reason", text)
	}
	n.unreachedLogged = text
}

// summarize returns the first texts, and how many more there are.
func summarize(texts []string) string {
	slices.Sort(texts)
	if len(texts) <= maxNamed {
		return strings.Join(texts, "; ")
	}
	return fmt.Sprintf("%s; and %d other peers: see flannelctl leases", strings.Join(texts[:maxNamed], "; "), len(texts)-maxNamed)
}
