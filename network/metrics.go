package network

import (
	"bytes"
	"net/http"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/firewall"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/pkg/probe"
	"github.com/flanneld/flanneld/subnet"
)

// metrics holds the metrics for Prometheus. They are set when something changes, and a scrape reads them without a lock
// on the main loop. make docs writes the help texts into Documentation/metrics.md.
type metrics struct {
	set []prometheus.Collector // those below, and flannel_build_info; all others are computed

	ready         atomic.Bool // the node has been ready
	peers, faulty prometheus.Gauge
	leaseEvents   *prometheus.CounterVec
	leaseDuration prometheus.Histogram
	errors        *prometheus.CounterVec

	probeRTT, probeLoss prometheus.Histogram
	perPeer             atomic.Bool // metrics for each peer, too

	manager subnet.Manager
	probes  atomic.Pointer[probes] // nil: peers are not probed
	rules   atomic.Pointer[firewall.Reconciler]
	kernel  atomic.Pointer[kernel.Stats]
	backend atomic.Pointer[backend.StatsReporter] // nil: the backend counts nothing
}

// operation returns the label of a duty, from the name of the duty in the log.
func operation(duty string) string { return strings.ReplaceAll(strings.ToLower(duty), " ", "_") }

func newMetrics(m subnet.Manager, version string) *metrics {
	s := &metrics{manager: m}
	gauge := func(name, help string) prometheus.Gauge {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
		s.set = append(s.set, g)
		return g
	}
	vector := func(name, help, label string, values ...string) *prometheus.CounterVec {
		v := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, []string{label})
		for _, value := range values {
			v.WithLabelValues(value) // a rate begins at zero
		}
		s.set = append(s.set, v)
		return v
	}
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "flannel_build_info", Help: "always 1; the labels name the build that runs",
		ConstLabels: prometheus.Labels{"version": version, "goversion": runtime.Version()},
	})
	info.Set(1)
	s.set = append(s.set, info)

	s.peers = gauge("flannel_peers", "leases of other nodes")
	s.faulty = gauge("flannel_peers_faulty",
		"leases of other nodes that are left out, wholly or in part; the log gives the reason")
	s.leaseEvents = vector("flannel_lease_events_total",
		"lease events: `snapshot`, all leases were read (once, and after each gap); `set`, a lease was added or changed; "+
			"`removed`, a lease was removed",
		"event", "snapshot", "set", "removed")
	s.leaseDuration = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "flannel_lease_event_duration_seconds",
		Help:    "from when the watch delivered the event of one lease until the kernel has the lease's objects",
		Buckets: []float64{.001, .005, .01, .05, .1, .5, 1, 5, 30},
	})
	s.set = append(s.set, s.leaseDuration)
	s.probeRTT = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "flannel_probe_rtt_seconds",
		Help:    "from a probe of a peer through the overlay until the reply",
		Buckets: []float64{.0001, .0002, .0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1},
	})
	s.probeLoss = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "flannel_probe_loss_ratio",
		Help:    "which share of some ten probes of one peer through the overlay had no reply; peers that have never replied do not count",
		Buckets: []float64{0, .05, .1, .2, .3, .5, .75, .95, 1},
	})
	s.set = append(s.set, s.probeRTT, s.probeLoss)
	s.errors = vector("flannel_errors_total",
		"attempts that failed and are retried, by operation as in the log: `uplink`, `configuration`, `publishing`, "+
			"`kernel`, `rules`, `subnet_file` (also each time that another program undoes it, again and again) and "+
			"`watching_the_subnet_file`",
		"operation", "uplink", "configuration", "publishing", "kernel", "rules", "subnet_file")
	return s
}

// failed counts an error of a duty.
func (s *metrics) failed(duty string) { s.errors.WithLabelValues(operation(duty)).Inc() }

// probes are what a *probe.Prober has found.
type probes interface {
	Count() map[probe.State]int
	All() map[string][]probe.Result
}

// setProber sets what has the results of probes, and whether metrics of each peer are reported.
func (s *metrics) setProber(p probes, perPeer bool) {
	s.perPeer.Store(perPeer)
	s.probes.Store(&p)
}

// observers returns what the prober calls.
func (s *metrics) observers() probe.Observers {
	return probe.Observers{
		RTT:  func(rtt time.Duration) { s.probeRTT.Observe(rtt.Seconds()) },
		Loss: s.probeLoss.Observe,
	}
}

// setBackend sets the backend whose counters are reported, if it has any.
func (s *metrics) setBackend(b backend.Backend) {
	if r, ok := b.(backend.StatsReporter); ok {
		s.backend.Store(&r)
	} else {
		s.backend.Store(nil)
	}
}

