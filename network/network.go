// Package network is the main loop: configuration, uplink, lease, backend,
// rules, subnet file, kept true until told to stop.
package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime/debug"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/firewall"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/subnet"
)

// Options are what the operator can choose for one node.
type Options struct {
	Manager    subnet.Manager
	Uplink     iface.Selector
	SubnetFile string // path of subnet.env

	IPMasq      bool          // masquerade what leaves the network
	RandomFully bool          // with random ports, where possible
	Forward     bool          // accept forwarding to and from the network
	RulesResync time.Duration // between checks of the rules

	// KernelResync is the time between comparisons of all that the kernel holds
	// with what is wanted, whatever the kernel has told meanwhile.
	KernelResync time.Duration

	Blackhole bool           // drop what is sent to our subnet and has no pod there
	Health    netip.AddrPort // where /healthz, /readyz and /metrics are served; port 0: nowhere
	Profile   bool           // /debug/pprof as well

	StatusSocket string // where flannelctl asks; "": nowhere
	Version      string // of this program
}

// blackholeMetric makes the blackhole the last choice: the route of the bridge
// that holds the pods, with the same destination, comes first.
const blackholeMetric = 1 << 31

// nodeOwner owns what the kernel holds for this node itself. Peers own theirs
// by their subnets.
const nodeOwner = "this node"

// node is all that is known of this node and its peers. It belongs to the
// goroutine of Run; the others tell it by channels what they learn.
type node struct {
	Options
	started time.Time
	group   sync.WaitGroup // of all the goroutines
	health  *health
	metrics *metrics
	kernel  *kernel.Reconciler
	rules   *rules
	tenant  *tenant
	worker  *worker
	questions
	file   *fileWatch           // of the subnet file; nil: it cannot be watched
	leases <-chan subnet.Update // nil: not asked for

	situation               // in force
	target    situation     // the latest; in force when there is a lease for it
	lease     *subnet.Lease // nil: none yet

	peers  map[subnet.Subnets]subnet.Lease // all leases, our own too; nil: not known yet
	warned map[subnet.Subnets]string       // what was last said of a peer
	unheld map[subnet.Subnets]time.Time    // news of leases, see measure

	rulesSet bool // the rules of the lease are in place
	fileSet  bool // so is the subnet file
	ready    bool
	trouble  map[string]retry.Trouble // of each duty
	retry    *time.Timer
	retrying bool // retry is running
	pause    retry.Backoff
}

// A situation is what a node's network is made from.
type situation struct {
	cfg     *subnet.Config
	uplink  iface.Uplink
	backend backend.Backend // nil: no uplink yet
}

// Run keeps the node's network until ctx ends, and leaves the data path in
// place. An error is for the operator: it says what no waiting can mend.
func Run(ctx context.Context, o Options) error {
	inner, cancel := context.WithCancel(ctx)
	n := &node{
		Options: o, started: time.Now(), questions: newQuestions(), metrics: newMetrics(o.Manager, o.Version),
		warned: map[subnet.Subnets]string{}, trouble: map[string]retry.Trouble{},
		retry: time.NewTimer(0), retrying: true,
	}
	defer n.group.Wait()
	defer cancel()
	// The manager may hear of the end of ctx before inner has ended.
	if err := n.run(inner); ctx.Err() == nil {
		return err
	}
	return nil
}

