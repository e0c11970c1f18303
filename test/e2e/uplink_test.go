package e2e

import (
	"errors"
	"fmt"
	"regexp"
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
