// Package network, which other programs may import, is the main loop: configuration,
// uplink, lease, backend, rules and subnet file, set up and kept so until the loop is
// told to stop.
//
// Run leaves the process to its caller: it reads no environment variables, handles no
// signals, sets nothing of the Go runtime, and ends by returning an error. It logs with
// the logger of its context. Several can run in one process, each in a network namespace
// of its own.
package network

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/fight"
	"github.com/flanneld/flanneld/pkg/firewall"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/pkg/lock"
	"github.com/flanneld/flanneld/pkg/netspace"
	"github.com/flanneld/flanneld/pkg/probe"
	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/subnet"
)

// Options are what can be chosen for one node. Only Manager and SubnetFile are needed.
type Options struct {
	Manager    subnet.Manager // the caller closes it after Run
	Uplink     iface.Selector
	SubnetFile string // path of subnet.env
	Name       string // of the network on this host, where there are several; "" is a name

	IPMasq      family.Pair[bool] // masquerade what leaves the network
	RandomFully bool              // with random ports, where possible
	Forward     bool              // accept forwarding to and from the network
	RulesResync time.Duration     // between checks of the rules; 0 or less: DefaultRulesResync

	// KernelResync is the time between comparisons of all that the kernel holds
	// with what it should, whether or not the kernel has notified of changes. 0 or
	// less: DefaultKernelResync.
	KernelResync time.Duration

	// RouteTable is the routing table for the routes to other nodes; 0: the main table. Rules of the priorities
	// RulePriority (0: DefaultRulePriority) and the one after lead to it.
	RouteTable, RulePriority uint32

	// ProbeInterval is the time in which each peer is asked at least once whether packets arrive there, while there are
	// few enough peers: see package probe. 0 or less: peers are not asked.
	ProbeInterval time.Duration
	PeerMetrics   bool // metrics for each peer, too, of what the probes find

	Blackhole bool           // drop what is sent to our subnet and has no pod there
	Health    netip.AddrPort // of /healthz and /readyz; port 0: nowhere; no address: all
	Handler   http.Handler   // serves all other paths there, see MetricsHandler; nil: nothing does

	// Metrics is where the metrics are registered as long as Run runs; nil: nowhere.
	// Several networks in one process need several registries, or a label each:
	// prometheus.WrapRegistererWith.
	Metrics prometheus.Registerer

	StatusSocket string // where flannelctl asks; "": nowhere
	Version      string // of this program

	// Waiting is called when what the node waits for changes: with a line of text, or
	// with "" when the node is ready, for the first time or again. nil: nothing is.
	// The main loop calls it, and waits for its end.
	Waiting func(what string)

	// Heartbeat is called by the main loop every HeartbeatEvery, as long as the loop
	// does not hang, from when the configuration is known. HeartbeatEvery 0: never.
	Heartbeat      func()
	HeartbeatEvery time.Duration
}

// What takes the place of what Options leave out. flanneld's flags have the same defaults.
const (
	DefaultRulesResync  = 5 * time.Second
	DefaultKernelResync = time.Minute
	DefaultRulePriority = 1000
)

// complete fills in what is left out, and returns what cannot be.
func (o *Options) complete() error {
	switch {
	case o.Manager == nil:
		return errors.New("network: Options have no Manager")
	case o.SubnetFile == "":
		return errors.New("network: Options have no SubnetFile")
	}
	if o.RulesResync <= 0 {
		o.RulesResync = DefaultRulesResync
	}
	if o.KernelResync <= 0 {
		o.KernelResync = DefaultKernelResync
	}
	if o.RulePriority == 0 {
		o.RulePriority = DefaultRulePriority
	}
	return nil
}

// masquerades tells whether any family is masqueraded.
func (o Options) masquerades() bool { return o.IPMasq.IPv4 || o.IPMasq.IPv6 }

