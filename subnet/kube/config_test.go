package kube

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr/funcr"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/subnet/subnettest"
)

// A configMap is a mounted ConfigMap with net-conf.json, as kubelet writes and replaces it.
type configMap struct {
	*testing.T
	dir     string
	version int
}

func (c *configMap) path() string { return filepath.Join(c.dir, "net-conf.json") }

// swap replaces the content at once, by the link ..data.
func (c *configMap) swap(text string) {
	c.Helper()
	c.version++
	now, before := fmt.Sprintf("..%d", c.version), fmt.Sprintf("..%d", c.version-1)
	in := func(name ...string) string { return filepath.Join(append([]string{c.dir}, name...)...) }
	for _, err := range []error{
		os.Mkdir(in(now), 0o755),
		os.WriteFile(in(now, "net-conf.json"), []byte(text), 0o644),
		os.Symlink(now, in("..data_tmp")),
		os.Rename(in("..data_tmp"), in("..data")),
		os.RemoveAll(in(before)),
	} {
		if err != nil {
			c.Fatal(err)
		}
	}
	if err := os.Symlink(filepath.Join("..data", "net-conf.json"), c.path()); err != nil && !os.IsExist(err) {
		c.Fatal(err)
	}
}

// remove removes the file, as when the ConfigMap has it no longer.
func (c *configMap) remove() {
	c.Helper()
	if err := os.Remove(c.path()); err != nil {
		c.Fatal(err)
	}
}

// loggedLines has a context's logger send what is logged, but for what is for developers.
func loggedLines(ctx context.Context) (context.Context, <-chan string) {
	lines := make(chan string, 100)
	return klog.NewContext(ctx, funcr.New(func(_, line string) { lines <- line }, funcr.Options{})), lines
}

// next waits for a value, for less than configEvery.
func next[T any](t *testing.T, from <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-from:
	case <-time.After(configEvery / 2):
		t.Fatal("there is none")
	}
	return v
}

const (
	vxlanConfig  = `{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}`
	hostgwConfig = `{"Network": "10.5.0.0/16", "Backend": {"Type": "host-gw"}}`
	dualConfig   = `{"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:5::/48", "Backend": {"Type": "ipip"}}`
)

