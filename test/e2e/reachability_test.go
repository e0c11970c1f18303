package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/network"
	"github.com/flanneld/flanneld/pkg/probe"
	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// A loss is what keeps IPv4 packets from the other node, and what each node knows of the other meanwhile. In commands and
// texts, {1} and {2} are the nodes' addresses on the link, {o1} and {o2} those of their flannel devices.
type loss struct {
	name            string
	inject, restore [2][]string // commands on the first and on the second node
	cable           bool        // of the second node is pulled
	spare           bool        // the second node has another uplink
	stopped         bool        // no daemon runs on the second node meanwhile
	states          [2]probe.State
	says            [2]string // a part of the text
	long            bool
}

func onBoth(commands ...string) [2][]string   { return [2][]string{commands, commands} }
func onSecond(commands ...string) [2][]string { return [2][]string{nil, commands} }

const (
	dropVXLAN = "iptables -I INPUT -p udp --dport 8472 -j DROP"
	dropPings = "iptables -I INPUT -p icmp --icmp-type echo-request -j DROP"
)

var losses = []loss{
	{name: "port dropped at the second", inject: onSecond(dropVXLAN), restore: onSecond("iptables -F INPUT"),
		states: [2]probe.State{probe.HostOnly, probe.HostOnly},
		says: [2]string{"UDP port 8472 from {1} to {2} does not arrive there, while packets of {2} arrive here",
			"UDP port 8472 from {1} to {2} does not arrive here, while packets to {1} arrive there"}},
	{name: "port dropped both ways", inject: onBoth(dropVXLAN), restore: onBoth("iptables -F INPUT"),
		states: [2]probe.State{probe.HostOnly, probe.HostOnly},
		says: [2]string{"UDP port 8472 between {1} and {2} arrives in neither direction",
			"UDP port 8472 between {2} and {1} arrives in neither direction"}},
	{name: "sent packets dropped", inject: onSecond("iptables -I OUTPUT -p udp --dport 8472 -j DROP"),
		restore: onSecond("iptables -F OUTPUT"), states: [2]probe.State{probe.HostOnly, probe.HostOnly},
		says: [2]string{"UDP port 8472 from {2} to {1} does not arrive here",
			"UDP port 8472 from {2} to {1} does not arrive there"}, long: true},
	{name: "switched off", cable: true, states: [2]probe.State{probe.Silent, probe.Silent},
		says: [2]string{"nothing from {2} arrives any more", "nothing from {1} arrives any more"}},
	{name: "another VNI", stopped: true,
		inject: onSecond("ip link del flannel.1",
			"ip link add flannel.2 type vxlan id 2 local {2} dev eth0 dstport 8472 nolearning",
			"ip address add {o2}/32 dev flannel.2", "ip link set flannel.2 up"),
		restore: onSecond("ip link del flannel.2"), states: [2]probe.State{probe.HostOnly},
		says: [2]string{"Either UDP port 8472 between {1} and {2} is blocked"}},
	{name: "reverse path filter",
		inject: onSecond("sysctl -w net.ipv4.conf.all.rp_filter=1", "ip rule add to {o1} table 77",
			"ip route add {o1} dev eth0 table 77"),
		restore: onSecond("sysctl -w net.ipv4.conf.all.rp_filter=0", "ip rule del table 77", "ip route flush table 77"),
		states:  [2]probe.State{probe.HostOnly, probe.HostOnly}, says: [2]string{"reverse path filtering", "reverse path filtering"},
		long: true},
	{name: "reverse path filter, two uplinks", spare: true,
		inject:  onSecond("sysctl -w net.ipv4.conf.all.rp_filter=1", "ip route add {1} via 198.18.102.254 dev eth1"),
		restore: onSecond("sysctl -w net.ipv4.conf.all.rp_filter=0", "ip route del {1} via 198.18.102.254 dev eth1"),
		states:  [2]probe.State{probe.Silent, probe.Silent},
		says: [2]string{"nothing that {1} sends arrives there, as where reverse path filtering of {2} drops it",
			"reverse path filtering of this host"},
		long: true},
	{name: "asymmetric routing",
		inject:  onSecond("ip rule add to {o1} table 77", "ip route add {o1} via {1} dev eth0 table 77"),
		restore: onSecond("ip rule del table 77", "ip route flush table 77"),
		states:  [2]probe.State{probe.Reachable, probe.Reachable}, long: true},
	// The second node's own requests tell the first one that it receives replies. The second one has them, too. It is the
	// last loss here, since the first node relies on what the second has told for another minute.
	{name: "pings dropped at the second", inject: onSecond(dropPings), restore: onSecond("iptables -F INPUT"),
		states: [2]probe.State{probe.Reachable, probe.Reachable}},
}