// node executes the plans for this node and its peers. It belongs to the goroutine
// of Run; the other goroutines send what they learn on channels.
type node struct {
	Options
	state        // in force
	target setup // the latest; in force when there is a lease for it

	started time.Time
	log     klog.Logger
	group   sync.WaitGroup // of all the goroutines
	health  *health
	metrics *metrics
	kernel  *kernel.Reconciler
	rules   *firewall.Reconciler
	keeper  *leaseKeeper
	worker  *worker
	prober  *probe.Prober // nil: peers are not probed
	status  statusServer
	file    *fileWatch // of the subnet file; nil: it cannot be watched
	events  events
	within  []netip.Prefix        // the networks that this host's network has, or had
	locks   map[string]*lock.Lock // by name, see locks.go; nil: there can be none
	blocked *subnet.Config        // not in force, since another flanneld has a lock that it needs; nil: none

	leftOver bool // locks and routes of earlier setups may be held: see giveUp

	unapplied   map[subnet.Subnets]time.Time // when updates were received that the kernel does not hold yet
	kernelWoken bool                         // the kernel's reconciler has something to do
	kernelErr   error                        // that it returned last

	before subnet.Subnets // that the subnet file named when the daemon started
	lost   []netip.Prefix // subnets that this node had, and pods may still hold: see announceSubnets

	retired  subnet.Networks // as noted: see noteRetired
	rulesSet bool            // the rules of the lease are in place
	fight    string          // over the rules, see firewall.State
	rival    string          // that claims what is ours, see recordRival
	overlaps []string        // of the network with what the host uses, as logged

	unreached       string // peers, as recorded: see recordReachability
	unreachedLogged string // the same, as logged

	fileSet bool // the subnet file has the right content
	ready   bool

	fileEnv    subnet.Env // what this process has last written to the subnet file
	fileFights *fight.Detector[string, string]
	fileFight  string // over the subnet file, in words; "": none
	filePaced  bool   // the subnet file is fought over: the next retry writes it

	errors   retry.LastErrors[string] // of each duty
	records  *subnet.RecordLog        // what is wrong with leases of peers
	retry    *time.Timer
	retrying bool // retry is running
	pause    retry.Backoff
}

// events are what the main loop waits for, beside what node's parts send.
type events struct {
	selectors <-chan iface.Selector
	configs   <-chan *subnet.Config
	links     <-chan struct{}
	file      <-chan struct{}      // nil: the subnet file cannot be watched
	leases    <-chan subnet.Update // nil: leases are not watched
	probes    <-chan struct{}      // nil: peers are not probed, or see takeReport
	reported  <-chan time.Time     // see takeReport
	heartbeat <-chan time.Time     // nil: there is none
}

// Run keeps the node's network until ctx ends, and leaves the data path in place.
// It logs with the logger of ctx (klog.NewContext). An error is for the operator: it
// says what neither waiting nor retrying can solve.
//
// All happens in the network namespace of the calling thread. Where that is not the
// process's own, the caller has locked the thread (runtime.LockOSThread).
func Run(ctx context.Context, o Options) error {
	if err := o.complete(); err != nil {
		return err
	}
	space, err := netspace.Current()
	if err != nil {
		return err
	}
	inner, cancel := context.WithCancel(space.NewContext(ctx))
	n := &node{
		Options: o, started: time.Now(), log: klog.FromContext(ctx), status: newStatusServer(),
		metrics: newMetrics(o.Manager, o.Version), errors: retry.LastErrors[string]{},
		records: subnet.NewRecordLog(klog.FromContext(ctx)), retry: time.NewTimer(0), retrying: true,
		health: newHealth(o.Manager, o.Waiting), fileFights: newFileFights(klog.FromContext(ctx)), locks: map[string]*lock.Lock{},
	}
	n.Uplink.Overlay, n.table = backend.Device, o.RouteTable
	defer n.releaseLocks()
	defer n.group.Wait()
	defer cancel()
	if o.Metrics != nil {
		if err := o.Metrics.Register(n.metrics); err != nil {
			return fmt.Errorf("registering the metrics (several networks need a label each): %w", err)
		}
		defer o.Metrics.Unregister(n.metrics)
	}
	// The manager may notice the end of ctx before inner has ended.
	if err := n.run(inner); ctx.Err() == nil {
		return err
	}
	return nil
}

