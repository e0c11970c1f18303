package lab_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/nstest"
	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// TestClusterLeftovers kills a process that has a cluster with pods in it; the
// next lab ends them all.
func TestClusterLeftovers(t *testing.T) {
	if os.Getenv("LAB_TO_LEAVE") != "" {
		leaveCluster(t)
	}
	nstest.NeedRoot(t)
	ctx := labtest.Context(t, 2*time.Minute)
	child := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestClusterLeftovers$")
	child.Env = append(os.Environ(), "LAB_TO_LEAVE=1")
	child.Stderr = os.Stderr
	out := labtest.Must(child.StdoutPipe())(t)
	labtest.Do(t, child.Start())
	var buf [1000]byte
	size, err := out.Read(buf[:])
	labtest.Do(t, err)
	labtest.Do(t, child.Process.Signal(unix.SIGKILL))
	child.Wait()
	name, rest, _ := strings.Cut(strings.TrimSpace(string(buf[:size])), " ")
	orphans := strings.Fields(rest)
	if len(orphans) < 4 {
		t.Errorf("the child said %q: want a name, and the processes of two pods", buf[:size])
	}
	for _, pid := range orphans {
		if _, err := os.Readlink("/proc/" + pid + "/ns/net"); err != nil {
			t.Errorf("process %s of a pod ended with the one that made the lab: nothing is left to be found", pid)
		}
	}

	labtest.New(ctx, t, "{}")
	for _, pattern := range []string{"/run/netns/" + name + "-*", "/sys/fs/cgroup/*/" + name + "-*",
		"/sys/fs/cgroup/" + name + "-*", filepath.Join(os.TempDir(), name)} {
		if left := labtest.Must(filepath.Glob(pattern))(t); len(left) > 0 {
			t.Errorf("these are there still: %v", left)
		}
	}
	for _, pid := range orphans {
		if _, err := os.Readlink("/proc/" + pid + "/ns/net"); err == nil { // a zombie has none
			t.Errorf("process %s lives still", pid)
		}
	}
}

// TestRoutePods: the control plane reaches pods by way of their node, and the node's own packets do not find this way, on
// which they would get around a pod network that lacks a route.
func TestRoutePods(t *testing.T) {
	nstest.NeedRoot(t)
	ctx := labtest.Context(t, 2*time.Minute)
	l := labtest.Must(lab.New(ctx, lab.Options{}))(t)
	t.Cleanup(func() { labtest.Do(t, l.Close()) })
	c := labtest.Must(l.NewCluster(ctx, lab.ClusterOptions{Nodes: 1, ProxyMode: "iptables",
		ClusterCIDR: "10.244.0.0/16,fd00:10:244::/48", ServiceCIDR: "198.19.128.0/20," + lab.ServiceRangeV6}))(t)
	n := c.Nodes[0]
	labtest.Do(t, lab.Poll(ctx, "podCIDRs and routes to them", func() error { return c.RoutePods(ctx) }))
	for _, way := range []struct{ pod, node string }{
		{"10.244.0.2", n.IPv4.String()}, {"fd00:10:244::2", n.IPv6.String()},
	} {
		route := func(words ...string) (string, error) {
			cmd := exec.CommandContext(ctx, "ip", append([]string{"route", "get", way.pod}, words...)...)
			var out strings.Builder
			cmd.Stdout, cmd.Stderr = &out, &out
			p := labtest.Must(c.Launch(cmd))(t)
			err := p.Wait()
			return out.String(), err
		}
		if out, err := route(); err != nil || !strings.Contains(out, " via "+way.node+" ") {
			t.Errorf("the control plane's route to pod %s: %v: %s, want it via %s", way.pod, err, out, way.node)
		}
		if out, err := route("from", way.node, "iif", "br0"); err == nil {
			t.Errorf("packets of nodes to pod %s are forwarded: %s", way.pod, out)
		}
	}
}

// leaveCluster is the child: it makes a cluster with pods on a bridge, says its
// name and the pods' processes, and waits for the end.
func leaveCluster(t *testing.T) {
	ctx := labtest.Context(t, time.Minute)
	l := labtest.Must(lab.New(ctx, lab.Options{}))(t)
	c := labtest.Must(l.NewCluster(ctx, lab.ClusterOptions{Nodes: 1, ProxyMode: "iptables",
		ClusterCIDR: "10.244.0.0/16"}))(t)
	n := c.Nodes[0]
	labtest.Must(n.Run(ctx, "mkdir -p /etc/cni/net.d"))(t)
	conflist := filepath.Join(n.Dir, "bridge.conflist")
	labtest.Do(t, os.WriteFile(conflist, []byte(`{"cniVersion": "1.0.0", "name": "bridge", "plugins": [
		{"type": "bridge", "bridge": "cni0", "isGateway": true, "ipam": {"type": "host-local", "subnet": "10.244.0.0/24"}}]}`), 0o644))
	labtest.Must(n.Run(ctx, "cp "+conflist+" /etc/cni/net.d"))(t)
	labtest.Must(c.KubectlApply(ctx, lab.Echo))(t)
	labtest.Must(c.Kubectl(ctx, "rollout", "status", "--timeout=60s", "deployment/echo"))(t)
	said := l.Name
	for _, p := range labtest.Must(c.Pods(ctx, "default", "app=echo"))(t) {
		said += " " + strings.Join(labtest.Must(c.Processes(p))(t), " ")
	}
	os.Stdout.WriteString(said + "\n")
	select {}
}
