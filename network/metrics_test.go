package network

import (
	"bytes"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/pkg/nstest"
	"github.com/flanneld/flanneld/subnet"
)

// scrape returns the values of all samples, by name and labels as they are
// written: a histogram's count and buckets are left out, but for the former.
func scrape(t *testing.T) map[string]float64 {
	t.Helper()
	code, text := get("/metrics")
	if code != http.StatusOK {
		t.Fatalf("/metrics: %d %s", code, text)
	}
	p := expfmt.NewTextParser(model.LegacyValidation)
	families, err := p.TextToMetricFamilies(strings.NewReader(text + "\n"))
	if err != nil {
		t.Fatalf("/metrics: %v", err)
	}
	all := map[string]float64{}
	for name, f := range families {
		for _, m := range f.Metric {
			var labels []string
			for _, l := range m.Label {
				labels = append(labels, l.GetName()+"="+l.GetValue())
			}
			key := name
			if len(labels) > 0 {
				key += "{" + strings.Join(labels, ",") + "}"
			}
			all[key] = m.GetGauge().GetValue() + m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return all
}

// waitMetrics waits for these to be so.
func waitMetrics(t *testing.T, want map[string]float64) {
	t.Helper()
	var got map[string]float64
	wrong := func() string {
		got = scrape(t)
		for key, value := range want {
			if now, ok := got[key]; !ok || now != value {
				return fmt.Sprintf("%s is %v (%t), want %v", key, now, ok, value)
			}
		}
		return ""
	}
	for deadline := time.Now().Add(20 * time.Second); wrong() != ""; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", wrong())
		}
	}
}

func TestMetrics(t *testing.T) {
	m := newManager(vxlanConfig)
	m.expires = time.Unix(2000000000, 0)
	begin(t, m, func(o *Options) { o.Version = "v1.2.3" })
	eventually(t, "healthz", func() bool { code, _ := get("/healthz"); return code == http.StatusOK })
	waitMetrics(t, map[string]float64{"flannel_ready": 0, "flannel_manager_connected": 1,
		"flannel_lease_expiry_timestamp_seconds": 2e9})
	m.grants <- lease("10.5.1.0-24", "")
	m.updates <- snapshot(peer2, lease("10.9.5.0-24", `{"PublicIP":"198.18.0.5","PublicIPv6":null,"BackendType":"vxlan"}`)) // outside the network
	eventually(t, "ready", ready)
	waitMetrics(t, map[string]float64{
		"flannel_ready": 1, "flannel_peers": 2, "flannel_peers_faulty": 1, "flannel_rules_in_place": 1,
		`flannel_lease_events_total{event=snapshot}`: 1, `flannel_lease_events_total{event=set}`: 0,
		"flannel_lease_event_duration_seconds":      0,
		`flannel_kernel_objects_wanted{kind=route}`: 1, `flannel_kernel_objects_held{kind=route}`: 1,
		`flannel_kernel_objects_held{kind=link}`:                 1,
		`flannel_kernel_repairs_total{cause=missing,kind=route}`: 0, "flannel_kernel_fights": 0,
		`flannel_errors_total{operation=kernel}`: 0, `flannel_errors_total{operation=uplink}`: 0,
	})

	// News of leases, and how long it took.
	var u subnet.Update
	u.Put(new(lease("10.5.3.0-24", `{"PublicIP":"198.18.0.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:00:00:00:00:03"}}`)))
	u.Delete(lease("10.9.5.0-24", "").Subnets)
	u.Since = time.Now()
	m.updates <- u
	waitMetrics(t, map[string]float64{
		"flannel_peers": 2, "flannel_peers_faulty": 0, `flannel_lease_events_total{event=set}`: 1,
		`flannel_lease_events_total{event=removed}`: 1,
		"flannel_lease_event_duration_seconds":      2, `flannel_kernel_objects_held{kind=route}`: 2,
	})

	// Somebody meddles.
	nstest.Run(t, "ip route del 10.5.2.0/24")
	nstest.Run(t, "bridge fdb replace 0e:00:00:00:00:02 dev flannel.1 dst 198.18.0.99 self permanent")
	waitMetrics(t, map[string]float64{
		`flannel_kernel_repairs_total{cause=missing,kind=route}`: 1,
		`flannel_kernel_repairs_total{cause=changed,kind=fdb}`:   1,
		`flannel_kernel_objects_held{kind=route}`:                2,
	})
	nstest.Run(t, "iptables -t nat -F FLANNEL-POSTRTG")
	eventually(t, "the rules' repair to be counted", func() bool { return scrape(t)["flannel_rules_repairs_total"] >= 1 })
	nstest.Run(t, "ip link del eth0")
	eventually(t, "the uplink's loss to be counted",
		func() bool { return scrape(t)[`flannel_errors_total{operation=uplink}`] >= 1 })

	_, text := get("/metrics")
	if want := `flannel_build_info{goversion="go1.`; !strings.Contains(text, want) ||
		!strings.Contains(text, `version="v1.2.3"} 1`) {
		t.Errorf("something is missing in\n%s", text)
	}
}