func (n *node) run(ctx context.Context) (err error) {
	if err := n.becomeOnly(ctx); err != nil {
		return err
	}
	n.serveStatus(ctx)
	n.health.waitFor("the network's configuration")
	if n.cfg, err = n.Manager.Config(ctx); err != nil {
		return err
	}
	n.cfg = retainFromFile(n.cfg, n.SubnetFile)
	n.target.cfg = n.cfg
	n.log.Info("Network configuration read", "network", n.cfg.Networks(), "backend", n.cfg.BackendType)
	n.logWarnings(n.cfg)
	n.health.waitFor("this node to be known")
	if err := n.start(ctx); err != nil {
		return err
	}
	defer n.stop()
	if n.kernel == nil {
		return nil // for ctx has ended
	}
	err = n.refreshUplink(ctx, n.target.cfg)
	compare := time.NewTicker(n.KernelResync)
	defer compare.Stop()
	close(n.status.serving)
	for running := true; running && err == nil; {
		n.refreshHost(ctx)
		n.reconcile()
		n.updateMetrics()
		n.health.report()
		running, err = n.handleEvent(ctx, compare.C)
	}
	return err
}

// start opens what events come from and starts the parts that work in goroutines
// of their own.
func (n *node) start(ctx context.Context) (err error) {
	n.events.selectors = n.Manager.Select(ctx, n.Uplink)
	var known bool
	if n.Uplink, known = <-n.events.selectors; !known {
		return nil
	}
	if n.events.links, err = iface.Changes(ctx); err != nil {
		return err
	}
	if file, err := watchFile(ctx, n.SubnetFile); err != nil {
		n.log.Error(err, "Cannot watch the subnet file; it is checked at each comparison (--kernel-resync)",
			"path", n.SubnetFile)
	} else {
		n.file, n.events.file = file, file.C
	}
	if n.kernel, err = kernel.New(n.log); err != nil {
		return err
	}
	n.kernel.Network, n.kernel.Table = n.Name, n.RouteTable
	if env, err := subnet.ReadEnv(n.SubnetFile); err == nil {
		for _, network := range env.Networks.Each() { // routes may be left of these
			if n.checkOverlap(ctx, network) == nil {
				n.within = append(n.within, network)
			}
		}
	}
	n.rules = firewall.NewReconciler(n.Name, n.RulesResync)
	n.metrics.rules.Store(n.rules)
	nftables := n.cfg.EnableNFTables
	n.group.Go(netspace.FromContext(ctx).In(func() { n.rules.Run(ctx, nftables) }))
	n.keeper = newLeaseKeeper(n.Manager, n.metrics)
	n.worker = newWorker()
	n.startProber(ctx)
	n.events.configs = n.Manager.Configs(ctx)
	if n.HeartbeatEvery > 0 {
		n.events.heartbeat = time.Tick(n.HeartbeatEvery)
	}
	return nil
}

func (n *node) stop() {
	if n.kernel != nil {
		n.worker.Stop(backend.ErrStopping)
		n.keeper.Stop(nil)
		n.kernel.Close()
	}
}

// handleEvent waits for the next event and handles it. It returns false when ctx has
// ended.
func (n *node) handleEvent(ctx context.Context, compare <-chan time.Time) (running bool, err error) {
	running = true
	select {
	case <-ctx.Done():
		return false, nil
	case <-n.kernel.Wake():
		n.kernelWoken = true
	case u, ok := <-n.events.leases:
		if running = ok; ok {
			n.update(u)
		}
	case l := <-n.keeper.leases:
		n.applyLease(ctx, l)
	case err = <-n.keeper.Failed():
	case err = <-n.worker.Failed():
	case s := <-n.rules.States():
		n.setRulesState(s)
	case <-n.events.file:
		n.checkFile()
	case <-n.events.probes:
		n.takeReport()
	case <-n.events.reported:
		n.events.probes = n.prober.Reports()
	case _, ok := <-n.events.links:
		if running = ok; ok {
			err = n.refreshUplink(ctx, n.target.cfg)
		}
	case cfg, ok := <-n.events.configs:
		if running = ok; ok {
			err = n.configure(ctx, cfg)
		}
	case sel, ok := <-n.events.selectors:
		if running = ok; ok {
			n.Uplink = sel
			err = n.refreshUplink(ctx, n.target.cfg)
		}
	case answer := <-n.status.requests:
		answer()
	case <-n.retry.C:
		n.retrying, n.filePaced = false, false
		if n.blocked != nil {
			err = n.refreshUplink(ctx, n.blocked)
		}
	case <-n.events.heartbeat:
		n.Heartbeat()
	case <-compare:
		n.kernel.Compare()
		n.fileSet = false
		n.fileFights.Forget()
		n.recordFileFight()
		n.checkLost()
		if err = n.releaseRetired(ctx); err == nil {
			err = n.refreshUplink(ctx, n.target.cfg)
		}
	}
	return running, err
}