// TestConfigMap: each content that can work is sent, the reason of each that cannot is logged once.
func TestConfigMap(t *testing.T) {
	s := newAPIServer(t)
	s.update("n1", func(n *testNode) { n.cidrs = []string{"10.5.1.0/24"} })
	c := &configMap{T: t, dir: t.TempDir()}
	c.swap(vxlanConfig)
	ctx, lines := loggedLines(t.Context())
	m, err := New(ctx, Options{APIURL: s.URL, NodeName: "n1", ConfigPath: c.path()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	if _, err := m.Config(ctx); err != nil {
		t.Fatal(err)
	}
	configs := m.Configs(ctx)
	sent := func(backend string) {
		t.Helper()
		if cfg := next(t, configs); cfg == nil || cfg.BackendType != backend {
			t.Fatalf("sent %+v, want the backend %s", cfg, backend)
		}
	}
	said := func(parts ...string) {
		t.Helper()
		line := next(t, lines)
		for _, part := range parts {
			if !strings.Contains(line, part) {
				t.Errorf("logged %s, which should have %q", line, part)
			}
		}
	}
	const refused = "The new configuration is refused; the old one stays in force"
	c.swap(hostgwConfig)
	sent("host-gw")
	c.swap(`{"Network": "10.5.0.0/33"}`)
	said(refused, c.path(), "10.5.0.0/33")
	c.swap(strings.ReplaceAll(vxlanConfig, "10.5.0.0", "10.9.0.0"))
	said(refused, "the podCIDR 10.5.1.0/24 of Node n1 is outside the Network 10.9.0.0/16")
	c.remove()
	said("cannot be read; the configuration stays in force here", c.path())
	c.swap(vxlanConfig)
	said("can be read again")
	sent("vxlan")
	c.swap(dualConfig)
	said(refused, "Node n1 has no IPv6 podCIDR, which the Network fd00:5::/48")

	// The Node is registered again, with another podCIDR.
	s.update("n1", func(n *testNode) { n.cidrs = []string{"10.5.2.0/24", "fd00:5:0:2::/64"} })
	sent("ipip")
	select {
	case line := <-lines:
		t.Errorf("logged, too: %s", line)
	default:
	}
}

// TestConfigFileIsLoggedOnce: however often a file is read that cannot be used, the log has one line about it.
func TestConfigFileIsLoggedOnce(t *testing.T) {
	c := &configMap{T: t, dir: t.TempDir()}
	ctx, lines := loggedLines(t.Context())
	m := &Manager{log: klog.FromContext(ctx), options: Options{ConfigPath: c.path()}, name: "n1",
		own: &ownNode{subnets: subnet.Subnets{}}}
	f := configFile{Manager: m}
	for _, step := range []struct{ text, want string }{
		{"", "no such file"}, {`{"Network": 5}`, "Network: got a number"}, {vxlanConfig, "has no IPv4 podCIDR"},
	} {
		if step.text != "" {
			c.swap(step.text)
		}
		for range 3 {
			f.read(ctx)
			f.suits()
		}
		var got []string
		for len(lines) > 0 {
			if line := <-lines; !strings.Contains(line, "can be read again") {
				got = append(got, line)
			}
		}
		if len(got) != 1 || !strings.Contains(got[0], step.want) {
			t.Errorf("with %q, the log has %q", step.text, got)
		}
	}
}

// TestUnsuited: which configurations suit a Node with a podCIDR of the second of two networks.
func TestUnsuited(t *testing.T) {
	m := &Manager{name: "n1", on: subnet.NetworksOf(netip.MustParsePrefix("10.5.0.0/16"), netip.MustParsePrefix("10.6.0.0/16"))}
	own := &ownNode{subnets: subnet.Subnets{IPv4: netip.MustParsePrefix("10.6.1.0/24")}}
	for text, want := range map[string]string{
		`{"Network": "10.5.0.0/16", "Networks": ["10.6.0.0/16"]}`: "",
		`{"Network": "10.4.0.0/14"}`:                              "",
		`{"Network": "10.5.0.0/16"}`:                              "", // the other one is retired
		`{"Network": "10.5.0.0/16", "Networks": ["10.6.0.0/18"]}`: "",
		`{"Network": "10.5.0.0/16", "Networks": ["10.6.8.0/21"]}`: "is outside the Network 10.5.0.0/16,10.6.8.0/21",
		`{"Network": "10.7.0.0/16"}`:                              "is outside the Network 10.7.0.0/16",
		`{"Network": "10.7.0.0/16", "Networks": ["10.8.0.0/16"]}`: "is outside the Network 10.7.0.0/16,10.8.0.0/16",
	} {
		cfg, err := subnet.ParseConfig([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if err := m.unsuited(own, cfg); fmt.Sprint(err) != "<nil>" && want == "" || want != "" && !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

// TestFamilyTurnedOn: when a lease is acquired for a network with one more family, or one less, the leases of peers have
// the podCIDRs of these families, and nothing is logged again.
func TestFamilyTurnedOn(t *testing.T) {
	s := newAPIServer(t)
	cidrs := func(i int) []string {
		return []string{fmt.Sprintf("10.5.%d.0/24", i), fmt.Sprintf("fd00:5:0:%d::/64", i)}
	}
	s.update("n1", func(n *testNode) { n.cidrs = cidrs(1) })
	for i := 2; i <= 3; i++ {
		s.update(fmt.Sprintf("n%d", i), func(n *testNode) { n.cidrs, n.annotations = cidrs(i), peerNode(2).annotations })
	}
	c := &configMap{T: t, dir: t.TempDir()}
	c.swap(vxlanConfig)
	ctx, lines := loggedLines(t.Context())
	m, err := New(ctx, Options{APIURL: s.URL, NodeName: "n1", ConfigPath: c.path()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	if _, err := m.Config(ctx); err != nil {
		t.Fatal(err)
	}
	updates := m.Watch(ctx)
	leases := map[subnet.Subnets]*subnet.Lease{}
	until := func(want ...string) {
		t.Helper()
		for {
			var got []string
			for s := range leases {
				got = append(got, s.String())
			}
			if slices.Sort(got); slices.Equal(got, want) {
				return
			}
			t.Logf("there are %v", got)
			next(t, updates).Apply(leases)
		}
	}
	until("10.5.2.0/24", "10.5.3.0/24")
	if line := next(t, lines); !strings.Contains(line, "Two Nodes conflict") { // both publish one address
		t.Errorf("logged %s", line)
	}
	acquire := func(config string) (own string) {
		t.Helper()
		cfg, err := subnet.ParseConfig([]byte(config))
		if err != nil {
			t.Fatal(err)
		}
		l, err := m.Acquire(ctx, cfg, subnet.Lease{Attrs: subnettest.Lease(1, 1).Attrs})
		if err != nil {
			t.Fatal(err)
		}
		return l.Subnets.String()
	}
	until(acquire(dualConfig), "10.5.2.0/24,fd00:5:0:2::/64", "10.5.3.0/24,fd00:5:0:3::/64")

	// Nothing stays of a family that is turned off.
	until(acquire(vxlanConfig), "10.5.2.0/24", "10.5.3.0/24")
	s.update("n3", func(n *testNode) { n.cidrs = []string{"10.5.4.0/24", "fd00:5:0:4::/64"} })
	until("10.5.1.0/24", "10.5.2.0/24", "10.5.4.0/24")
	s.update("n4", func(n *testNode) {
		n.cidrs, n.annotations = []string{"10.5.3.0/24", "fd00:5:0:3::/64"}, peerNode(4).annotations
	})
	until("10.5.1.0/24", "10.5.2.0/24", "10.5.3.0/24", "10.5.4.0/24")
	until(acquire(dualConfig), "10.5.2.0/24,fd00:5:0:2::/64", "10.5.3.0/24,fd00:5:0:3::/64", "10.5.4.0/24,fd00:5:0:4::/64")
	select {
	case line := <-lines:
		t.Errorf("logged, too: %s", line)
	default:
	}
}
