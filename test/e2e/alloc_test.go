package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// TestAlloc: there are leases, subnet files and rules, and no data path. Who
// makes one is not disturbed.
func TestAlloc(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 2*time.Minute)
	l := labtest.New(ctx, t, `{`+ipv4Network+`, `+ipv6Network+`, "Backend": {"Type": "alloc"}}`,
		make([]lab.NodeOptions, 2)...)
	labtest.Start(ctx, t, l, "--ip-masq")
	for _, n := range l.Nodes() {
		key, lease := leaseOf(ctx, t, l, n)
		if value := labtest.Must(l.Etcd.Get(ctx, key))(t); strings.Contains(value, "Backend") {
			t.Errorf("%s has published %s", n.Hostname, value)
		}
		if env := labtest.Must(n.SubnetEnv())(t); env.Subnets != lease.Subnets || env.MTU != 1500 {
			t.Errorf("the subnet file of %s says %+v, and the lease %s", n.Hostname, env, lease.Subnets)
		}
		expectNoPath(ctx, t, n)
	}
	pods := addPods(ctx, t, l)
	for i, n := range l.Nodes() {
		peer := l.Nodes()[1-i]
		_, lease := leaseOf(ctx, t, l, peer)
		labtest.Do(t, n.Script(ctx,
			fmt.Sprintf("route add %s via %s", lease.IPv4, peer.IPv4),
			fmt.Sprintf("route add %s via %s", lease.IPv6, peer.IPv6)))
	}
	checkPaths(ctx, t, l, pods)
	lossless := startPings(ctx, t, pods)
	for _, n := range l.Nodes() {
		labtest.Do(t, n.Restart(ctx))
		labtest.Do(t, n.WaitReady(ctx))
	}
	lossless()
}

// expectNoPath fails the test when a daemon has made routes, or devices.
func expectNoPath(ctx context.Context, t *testing.T, n *lab.Node) {
	t.Helper()
	for _, command := range []string{"ip -4 route show proto 70", "ip -6 route show proto 70"} {
		if out := labtest.Must(n.Run(ctx, command))(t); out != "" {
			t.Errorf("%s: %s says\n%s", n.Hostname, command, out)
		}
	}
	if out := labtest.Must(n.Run(ctx, "ip -br link show"))(t); strings.Contains(out, "flannel") {
		t.Errorf("%s has the devices\n%s", n.Hostname, out)
	}
}

// TestAllocKubernetes: the daemon reads and watches its own Node, and no other.
func TestAllocKubernetes(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 4*time.Minute)
	audit := filepath.Join(t.TempDir(), "audit.log")
	policy := filepath.Join(t.TempDir(), "policy.yaml")
	labtest.Do(t, os.WriteFile(policy, []byte(`{"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": [{"level": "Metadata", "resources": [{"group": "", "resources": ["nodes", "nodes/status"]}]}]}`), 0o600))
	l, k := newKube(ctx, t, "10.5.0.0/16", make([]lab.NodeOptions, 2), "--audit-policy-file="+policy,
		"--audit-log-path="+audit, "--audit-log-mode=blocking-strict")
	args := labtest.Must(k.DaemonArgs(`{` + ipv4Network + `, "Backend": {"Type": "alloc"}}`))(t)
	for _, n := range l.Nodes() {
		labtest.Do(t, k.AddNode(ctx, n))
		labtest.Do(t, n.Start(args...))
	}
	for _, n := range l.Nodes() {
		labtest.Do(t, n.WaitReady(ctx))
		got := labtest.Must(k.Node(ctx, n.Hostname))(t)
		if env := labtest.Must(n.SubnetEnv())(t); env.Subnets.IPv4.String() != got.Spec.PodCIDR || env.MTU != 1500 {
			t.Errorf("the subnet file of %s says %+v, and its podCIDR is %s", n.Hostname, env, got.Spec.PodCIDR)
		}
		expectNoPath(ctx, t, n)
	}
	for _, n := range l.Nodes() {
		labtest.Do(t, n.Stop(ctx)) // a watch is in the log once it has ended, too
	}
	watches := 0
	for lines := bufio.NewScanner(bytes.NewReader(labtest.Must(os.ReadFile(audit))(t))); lines.Scan(); {
		var event struct {
			Verb, RequestURI string
			User             struct{ Username string }
			ObjectRef        struct{ Name string }
		}
		labtest.Do(t, json.Unmarshal(lines.Bytes(), &event))
		if !strings.HasSuffix(event.User.Username, ":flannel") {
			continue
		}
		if event.Verb == "watch" {
			watches++
		}
		if event.ObjectRef.Name == "" && !strings.Contains(event.RequestURI, "fieldSelector=metadata.name") {
			t.Errorf("the daemon asks for all nodes: %s %s", event.Verb, event.RequestURI)
		}
	}
	if watches == 0 {
		t.Error("the log of the API server has no watches of the daemons'")
	}
}