// Any number of scrapes at any time: for the race detector.
func TestScrapesAtAnyTime(t *testing.T) {
	m := newManager(vxlanConfig)
	begin(t, m, nil)
	m.grants <- lease("10.5.1.0-24", "")
	m.updates <- snapshot()
	eventually(t, "ready", ready)
	var scrapers sync.WaitGroup
	stop := make(chan struct{})
	for range 3 {
		scrapers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					if code, text := get("/metrics"); code != http.StatusOK {
						t.Errorf("/metrics: %d %s", code, text)
						return
					}
				}
			}
		})
	}
	for i := range 50 {
		u := subnet.Update{Since: time.Now()}
		l := lease("10.5.2.0-24", fmt.Sprintf(`{"PublicIP":"198.18.0.2","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:00:00:00:00:%02x"}}`, i+2))
		if u.Put(&l); i%5 == 4 {
			u.Delete(l.Subnets)
		}
		m.updates <- u
	}
	close(stop)
	scrapers.Wait()
	waitMetrics(t, map[string]float64{"flannel_peers": 0, `flannel_lease_events_total{event=set}`: 40,
		`flannel_lease_events_total{event=removed}`: 10})
}

// TestRegistry: the metrics are in the caller's registry as long as Run runs; a registry that has metrics of the same
// names already is an error.
func TestRegistry(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	use := func(o *Options) { o.Metrics = registry }
	m := newManager(vxlanConfig)
	d := begin(t, m, use)
	m.grants <- lease("10.5.1.0-24", "")
	m.updates <- snapshot()
	eventually(t, "ready", ready)
	families, err := registry.Gather()
	if err != nil || len(families) == 0 {
		t.Errorf("%d metrics, %v", len(families), err)
	}
	err = Run(t.Context(), Options{Manager: newManager(vxlanConfig), SubnetFile: d.file, Name: "other", Metrics: registry})
	if err == nil || !strings.Contains(err.Error(), "registering the metrics") {
		t.Errorf("a second one with the same registry: %v", err)
	}
	d.stop()
	d.done <- nil
	if families, err = registry.Gather(); err != nil || len(families) != 0 {
		t.Errorf("after the end there are %d metrics, %v", len(families), err)
	}
}

// A counter is a backend that moves packets itself.
type mover struct{ backend.Backend }

func (mover) QueueStats() []backend.QueueStats {
	return []backend.QueueStats{{Queue: 1, Direction: "sent", Packets: 3, Bytes: 4500,
		Drops: map[string]uint64{"no_route": 2}}}
}

func TestBackendCounters(t *testing.T) {
	s := newMetrics(newManager(""), "")
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(s)
	text := func() string {
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		for _, f := range families {
			expfmt.MetricFamilyToText(&out, f)
		}
		return out.String()
	}
	s.setBackend(mover{})
	got := text()
	for _, want := range []string{
		`flannel_backend_packets_total{direction="sent",queue="1"} 3`,
		`flannel_backend_bytes_total{direction="sent",queue="1"} 4500`,
		`flannel_backend_dropped_packets_total{direction="sent",queue="1",reason="no_route"} 2`,
	} {
		if !strings.Contains(got, want+"\n") {
			t.Errorf("%s is missing in\n%s", want, got)
		}
	}
	s.setBackend(nil)
	if got := text(); strings.Contains(got, "flannel_backend_") {
		t.Errorf("counters of a backend without:\n%s", got)
	}
}

// BenchmarkScrape is what one scrape costs: what a node with many peers, or a
// backend with many queues that count, adds to it.
func BenchmarkScrape(b *testing.B) {
	for _, c := range []struct{ peers, queues int }{{0, 0}, {5000, 0}, {5000, 2}, {5000, 16}} {
		b.Run(fmt.Sprintf("peers=%d/queues=%d", c.peers, c.queues), func(b *testing.B) {
			nstest.New(b)
			r, err := kernel.New(klog.Background())
			if err != nil {
				b.Fatal(err)
			}
			defer r.Close()
			for i := range c.peers {
				ip := netip.AddrFrom4([4]byte{10, byte(5 + i>>8), byte(i), 0})
				mac := kernel.MAC{0x0e, 4: byte(i >> 8), 5: byte(i)}
				r.Set(ip.String(), []kernel.Object{
					kernel.Neighbor{Dev: "flannel.1", IP: ip, MAC: mac},
					kernel.FDBEntry{Dev: "flannel.1", MAC: mac, Dst: netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)})},
					kernel.Route{Dst: netip.PrefixFrom(ip, 24), Via: ip, Dev: "flannel.1", Onlink: true},
				})
			}
			m := newManager(vxlanConfig)
			m.expires = time.Unix(2000000000, 0)
			s, registry := newMetrics(m, "v1.2.3"), prometheus.NewRegistry()
			registry.MustRegister(s, collectors.NewGoCollector(),
				collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
			handler, request := MetricsHandler(registry), httptest.NewRequest(http.MethodGet, "/metrics", nil)
			stats := r.Stats()
			if got := stats.Kinds[kernel.KindRoute].Wanted; got != c.peers {
				b.Fatalf("%d routes are wanted", got)
			}
			s.kernel.Store(&stats)
			s.peers.Set(float64(c.peers))
			s.setBackend(counting{queues: c.queues})
			scraped := 0
			for b.Loop() {
				w := httptest.NewRecorder()
				handler.ServeHTTP(w, request)
				if w.Code != http.StatusOK {
					b.Fatal(w.Body)
				}
				scraped = w.Body.Len()
			}
			b.ReportMetric(float64(scraped), "B/scrape")
		})
	}
}

// counting is a backend that counts, for so many queues.
type counting struct {
	backend.Backend
	queues int
}

func (c counting) QueueStats() []backend.QueueStats {
	var all []backend.QueueStats
	for queue := range c.queues {
		for _, direction := range []string{"sent", "received"} {
			all = append(all, backend.QueueStats{Queue: queue, Direction: direction, Packets: 1e9, Bytes: 1e12,
				Drops: map[string]uint64{"no_peer": 1, "full": 2, "invalid": 3}})
		}
	}
	return all
}
