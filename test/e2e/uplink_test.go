package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// TestNATTrap: machines with a second interface where all have the same
// address, as VirtualBox makes them. The default route leads there, but no peer
// ever comes from there.
func TestNATTrap(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 2*time.Minute)
	nat := lab.NodeOptions{NAT: true}
	l := labtest.New(ctx, t, vxlanConfig, nat, nat, nat)
	for _, n := range l.Nodes() {
		labtest.Do(t, n.Start())
	}
	// One may hold the address. It may even work, for all it knows.
	var holder *lab.Node
	labtest.Do(t, lab.Poll(ctx, "a daemon to be ready", func() error {
		var errs []error
		for _, n := range l.Nodes() {
			err := n.Ready(ctx)
			if err == nil {
				holder = n
				return nil
			}
			errs = append(errs, fmt.Errorf("%s: %w", n.Hostname, err))
		}
		return errors.Join(errs...)
	}))
	for _, n := range l.Nodes() {
		if n == holder {
			continue
		}
		labtest.Do(t, lab.Poll(ctx, n.Hostname+" to say what is wrong", func() error {
			for _, word := range []string{regexp.QuoteMeta(lab.NATAddress), "--iface", `\b` + holder.Hostname + `\b`} {
				if !regexp.MustCompile(word).MatchString(n.Log()) {
					return fmt.Errorf("no word of %s", word)
				}
			}
			return nil
		}))
		if n.Exited() || n.Ready(ctx) == nil {
			t.Errorf("%s has exited or is ready, and should wait", n.Hostname)
		}
	}

	// The operator reads the log, and does what it says.
	for _, n := range l.Nodes() {
		labtest.Do(t, n.Stop(ctx))
	}
	labtest.Start(ctx, t, l, "--iface=eth0")
	pods := addPods(ctx, t, l)
	for _, from := range pods {
		for _, to := range pods {
			labtest.Do(t, from.WaitPing(ctx, to.IPv4))
		}
	}
}

// TestUplinkFlags: any of the flags leads out of the trap.
func TestUplinkFlags(t *testing.T) {
	t.Parallel()
	for _, flag := range []string{
		"--iface=eth0",
		`--iface-regex=198\.18\..*`,
		"--iface-can-reach=" + lab.Gateway.String(),
	} {
		t.Run(flag, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t, time.Minute)
			nat := lab.NodeOptions{NAT: true}
			l := labtest.New(ctx, t, vxlanConfig, nat, nat)
			labtest.Start(ctx, t, l, flag)
			pods := addPods(ctx, t, l)
			labtest.Do(t, pods[0].WaitPing(ctx, pods[1].IPv4))
			labtest.Do(t, pods[1].WaitPing(ctx, pods[0].IPv4))
		})
	}
}

// TestUplinkMoves: a node's uplink gets another address, and peers follow.
func TestUplinkMoves(t *testing.T) {
	t.Parallel()
	for backend, want := range map[string]trace{
		"vxlan":   {"bridge fdb show dev flannel.1", "dst 198.18.0.77 "},
		"host-gw": {"ip route show proto 70", "via 198.18.0.77 "},
	} {
		t.Run(backend, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t, time.Minute)
			l := labtest.New(ctx, t, fmt.Sprintf(`{%s, "Backend": {"Type": %q}}`, ipv4Network, backend),
				make([]lab.NodeOptions, 2)...)
			labtest.Start(ctx, t, l)
			pods := addPods(ctx, t, l)
			mover, peer := l.Nodes()[0], l.Nodes()[1]
			labtest.Do(t, pods[1].WaitPing(ctx, pods[0].IPv4))
			before := labtest.Must(mover.SubnetEnv())(t)

			labtest.Do(t, mover.Script(ctx,
				"addr del 198.18.0.1/24 dev eth0",
				"addr add 198.18.0.77/24 dev eth0",
				"route add default via "+lab.Gateway.String()))
			moved := time.Now()
			waitTraces(ctx, t, peer, []trace{want}, true)
			labtest.Do(t, pods[1].WaitPing(ctx, pods[0].IPv4))
			labtest.Do(t, pods[0].WaitPing(ctx, pods[1].IPv4))
			t.Logf("pods talk again %v after the address changed", time.Since(moved).Round(time.Millisecond))
			if after := labtest.Must(mover.SubnetEnv())(t); !after.Equal(before) {
				t.Errorf("the subnet file said %+v, says %+v", before, after)
			}
		})
	}
}

