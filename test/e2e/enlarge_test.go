package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// twoSubnets returns a configuration whose first network has room for two nodes, in both families, and more networks.
func twoSubnets(backend string, more ...string) string {
	return fmt.Sprintf(`{"Network": "10.5.0.0/22", "SubnetMin": "10.5.2.0", "EnableIPv6": true, "IPv6Network": "fd05::/62",
		"IPv6SubnetMin": "fd05:0:0:2::", "Networks": ["%s"], "Backend": {"Type": %q}}`, strings.Join(more, `", "`), backend)
}

// TestEnlarge: a network that is full is enlarged, twice, while pods ping each other, and then made smaller. Nodes stay
// where they are, also when their daemons start again.
func TestEnlarge(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		backend string
		long    bool
	}{{"vxlan", false}, {"host-gw", true}, {"udp", true}, {"wireguard", true}} {
		if !labtest.Selected(!c.long) {
			continue
		}
		t.Run(c.backend, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t, 2*time.Minute)
			enlarge(ctx, t, labtest.New(ctx, t, strings.Replace(twoSubnets(c.backend), `[""]`, `[]`, 1), make([]lab.NodeOptions, 6)...),
				c.backend)
		})
	}
}

func enlarge(ctx context.Context, t *testing.T, l *lab.Lab, backend string) {
	nodes := l.Nodes()
	for _, n := range nodes[:2] {
		labtest.Do(t, n.Start("--ip-masq"))
	}
	for _, n := range nodes[:2] {
		labtest.Do(t, n.WaitReady(ctx))
	}
	pods := addPodsTo(ctx, t, nodes[:2])
	lossless := startPings(ctx, t, pods)
	for _, n := range nodes[2:] {
		labtest.Do(t, n.Start("--ip-masq"))
	}
	waitFull := func(n *lab.Node) {
		t.Helper()
		labtest.Do(t, lab.Poll(ctx, n.Hostname+" to wait for a subnet", func() error {
			if !strings.Contains(n.Log(), "No subnet is free") {
				return errors.New("it does not say so")
			}
			return nil
		}))
	}
	waitFull(nodes[2])

	// The next network has room for three nodes, and the one after that for the last.
	labtest.Do(t, l.Etcd.Configure(ctx, twoSubnets(backend, "10.6.0.0/22", "fd06::/62")))
	labtest.Do(t, lab.Poll(ctx, "three nodes to have subnets", func() error {
		leases, err := l.Etcd.Leases(ctx)
		if err == nil && len(leases) != 5 {
			err = fmt.Errorf("there are %d leases", len(leases))
		}
		return err
	}))
	labtest.Do(t, l.Etcd.Configure(ctx, twoSubnets(backend, "10.6.0.0/22", "fd06::/62", "fd07::/62", "10.7.0.0/22")))
	for _, n := range nodes {
		labtest.Do(t, n.WaitReady(ctx))
	}
	pods = append(pods, addPodsTo(ctx, t, nodes[2:])...)
	networks := map[netip.Prefix]int{}
	for _, n := range nodes {
		labtest.Do(t, lab.Poll(ctx, n.Hostname+"'s subnet file", func() error {
			env, err := n.SubnetEnv()
			const want = "10.5.0.0/22,10.6.0.0/22,10.7.0.0/22,fd05::/62,fd06::/62,fd07::/62"
			if err == nil && env.Networks.String() != want {
				err = fmt.Errorf("it names the networks %s", env.Networks)
			}
			return err
		}))
		for _, s := range labtest.Must(n.SubnetEnv())(t).Subnets.Each() {
			networks[netip.PrefixFrom(s.Addr(), map[bool]int{true: 22, false: 62}[s.Addr().Is4()]).Masked()]++
		}
	}
	if got := fmt.Sprint(networks); got != "map[10.5.0.0/22:2 10.6.0.0/22:3 10.7.0.0/22:1 fd05::/62:2 fd06::/62:3 fd07::/62:1]" {
		t.Errorf("nodes in the networks: %s", got)
	}
	checkPaths(ctx, t, l, pods)
	expectNoDiff(ctx, t, nodes...)
	// Else the daemon itself moves the packets, and starts again with another configuration.
	inKernel := backend == "vxlan" || backend == "host-gw"
	if inKernel {
		lossless()
	}

	// The configuration loses the network that most nodes are in, and a daemon starts again.
	inRemoved := nodesIn(t, nodes, "10.6.")
	across := startPings(ctx, t, []*lab.Pod{pods[0], podOf(t, nodes, pods, inRemoved[0])})
	labtest.Do(t, l.Etcd.Configure(ctx, twoSubnets(backend, "10.7.0.0/22", "fd07::/62", "fd06::/62")))
	for _, n := range nodes {
		said(ctx, t, n, `"The configuration no longer has a network that nodes have subnets of. They stay where they are" network="10.6.0.0/22" nodes=3`)
	}
	labtest.Do(t, lab.Poll(ctx, "the status to say which network is gone", func() error {
		if got := fmt.Sprint(getStatus(ctx, t, nodes[0]).Retired); got != "[10.6.0.0/22]" {
			return fmt.Errorf("it says %s", got)
		}
		return nil
	}))
	labtest.Do(t, inRemoved[0].Restart(ctx))
	labtest.Do(t, nodes[0].Restart(ctx))
	for _, n := range []*lab.Node{inRemoved[0], nodes[0]} {
		labtest.Do(t, n.WaitReady(ctx))
	}
	checkPathsAgain(ctx, t, l, pods)
	if inKernel {
		across()
	}
	if again := nodesIn(t, nodes, "10.6."); len(again) != 3 {
		t.Errorf("%d nodes are in the network that is gone", len(again))
	}
	expectNoDiff(ctx, t, nodes...)
}

