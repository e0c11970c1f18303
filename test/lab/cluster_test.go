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