// TestUplinkTakenOver: the uplink goes down, and its address stays on it; the
// next default route leads elsewhere. Nothing answers the connection to etcd any
// more, and nothing ends it but the daemon: peers learn where the node is by
// another one.
func TestUplinkTakenOver(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, time.Minute)
	l := labtest.New(ctx, t, vxlanConfig, lab.NodeOptions{}, lab.NodeOptions{Routed: true})
	peer, mover := l.Nodes()[0], l.Nodes()[1]
	spare := labtest.Must(mover.AddSpareUplink(ctx))(t)
	labtest.Start(ctx, t, l)
	pods := addPods(ctx, t, l)
	labtest.Do(t, pods[0].WaitPing(ctx, pods[1].IPv4))

	labtest.Do(t, mover.Script(ctx, "link set eth0 down"))
	down := time.Now()
	waitTraces(ctx, t, peer, []trace{{"bridge fdb show dev flannel.1", "dst " + spare.String() + " "}}, true)
	t.Logf("the peer knows of it after %v", time.Since(down).Round(time.Millisecond))
	if want := fmt.Sprintf("Closing a connection; the client connects again\" from=%q", mover.IPv4); !strings.Contains(mover.Log(), want) {
		t.Errorf("the daemon has not closed the connection by itself, but waited for its end")
	}
	labtest.Do(t, pods[0].WaitPing(ctx, pods[1].IPv4))
	labtest.Do(t, pods[1].WaitPing(ctx, pods[0].IPv4))
}

// TestUplinkForEachFamily: IPv6 comes in by another interface than IPv4 on two nodes, and by the same one on the third,
// which is like a node that knows no such thing. Pods of all reach each other in both families; one family stays while
// the other one's interface is away; flannelctl knows both.
func TestUplinkForEachFamily(t *testing.T) {
	t.Parallel()
	for backend, onEth1 := range map[string]trace{
		"vxlan":     {"ip -d link show flannel-v6.1", " dev eth1 "},
		"host-gw":   {"ip -6 route show proto 70", " dev eth1 "},
		"wireguard": {"ip link show flannel-wg-v6", "flannel-wg-v6"},
		"udp":       {"ip link show flannel0", "flannel0"},
	} {
		inKernel := backend == "vxlan" || backend == "host-gw"
		if !labtest.Selected(inKernel) {
			continue
		}
		t.Run(backend, func(t *testing.T) {
			t.Parallel()
			testUplinkForEachFamily(t, backend, onEth1, inKernel)
		})
	}
}

