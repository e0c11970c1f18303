package e2e

import (
	"context"
	"fmt"
	"regexp"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// TestRestart: daemons that end, well or badly, and start again drop no packet.
func TestRestart(t *testing.T) {
	t.Parallel()
	for name, backend := range map[string]string{
		"vxlan":        `{"Type": "vxlan"}`,
		"vxlan direct": `{"Type": "vxlan", "DirectRouting": true}`,
		"host-gw":      `{"Type": "host-gw"}`,
	} {
		for _, rules := range []string{"iptables", "nftables"} {
			t.Run(name+"/"+rules, func(t *testing.T) {
				t.Parallel()
				ctx := labtest.Context(t, 2*time.Minute)
				l := labtest.New(ctx, t, fmt.Sprintf(`{%s, %s, "EnableNFTables": %v, "Backend": %s}`,
					ipv4Network, ipv6Network, rules == "nftables", backend), make([]lab.NodeOptions, 2)...)
				labtest.Start(ctx, t, l, "--ip-masq")
				pods := addPods(ctx, t, l)
				labtest.Do(t, l.Outside.Mirror())
				lossless := startPings(ctx, t, pods)
				for _, n := range l.Nodes() {
					before := labtest.Must(n.SubnetEnv())(t)
					labtest.Do(t, n.Restart(ctx)) // by SIGTERM
					labtest.Do(t, n.WaitReady(ctx))
					n.Kill()
					labtest.Do(t, n.Restart(ctx))
					labtest.Do(t, n.WaitReady(ctx))
					if after := labtest.Must(n.SubnetEnv())(t); after != before {
						t.Errorf("%s: the subnet file said %+v, says %+v", n.Hostname, before, after)
					}
				}
				lossless()
				expectSeenAs(ctx, t, pods[0].Namespace, lab.Outside, l.Nodes()[0].IPv4)
				expectSeenAs(ctx, t, pods[0].Namespace, lab.OutsideV6, l.Nodes()[0].IPv6)
			})
		}
	}
}

// startPings has the first two pods ping each other in all families. What it
// returns waits for another half second of answers, and fails the test if any
// was lost.
func startPings(ctx context.Context, t *testing.T, pods []*lab.Pod) (lossless func()) {
	t.Helper()
	var pings []*lab.Pinging
	for i, from := range pods[:2] {
		for _, dst := range pods[1-i].Addrs() {
			pings = append(pings, labtest.Must(from.StartPing(ctx, dst))(t))
		}
	}
	return func() {
		t.Helper()
		for _, dst := range pods[1].Addrs() {
			labtest.Must(pods[0].Ping(ctx, dst, lab.PingOptions{Count: 25}))(t)
		}
		for _, p := range pings {
			got := labtest.Must(p.Stop())(t)
			if len(got.Lost) > 0 {
				t.Errorf("%s: lost %d of %d packets, numbers %v", p, len(got.Lost), got.Sent, got.Lost)
			}
		}
	}
}

// TestReboot: a node that loses its power and comes back has its subnet again,
// at once, and its peers reach it.
func TestReboot(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, time.Minute)
	l := labtest.New(ctx, t, vxlanConfig, lab.NodeOptions{}, lab.NodeOptions{})
	labtest.Start(ctx, t, l)
	n := l.Nodes()[1]
	before := labtest.Must(n.SubnetEnv())(t)
	labtest.Do(t, n.Reboot(ctx))
	labtest.Do(t, n.Start())
	labtest.Do(t, n.WaitReady(ctx))
	if after := labtest.Must(n.SubnetEnv())(t); after != before {
		t.Errorf("the subnet file said %+v, says %+v", before, after)
	}
	pods := addPods(ctx, t, l)
	labtest.Do(t, pods[0].WaitPing(ctx, pods[1].IPv4))
	labtest.Do(t, pods[1].WaitPing(ctx, pods[0].IPv4))
}

// TestEtcdOutage: without etcd, traffic goes on and a new node waits. Afterwards the daemons follow changes that
// happened meanwhile and were compacted away.
func TestEtcdOutage(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 3*time.Minute)
	l := labtest.New(ctx, t, vxlanConfig, make([]lab.NodeOptions, 3)...)
	nodes := l.Nodes()
	old, fresh := subnetKey("10.5.200.0-24"), subnetKey("10.5.201.0-24")
	labtest.Do(t, l.Etcd.Put(ctx, old, strangerLease("198.18.0.200", "0e:00:00:00:00:c8")))
	for _, n := range nodes[:2] {
		labtest.Do(t, n.Start())
	}
	var pods []*lab.Pod
	for _, n := range nodes[:2] {
		labtest.Do(t, n.WaitReady(ctx))
		pods = append(pods, labtest.Must(n.AddPod(ctx, "pod"))(t))
		waitTraces(ctx, t, n, []trace{{"ip route show dev flannel.1", "10.5.200.0/24 via "}}, true)
	}
	lossless := startPings(ctx, t, pods)

	l.Etcd.Kill()
	labtest.Do(t, nodes[2].Start())
	// Ten seconds of outage are five hundred packets.
	labtest.Must(pods[0].Ping(ctx, pods[1].IPv4, lab.PingOptions{Count: 500}))(t)
	if nodes[2].Exited() || nodes[2].Ready(ctx) == nil {
		t.Error("without etcd a new node has exited or is ready, and should wait")
	}
	for _, n := range nodes {
		if !regexp.MustCompile(`(?m)^[WE].*` + regexp.QuoteMeta(lab.Gateway.String())).MatchString(n.Log()) {
			t.Errorf("%s says nothing of etcd being away", n.Hostname)
		}
	}

	labtest.Do(t, l.Etcd.Cut(ctx))
	labtest.Do(t, l.Etcd.Start(ctx))
	labtest.Do(t, l.Etcd.Delete(ctx, old))
	labtest.Do(t, l.Etcd.Put(ctx, fresh, strangerLease("198.18.0.201", "0e:00:00:00:00:c9")))
	labtest.Do(t, l.Etcd.Compact(ctx))
	labtest.Do(t, l.Etcd.Restore(ctx))
	restored := time.Now()

	labtest.Do(t, nodes[2].WaitReady(ctx))
	for _, n := range nodes {
		waitTraces(ctx, t, n, []trace{{"ip route show dev flannel.1", "10.5.201.0/24 via "}}, true)
		waitTraces(ctx, t, n, []trace{{"ip route show dev flannel.1", "10.5.200.0/24 via "}}, false)
	}
	pods = append(pods, labtest.Must(nodes[2].AddPod(ctx, "pod"))(t))
	for _, p := range pods[:2] {
		labtest.Do(t, p.WaitPing(ctx, pods[2].IPv4))
		labtest.Do(t, pods[2].WaitPing(ctx, p.IPv4))
	}
	t.Logf("pods reached the new node's %v after etcd was back", time.Since(restored).Round(time.Millisecond))
	lossless()
}

func subnetKey(name string) string { return lab.Prefix + "/subnets/" + name }

// strangerLease is the record of a node that is not there.
func strangerLease(publicIP, mac string) string {
	return fmt.Sprintf(`{"PublicIP":%q,"PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":%q}}`,
		publicIP, mac)
}