// maxWarnings is how many remarks on a configuration are logged.
const maxWarnings = 20

// logWarnings logs the remarks on a configuration, once.
func (n *node) logWarnings(cfg *subnet.Config) {
	for i, w := range cfg.Warnings {
		if i == maxWarnings {
			n.log.Error(nil, "Configuration: there are more warnings", "count", len(cfg.Warnings)-i,
				"fix", "flannelctl validate shows all of them")
			break
		}
		n.log.Error(nil, "Configuration: "+w)
	}
	cfg.Warnings = nil
}

// refreshUplink finds the uplink as it is now, and has the backend and the lease
// follow it, and the configuration, which may be a new one. A setup that cannot work
// is an error only while no other is in force.
func (n *node) refreshUplink(ctx context.Context, cfg *subnet.Config) error {
	old := n.target
	sel := n.Uplink
	sel.Prefer = append(family.Valid(old.uplink.Addrs()), sel.Prefer...)
	// A node that works with both families stays as it is while one of them is away.
	uplink, missing, err := findUplink(sel, cfg, n.workingUplink(), n.backend == nil || n.partial())
	if err != nil {
		n.target = setup{cfg: cfg, uplink: old.uplink} // which is not there yet
		if n.backend != nil {
			err = fmt.Errorf("staying with %s: %w", old.uplink.Names(), err)
		} else {
			n.health.waitFor("an uplink: " + err.Error())
		}
		n.logOnce("Uplink", err)
		return nil
	}
	n.logOnce("Uplink", nil)
	for _, f := range family.All {
		n.logOnce(f.String(), missing[f])
	}
	n.health.setMissing(missing)
	if old.backend != nil && cfg == old.cfg && uplink.Equal(old.uplink) {
		return nil
	}
	forBackend := backendConfig(cfg, uplink)
	b, err := backend.New(forBackend, uplink)
	cfg.Warnings = forBackend.Warnings
	next := setup{cfg, uplink, b}
	var held error // by another flanneld
	if err == nil {
		held = n.takeLocks(ctx, next)
		err = held
	}
	if held != nil && (n.backend == nil || cfg != n.cfg) {
		n.blocked = cfg
	}
	switch {
	case held != nil && n.backend == nil:
		n.target = setup{cfg: cfg, uplink: uplink}
		n.health.waitFor("what another flanneld has: " + err.Error())
		n.logOnce("Configuration", err)
		return nil
	case err != nil && n.backend == nil:
		return err
	case err != nil && cfg != n.cfg:
		n.logOnce("Configuration", fmt.Errorf("the new one is refused, the old one stays in force: %w", err))
		if old.cfg == cfg { // there was no uplink for it
			n.target = n.setup
			return n.refreshUplink(ctx, n.cfg)
		}
		return nil
	case err != nil:
		n.logOnce("Uplink", fmt.Errorf("%s cannot be used, staying with %s: %w", uplink, old.uplink, err))
		return nil
	}
	if cfg != n.cfg || cfg == n.blocked { // else another one is refused
		n.logOnce("Configuration", nil)
	}
	if cfg == n.blocked {
		n.blocked = nil
	}
	if old.backend == nil || !uplink.Equal(old.uplink) {
		n.log.Info("Uplink found", "uplink", uplink)
	}
	n.logWarnings(cfg) // of the backend's keys too
	n.target, n.leftOver = next, true
	n.keeper.setObstacles(n.target.obstacles(n.readHost()))
	if n.own == nil {
		n.setup = n.target
		n.watchLeases(ctx)
		n.health.waitFor("a lease")
		n.keeper.acquire(ctx, n.target, n.previousSubnets())
		return nil
	}
	if cfg == n.cfg { // the devices and routes follow at once, before the lease does
		n.setup = n.target
		n.apply(ctx)
	}
	n.keeper.acquire(ctx, n.target, n.own.Subnets)
	return nil
}