func (n *node) run(ctx context.Context) error {
	var err error
	if n.health, err = serveHealth(ctx, &n.group, n.Health, n.metrics, n.Profile); err != nil {
		return err
	}
	n.answer(ctx)
	n.health.waitFor("the network's configuration")
	if n.cfg, err = n.Manager.Config(ctx); err != nil {
		return err
	}
	n.target.cfg = n.cfg
	klog.Infof("Network %s, backend %s", n.cfg.Networks(), n.cfg.BackendType)
	warn(n.cfg)

	n.health.waitFor("this node to be known")
	selectors := n.Manager.Select(ctx, n.Uplink)
	var known bool
	if n.Uplink, known = <-selectors; !known {
		return nil // for ctx has ended
	}
	if n.kernel, err = kernel.New(); err != nil {
		return err
	}
	defer n.kernel.Close()
	links, err := iface.Changes(ctx)
	if err != nil {
		return err
	}
	var fileChanges <-chan struct{}
	if n.file, err = watchFile(ctx, n.SubnetFile); err != nil {
		klog.Warning(err)
	} else {
		fileChanges = n.file.changes
	}
	n.rules = keepRules(ctx, &n.group, n.RulesResync, n.metrics, n.Manager)
	n.tenant = newTenant(n.Manager, n.metrics)
	defer func() { n.tenant.leave() }()
	n.worker = newWorker()
	defer func() { n.worker.leave(backend.ErrStopping) }()

	configs := n.Manager.Configs(ctx)
	err = n.look(ctx, n.target.cfg)
	compare := time.NewTicker(n.KernelResync)
	defer compare.Stop()
	watchdog := watchdog()
	close(n.answering)
	for err == nil {
		n.converge()
		n.measure()
		select {
		case <-ctx.Done():
			return nil
		case ev := <-n.kernel.Events():
			n.handle(ev)
		case u, ok := <-n.leases:
			if !ok {
				return nil // for ctx has ended
			}
			n.update(u)
		case l := <-n.tenant.leases:
			n.moveIn(ctx, l)
		case err = <-n.tenant.failed:
		case err = <-n.worker.failed:
		case s := <-n.rules.states:
			n.rulesSet = s
		case <-fileChanges:
			n.lookAtFile()
		case _, ok := <-links:
			if !ok {
				return nil
			}
			err = n.look(ctx, n.target.cfg)
		case cfg, ok := <-configs:
			if !ok {
				return nil
			}
			err = n.look(ctx, cfg)
		case sel, ok := <-selectors:
			if !ok {
				return nil
			}
			n.Uplink = sel
			err = n.look(ctx, n.target.cfg)
		case answer := <-n.asked:
			answer()
		case <-n.retry.C:
			n.retrying = false
			n.kernel.Retry()
		case <-watchdog:
			notify("WATCHDOG=1")
		case <-compare.C:
			n.kernel.Compare()
			n.fileSet = false
			err = n.look(ctx, n.target.cfg)
		}
	}
	return err
}

// warn logs the remarks on a configuration.
func warn(cfg *subnet.Config) {
	for _, w := range cfg.Warnings {
		klog.Warningf("Configuration: %s", w)
	}
	cfg.Warnings = nil
}

// handle takes the kernel's notifications, all there are by now.
func (n *node) handle(ev kernel.Event) {
	for {
		n.kernel.Handle(ev)
		select {
		case ev = <-n.kernel.Events():
		default:
			return
		}
	}
}

// look finds out what the uplink is by now, and has the backend and the lease
// follow it, and the configuration, which may be a new one. What cannot work is
// an error only while nothing else does.
func (n *node) look(ctx context.Context, cfg *subnet.Config) error {
	old := n.target
	sel := n.Uplink
	sel.Prefer = []netip.Addr{old.uplink.IPv4, old.uplink.IPv6}
	uplink, err := iface.Find(sel, cfg.IPv4.Enabled(), cfg.IPv6.Enabled())
	if err != nil {
		n.target = situation{cfg: cfg, uplink: old.uplink} // which is not there yet
		if n.backend != nil {
			err = fmt.Errorf("staying with %s: %w", old.uplink.Name, err)
		} else {
			n.health.waitFor("an uplink: " + err.Error())
		}
		n.say("Uplink", err)
		return nil
	}
	n.say("Uplink", nil)
	if old.backend != nil && cfg == old.cfg && uplink.Equal(old.uplink) {
		return nil
	}
	b, err := backend.New(cfg, uplink)
	switch {
	case err != nil && n.backend == nil:
		return err
	case err != nil && cfg != n.cfg:
		n.say("Configuration", fmt.Errorf("the new one is refused, the old one stays in force: %w", err))
		return nil
	case err != nil:
		n.say("Uplink", fmt.Errorf("%s cannot be used, staying with %s: %w", uplink, old.uplink, err))
		return nil
	}
	n.say("Configuration", nil)
	if old.backend == nil || !uplink.Equal(old.uplink) {
		klog.Infof("Uplink %s", uplink)
	}
	warn(cfg) // of the backend's keys too, once
	n.target = situation{cfg, uplink, b}
	switch {
	case n.lease == nil:
		n.situation = n.target
		n.askForPeers(ctx)
		n.health.waitFor("a lease")
		n.tenant.settle(ctx, n.target, n.previous())
		return nil
	case cfg == n.cfg: // with new devices and routes at once, whatever becomes of the lease
		n.situation = n.target
		n.program(ctx)
	}
	n.tenant.settle(ctx, n.target, n.lease.Subnets)
	return nil
}