// These metrics are computed at each scrape.
var (
	descReady = prometheus.NewDesc("flannel_ready",
		"1 while `/readyz` answers 200: as soon as the node's network is set up, until the node waits for another lease",
		nil, nil)
	descConnected = prometheus.NewDesc("flannel_manager_connected",
		"1 while etcd or the API server answers requests; an outage shows within about 20 s", nil, nil)
	descExpiry = prometheus.NewDesc("flannel_lease_expiry_timestamp_seconds",
		"when the node's lease ends unless it is renewed, as Unix time. Absent without a lease, for a lease that does "+
			"not end, and with Kubernetes", nil, nil)
	descObjectsWanted = prometheus.NewDesc("flannel_kernel_objects_wanted",
		"desired objects, which the kernel should hold: `link`, `address`, `neighbor`, `fdb`, `route`, `rule`, `policy` (IPsec's)",
		[]string{"kind"}, nil)
	descObjectsHeld = prometheus.NewDesc("flannel_kernel_objects_held",
		"desired objects that the kernel holds", []string{"kind"}, nil)
	descRepairs = prometheus.NewDesc("flannel_kernel_repairs_total",
		"objects restored after another program's change: `missing`, the object was removed; `changed`, it was changed "+
			"or replaced; `left_over`, it was there and not desired; `fight`, any of these again and again. At the start, "+
			"objects that an earlier daemon left count too",
		[]string{"kind", "cause"}, nil)
	descFights = prometheus.NewDesc("flannel_kernel_fights",
		"objects that another program undoes again and again; each is restored at most once a second", nil, nil)
	descRulesChecks = prometheus.NewDesc("flannel_rules_checks_total",
		"checks of the firewall rules: every `--iptables-resync`, and when the kernel notifies of a change", nil, nil)
	descRulesWrites  = prometheus.NewDesc("flannel_rules_writes_total", "times that the firewall rules were set", nil, nil)
	descRulesRepairs = prometheus.NewDesc("flannel_rules_repairs_total",
		"times that the firewall rules were restored, because another program had changed them", nil, nil)
	descRulesInPlace = prometheus.NewDesc("flannel_rules_in_place",
		"1 if the firewall rules were in place after the last check", nil, nil)
	descRulesChecked = prometheus.NewDesc("flannel_rules_last_check_timestamp_seconds",
		"when the firewall rules were checked last, as Unix time", nil, nil)
	descProbed = prometheus.NewDesc("flannel_probe_paths",
		"ways to peers, one for each family, by what the probes find: `reachable`; `host-only`, the peer's host replies, but "+
			"not through the overlay; `silent`, nothing replies any more; `never-replied`, nothing ever has, since a firewall "+
			"may drop ICMP; `no-address`, the peer or this node has no bridge yet, and so no address in the overlay; "+
			"`unknown`, not asked yet",
		[]string{"state"}, nil)
	descPeerReachable = prometheus.NewDesc("flannel_peer_reachable",
		"1 while probes of the peer through the overlay have replies. Only with `--probe-peer-metrics`",
		[]string{"peer", "address"}, nil)
	descPeerRTT = prometheus.NewDesc("flannel_peer_rtt_seconds",
		"from the latest probe of the peer through the overlay until the reply. Only with `--probe-peer-metrics`",
		[]string{"peer", "address"}, nil)
	descPackets = prometheus.NewDesc("flannel_backend_packets_total",
		"packets that the backend moved itself (as udp does): `sent` to peers, `received` from peers",
		[]string{"direction", "queue"}, nil)
	descOctets = prometheus.NewDesc("flannel_backend_bytes_total",
		"bytes of the packets that the backend moved itself", []string{"direction", "queue"}, nil)
	descDrops = prometheus.NewDesc("flannel_backend_dropped_packets_total",
		"packets that the backend dropped: `malformed`, `not_from_peer`, `not_ours`, `no_route`, `on_link` (such as "+
			"multicast, which is normal), `ttl_expired`, `not_sent`, `not_received`",
		[]string{"direction", "queue", "reason"}, nil)
)

// Describe implements prometheus.Collector.
func (s *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		descReady, descConnected, descExpiry, descObjectsWanted, descObjectsHeld, descRepairs, descFights,
		descRulesChecks, descRulesWrites, descRulesRepairs, descRulesInPlace, descRulesChecked,
		descProbed, descPeerReachable, descPeerRTT, descPackets, descOctets, descDrops,
	} {
		ch <- d
	}
	for _, c := range s.set {
		c.Describe(ch)
	}
}