// TestReachability: each node knows whether packets arrive at the other, in which direction they do not, and says what
// to open. IPv6 is not concerned.
func TestReachability(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 5*time.Minute)
	l := labtest.New(ctx, t, fmt.Sprintf(doctorNetwork, ""), lab.NodeOptions{}, lab.NodeOptions{})
	labtest.Start(ctx, t, l, "--ip-masq", "--probe-interval=1")
	nodes := [2]*lab.Node{l.Nodes()[0], l.Nodes()[1]}
	words := []string{"{1}", nodes[0].IPv4.String(), "{2}", nodes[1].IPv4.String()}
	for i, n := range nodes {
		words = append(words, fmt.Sprintf("{o%d}", i+1), labtest.Must(n.SubnetEnv())(t).Subnets.IPv4.Addr().String())
	}
	filled := strings.NewReplacer(words...)
	run := func(commands [2][]string) {
		t.Helper()
		for i, n := range nodes {
			for _, c := range commands[i] {
				labtest.Must(n.Run(ctx, filled.Replace(c)))(t)
			}
		}
	}
	healthy := loss{states: [2]probe.State{probe.Reachable, probe.Reachable}}
	waitReachability(ctx, t, nodes, healthy, filled)
	for _, m := range losses {
		if !labtest.Selected(!m.long) {
			continue
		}
		t.Run(m.name, func(t *testing.T) {
			if m.stopped {
				labtest.Do(t, nodes[1].Stop(ctx))
			}
			if m.spare {
				labtest.Must(nodes[1].AddSpareUplink(ctx))(t)
			}
			run(m.inject)
			if m.cable {
				labtest.Do(t, nodes[1].PullCable(ctx))
			}
			began := time.Now()
			waitReachability(ctx, t, nodes, m, filled)
			if says := filled.Replace(m.says[0]); says != "" {
				out, status, err := nodes[0].Ctl(ctx, "doctor")
				if err != nil || status != 1 || !strings.Contains(out, "peer-blocked: ") || !strings.Contains(out, says) {
					t.Errorf("doctor: %v, status %d\n%s", err, status, out)
				}
				if out, _, err := nodes[0].Ctl(ctx, "status"); err != nil || !strings.Contains(out, says) {
					t.Errorf("status: %v\n%s", err, out)
				}
			}
			// It stays so for longer than a round takes in which nothing replies.
			for m.states[0] == probe.Reachable && time.Since(began) < 5*time.Second {
				waitReachability(ctx, t, nodes, m, filled)
			}
			if m.cable {
				labtest.Do(t, nodes[1].PlugCable(ctx))
			}
			run(m.restore)
			if m.stopped {
				labtest.Do(t, nodes[1].Restart(ctx))
			}
			waitReachability(ctx, t, nodes, healthy, filled)
		})
	}
}

// waitReachability waits until each node knows of the other what m says.
func waitReachability(ctx context.Context, t *testing.T, nodes [2]*lab.Node, m loss, filled *strings.Replacer) {
	t.Helper()
	for i, n := range nodes {
		if m.states[i] == "" {
			continue
		}
		labtest.Do(t, lab.Poll(ctx, fmt.Sprintf("%s on %s", m.states[i], n.Hostname), func() error {
			paths, err := reachability(ctx, n)
			if err != nil {
				return err
			}
			for _, p := range paths {
				wants, says := m.states[i], filled.Replace(m.says[i])
				if p.Address.Is6() && !m.cable && !m.stopped {
					wants, says = probe.Reachable, ""
				} else if p.Address.Is6() {
					continue
				}
				if p.State != wants || !strings.Contains(p.Problem, says) || (says == "") != (p.Problem == "") {
					return fmt.Errorf("%s: %s, %q; want %s, %q", p.Address, p.State, p.Problem, wants, says)
				}
			}
			return nil
		}))
	}
}

// reachability returns what a node knows of its only peer.
func reachability(ctx context.Context, n *lab.Node) ([]network.Reachability, error) {
	leases, err := leasesOf(ctx, n)
	if err != nil {
		return nil, err
	}
	for _, l := range leases {
		if !l.Own && len(l.Reachability) == 2 {
			return l.Reachability, nil
		}
	}
	return nil, fmt.Errorf("there is no peer with two families in %+v", leases)
}

// leasesOf returns what flannelctl leases prints.
func leasesOf(ctx context.Context, n *lab.Node) (leases []network.Lease, err error) {
	out, _, err := n.Ctl(ctx, "leases", "-o", "json")
	if err != nil {
		return nil, err
	}
	return leases, json.Unmarshal([]byte(out), &leases)
}

// waitReached waits until packets of a node arrive at all of its peers, as its probes find. keys tells whether the backend
// agrees on keys with peers.
func waitReached(ctx context.Context, n *lab.Node, keys bool) error {
	return lab.Poll(ctx, "the probes of "+n.Hostname, func() error {
		leases, err := leasesOf(ctx, n)
		if err != nil {
			return err
		}
		for _, l := range leases {
			if l.Own {
				continue
			}
			if len(l.Reachability) != len(l.Subnets) || keys != (time.Since(l.Keys) < time.Hour) {
				return fmt.Errorf("of %v it knows %+v, keys of %v", l.Subnets, l.Reachability, l.Keys)
			}
			for _, r := range l.Reachability {
				if r.State != probe.Reachable {
					return fmt.Errorf("%s is %s", r.Address, r.State)
				}
			}
		}
		return nil
	})
}