// askForPeers has the manager watch leases, if the backend has peers at all.
func (n *node) askForPeers(ctx context.Context) {
	if n.leases != nil {
		return
	}
	if _, alone := n.backend.(backend.Solitary); !alone {
		n.leases, n.peers = n.Manager.Watch(ctx), nil
	} else if n.peers == nil {
		n.peers = map[subnet.Subnets]subnet.Lease{}
	}
}

// previous returns the subnets that the subnet file names, if it is of this
// network.
func (n *node) previous() subnet.Subnets {
	env, err := subnet.ReadEnv(n.SubnetFile)
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		klog.Warningf("The subnet held before is not known: %v", err)
	case env.Networks == n.cfg.Networks():
		return env.Subnets
	}
	return subnet.Subnets{}
}

// moveIn takes up a lease, and what it was acquired for.
func (n *node) moveIn(ctx context.Context, t tenancy) {
	if t.backend != n.target.backend {
		return // there is a later one to come
	}
	l := t.Lease
	if t.cfg != n.cfg {
		klog.Infof("The configuration has changed: network %s, backend %s", t.cfg.Networks(), t.cfg.BackendType)
		n.situation = t.situation
		n.askForPeers(ctx)
	}
	if n.lease != nil && n.lease.Subnets != l.Subnets {
		klog.Warningf("This node's subnet is %s from now on, no longer %s: pods that hold addresses of the old one must be restarted", l.Subnets, n.lease.Subnets)
	} else if n.lease == nil {
		klog.Infof("Subnet %s", l.Subnets)
	}
	n.lease = &l
	n.program(ctx)
	n.fileSet, n.rulesSet = false, false
	n.rules.set(n.wantedRules(), n.cfg.EnableNFTables)
}

// wantedRules returns the rules that the lease calls for.
func (n *node) wantedRules() firewall.Desired {
	o := firewall.Options{Masquerade: n.IPMasq, RandomFully: n.RandomFully, Forward: n.Forward}
	return firewall.Desired{
		IPv4: firewall.For(n.cfg.IPv4.Network, n.lease.IPv4, o),
		IPv6: firewall.For(n.cfg.IPv6.Network, n.lease.IPv6, o),
	}
}

// program wants of the kernel, and of the backend's worker, what the lease and
// all of the peers call for.
func (n *node) program(ctx context.Context) {
	n.kernel.Networks = n.cfg.Networks().Each()
	if _, ok := n.backend.(backend.Bystander); ok {
		n.kernel.Networks = nil
	}
	objects := n.backend.Local(*n.lease)
	if n.Blackhole {
		for _, s := range n.lease.Each() {
			objects = append(objects, kernel.Route{Dst: s, Blackhole: true, Metric: blackholeMetric})
		}
	}
	n.kernel.Set(nodeOwner, objects)
	n.metrics.setBackend(n.backend)
	n.worker.begin(ctx, n.backend, *n.lease)
	if n.peers != nil {
		n.programPeers(subnet.Update{Snapshot: true, Leases: n.peers})
	}
}

// programPeers passes on news of leases.
func (n *node) programPeers(u subnet.Update) {
	news := subnet.Update{Snapshot: u.Snapshot}
	for s := range u.Gone {
		news.Delete(s)
	}
	for s, l := range u.Leases {
		if n.programPeer(l) {
			news.Put(l)
		} else {
			news.Delete(s)
		}
	}
	n.worker.tell(news)
}

// update takes news of leases.
func (n *node) update(u subnet.Update) {
	n.note(u)
	if n.peers == nil {
		n.peers = map[subnet.Subnets]subnet.Lease{}
	}
	for _, s := range u.Apply(n.peers) {
		delete(n.warned, s)
		n.kernel.Set(s.String(), nil)
	}
	if n.lease != nil {
		n.programPeers(u)
	}
}

