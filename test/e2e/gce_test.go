package e2e

import (
	"bytes"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/cloud"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// Where daemons find Compute Engine and the metadata server, in any lab.
const gceAddress = "198.19.0.1:8774"

func init() {
	os.Setenv("GCE_METADATA_HOST", gceAddress)
	os.Setenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE", "http://"+gceAddress+"/compute/v1/")
}

// TestGCE: nodes of Google Cloud make their routes, restore them, and take them along when they leave.
func TestGCE(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 4*time.Minute)
	s := cloud.NewGCE("prod", false)
	v := newCloud(ctx, t, 2, "gce", s.State, s, gceAddress)
	nodes := v.lab.Nodes()
	labtest.Start(ctx, t, v.lab, "--ip-masq")
	v.routes(ctx, t, nodes...)
	for _, n := range nodes {
		expectNoPath(ctx, t, n)
	}
	pods := addPods(ctx, t, v.lab)
	checkPaths(ctx, t, v.lab, pods)

	// flannelctl shows what is missing; the daemon restores it.
	own := labtest.Must(nodes[0].SubnetEnv())(t).Subnets.IPv4
	labtest.Do(t, nodes[0].Stop(ctx))
	v.Remove(v.Main(), own)
	if out, _, _ := nodes[0].Ctl(ctx, "diff"); !strings.Contains(out, "gcloud compute routes create flannel-") ||
		!strings.Contains(out, own.String()) {
		t.Errorf("without the route to %s, flannelctl diff shows\n%s", own, out)
	}
	labtest.Do(t, nodes[0].Start("--ip-masq"))
	labtest.Do(t, nodes[0].WaitReady(ctx))
	v.routes(ctx, t, nodes...)

	// What a node has left in the cloud is removed with the rest.
	labtest.Do(t, nodes[0].Stop(ctx))
	out, _, err := nodes[0].Ctl(ctx, "cleanup", "--yes")
	if err != nil || strings.Count(out, "gcloud compute routes delete flannel-") != 2 {
		t.Errorf("cleanup: %v\n%s", err, out)
	}
	v.routes(ctx, t, nodes[1])
}

// TestGCELean: of the hundreds of calls of Compute Engine's client, those that are used are linked.
func TestGCELean(t *testing.T) {
	t.Parallel()
	program := labtest.Must(os.ReadFile("../../build/bin/flanneld"))(t)
	for call, want := range map[string]bool{"RoutesInsertCall": true, "InstancesInsertCall": false} {
		if has := bytes.Contains(program, []byte("compute/v1.(*"+call+").Do")); has != want {
			t.Errorf("the daemon has %s: %t", call, has)
		}
	}
}