func testUplinkForEachFamily(t *testing.T, backend string, onEth1 trace, inKernel bool) {
	ctx := labtest.Context(t, 2*time.Minute)
	l := labtest.New(ctx, t, fmt.Sprintf(dualConfig, backend), make([]lab.NodeOptions, 3)...)
	a, b, c := l.Nodes()[0], l.Nodes()[1], l.Nodes()[2]
	labtest.Do(t, a.MoveIPv6(ctx))
	labtest.Do(t, b.MoveIPv6(ctx))
	labtest.Do(t, a.Start("--iface-v6=eth1"))
	labtest.Do(t, b.Start(`--iface-regex=^198\.18\.`, "--iface-can-reach-v6=2000::"))
	labtest.Do(t, c.Start())
	for _, n := range l.Nodes() {
		labtest.Do(t, n.WaitReady(ctx))
	}
	pods := addPods(ctx, t, l)
	reachAll := func(family func(*lab.Pod) netip.Addr) {
		t.Helper()
		for _, from := range pods {
			for _, to := range pods {
				labtest.Do(t, from.WaitPing(ctx, family(to)))
			}
		}
	}
	four := func(p *lab.Pod) netip.Addr { return p.IPv4 }
	six := func(p *lab.Pod) netip.Addr { return p.IPv6 }
	reachAll(four)
	reachAll(six)
	for _, n := range []*lab.Node{a, b} {
		waitTraces(ctx, t, n, []trace{onEth1}, true)
		checkUplinks(ctx, t, n)
	}

	// IPv6's interface goes down, and comes back: IPv4 loses nothing. In user space, a backend starts again with another
	// address, and a session of WireGuard that is new loses packets by itself.
	labtest.Do(t, pods[0].Mirror())
	probe := pods[2].StartProbe(pods[0].IPv4, 100, netip.Addr{}, 20*time.Millisecond)
	defer probe.Stop()
	down := time.Now()
	labtest.Do(t, a.Script(ctx, "link set eth1 down"))
	away := "IPv6 stays as it is, with " + a.IPv6.String() + " of eth1"
	labtest.Do(t, lab.Poll(ctx, "doctor to know of it", func() error {
		if out, _, err := a.Ctl(ctx, "doctor"); err != nil || !strings.Contains(out, away) {
			return fmt.Errorf("%v: %s", err, out)
		}
		return nil
	}))
	labtest.Do(t, a.ConfigureIPv6(ctx, a.IPv6))
	reachAll(six)
	labtest.Do(t, a.PullIPv6(ctx))
	labtest.Do(t, a.PlugIPv6(ctx))
	reachAll(six)

	// Its address changes; peers follow.
	other := netip.MustParseAddr("fd18::77")
	labtest.Do(t, a.Script(ctx, "addr del "+a.IPv6.String()+"/64 dev eth1"))
	labtest.Do(t, a.ConfigureIPv6(ctx, other))
	labtest.Do(t, lab.Poll(ctx, "the other nodes to know the new address", func() error {
		for _, n := range []*lab.Node{b, c} {
			if out, _, err := n.Ctl(ctx, "leases"); err != nil || !strings.Contains(out, other.String()+" ") {
				return fmt.Errorf("%v: %s", err, out)
			}
		}
		return nil
	}))
	reachAll(six)
	if silence := labtest.Must(probe.Silence(ctx, down))(t); silence > 0 && inKernel {
		t.Errorf("IPv4 lost packets until %v after IPv6's interface went down", silence)
	}
	reachAll(four)
}

// checkUplinks checks that flannelctl reports both uplinks of a node, and finds nothing wrong, with and without the
// daemon.
func checkUplinks(ctx context.Context, t *testing.T, n *lab.Node) {
	t.Helper()
	for _, way := range [][]string{nil, {"--direct"}} {
		var got []string
		for _, u := range getStatus(ctx, t, n, way...).Uplinks {
			got = append(got, fmt.Sprintf("%s %d %v %v", u.Name, u.MTU, u.Addresses, u.PublicIPs))
		}
		want := []string{fmt.Sprintf("eth0 1500 [%[1]s] [%[1]s]", n.IPv4), fmt.Sprintf("eth1 1500 [%[1]s] [%[1]s]", n.IPv6)}
		if !slices.Equal(got, want) {
			t.Errorf("%s: status %v has the uplinks %q, want %q", n.Hostname, way, got, want)
		}
		for _, command := range []string{"status", "doctor", "diff", "connectivity"} {
			out, status, err := n.Ctl(ctx, append([]string{command}, way...)...)
			if err != nil || status != 0 {
				t.Errorf("%s: flannelctl %s %v: status %d, %v\n%s", n.Hostname, command, way, status, err, out)
			}
		}
	}
}

// TestIPv6Elsewhere: without a flag for it, IPv6 stays off where only another interface has it; the node says which flag
// would help, and works with it.
func TestIPv6Elsewhere(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, time.Minute)
	l := labtest.New(ctx, t, fmt.Sprintf(dualConfig, "vxlan"), make([]lab.NodeOptions, 2)...)
	a := l.Nodes()[0]
	labtest.Do(t, a.MoveIPv6(ctx))
	labtest.Start(ctx, t, l)
	out, _, err := a.Ctl(ctx, "doctor")
	const flag = "--iface-v6=eth1"
	if err != nil || !strings.Contains(out, "eth0 (the IPv4 default route) has no usable IPv6 address") ||
		!strings.Contains(out, "set "+flag+" if IPv6 comes in there") {
		t.Errorf("doctor: %v\n%s", err, out)
	}
	labtest.Do(t, a.Stop(ctx))
	labtest.Do(t, a.Start(flag))
	labtest.Do(t, a.WaitReady(ctx))
	pods := addPods(ctx, t, l)
	labtest.Do(t, pods[0].WaitPing(ctx, pods[1].IPv6))
	labtest.Do(t, pods[1].WaitPing(ctx, pods[0].IPv6))
}
