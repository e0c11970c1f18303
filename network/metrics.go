package network

import (
	"bytes"
	"fmt"
	"net/http"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/common/expfmt"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/subnet"
)

// metrics are what Prometheus is told (Documentation/metrics.md has each). They
// are set by those who know, and read at any time: nobody waits for a scrape.
type metrics struct {
	registry *prometheus.Registry

	ready, peers, faulty prometheus.Gauge
	leaseEvents          *prometheus.CounterVec
	leaseDuration        prometheus.Histogram
	errors               *prometheus.CounterVec

	rulesChecks, rulesWrites, rulesRepairs prometheus.Counter
	rulesInPlace, rulesChecked             prometheus.Gauge

	manager subnet.Manager
	kernel  atomic.Pointer[kernel.Stats]
	backend atomic.Pointer[backend.Metered] // nil: it counts nothing
}

// operation is the label of a duty, named as the log does.
func operation(duty string) string { return strings.ReplaceAll(strings.ToLower(duty), " ", "_") }

func newMetrics(m subnet.Manager, version string) *metrics {
	s := &metrics{registry: prometheus.NewRegistry(), manager: m}
	s.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), s)
	gauge := func(name, help string) prometheus.Gauge {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
		s.registry.MustRegister(g)
		return g
	}
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
		s.registry.MustRegister(c)
		return c
	}
	vector := func(name, help, label string, values ...string) *prometheus.CounterVec {
		v := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, []string{label})
		for _, value := range values {
			v.WithLabelValues(value) // a rate begins at zero
		}
		s.registry.MustRegister(v)
		return v
	}
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "flannel_build_info", Help: "Always 1; the labels tell which build runs.",
		ConstLabels: prometheus.Labels{"version": version, "goversion": runtime.Version()},
	})
	info.Set(1)
	s.registry.MustRegister(info)

	s.ready = gauge("flannel_ready", "Whether the node's network has been set up: 1 once /readyz answers 200.")
	s.peers = gauge("flannel_peers", "Leases of other nodes.")
	s.faulty = gauge("flannel_peers_faulty", "Leases of other nodes that are left out, wholly or in part: the log says why.")
	s.leaseEvents = vector("flannel_lease_events_total", "News of leases: whole states read, leases set and removed since.", "event", "snapshot", "set", "removed")
	s.leaseDuration = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "flannel_lease_event_duration_seconds", Help: "From news of one lease until the kernel holds what it calls for.",
		Buckets: []float64{.001, .005, .01, .05, .1, .5, 1, 5, 30},
	})
	s.registry.MustRegister(s.leaseDuration)
	s.errors = vector("flannel_errors_total", "Attempts that failed; each is made again.", "operation",
		"uplink", "configuration", "publishing", "kernel", "rules", "subnet_file")
	s.rulesChecks = counter("flannel_rules_checks_total", "Checks of the firewall rules.")
	s.rulesWrites = counter("flannel_rules_writes_total", "How often firewall rules were set.")
	s.rulesRepairs = counter("flannel_rules_repairs_total", "How often firewall rules were found changed by somebody.")
	s.rulesInPlace = gauge("flannel_rules_in_place", "Whether the firewall rules were in place at the last check.")
	s.rulesChecked = gauge("flannel_rules_last_check_timestamp_seconds", "When the firewall rules were checked last.")
	return s
}

// failed counts an error of a duty.
func (s *metrics) failed(duty string) { s.errors.WithLabelValues(operation(duty)).Inc() }

// setBackend has the counters of a backend told, if it has any.
func (s *metrics) setBackend(b backend.Backend) {
	if m, ok := b.(backend.Metered); ok {
		s.backend.Store(&m)
	} else {
		s.backend.Store(nil)
	}
}

// What is asked for at a scrape.
var (
	descConnected     = prometheus.NewDesc("flannel_manager_connected", "Whether etcd, or the API server, does what it is asked.", nil, nil)
	descExpiry        = prometheus.NewDesc("flannel_lease_expiry_timestamp_seconds", "When this node's lease ends unless it is renewed; absent for one that does not end.", nil, nil)
	descObjectsWanted = prometheus.NewDesc("flannel_kernel_objects_wanted", "Objects that the kernel is wanted to hold.", []string{"kind"}, nil)
	descObjectsHeld   = prometheus.NewDesc("flannel_kernel_objects_held", "Wanted objects that the kernel holds as they should be.", []string{"kind"}, nil)
	descRepairs       = prometheus.NewDesc("flannel_kernel_repairs_total", "Objects set right after somebody else changed the kernel's tables.", []string{"kind", "cause"}, nil)
	descFights        = prometheus.NewDesc("flannel_kernel_fights", "Objects that somebody undoes again and again.", nil, nil)
	descPackets       = prometheus.NewDesc("flannel_backend_packets_total", "Packets that the backend moved itself.", []string{"direction", "queue"}, nil)
	descOctets        = prometheus.NewDesc("flannel_backend_bytes_total", "Bytes of the packets that the backend moved itself.", []string{"direction", "queue"}, nil)
	descDrops         = prometheus.NewDesc("flannel_backend_dropped_packets_total", "Packets that the backend dropped.", []string{"direction", "queue", "reason"}, nil)
)