// readHost returns what the network may not take from the host.
func (n *node) readHost() host {
	overlays := n.target.cfg.Networks().Each()
	if n.cfg != n.target.cfg {
		overlays = append(overlays, n.cfg.Networks().Each()...)
	}
	n.kernel.SetOverlays(overlays)
	h := host{routes: n.kernel.Foreign()}
	h.store, h.stores = storeOf(n.Manager.State())
	return h
}

// refreshHost has the peers and the lease follow what belongs to the host now.
func (n *node) refreshHost(ctx context.Context) {
	h := n.readHost()
	if h.equal(n.host) {
		n.logOverlaps() // the uplink, the configuration or the lease may be new
		return
	}
	before := n.target.obstacles(n.host)
	u := n.setHost(h)
	now := n.target.obstacles(h)
	n.keeper.setObstacles(now)
	n.logOverlaps()
	if n.own != nil && n.table != 0 { // the rules that lead to it are others now
		n.kernel.Set(nodeOwner, n.planNode(n.Options).objects)
	}
	switch {
	case n.own == nil && n.target.backend != nil && !slices.Equal(before, now):
		n.keeper.acquire(ctx, n.target, n.previousSubnets()) // other subnets are free now
	case n.own != nil && len(u.Leases) > 0:
		n.applyPeers(n.applyUpdate(u))
		n.forgetProblems(u)
	}
}

// logOverlaps logs, once, where the network overlaps what the host uses.
func (n *node) logOverlaps() {
	now := n.target.overlaps(n.host, n.own)
	if slices.Equal(now, n.overlaps) {
		return
	}
	for _, text := range now {
		if !slices.Contains(n.overlaps, text) {
			n.log.Error(nil, "The network overlaps what this host uses", "overlap", text)
		}
	}
	n.overlaps = now
	n.recordEvent("overlap", "NetworkOverlap", strings.Join(now, "; "))
}

// watchLeases has the manager watch leases, if the backend has peers at all.
func (n *node) watchLeases(ctx context.Context) {
	switch {
	case n.events.leases != nil:
	case !n.backend.Info().NoPeers:
		n.events.leases, n.leases = n.Manager.Watch(ctx), nil
	case n.leases == nil:
		n.leases = map[subnet.Subnets]*subnet.Lease{}
	}
}

// previousSubnets returns the subnets that the subnet file names, if the file is of
// this network.
func (n *node) previousSubnets() subnet.Subnets {
	env, err := subnet.ReadEnv(n.SubnetFile)
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		n.log.Error(err, "Cannot tell which subnet this node held before", "path", n.SubnetFile)
	default:
		n.before = env.Subnets
		if n.cfg.Networks().Contain(env.Subnets) {
			return env.Subnets
		}
	}
	return subnet.Subnets{}
}

// applyLease puts a lease in force, and the setup that it was acquired for.
func (n *node) applyLease(ctx context.Context, a acquired) {
	if a.backend != n.target.backend {
		return // a later one follows
	}
	l := a.Lease
	l.Expires = time.Time{} // State of the manager has the end, which may become another one
	if a.cfg != n.cfg {
		n.log.Info("Configuration changed", "network", a.cfg.Networks(), "backend", a.cfg.BackendType)
		n.setup = a.setup
		n.watchLeases(ctx)
	}
	if n.own == nil {
		n.announceSubnets(n.before, l.Subnets)
	} else if former := n.own.Subnets; former != l.Subnets {
		n.announceSubnets(former, l.Subnets)
		if l := n.leases[former]; l != nil && l.Attrs.Equal(n.own.Attrs) { // else it is another node's by now
			delete(n.leases, former)
		}
	}
	n.own = &l
	n.apply(ctx)
	n.fileSet, n.rulesSet = false, false
	p := n.planNode(n.Options)
	n.rules.Set(p.rules, p.nftables)
}

