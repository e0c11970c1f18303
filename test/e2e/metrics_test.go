package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/flanneld/flanneld/pkg/nstest"
	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// A prometheus is one that runs on a node and scrapes its flanneld.
type prometheus struct {
	*lab.Process
	node *lab.Node
}

// startPrometheus starts one, in the node's namespace and with all that it
// writes in the node's directory.
func startPrometheus(ctx context.Context, t *testing.T, n *lab.Node) *prometheus {
	t.Helper()
	dir := filepath.Join(n.Dir, "prometheus")
	labtest.Do(t, os.Mkdir(dir, 0o755))
	rules := labtest.Must(filepath.Abs("../../dist/prometheus/flannel.rules.yml"))(t)
	config := fmt.Sprintf(`
global: {scrape_interval: 200ms, evaluation_interval: 200ms}
rule_files: [%s]
scrape_configs:
- job_name: flannel
  static_configs:
  - {targets: ["127.0.0.1:10255"], labels: {instance: %s}}
`, rules, n.Hostname)
	labtest.Do(t, os.WriteFile(filepath.Join(dir, "prometheus.yml"), []byte(config), 0o644))
	log := labtest.Must(os.Create(filepath.Join(dir, "log")))(t)
	defer log.Close()
	cmd := exec.Command("prometheus", "--config.file="+filepath.Join(dir, "prometheus.yml"),
		"--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address=127.0.0.1:9090")
	cmd.Stdout, cmd.Stderr = log, log
	p := &prometheus{labtest.Must(n.Launch(cmd))(t), n}
	t.Cleanup(p.Kill)
	labtest.Do(t, lab.Poll(ctx, "prometheus", func() error {
		if p.Exited() {
			text, _ := os.ReadFile(filepath.Join(dir, "log"))
			return fmt.Errorf("it has exited\n%s", text)
		}
		_, err := getFrom(ctx, n, "http://127.0.0.1:9090/-/ready")
		return err
	}))
	return p
}

// getFrom reads a page inside of a node's namespace.
func getFrom(ctx context.Context, n *lab.Node, page string) (string, error) {
	client := &http.Client{Transport: &http.Transport{DialContext: n.Dial, DisableKeepAlives: true}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, page, nil)
	if err != nil {
		return "", err
	}
	answer, err := client.Do(request)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", page, answer.Status, text)
	}
	return string(text), err
}

// value returns what an expression is, which has to be one number.
func (p *prometheus) value(ctx context.Context, expression string) (string, error) {
	text, err := getFrom(ctx, p.node, "http://127.0.0.1:9090/api/v1/query?query="+url.QueryEscape(expression))
	if err != nil {
		return "", err
	}
	var answer struct {
		Data struct {
			Result []struct{ Value [2]any }
		}
	}
	if err := json.Unmarshal([]byte(text), &answer); err != nil {
		return "", err
	}
	if len(answer.Data.Result) != 1 {
		return "", fmt.Errorf("%s has %d values: %s", expression, len(answer.Data.Result), text)
	}
	return fmt.Sprint(answer.Data.Result[0].Value[1]), nil
}

// wait waits until expressions have values.
func (p *prometheus) wait(ctx context.Context, t *testing.T, want map[string]string) {
	t.Helper()
	for expression, value := range want {
		labtest.Do(t, lab.Poll(ctx, "prometheus to have "+expression+" = "+value, func() error {
			got, err := p.value(ctx, expression)
			if err == nil && got != value {
				err = errors.New("it is " + got)
			}
			return err
		}))
	}
}