// Describe implements prometheus.Collector.
func (s *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descConnected, descExpiry, descObjectsWanted, descObjectsHeld, descRepairs, descFights, descPackets, descOctets, descDrops} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (s *metrics) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	state := s.manager.State()
	gauge(descConnected, truth(state.Connected))
	if !state.Expires.IsZero() {
		gauge(descExpiry, float64(state.Expires.Unix()))
	}
	if stats := s.kernel.Load(); stats != nil {
		gauge(descFights, float64(stats.Fights))
		for i, k := range stats.Kinds {
			kind := kernel.Kind(i)
			if kind == kernel.KindNexthop {
				continue // a means only
			}
			gauge(descObjectsWanted, float64(k.Wanted), kind.String())
			gauge(descObjectsHeld, float64(k.Held), kind.String())
			for cause, times := range k.Repairs {
				counter(descRepairs, times, kind.String(), kernel.Cause(cause).String())
			}
		}
	}
	if b := s.backend.Load(); b != nil {
		for _, f := range (*b).Flows() {
			queue := strconv.Itoa(f.Queue)
			counter(descPackets, f.Packets, f.Direction, queue)
			counter(descOctets, f.Bytes, f.Direction, queue)
			for reason, n := range f.Drops {
				counter(descDrops, n, f.Direction, queue, reason)
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

// ServeHTTP answers a scrape, in Prometheus' text format.
func (s *metrics) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	var out bytes.Buffer
	families, err := s.registry.Gather()
	for _, f := range families {
		if err == nil {
			_, err = expfmt.MetricFamilyToText(&out, f)
		}
	}
	if err != nil {
		klog.V(1).Infof("/metrics: %v", err)
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", string(expfmt.NewFormat(expfmt.TypeTextPlain)))
	w.Write(out.Bytes())
}

// herald tells people what needs a hand, where the store is a place for that; ""
// says that it is over.
func herald(m subnet.Manager, about, reason, message string) {
	if h, ok := m.(subnet.Herald); ok {
		h.Notify(about, reason, message)
	}
}

// measure tells the metrics what this goroutine knows.
func (n *node) measure() {
	if n.lease != nil {
		n.metrics.peers.Set(float64(n.others()))
	}
	n.metrics.faulty.Set(float64(len(n.warned)))
	if now, before := n.kernel.Stats(), n.metrics.kernel.Load(); before == nil || now != *before {
		stats := now
		n.metrics.kernel.Store(&stats)
		if before == nil || now.Fight != before.Fight {
			text := ""
			if now.Fight != nil {
				text = fmt.Sprintf("Somebody undoes what flanneld sets, again and again: %s. `ip monitor all` shows each change; mostly it is another network manager on the host, to be told to leave this alone", now.Fight)
			}
			herald(n.Manager, "kernel", "KernelFight", text)
		}
	}
	for s, since := range n.unheld {
		if n.peers != nil && n.kernel.Has(s.String()) {
			n.metrics.leaseDuration.Observe(time.Since(since).Seconds())
			delete(n.unheld, s)
		}
	}
	if len(n.unheld) == 0 {
		n.unheld = nil // a burst's memory goes
	}
}

// note counts news of leases, and the time from now on until the kernel holds
// what they call for.
func (n *node) note(u subnet.Update) {
	if u.Snapshot {
		n.metrics.leaseEvents.WithLabelValues("snapshot").Inc()
		return
	}
	n.metrics.leaseEvents.WithLabelValues("set").Add(float64(len(u.Leases)))
	n.metrics.leaseEvents.WithLabelValues("removed").Add(float64(len(u.Gone)))
	if n.lease == nil || u.Since.IsZero() {
		return
	}
	if n.unheld == nil {
		n.unheld = make(map[subnet.Subnets]time.Time, len(u.Leases)+len(u.Gone))
	}
	begin := func(s subnet.Subnets) {
		if _, waits := n.unheld[s]; !waits && s != n.lease.Subnets {
			n.unheld[s] = u.Since
		}
	}
	for s := range u.Leases {
		begin(s)
	}
	for s := range u.Gone {
		begin(s)
	}
}
