package e2e

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/cloud"
	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// Where daemons find the APIs of Alibaba Cloud, in any lab. The metadata are where they are on all instances. There are
// no credentials in the environment, so that those of the instance's role are used.
const (
	aliAddress  = "198.19.0.1:8775"
	aliMetadata = "100.100.100.200"
)

func init() {
	os.Setenv("VPC_ENDPOINT", "http://"+aliAddress)
	os.Setenv("ECS_ENDPOINT", "http://"+aliAddress)
}

// TestAli: whatever happens to daemons and instances, there is one right route a node and family in the end, and pods
// reach each other by it. The VPC makes one change at a time.
func TestAli(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 5*time.Minute)
	c := cloud.NewAliCloud()
	c.Task = 200 * time.Millisecond
	v := newCloud(ctx, t, 3, "ali-vpc", c.State, c, aliAddress)
	labtest.Do(t, v.lab.Outside.Script(ctx, "addr add "+aliMetadata+"/32 dev lo"))
	v.underlay(ctx, t, "route add "+aliMetadata+" via "+lab.Outside.String())
	v.serve(t, c, aliMetadata+":80")
	nodes := v.lab.Nodes()
	first, second, third := nodes[0], nodes[1], nodes[2]
	third.Env = []string{"ACCESS_KEY_ID=flannel", "ACCESS_KEY_SECRET=secret"}
	labtest.Start(ctx, t, v.lab, "--ip-masq")
	v.routes(ctx, t, nodes...)
	if used := c.UsedKeys(); len(used) != 2 || !strings.HasPrefix(used[0], "STS.") || used[1] != "flannel " {
		t.Errorf("the nodes have used the keys %q", used)
	}
	for _, n := range nodes {
		if !v.Forwards(v.hops[n]) {
			t.Errorf("the check of sources and destinations of %s is on", n.Hostname)
		}
		expectNoPath(ctx, t, n)
	}
	pods := addPods(ctx, t, v.lab)
	checkPaths(ctx, t, v.lab, pods)

	// A node leaves. Its route goes with its lease, as soon as its instance is stopped; then, the instance can be released.
	key, _ := leaseOf(ctx, t, v.lab, third)
	labtest.Do(t, third.Stop(ctx))
	c.Stop(v.hops[third])
	labtest.Do(t, v.lab.Etcd.Delete(ctx, key))
	lossless := startPings(ctx, t, pods[:2])
	labtest.Do(t, first.Restart(ctx))
	v.routes(ctx, t, first, second)
	lossless()

	// What a node has left in the cloud is removed with the rest.
	labtest.Do(t, first.Stop(ctx))
	out, _, err := first.Ctl(ctx, "cleanup", "--yes")
	if err != nil || strings.Count(out, "aliyun vpc DeleteRouteEntry ") != 2 {
		t.Errorf("cleanup: %v\n%s", err, out)
	}
	v.routes(ctx, t, second)
	for _, n := range nodes {
		for line := range strings.Lines(n.Log()) {
			if strings.Contains(line, "Alibaba Cloud") {
				t.Errorf("%s logs %s", n.Hostname, line)
			}
		}
	}
}