// apply has the kernel and the backend's worker follow the plans for the node and
// all of its peers.
func (n *node) apply(ctx context.Context) {
	p := n.planNode(n.Options)
	for _, network := range n.cfg.Networks().Each() {
		if !slices.Contains(n.within, network) {
			n.within = append(n.within, network)
		}
	}
	n.kernel.SetNetworks(p.networks, slices.Clone(n.within))
	n.kernel.Set(nodeOwner, p.objects)
	n.metrics.setBackend(n.backend)
	n.worker.start(ctx, n.backend, n.working())
	if n.leases != nil {
		n.applyPeers(n.planAllPeers())
	}
}

func (n *node) applyPeers(p peersPlan) {
	for _, drop := range []bool{true, false} { // first what is dropped: two owners must not claim one object
		for owner, objects := range p.objects {
			if (len(objects) == 0) == drop {
				n.kernel.Set(owner, objects)
			}
		}
	}
	n.logProblems(p.problems)
	n.worker.update(p.update)
	n.probePeers(p)
	n.recordRival()
}

// logProblems logs what is wrong with leases of peers.
func (n *node) logProblems(problems []problem) {
	for _, problem := range problems {
		l := problem.lease
		n.records.Error(l.Subnets.String(), problem.text, nil, "Peer cannot be reached",
			"peer", l.Subnets, "addresses", l.Attrs.PublicIPs(), "reason", problem.text)
	}
}

// forgetProblems forgets what was logged about leases that are gone or right after an update.
func (n *node) forgetProblems(u subnet.Update) {
	if n.records.Len() == 0 {
		return
	}
	if u.Snapshot {
		n.records.ForgetOthers(func(yield func(string) bool) {
			for s := range n.problems {
				if !yield(s.String()) {
					return
				}
			}
		})
		return
	}
	for s := range u.Leases {
		if _, wrong := n.problems[s]; !wrong {
			n.records.Forget(s.String())
		}
	}
	for s := range u.Gone {
		n.records.Forget(s.String())
	}
}

// update handles an update of leases.
func (n *node) update(u subnet.Update) {
	n.countUpdate(u)
	n.applyPeers(n.applyUpdate(u))
	n.forgetProblems(u)
}

// reconcile makes everything as planned, as far as possible now.
func (n *node) reconcile() {
	if n.blocked != nil {
		n.retryLater()
	}
	if n.own == nil {
		return
	}
	if n.leases == nil {
		// Kernel objects may be peers' from before a restart: they stay until the
		// peers are known.
		n.health.waitFor("the leases of the other nodes")
		return
	}
	n.reconcileKernel()
	n.giveUp()
	switch {
	case !n.kernel.Has(nodeOwner):
		n.health.waitFor("the device: " + string(n.errors["Kernel"]))
	case !n.rulesSet:
		n.health.waitFor("the rules: see the log")
	case !n.fileSet && !n.filePaced:
		n.writeFile()
	}
	if !n.ready && n.fileSet {
		n.becomeReady()
	}
	switch { // the subnet file; the kernel's and the rules' reconcilers retry by themselves
	case n.blocked != nil:
	case !n.rulesSet || n.fileSet:
		n.pause.Reset()
	default:
		n.retryLater()
	}
}

// retryLater has the main loop run again after a pause.
func (n *node) retryLater() {
	if !n.retrying {
		n.retry.Reset(n.pause.Next())
		n.retrying = true
	}
}

// reconcileKernel makes the kernel hold what is planned, if there is anything to do.
func (n *node) reconcileKernel() {
	select {
	case <-n.kernel.Wake():
		n.kernelWoken = true
	default:
	}
	if !n.kernelWoken {
		return
	}
	n.kernelWoken = false
	if err := n.kernel.Reconcile(); err != n.kernelErr {
		n.kernelErr = err
		n.logOnce("Kernel", err)
	}
}

func (n *node) becomeReady() {
	n.ready = true
	n.metrics.ready.Store(true)
	n.Manager.Ready()
	n.health.setReady()
	n.log.Info("Ready", "after", time.Since(n.started).Round(time.Millisecond),
		"subnet", n.own.Subnets, "peers", n.others())
}

// logOnce logs a duty's error when it changes, and its end.
func (n *node) logOnce(duty string, err error) {
	if err != nil {
		n.metrics.failed(duty)
	}
	n.errors.Log(n.log, duty, err)
}
