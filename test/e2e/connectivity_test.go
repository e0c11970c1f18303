package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// A pathFault is a fault on the path from the first node to the second, or back, which flannelctl connectivity must
// find on the first node.
type pathFault struct {
	name            string
	inject, restore func(context.Context, *doctorTestbed) error
	finds           string   // names of findings, sorted
	says            []string // parts of the texts, with HERE and THERE for the nodes' overlay addresses
	both            bool     // the command runs on both nodes at the same time
	long            bool     // left to make test-long
}

// onPeer runs commands on the second node.
func onPeer(lines ...string) func(context.Context, *doctorTestbed) error {
	return func(ctx context.Context, c *doctorTestbed) error {
		return shell(lines...)(ctx, &doctorTestbed{Node: c.peer})
	}
}

func limitHop(mtu int) func(context.Context, *doctorTestbed) error {
	return func(ctx context.Context, c *doctorTestbed) error { return c.peer.LimitHop(ctx, mtu) }
}

const vxlanRule = "INPUT -p udp --dport 8472 -j DROP"

// vxlanFaults are of two nodes with vxlan and both families.
var vxlanFaults = []pathFault{
	{name: "the port dropped by the peer", both: true, finds: "overlay-blocked",
		says:   []string{"UDP port 8472 from 198.18.0.1 to 198.18.0.2 gets lost", "The other way works"},
		inject: onPeer("iptables -I " + vxlanRule), restore: onPeer("iptables -D " + vxlanRule)},
	{name: "the port dropped by this node", both: true, finds: "overlay-blocked", long: true,
		says:   []string{"UDP port 8472 between 198.18.0.1 and 198.18.0.2 gets lost"},
		inject: shell("iptables -I " + vxlanRule), restore: shell("iptables -D " + vxlanRule)},
	{name: "the port dropped by both", both: true, finds: "overlay-blocked", long: true,
		says:    []string{"UDP port 8472 between 198.18.0.1 and 198.18.0.2 gets lost"},
		inject:  steps(shell("iptables -I "+vxlanRule), onPeer("iptables -I "+vxlanRule)),
		restore: steps(shell("iptables -D "+vxlanRule), onPeer("iptables -D "+vxlanRule))},
	{name: "no device on the peer", finds: "overlay-blocked", long: true,
		says: []string{"UDP port 8472 between 198.18.0.1 and 198.18.0.2 gets lost"},
		inject: steps(func(ctx context.Context, c *doctorTestbed) error { return c.peer.Stop(ctx) },
			onPeer("ip link del flannel.1")),
		restore: func(ctx context.Context, c *doctorTestbed) error {
			return startAgain(ctx, &doctorTestbed{Node: c.peer})
		}},
	// A device lets frames through that are longer by a VLAN tag, as other hardware may.
	{name: "a hop with a smaller MTU", finds: "path-mtu path-mtu", inject: limitHop(1400), restore: limitHop(1500),
		says: []string{"from HERE to THERE of more than 1354 bytes get lost, and pods send up to 1430",
			"From host to host, 198.18.0.1 to 198.18.0.2, at most 1404 bytes of 1480",
			"from HEREv6 to THEREv6 of more than 1334 bytes"}},
	{name: "masquerading", finds: "masqueraded", says: []string{"packets from HERE1 arrive at THERE as packets from HERE:"},
		inject: shell("nft add table ip bad", "nft add chain ip bad post { type nat hook postrouting priority 90 ; }",
			"nft add rule ip bad post ip saddr 10.5.0.0/16 masquerade"), restore: shell("nft delete table ip bad")},
	{name: "strict rp_filter", finds: "rp-filter", long: true, says: []string{"(rp_filter) on flannel.1"},
		inject:  shell("sysctl -qw net/ipv4/conf/flannel.1/rp_filter=1"),
		restore: shell("sysctl -qw net/ipv4/conf/flannel.1/rp_filter=0")},
	{name: "ICMP dropped by the peer", says: []string{"THERE does not reply to ping, but it replies to UDP or TCP"},
		inject: onPeer("iptables -I INPUT -p icmp -j DROP"), restore: onPeer("iptables -F INPUT")},
	{name: "all dropped by the peer but the port", long: true,
		says: []string{"the host 198.18.0.2 does not reply, but packets arrive through the overlay",
			"packets to pods arrive at the node of THERE, which does not reply itself: its firewall"},
		inject:  onPeer("iptables -A INPUT -p udp --dport 8472 -j ACCEPT", "iptables -P INPUT DROP"),
		restore: onPeer("iptables -P INPUT ACCEPT", "iptables -F INPUT")},
	{name: "all dropped by the peer but the port and ICMP", long: true,
		says: []string{"THERE replies to ping, but does not refuse UDP and TCP to closed ports"},
		inject: onPeer("iptables -A INPUT -p udp --dport 8472 -j ACCEPT", "iptables -A INPUT -p icmp -j ACCEPT",
			"iptables -P INPUT DROP"),
		restore: onPeer("iptables -P INPUT ACCEPT", "iptables -F INPUT")},
	{name: "UDP and TCP refused by the peer", long: true,
		inject: onPeer("iptables -A INPUT -p udp --dport 8472 -j ACCEPT", "iptables -A INPUT -p udp -j REJECT",
			"iptables -A INPUT -p tcp -j REJECT --reject-with icmp-host-prohibited"), restore: onPeer("iptables -F INPUT")},
	{name: "a peer cut off", finds: "host-silent host-silent", long: true,
		says: []string{"198.18.0.2 cannot be reached: no host on the link replies for 198.18.0.2"},
		inject: steps(func(ctx context.Context, c *doctorTestbed) error { return c.peer.PullCable(ctx) },
			shell("ip neigh flush dev eth0")),
		restore: func(ctx context.Context, c *doctorTestbed) error { return c.peer.PlugCable(ctx) }},
	// The last, since the device stays.
	{name: "checksums that a device does not compute", finds: "checksum-wrong checksum-wrong",
		says:    []string{"UDP from HERE arrives at THERE with wrong checksums", "UDP from HEREv6 arrives at THEREv6"},
		inject:  func(ctx context.Context, c *doctorTestbed) error { return c.BreakChecksums(ctx) },
		restore: runFixes},
}

