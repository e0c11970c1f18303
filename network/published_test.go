package network

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/pkg/kernel"
)

// exported returns the names of all metrics that there can be, a histogram's
// series among them.
func exported(t *testing.T) (own, all []string) {
	t.Helper()
	m := newManager("")
	m.expires = time.Now()
	s := newMetrics(m, "")
	s.kernel.Store(&kernel.Stats{})
	s.setBackend(mover{})
	families, err := s.registry.Gather()
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
		if !used[name] && !used[name+"_bucket"] && name != "flannel_rules_last_check_timestamp_seconds" {
			t.Errorf("%s is neither in the dashboard nor in the alerts", name)
		}
	}
}

// Documentation/metrics.md has a row for each metric and each alert, and no
// others.
func TestMetricsAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../Documentation/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	rules, err := os.ReadFile("../dist/prometheus/flannel.rules.yml")
	if err != nil {
		t.Fatal(err)
	}
	own, _ := exported(t)
	for _, m := range regexp.MustCompile(`(?m)^  - alert: (\w+)$`).FindAllStringSubmatch(string(rules), -1) {
		own = append(own, m[1])
	}
	var rows []string
	for _, m := range regexp.MustCompile("(?m)^\\| `(\\w+)").FindAllStringSubmatch(string(text), -1) {
		rows = append(rows, m[1])
	}
	for _, name := range own {
		if !slices.Contains(rows, name) {
			t.Errorf("metrics.md has no row for %s", name)
		}
	}
	for _, name := range rows {
		if !slices.Contains(own, name) {
			t.Errorf("metrics.md has a row for %s, which is nothing of ours", name)
		}
	}
}