// nodesIn returns the nodes whose IPv4 subnets begin so.
func nodesIn(t *testing.T, nodes []*lab.Node, prefix string) (in []*lab.Node) {
	t.Helper()
	for _, n := range nodes {
		if strings.HasPrefix(labtest.Must(n.SubnetEnv())(t).Subnets.IPv4.String(), prefix) {
			in = append(in, n)
		}
	}
	return in
}

func podOf(t *testing.T, nodes []*lab.Node, pods []*lab.Pod, n *lab.Node) *lab.Pod {
	t.Helper()
	for i := range nodes {
		if nodes[i] == n {
			return pods[i]
		}
	}
	t.Fatalf("%s has no pod", n.Hostname)
	return nil
}

// expectNoDiff waits until flannelctl diff finds nothing: what an earlier daemon left may go a moment after the new one is
// ready, when a dump of the kernel's was interrupted.
func expectNoDiff(ctx context.Context, t *testing.T, nodes ...*lab.Node) {
	t.Helper()
	for _, n := range nodes {
		labtest.Do(t, lab.Poll(ctx, n.Hostname+" to have no differences", func() error {
			out, status, err := n.Ctl(ctx, "diff")
			if err == nil && status != 0 {
				err = fmt.Errorf("status %d\n%s", status, out)
			}
			return err
		}))
	}
}

// TestEnlargeKubernetes: the ConfigMap gets another network, and a node with a podCIDR of that joins, while pods ping
// each other. When the ConfigMap loses the network again, the node stays.
func TestEnlargeKubernetes(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		backend string
		long    bool
	}{{"vxlan", false}, {"host-gw", true}} {
		if !labtest.Selected(!c.long) {
			continue
		}
		t.Run(c.backend, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t, 2*time.Minute)
			l, k := newKube(ctx, t, "", make([]lab.NodeOptions, 3))
			enlargeKubernetes(ctx, t, l, k, fmt.Sprintf(`{"Type": %q}`, c.backend))
		})
	}
}

func enlargeKubernetes(ctx context.Context, t *testing.T, l *lab.Lab, k *lab.Kube, backend string) {
	const small = `"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "fd05::/48"`
	nodes := l.Nodes()
	args := daemonArgs(t, k, configuration(small, backend, false))
	for i, n := range nodes {
		cidrs := []string{fmt.Sprintf("10.5.%d.0/24", i+1), fmt.Sprintf("fd05:0:0:%d::/64", i+1)}
		if i == 2 {
			cidrs = []string{"10.6.3.0/24", "fd06:0:0:3::/64"}
		}
		labtest.Do(t, k.AddNode(ctx, n, cidrs...))
	}
	for _, n := range nodes[:2] {
		labtest.Do(t, n.Start(args...))
		labtest.Do(t, n.WaitReady(ctx))
	}
	pods := addPodsTo(ctx, t, nodes[:2])
	lossless := startPings(ctx, t, pods)
	labtest.Do(t, k.Configure(configuration(small+`, "Networks": ["10.6.0.0/16", "fd06::/48"]`, backend, false)))
	labtest.Do(t, nodes[2].Start(args...))
	labtest.Do(t, nodes[2].WaitReady(ctx))
	pods = append(pods, addPodsTo(ctx, t, nodes[2:])...)
	checkPaths(ctx, t, l, pods)
	expectNoDiff(ctx, t, nodes...)

	labtest.Do(t, k.Configure(configuration(small, backend, false)))
	for _, n := range nodes {
		said(ctx, t, n, `They stay where they are" network="10.6.0.0/16,fd06::/48" nodes=1`)
	}
	labtest.Do(t, nodes[2].Restart(ctx))
	labtest.Do(t, nodes[2].WaitReady(ctx))
	checkPathsAgain(ctx, t, l, pods)
	lossless()
	expectNoDiff(ctx, t, nodes...)
}