// hostGWFaults are of two nodes with host-gw.
var hostGWFaults = []pathFault{
	{name: "addresses of pods dropped on the way", finds: "overlay-blocked",
		says: []string{"packets from HERE1 to THERE1 get lost, although the hosts reach each other"},
		inject: onPeer("nft add table ip fw", "nft add chain ip fw in { type filter hook prerouting priority -300 ; }",
			"nft add rule ip fw in ip saddr 10.5.0.0/16 drop"), restore: onPeer("nft delete table ip fw")},
	{name: "a hop with a smaller MTU", finds: "path-mtu", inject: limitHop(1400), restore: limitHop(1500),
		says: []string{"from HERE1 to THERE1 of more than 1404 bytes get lost, and pods send up to 1500"}},
	{name: "no pod on the peer", says: []string{"packets to pods arrive at the node of THERE1, which does not reply itself: " +
		"as long as no pod has run there"},
		inject: func(ctx context.Context, c *doctorTestbed) error {
			_, err := c.peer.Run(ctx, "ip addr flush dev cni0")
			return err
		}, restore: func(ctx context.Context, c *doctorTestbed) error {
			env, err := c.peer.SubnetEnv()
			if err == nil {
				_, err = c.peer.Run(ctx, fmt.Sprintf("ip addr add %s/24 dev cni0", env.Subnets.IPv4.Addr().Next()))
			}
			return err
		}},
}

// runFixes runs the commands that the findings of the first node name.
func runFixes(ctx context.Context, c *doctorTestbed) error {
	r, err := connectivity(ctx, c.Node)
	for _, f := range r.findings {
		for _, line := range f.Fix {
			if err == nil {
				command, _, _ := strings.Cut(line, "#")
				_, err = c.Run(ctx, command)
			}
		}
	}
	return err
}

// A connectivityResult is what flannelctl connectivity finds.
type connectivityResult struct {
	findings []connectivityFinding
	notes    []string
}

type connectivityFinding struct {
	Check, Text string
	Fix         []string
}

