package e2e

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// TestConfigMap: what kubelet writes into the mounted ConfigMap takes effect on all nodes by itself. The reason of what
// cannot take effect is logged once, and the configuration before stays in force, to the last route.
func TestConfigMap(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 3*time.Minute)
	l, k := newKube(ctx, t, dualCIDR, oneLink)
	args := daemonArgs(t, k, vxlanConfig)
	for _, n := range l.Nodes() {
		labtest.Do(t, k.AddNode(ctx, n))
		labtest.Do(t, n.Start(args...))
	}
	for _, n := range l.Nodes() {
		labtest.Do(t, n.WaitReady(ctx))
	}
	pods := addPods(ctx, t, l)
	checkPaths(ctx, t, l, pods)
	shows := func(present bool, traces ...trace) {
		t.Helper()
		for _, n := range l.Nodes() {
			waitTraces(ctx, t, n, traces, present)
		}
	}

	// Changes that lose no packet.
	lossless := startPings(ctx, t, pods)
	labtest.Do(t, k.Configure(configuration(ipv4Network, `{"Type": "vxlan", "DirectRouting": true}`, false)))
	shows(true, trace{"ip route show proto 70", "dev eth0"})
	labtest.Do(t, k.Configure(configuration(ipv4Network, `{"Type": "vxlan"}`, true)))
	shows(true, trace{"ip route show proto 70", "dev flannel.1"}, trace{"nft list tables", "flannel-ipv4"})
	shows(false, trace{"iptables-save", "FLANNEL"})
	labtest.Do(t, k.Configure(configuration(`"Network": "10.4.0.0/15"`, `{"Type": "vxlan"}`, true)))
	shows(true, trace{"nft list table ip flannel-ipv4", "10.4.0.0/15"})
	for _, n := range l.Nodes() {
		labtest.Do(t, lab.Poll(ctx, n.Hostname+"'s subnet file", func() error {
			env, err := n.SubnetEnv()
			if err == nil && env.Networks.String() != "10.4.0.0/15" {
				err = fmt.Errorf("the network is %s", env.Networks)
			}
			return err
		}))
	}

	// What cannot work.
	before := map[*lab.Node]string{}
	for _, n := range l.Nodes() {
		before[n] = labtest.Must(n.Holds(ctx))(t)
	}
	refused := []struct {
		change func() error
		why    string
	}{
		{func() error { return k.Configure(`{"Network": "10.5.0.0/33"}`) }, `Network \"10.5.0.0/33\" is not an IPv4 network`},
		{func() error { return k.Configure(configuration(ipv4Network, `{"Type": "vxlan", "VNI": -1}`, true)) }, "VNI -1"},
		{func() error { return k.Configure(configuration(`"Network": "10.9.0.0/16"`, `{"Type": "vxlan"}`, true)) },
			"is outside the Network 10.9.0.0/16"},
		{func() error { return os.Remove(k.ConfigFile()) }, "cannot be read; the configuration stays in force here"},
	}
	for _, r := range refused {
		labtest.Do(t, r.change())
		for _, n := range l.Nodes() {
			waitSaid(ctx, t, n, r.why)
		}
	}
	for _, n := range l.Nodes() {
		if after := labtest.Must(n.Holds(ctx))(t); after != before[n] {
			t.Errorf("%s: %s", n.Hostname, difference(before[n], after))
		}
		labtest.Do(t, n.Ready(ctx))
		for _, r := range refused {
			if times := strings.Count(n.Log(), r.why); times != 1 {
				t.Errorf("%s says %d times: %s", n.Hostname, times, r.why)
			}
		}
	}
	lossless()

	// A new family, and another backend.
	labtest.Do(t, k.Configure(fmt.Sprintf(dualConfig, "host-gw")))
	shows(true, trace{"ip route show proto 70", "dev eth0"}, trace{"ip -6 route show proto 70", "dev eth0"},
		trace{"iptables-save", "FLANNEL"}, trace{"ip6tables-save", "FLANNEL"})
	shows(false, trace{"ip link show", "flannel.1"}, trace{"nft list tables", "flannel-ipv4"})
	for _, n := range l.Nodes() {
		checkNode(ctx, t, k, n, "host-gw")
		labtest.Do(t, n.Script(ctx, "link del cni0")) // which has no IPv6 address
	}
	var dual []*lab.Pod
	for _, n := range l.Nodes() {
		dual = append(dual, labtest.Must(n.AddPod(ctx, "dual"))(t))
	}
	for i, from := range dual {
		for _, to := range dual[1-i].Addrs() {
			labtest.Do(t, from.WaitPing(ctx, to))
		}
	}
	for _, n := range l.Nodes() {
		if n.Exited() {
			t.Errorf("%s has exited", n.Hostname)
		}
		own := `"Peer cannot be reached" peer="` + labtest.Must(n.SubnetEnv())(t).Subnets.IPv4.String() + `"`
		if strings.Contains(n.Log(), own) {
			t.Errorf("%s takes its former lease for a peer's", n.Hostname)
		}
	}
}
