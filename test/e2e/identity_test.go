package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// TestIdentity: what a node is outlives restarts of its daemon, whatever happens to its address meanwhile. It is one
// node's history: a lab is expensive.
func TestIdentity(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 3*time.Minute)
	l := labtest.New(ctx, t, vxlanConfig, oneLink...)
	labtest.Start(ctx, t, l)
	n, peer := l.Nodes()[0], l.Nodes()[1]
	pods := addPods(ctx, t, l)
	key, had := leaseOf(ctx, t, l, n)
	same := func(publicIP string) {
		t.Helper()
		now, ok := labtest.Must(l.Etcd.Leases(ctx))(t)[key]
		if !ok || now.Attrs.PublicIP.String() != publicIP || string(now.Attrs.BackendData) != string(had.Attrs.BackendData) {
			t.Errorf("the lease was %+v and is %+v, should be at %s", had, now, publicIP)
		}
		if env := labtest.Must(n.SubnetEnv())(t); env.Subnets != had.Subnets {
			t.Errorf("the subnet was %v and is %v", had.Subnets, env.Subnets)
		}
		labtest.Do(t, pods[1].WaitPing(ctx, pods[0].IPv4))
	}
	again := func() {
		t.Helper()
		labtest.Do(t, n.Start())
		labtest.Do(t, n.WaitReady(ctx))
	}

	// A VIP stands first on the uplink by the time that the daemon starts again.
	labtest.Do(t, n.Stop(ctx))
	labtest.Do(t, n.Script(ctx, "addr del 198.18.0.1/24 dev eth0", "addr add 198.18.0.200/24 dev eth0",
		"addr add 198.18.0.1/24 dev eth0", "route add default via "+lab.Gateway.String()))
	again()
	same("198.18.0.1")

	// The node has another address.
	labtest.Do(t, n.Stop(ctx))
	labtest.Do(t, n.Script(ctx, "addr flush dev eth0", "addr add 198.18.0.77/24 dev eth0",
		"route add default via "+lab.Gateway.String()))
	again()
	same("198.18.0.77")
	waitTraces(ctx, t, peer, []trace{{"bridge fdb show dev flannel.1", "dst 198.18.0.77 "}}, true)

	// The machine dies, and another one with its address takes its place.
	n.Kill()
	labtest.Do(t, os.WriteFile(filepath.Join(n.Dir, "machine-id"), []byte(strings.Repeat("1", 32)+"\n"), 0o644))
	for _, file := range []string{n.SubnetFile(), n.SubnetFile() + ".lease"} {
		labtest.Do(t, os.Remove(file))
	}
	again()
	same("198.18.0.77")
	waitLog(ctx, t, n, "The machine that held the public address is gone")
	if strings.Contains(n.Log(), "Another node holds the public address") {
		t.Error("a dead machine is logged as alive")
	}

	// The subnet changes while the daemon does not run.
	labtest.Do(t, n.Stop(ctx))
	labtest.Do(t, l.Etcd.Put(ctx, key, strangerLease("198.18.0.201", "0e:00:00:00:00:c9")))
	again()
	waitLog(ctx, t, n, `podsCutOff=1`)
	if strings.Contains(n.Log(), "this node's own address") {
		t.Errorf("the node's own lease is logged as a peer's:\n%s", n.Log())
	}
	const fix = "ip address del "
	if _, err := n.AddPod(ctx, "late"); err == nil || !strings.Contains(err.Error(), fix) {
		t.Errorf("a new pod, beside one with an address of the earlier subnet: %v", err)
	}
	out, _, err := n.Ctl(ctx, "doctor")
	if err != nil || !strings.Contains(out, "bridge-subnet: the bridge cni0 has ") || !strings.Contains(out, fix) {
		t.Errorf("doctor: %v\n%s", err, out)
	}
	labtest.Do(t, pods[0].Delete(ctx))
	late := labtest.Must(n.AddPod(ctx, "later"))(t)
	if now := labtest.Must(n.SubnetEnv())(t).Subnets; now == (subnet.Subnets{}) || !now.IPv4.Contains(late.IPv4) {
		t.Errorf("the pod has %s, which is not of %v", late.IPv4, now)
	}
	labtest.Do(t, pods[1].WaitPing(ctx, late.IPv4))
}