// TestPrometheus: a real Prometheus scrapes a daemon, and knows by that of its
// peers, its repairs, its lease and etcd's outage.
func TestPrometheus(t *testing.T) {
	t.Parallel()
	nstest.Need(t, "prometheus", "promtool")
	ctx := labtest.Context(t, 3*time.Minute)
	l := labtest.New(ctx, t, vxlanConfig, make([]lab.NodeOptions, 3)...)
	n, others := l.Nodes()[0], l.Nodes()[1:]
	labtest.Do(t, n.Start("--ip-masq"))
	labtest.Do(t, n.WaitReady(ctx))
	p := startPrometheus(ctx, t, n)
	p.wait(ctx, t, map[string]string{
		"flannel_ready": "1", "flannel_peers": "0", "flannel_manager_connected": "1", "flannel_rules_in_place": "1", "count(flannel_build_info)": "1",
		"flannel_lease_expiry_timestamp_seconds > bool time() + 86000": "1", "flannel_lease_expiry_timestamp_seconds < bool time() + 86401": "1",
		`flannel_lease_events_total{event="snapshot"}`: "1", "sum(flannel_kernel_repairs_total)": "0", "flannel_kernel_fights": "0",
		`flannel_kernel_objects_held{kind="route"}`: "0", `up{job="flannel"}`: "1", "process_resident_memory_bytes > bool 1e6": "1",
	})

	for _, o := range others {
		labtest.Do(t, o.Start())
		labtest.Do(t, o.WaitReady(ctx))
	}
	p.wait(ctx, t, map[string]string{
		"flannel_peers": "2", `flannel_kernel_objects_wanted{kind="route"}`: "2", `flannel_kernel_objects_held{kind="route"}`: "2",
		"flannel_lease_event_duration_seconds_count": "2", `flannel_lease_event_duration_seconds_bucket{le="30"}`: "2", "flannel_peers_faulty": "0",
	})

	route := labtest.Must(others[0].SubnetEnv())(t).Subnets.IPv4.String()
	labtest.Must(n.Run(ctx, "ip route del "+route))(t)
	p.wait(ctx, t, map[string]string{
		`flannel_kernel_repairs_total{kind="route", cause="missing"}`: "1", "sum(flannel_kernel_repairs_total)": "1", `flannel_kernel_objects_held{kind="route"}`: "2",
	})
	labtest.Must(n.Run(ctx, "iptables -t nat -F FLANNEL-POSTRTG"))(t)
	p.wait(ctx, t, map[string]string{"flannel_rules_repairs_total > bool 0": "1", "flannel_rules_in_place": "1"})

	// Somebody who does not give up: the alert is on its way.
	fight, stop := context.WithCancel(ctx)
	defer stop()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for fight.Err() == nil {
			n.Run(fight, "ip route del "+route)
		}
	}()
	p.wait(ctx, t, map[string]string{"flannel_kernel_fights": "1",
		`count(ALERTS{alertname="FlannelFight", alertstate="pending"})`: "1"})
	stop()
	<-done

	checkMetrics(ctx, t, n)
	labtest.Do(t, l.Etcd.Stop(ctx))
	p.wait(ctx, t, map[string]string{"flannel_manager_connected": "0", "flannel_ready": "1", "flannel_peers": "2"})
	labtest.Do(t, l.Etcd.Start(ctx))
	p.wait(ctx, t, map[string]string{"flannel_manager_connected": "1"})
}

// TestUDPMetrics: the udp backend's packets are counted.
func TestUDPMetrics(t *testing.T) {
	t.Parallel()
	nstest.Need(t, "prometheus", "promtool")
	ctx := labtest.Context(t, 2*time.Minute)
	s := newUDPTestbed(ctx, t)
	p := startPrometheus(ctx, t, s.node)
	labtest.Must(s.pods[0].Ping(ctx, s.pods[1].IPv4, lab.PingOptions{Count: 100}))(t)
	p.wait(ctx, t, map[string]string{
		`flannel_backend_packets_total{direction="sent"} >= bool 100`:                             "1",
		`flannel_backend_packets_total{direction="received", queue="0"} >= bool 100`:              "1",
		`flannel_backend_bytes_total{direction="sent"} > bool 20 * flannel_backend_packets_total`: "1",
		`flannel_backend_dropped_packets_total{direction="sent", reason="malformed"}`:             "0",
		`count(flannel_backend_dropped_packets_total{direction="received"})`:                      "8",
		`flannel_kernel_objects_held{kind="link"}`:                                                "1",
	})
	checkMetrics(ctx, t, s.node)
}

// checkMetrics has promtool judge names, units and help.
func checkMetrics(ctx context.Context, t *testing.T, n *lab.Node) {
	t.Helper()
	text := labtest.Must(getFrom(ctx, n, "http://127.0.0.1:10255/metrics"))(t)
	cmd := exec.CommandContext(ctx, "promtool", "check", "metrics")
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("promtool check metrics: %v\n%s\nof\n%s", err, out, text)
	}
}

// TestAlerts: the rules are right, and there is a test in which each of them
// fires.
func TestAlerts(t *testing.T) {
	t.Parallel()
	nstest.Need(t, "prometheus", "promtool")
	const rules, tests = "../../dist/prometheus/flannel.rules.yml", "flannel.rules.test.yml"
	if out, err := exec.Command("promtool", "check", "rules", rules).CombinedOutput(); err != nil {
		t.Errorf("promtool check rules: %v\n%s", err, out)
	}
	cmd := exec.Command("promtool", "test", "rules", tests)
	cmd.Dir = "testdata"
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("promtool test rules: %v\n%s", err, out)
	}
	var alerts struct {
		Groups []struct{ Rules []struct{ Alert string } }
	}
	var scenes struct {
		Tests []struct {
			Alerts []struct {
				Name     string `json:"alertname"`
				Expected []any  `json:"exp_alerts"`
			} `json:"alert_rule_test"`
		}
	}
	labtest.Do(t, yaml.Unmarshal(labtest.Must(os.ReadFile(rules))(t), &alerts))
	labtest.Do(t, yaml.Unmarshal(labtest.Must(os.ReadFile("testdata/"+tests))(t), &scenes))
	var fire []string
	for _, s := range scenes.Tests {
		for _, a := range s.Alerts {
			if len(a.Expected) > 0 {
				fire = append(fire, a.Name)
			}
		}
	}
	if len(alerts.Groups) == 0 {
		t.Error("no rules")
	}
	for _, g := range alerts.Groups {
		for _, r := range g.Rules {
			if !slices.Contains(fire, r.Alert) {
				t.Errorf("no test has %s fire", r.Alert)
			}
		}
	}
}
