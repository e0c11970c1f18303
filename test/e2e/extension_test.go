package e2e

import (
	"context"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// TestExtension: the examples of the README do what the backends do that they
// imitate, also when daemons come and go.
func TestExtension(t *testing.T) {
	t.Parallel()
	readme := string(labtest.Must(os.ReadFile("../../backend/extension/README.md"))(t))
	examples := regexp.MustCompile("(?s)### Example: ([a-z-]+)\n.*?```json\n(.*?)```").FindAllStringSubmatch(readme, -1)
	if len(examples) != 2 {
		t.Fatalf("the README has %d examples, want 2", len(examples))
	}
	nodes := map[string][]lab.NodeOptions{
		"host-gw": make([]lab.NodeOptions, 3),
		"vxlan":   {{}, {}, {Routed: true}},
	}
	for _, example := range examples {
		name, config := example[1], example[2]
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t, 2*time.Minute)
			l := labtest.New(ctx, t, config, nodes[name]...)
			for _, n := range l.Nodes() {
				ownRun(ctx, t, n)
			}
			labtest.Start(ctx, t, l, "--ip-masq")
			pods := addPods(ctx, t, l)
			checkPaths(ctx, t, l, pods)

			// One daemon starts again, and loses nothing; another peer leaves
			// while it is down.
			first, second, third := l.Nodes()[0], l.Nodes()[1], l.Nodes()[2]
			key, gone := leaseOf(ctx, t, l, third)
			traces := []trace{{"ip route show", gone.IPv4.String() + " via "}}
			if name == "vxlan" {
				traces = append(traces,
					trace{"ip neigh show dev vx7", gone.IPv4.Addr().String() + " lladdr "},
					trace{"bridge fdb show dev vx7", " dst " + third.IPv4.String() + " "})
			}
			waitTraces(ctx, t, first, traces, true)
			lossless := startPings(ctx, t, pods)
			labtest.Do(t, first.Stop(ctx))
			labtest.Do(t, third.Stop(ctx))
			labtest.Do(t, l.Etcd.Delete(ctx, key))
			labtest.Do(t, first.Start("--ip-masq"))
			labtest.Do(t, first.WaitReady(ctx))
			waitTraces(ctx, t, first, traces, false)
			waitTraces(ctx, t, second, traces, false)
			lossless()
			for _, n := range l.Nodes() {
				if strings.Contains(n.Log(), "Command failed; retrying") {
					t.Errorf("a command failed on %s", n.Hostname)
				}
			}

			// It comes back, on a node that has forgotten everything.
			labtest.Do(t, third.Reboot(ctx))
			ownRun(ctx, t, third)
			labtest.Do(t, third.Start("--ip-masq"))
			labtest.Do(t, third.WaitReady(ctx))
			pod := labtest.Must(third.AddPod(ctx, "pod"))(t)
			for _, other := range pods[:2] {
				labtest.Do(t, pod.WaitPing(ctx, other.IPv4))
			}
		})
	}
}

// ownRun gives a node a /run/flannel of its own, which a reboot takes away.
func ownRun(ctx context.Context, t *testing.T, n *lab.Node) {
	t.Helper()
	labtest.Must(n.Run(ctx, "mkdir -p /run/flannel"))(t)
	labtest.Must(n.Run(ctx, "mount -t tmpfs tmpfs /run/flannel"))(t)
}