// Collect implements prometheus.Collector.
func (s *metrics) Collect(ch chan<- prometheus.Metric) {
	for _, c := range s.set {
		c.Collect(ch)
	}
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	state := s.manager.State()
	gauge(descReady, truth(s.ready.Load() && state.Waiting == ""))
	gauge(descConnected, truth(state.Connected))
	if !state.Expires.IsZero() {
		gauge(descExpiry, float64(byClock(state.Expires).Unix()))
	}
	if stats := s.kernel.Load(); stats != nil {
		gauge(descFights, float64(stats.Fights))
		for i, k := range stats.Kinds {
			kind := kernel.Kind(i)
			if kind.BestEffort() {
				continue
			}
			gauge(descObjectsWanted, float64(k.Wanted), kind.String())
			gauge(descObjectsHeld, float64(k.Held), kind.String())
			for cause, times := range k.Repairs {
				counter(descRepairs, times, kind.String(), kernel.Cause(cause).String())
			}
		}
	}
	var rules firewall.Stats
	if r := s.rules.Load(); r != nil {
		rules = r.Stats()
	}
	counter(descRulesChecks, rules.Checks)
	counter(descRulesWrites, rules.Writes)
	counter(descRulesRepairs, rules.Repairs)
	gauge(descRulesInPlace, truth(rules.InPlace))
	checked := 0.0
	if !rules.Checked.IsZero() {
		checked = float64(byClock(rules.Checked).UnixNano()) / 1e9
	}
	gauge(descRulesChecked, checked)
	s.collectProbes(gauge)
	if b := s.backend.Load(); b != nil {
		for _, q := range (*b).QueueStats() {
			queue := strconv.Itoa(q.Queue)
			counter(descPackets, q.Packets, q.Direction, queue)
			counter(descOctets, q.Bytes, q.Direction, queue)
			for reason, n := range q.Drops {
				counter(descDrops, n, q.Direction, queue, reason)
			}
		}
	}
}

// collectProbes reports what the probes of peers find.
func (s *metrics) collectProbes(gauge func(*prometheus.Desc, float64, ...string)) {
	found := s.probes.Load()
	if found == nil {
		return
	}
	count := (*found).Count()
	for _, state := range probe.States {
		gauge(descProbed, float64(count[state]), string(state))
	}
	if !s.perPeer.Load() {
		return
	}
	for peer, results := range (*found).All() {
		for _, r := range results {
			gauge(descPeerReachable, truth(r.State == probe.Reachable), peer, r.Overlay.String())
			if r.RTT > 0 {
				gauge(descPeerRTT, r.RTT.Seconds(), peer, r.Overlay.String())
			}
		}
	}
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// MetricsHandler returns a handler that answers scrapes of g, in Prometheus' text format.
func MetricsHandler(g prometheus.Gatherer) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var out bytes.Buffer
		families, err := g.Gather()
		for _, f := range families {
			if err == nil {
				_, err = expfmt.MetricFamilyToText(&out, f)
			}
		}
		if err != nil {
			klog.FromContext(r.Context()).V(1).Info("Cannot answer a scrape of the metrics", "err", err)
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", string(expfmt.NewFormat(expfmt.TypeTextPlain)))
		w.Write(out.Bytes())
	})
}

// updateMetrics sets the metrics that this goroutine knows.
func (n *node) updateMetrics() {
	if n.own != nil {
		n.metrics.peers.Set(float64(n.others()))
	}
	n.metrics.faulty.Set(float64(len(n.problems)))
	if now, before := n.kernel.Stats(), n.metrics.kernel.Load(); before == nil || now != *before {
		stats := now
		n.metrics.kernel.Store(&stats)
		if before == nil || now.Fight != before.Fight {
			n.recordKernelFight(now.Fight)
		}
	}
	for s, since := range n.unapplied {
		if n.leases != nil && n.kernel.Has(s.String()) {
			n.metrics.leaseDuration.Observe(time.Since(since).Seconds())
			delete(n.unapplied, s)
		}
	}
	if len(n.unapplied) == 0 {
		n.unapplied = nil // frees the memory that a burst has taken
	}
}

// countUpdate counts an update of leases, and records its time, so that updateMetrics can observe how long it takes
// until the kernel has the objects of the leases.
func (n *node) countUpdate(u subnet.Update) {
	if u.Snapshot {
		n.metrics.leaseEvents.WithLabelValues("snapshot").Inc()
		return
	}
	n.metrics.leaseEvents.WithLabelValues("set").Add(float64(len(u.Leases)))
	n.metrics.leaseEvents.WithLabelValues("removed").Add(float64(len(u.Gone)))
	if n.own == nil || u.Since.IsZero() {
		return
	}
	if n.unapplied == nil {
		n.unapplied = make(map[subnet.Subnets]time.Time, len(u.Leases)+len(u.Gone))
	}
	begin := func(s subnet.Subnets) {
		if _, waits := n.unapplied[s]; !waits && s != n.own.Subnets {
			n.unapplied[s] = u.Since
		}
	}
	for s := range u.Leases {
		begin(s)
	}
	for s := range u.Gone {
		begin(s)
	}
}
