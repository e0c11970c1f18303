package network

import (
	"fmt"
	"maps"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/flanneld/flanneld/backend/backendtest"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/pkg/pagetest"
	"github.com/flanneld/flanneld/pkg/probe"
)

// complete returns a registry of all metrics that there can be.
func complete() *prometheus.Registry {
	m := newManager("")
	m.expires = time.Now()
	s := newMetrics(m, "")
	s.kernel.Store(&kernel.Stats{})
	s.setBackend(mover{})
	s.setProber(fakeProbes{}, true)
	registry := prometheus.NewRegistry()
	registry.MustRegister(s, collectors.NewGoCollector(), // as flanneld does
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return registry
}

// fakeProbes is what a prober has found that knows one peer.
type fakeProbes struct{}

func (fakeProbes) Count() map[probe.State]int { return map[probe.State]int{probe.Reachable: 1} }

func (fakeProbes) All() map[string][]probe.Result {
	return map[string][]probe.Result{"10.5.2.0/24": {{
		Path: probe.Path{Overlay: netip.MustParseAddr("10.5.2.0")}, State: probe.Reachable, RTT: time.Millisecond,
	}}}
}

// exported returns their names, a histogram's series among them.
func exported(t *testing.T) (own, all []string) {
	t.Helper()
	families, err := complete().Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if strings.HasPrefix(f.GetName(), "flannel_") {
			own = append(own, f.GetName())
		}
		all = append(all, f.GetName())
		if f.Metric[0].Histogram != nil {
			for _, series := range []string{"_bucket", "_sum", "_count"} {
				all = append(all, f.GetName()+series)
			}
		}
	}
	return own, all
}

var metricName = regexp.MustCompile(`\b(flannel|process|go)_[a-z_]+\b`)

// The dashboard and the alerts are of metrics that there are, and show or watch
// each of ours but for those that are only for looking up.
func TestDashboardAndAlerts(t *testing.T) {
	own, all := exported(t)
	used := map[string]bool{}
	for _, file := range []string{"../dist/grafana/flannel.json", "../dist/prometheus/flannel.rules.yml"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range metricName.FindAllString(string(text), -1) {
			used[name] = true
			if !slices.Contains(all, name) {
				t.Errorf("%s has %s, which flanneld does not export", file, name)
			}
		}
	}
	for _, name := range own {
		lookedUp := name == "flannel_rules_last_check_timestamp_seconds" || strings.HasPrefix(name, "flannel_peer_")
		if !used[name] && !used[name+"_bucket"] && !lookedUp {
			t.Errorf("%s is neither in the dashboard nor in the alerts", name)
		}
	}
}

// The documentation lists the metrics as they are.
func TestReference(t *testing.T) {
	families, err := complete().Gather()
	if err != nil {
		t.Fatal(err)
	}
	var table strings.Builder
	table.WriteString("| metric | kind | meaning |\n| --- | --- | --- |\n")
	for _, f := range families {
		if !strings.HasPrefix(f.GetName(), "flannel_") {
			continue
		}
		values := map[string][]string{}
		for _, m := range f.Metric {
			for _, l := range m.Label {
				values[l.GetName()] = append(values[l.GetName()], l.GetValue())
			}
		}
		// A help that lists a label's values lists all.
		told := func(value string) bool { return strings.Contains(f.GetHelp(), "`"+value+"`") }
		for label, all := range values {
			if first := slices.IndexFunc(all, func(v string) bool { return !told(v) }); first >= 0 &&
				slices.ContainsFunc(all, told) {
				t.Errorf("the help of %s does not tell of %s %q", f.GetName(), label, all[first])
			}
		}
		name := f.GetName()
		if len(values) > 0 {
			name += "{" + strings.Join(slices.Sorted(maps.Keys(values)), ",") + "}"
		}
		fmt.Fprintf(&table, "| `%s` | %s | %s |\n", name, strings.ToLower(f.GetType().String()), f.GetHelp())
	}
	pagetest.Part(t, "../Documentation/metrics.md", "metrics", table.String(), *backendtest.Update)
}

// The documentation has a remedy for each alert.
func TestAlertsAreDocumented(t *testing.T) {
	names := func(file, pattern string) []string {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var found []string
		for _, m := range regexp.MustCompile(pattern).FindAllStringSubmatch(string(text), -1) {
			found = append(found, m[1])
		}
		slices.Sort(found)
		return found
	}
	rules := names("../dist/prometheus/flannel.rules.yml", `(?m)^  - alert: (\w+)$`)
	rows := names("../Documentation/metrics.md", "(?m)^\\| `(Flannel\\w+)`")
	if len(rules) == 0 || !slices.Equal(rules, rows) {
		t.Errorf("the alerts are\n%s\nand Documentation/metrics.md has\n%s", rules, rows)
	}
}