// programPeer wants of the kernel what a peer calls for: nothing, if it is no
// peer, and it tells whether it is.
func (n *node) programPeer(l subnet.Lease) (is bool) {
	var objects []kernel.Object
	var err error
	if l.Subnets != n.lease.Subnets {
		if err = n.acceptable(l); err == nil {
			is = true
			objects, err = n.backend.Peer(*n.lease, l)
		}
	}
	n.kernel.Set(l.Subnets.String(), objects)
	switch {
	case err == nil:
		delete(n.warned, l.Subnets)
	case n.warned[l.Subnets] != err.Error():
		n.warned[l.Subnets] = err.Error()
		klog.Warningf("Peer %s at %v: %v", l.Subnets, l.Attrs.PublicIPs(), err)
	}
	return is
}

// acceptable tells what keeps a lease from being a peer's.
func (n *node) acceptable(l subnet.Lease) error {
	own := n.lease.Attrs
	// Some backends publish no type (see the lease we publish ourselves), and
	// take peers that do.
	if t := l.Attrs.BackendType; t != own.BackendType && t != n.cfg.BackendType {
		return fmt.Errorf("left out, since its backend is %q and ours %q: all nodes must use the same one", t, n.cfg.BackendType)
	}
	for _, ip := range l.Attrs.PublicIPs() {
		if ip == own.PublicIP || ip == own.PublicIPv6 {
			return fmt.Errorf("left out, since %s is this node's own address: it is an earlier lease of ours that will expire, or a node that needs an address of its own", ip)
		}
	}
	for _, f := range []struct{ network, own, peer netip.Prefix }{
		{n.cfg.IPv4.Network, n.lease.IPv4, l.IPv4}, {n.cfg.IPv6.Network, n.lease.IPv6, l.IPv6},
	} {
		switch {
		case !f.network.IsValid() || !f.peer.IsValid():
		case !f.network.Contains(f.peer.Addr()) || f.peer.Bits() < f.network.Bits():
			return fmt.Errorf("left out, since %s is not in the network %s", f.peer, f.network)
		case f.peer.Overlaps(f.own):
			return fmt.Errorf("left out, since %s overlaps this node's own %s", f.peer, f.own)
		}
	}
	return nil
}

// converge brings everything in line with what is known by now.
func (n *node) converge() {
	if n.lease == nil {
		return
	}
	if n.peers == nil {
		// What is there may be a peer's, of before a restart: it stays until
		// we know better.
		n.health.waitFor("the leases of the other nodes")
		return
	}
	if n.kernel.Pending() {
		n.say("Kernel", n.kernel.Apply())
	}
	switch {
	case !n.kernel.Has(nodeOwner):
		n.health.waitFor("the device: " + string(n.trouble["Kernel"]))
	case !n.rulesSet:
		n.health.waitFor("the rules: see the log")
	case !n.fileSet:
		n.watchAgain()
		err := n.env().WriteFile(n.SubnetFile)
		n.say("Subnet file", err)
		if n.fileSet = err == nil; !n.fileSet {
			n.health.waitFor(err.Error())
		}
	}
	if !n.ready && n.fileSet {
		n.ready = true
		n.health.setReady()
		n.metrics.ready.Set(1)
		n.Manager.Ready()
		debug.FreeOSMemory() // what it took to read everything will not be needed again
		klog.Infof("Ready after %v: subnet %s, %d peers", time.Since(n.started).Round(time.Millisecond), n.lease.Subnets, n.others())
	}
	switch failed := n.kernel.Failed() || n.kernel.Pending() || n.rulesSet && !n.fileSet; {
	case !failed:
		n.pause.Reset()
	case !n.retrying:
		n.retry.Reset(n.pause.Next())
		n.retrying = true
	}
}

// others returns how many leases there are beside our own.
func (n *node) others() int {
	count := len(n.peers)
	if _, ok := n.peers[n.lease.Subnets]; ok {
		count--
	}
	return count
}

// say logs a duty's error, once, and when it is over.
func (n *node) say(duty string, err error) {
	if err != nil {
		n.metrics.failed(duty)
	}
	trouble := n.trouble[duty]
	trouble.Log(duty, err)
	n.trouble[duty] = trouble
}