// connectivity runs flannelctl connectivity on a node.
func connectivity(ctx context.Context, n *lab.Node, args ...string) (r connectivityResult, err error) {
	out, status, err := n.Ctl(ctx, append([]string{"connectivity", "-o", "json"}, args...)...)
	if err != nil {
		return r, err
	}
	var all struct {
		Findings []connectivityFinding
		Peers    []struct {
			Findings []connectivityFinding
			Notes    []string
		}
	}
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		return r, err
	}
	r.findings = all.Findings
	for _, p := range all.Peers {
		r.findings = append(r.findings, p.Findings...)
		r.notes = append(r.notes, p.Notes...)
	}
	if status != min(1, len(r.findings)) {
		return r, fmt.Errorf("exit status %d with\n%s", status, out)
	}
	return r, nil
}

// expectFault runs flannelctl connectivity until it finds what it must find.
func expectFault(ctx context.Context, c *doctorTestbed, want pathFault) error {
	here, err := c.SubnetEnv()
	if err != nil {
		return err
	}
	there, err := c.peer.SubnetEnv()
	if err != nil {
		return err
	}
	names := strings.NewReplacer(
		here.Subnets.IPv4.Addr().Next().String(), "HERE1", there.Subnets.IPv4.Addr().Next().String(), "THERE1",
		here.Subnets.IPv4.Addr().String(), "HERE", there.Subnets.IPv4.Addr().String(), "THERE",
		here.Subnets.IPv6.Addr().String(), "HEREv6", there.Subnets.IPv6.Addr().String(), "THEREv6")
	return lab.Poll(ctx, "flannelctl connectivity to find "+want.finds, func() error {
		var other sync.WaitGroup
		if want.both {
			other.Go(func() { _, _ = connectivity(ctx, c.peer) })
		}
		r, err := connectivity(ctx, c.Node)
		other.Wait()
		if err != nil {
			return err
		}
		var checks, texts []string
		for _, f := range r.findings {
			checks, texts = append(checks, f.Check), append(texts, f.Text)
			if len(f.Fix) == 0 {
				return fmt.Errorf("there is no remedy for %+v", f)
			}
		}
		slices.Sort(checks)
		text := names.Replace(strings.Join(append(texts, r.notes...), "\n"))
		if got := strings.Join(checks, " "); got != want.finds || len(want.says) == 0 && text != "" {
			return fmt.Errorf("it finds %q: %s", got, text)
		}
		for _, part := range want.says {
			if !strings.Contains(text, part) {
				return fmt.Errorf("%q is not in\n%s", part, text)
			}
		}
		return nil
	})
}

// TestConnectivity: each fault is found, with its reason. Between healthy nodes, nothing is found.
func TestConnectivity(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, config string
		faults       []pathFault
		long         bool
	}{
		{"vxlan", fmt.Sprintf(doctorNetwork, ""), vxlanFaults, false},
		{"host-gw", `{` + ipv4Network + `, "Backend": {"Type": "host-gw"}}`, hostGWFaults, true},
	} {
		if !labtest.Selected(!c.long) {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t, 5*time.Minute)
			l := labtest.New(ctx, t, c.config, lab.NodeOptions{}, lab.NodeOptions{})
			c, faults := &doctorTestbed{Lab: l, Node: l.Nodes()[0], peer: l.Nodes()[1]}, c.faults
			labtest.Start(ctx, t, l, "--ip-masq")
			addPods(ctx, t, l)
			labtest.Do(t, expectFault(ctx, c, pathFault{}))
			direct, err := connectivity(ctx, c.Node, "--direct", c.peer.IPv4.String())
			if err != nil || len(direct.findings)+len(direct.notes) > 0 {
				t.Errorf("without the daemon: %+v, %v", direct, err)
			}
			for _, m := range faults {
				if m.long && !labtest.Selected(false) {
					continue
				}
				t.Run(m.name, func(t *testing.T) {
					err := m.inject(ctx, c)
					if err == nil {
						err = expectFault(ctx, c, m)
					}
					if err != nil {
						t.Error(err)
					}
					labtest.Do(t, m.restore(ctx, c))
					labtest.Do(t, expectFault(ctx, c, pathFault{}))
				})
			}
		})
	}
}
