package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// TestRouteTable: on a host where rules of another program, such as a VPN's, lead everything past the main table, routes
// in a table of their own, with rules before these, connect the pods all the same. The other node has its routes in the
// main table.
func TestRouteTable(t *testing.T) {
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
			ctx := labtest.Context(t, time.Minute)
			l := labtest.New(ctx, t, configuration(ipv4Network+`, `+ipv6Network, fmt.Sprintf(`{"Type": %q}`, c.backend), false),
				lab.NodeOptions{}, lab.NodeOptions{})
			useTable(ctx, t, l)
		})
	}
}

func useTable(ctx context.Context, t *testing.T, l *lab.Lab) {
	n, other := l.Nodes()[0], l.Nodes()[1]
	vpn := []string{
		"ip route add prohibit 10.0.0.0/8 table 99", "ip -6 route add prohibit fd00::/16 table 99",
		"ip rule add priority 2000 lookup 99", "ip -6 rule add priority 2000 lookup 99",
	}
	for _, line := range vpn {
		labtest.Must(n.Run(ctx, line))(t)
	}
	args := []string{"--ip-masq", "--ip-blackhole-route", "--route-table=7070"}
	labtest.Do(t, n.Start(args...))
	labtest.Do(t, other.Start("--ip-masq"))
	for _, n := range l.Nodes() {
		labtest.Do(t, n.WaitReady(ctx))
	}
	pods := addPods(ctx, t, l)
	checkPaths(ctx, t, l, pods)
	expectNoDiff(ctx, t, l.Nodes()...)
	if main := labtest.Must(n.Run(ctx, "ip route show proto 70"))(t); strings.TrimSpace(main) !=
		"blackhole 10.5."+strings.Split(pods[0].IPv4.String(), ".")[2]+".0/24 metric 2147483648" {
		t.Errorf("in the main table, there are\n%s", main)
	}

	// What another program does to rules and routes is put right.
	for _, line := range []string{"ip route flush table 7070", "ip rule flush priority 1001", "ip -6 rule del priority 1001"} {
		labtest.Must(n.Run(ctx, line))(t)
		for _, dst := range pods[1].Addrs() {
			labtest.Do(t, pods[0].WaitPing(ctx, dst))
		}
	}

	// Without the flag, and without the other program, the main table has the routes again, and the rules are gone.
	for _, line := range vpn {
		labtest.Must(n.Run(ctx, strings.Replace(line, " add ", " del ", 1)))(t)
	}
	labtest.Do(t, n.Stop(ctx))
	labtest.Do(t, n.Start("--ip-masq"))
	labtest.Do(t, n.WaitReady(ctx))
	checkPathsAgain(ctx, t, l, pods)
	left := labtest.Must(n.Run(ctx, "ip rule"))(t) + labtest.Must(n.Run(ctx, "ip -6 rule"))(t)
	if strings.Contains(left, "proto 70") {
		t.Errorf("there remain\n%s", left)
	}
	expectNoDiff(ctx, t, n)

	// Cleanup removes them, too.
	labtest.Do(t, n.Stop(ctx))
	labtest.Do(t, n.Start(args...))
	labtest.Do(t, n.WaitReady(ctx))
	labtest.Do(t, n.Stop(ctx))
	labtest.Must(first(n.Ctl(ctx, "cleanup", "--yes")))(t)
	left = labtest.Must(n.Run(ctx, "ip rule"))(t) + labtest.Must(n.Run(ctx, "ip -6 rule"))(t) +
		labtest.Must(n.Run(ctx, "ip route show table all proto 70"))(t)
	if strings.Contains(left, "proto 70") || strings.Contains(left, "10.5.") {
		t.Errorf("after cleanup, there remain\n%s", left)
	}
}

// TestRouteTableBesideLAN: a LAN in a part of the network that is not handed out stays reachable, also where the backend
// has one route to the whole network, and also a LAN that comes later.
func TestRouteTableBesideLAN(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		backend string
		long    bool
	}{{"udp", false}, {"wireguard", true}, {"vxlan", true}} {
		if !labtest.Selected(!c.long) {
			continue
		}
		t.Run(c.backend, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t, time.Minute)
			l := labtest.New(ctx, t, configuration(ipv4Network, fmt.Sprintf(`{"Type": %q}`, c.backend), false), lab.NodeOptions{})
			n := l.Nodes()[0]
			addLAN := func(dev, address string) {
				t.Helper()
				for _, line := range []string{
					fmt.Sprintf("ip link add %s type veth peer name %[1]s-far", dev), "ip link set " + dev + "-far up",
					"ip link set " + dev + " up", "ip addr add " + address + " dev " + dev,
				} {
					labtest.Must(n.Run(ctx, line))(t)
				}
			}
			leads := func(to, dev string) {
				t.Helper()
				labtest.Do(t, lab.Poll(ctx, to+" to be on "+dev, func() error {
					out, err := n.Run(ctx, "ip route get "+to)
					if err == nil && !strings.Contains(out, "dev "+dev+" ") {
						err = errors.New(out)
					}
					return err
				}))
			}
			addLAN("lan", "10.5.0.129/25")
			labtest.Do(t, n.Start("--route-table=7070"))
			labtest.Do(t, n.WaitReady(ctx))
			leads("10.5.0.200", "lan")
			addLAN("later", "10.5.0.65/26")
			leads("10.5.0.99", "later")
			expectNoDiff(ctx, t, n)
			labtest.Must(n.Run(ctx, "ip link del lan"))(t)
			labtest.Do(t, lab.Poll(ctx, "no rule for the LAN that is gone", func() error {
				rules, err := n.Run(ctx, "ip rule")
				if err == nil && strings.Contains(rules, "10.5.0.128/25") {
					err = errors.New(rules)
				}
				return err
			}))
		})
	}
}
