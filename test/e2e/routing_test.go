package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// birdConf announces the pods of a node to another one. Of what the other one announces, the kernel gets no routes to
// pods. %[1]s and %[2]s are the node's addresses, %[3]s and %[4]s the other node's.
const birdConf = `log stderr all;
router id %[1]s;
protocol device {}
protocol direct { ipv4; ipv6; interface "cni0"; }
protocol kernel kernel4 { ipv4 { import none; export where source = RTS_BGP && net !~ [10.4.0.0/14+]; }; }
protocol kernel kernel6 { ipv6 { import none; export where source = RTS_BGP && net !~ [fd00:5::/48+]; }; }
protocol bgp four { local %[1]s as 64512; neighbor %[3]s as 64512; direct; ipv4 { import all; export all; }; }
protocol bgp six { local %[2]s as 64512; neighbor %[4]s as 64512; direct; ipv6 { import all; export all; }; }
`

// birdAllConf has the kernel get the routes to pods, too. They stand beside flanneld's, with another metric.
const birdAllConf = `log stderr all;
router id %[1]s;
protocol device {}
protocol direct { ipv4; interface "cni0"; }
protocol kernel { ipv4 { import none; export where source = RTS_BGP; }; }
protocol bgp four { local %[1]s as 64512; neighbor %[3]s as 64512; direct; ipv4 { import all; export all; }; }
`

// frrConf does with FRR what birdConf does.
const frrConf = `log syslog
ip prefix-list pods permit 10.4.0.0/14 le 32
ipv6 prefix-list pods permit fd00:5::/48 le 128
route-map kernel4 deny 10
 match ip address prefix-list pods
route-map kernel4 permit 20
route-map kernel6 deny 10
 match ipv6 address prefix-list pods
route-map kernel6 permit 20
ip protocol bgp route-map kernel4
ipv6 protocol bgp route-map kernel6
route-map pods permit 10
 match interface cni0
router bgp 64512
 bgp router-id %[1]s
 neighbor %[3]s remote-as 64512
 neighbor %[4]s remote-as 64512
 address-family ipv4 unicast
  redistribute connected route-map pods
  no neighbor %[4]s activate
 exit-address-family
 address-family ipv6 unicast
  redistribute connected route-map pods
  neighbor %[4]s activate
 exit-address-family
`

// routing are the acts of a routing daemon that runs on both nodes: a unit of Debian, its files with the name of the file
// for its configuration, the command that reads it again, and what waits until the daemon has the routes of the other
// node.
func routing(unit, file, conf string, more map[string]string, reload string, learned doing) []act {
	files := func(of, to *lab.Node) map[string]string {
		all := map[string]string{file: fmt.Sprintf(conf+"%.0[2]s%.0[4]s", of.IPv4, of.IPv6, to.IPv4, to.IPv6)}
		for name, text := range more {
			all[name] = text
		}
		return all
	}
	return []act{
		{name: "start", do: func(ctx context.Context, s *neighbourhood) error {
			d, err := s.peer.StartDebian(ctx, files(s.peer, s.node), unit)
			if err != nil {
				return err
			}
			if out, err := d.Run(ctx, "systemctl start "+unit); err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return together(boot(files(s.node, s.peer), unit), debian("systemctl start "+unit), learned)(ctx, s)
		}},
		{name: "reload", do: together(debian(reload), learned)},
		{name: "restart", do: together(debian("systemctl restart "+unit), learned)},
		{name: "stop", do: debian("systemctl stop " + unit)},
		{name: "start again", do: together(debian("systemctl start "+unit), learned)},
	}
}

// beFirst has flanneld find the routing daemon's routes alone when it starts, as after a boot.
func beFirst(ctx context.Context, s *neighbourhood) error {
	s.node.Kill()
	if _, err := s.node.Run(ctx, "ip link del flannel.1"); err != nil {
		return err
	}
	if err := birdRoute(ctx, s); err != nil {
		return err
	}
	if err := s.node.Restart(ctx); err != nil {
		return err
	}
	return s.node.WaitReady(ctx)
}

var (
	bird = routing("bird.service", "/etc/bird/bird.conf", birdConf, nil, "birdc configure", together(
		until("birdc show route", `(?m)^10\.\S+ +unicast \[four`),
		until("birdc show route", `(?m)^fd00:5:\S+ +unicast \[six`)))
	birdAll = append(routing("bird.service", "/etc/bird/bird.conf", birdAllConf, nil, "birdc configure", birdRoute),
		act{"be there first", beFirst, perhaps})
	birdRoute = until("ip route", `(?m)^10\.\S+ via 198\.18\.0\.2 dev eth0 proto bird metric 32`)
	frr       = routing("frr.service", "/etc/frr/frr.conf", frrConf, map[string]string{
		"/etc/frr/daemons":    "bgpd=yes\nzebra_options='-A 127.0.0.1'\nbgpd_options='-A 127.0.0.1'\n",
		"/etc/frr/vtysh.conf": "service integrated-vtysh-config\n",
		"/root/routes":        "vtysh -c 'show ip route' -c 'show ipv6 route'\n",
	}, "vtysh -b", together(
		until("sh /root/routes", `(?m)^B +10\.\S+ \[200/0\] via 198\.18\.0\.2`),
		until("sh /root/routes", `(?m)^B +fd00:5:\S+ \[200/0\] via `)))
)

// announcerConf announces the pods of a node to the router.
const announcerConf = `log stderr all;
router id %[1]s;
protocol device {}
protocol direct { ipv4; ipv6; interface "cni0"; }
protocol bgp four { local %[1]s as 64512; neighbor 198.18.0.254 as 65000; ipv4 { import none; export all; }; }
protocol bgp six { local %[2]s as 64512; neighbor fd18::fe as 65000; ipv6 { import none; export all; }; }
`

const routerConf = `log stderr all;
router id 198.18.0.254;
protocol device {}
protocol kernel kernel4 { ipv4 { import none; export all; }; }
protocol kernel kernel6 { ipv6 { import none; export all; }; }
template bgp node { local as 65000; neighbor as 64512; ipv4 { import all; export none; }; ipv6 { import all; export none; }; }
protocol bgp four1 from node { neighbor 198.18.0.1; }
protocol bgp six1 from node { neighbor fd18::1; }
protocol bgp four2 from node { neighbor 198.18.0.2; }
protocol bgp six2 from node { neighbor fd18::2; }
`

// launchBird is a command that runs BIRD with a configuration.
func launchBird(conf string) []string {
	return []string{"sh", "-c", `echo "$0" >/run/bird.conf && exec bird -f -c /run/bird.conf -s /run/bird.ctl`, conf}
}

// TestAnnouncedPods: nodes announce their pods to a router. With NonMasqueradeCIDRs, a host behind the router sees pods'
// own addresses, and reaches pods. Other hosts see the node's.
func TestAnnouncedPods(t *testing.T) {
	t.Parallel()
	for _, backend := range []string{"vxlan", "host-gw"} {
		if !labtest.Selected(false) {
			continue
		}
		t.Run(backend, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t, time.Minute)
			l := labtest.New(ctx, t, configuration(ipv4Network+`, `+ipv6Network+
				`, "NonMasqueradeCIDRs": ["198.19.0.0/24", "fd19::/64"]`, fmt.Sprintf(`{"Type": %q}`, backend), backend == "host-gw"),
				lab.NodeOptions{}, lab.NodeOptions{})
			labtest.Start(ctx, t, l, "--ip-masq")
			pods := addPods(ctx, t, l)
			labtest.Do(t, l.Outside.Mirror())
			labtest.Must(l.LaunchRouter(launchBird(routerConf)...))(t)
			for _, n := range l.Nodes() {
				labtest.Do(t, n.Mirror())
				labtest.Must(n.LaunchDebian(launchBird(fmt.Sprintf(announcerConf, n.IPv4, n.IPv6))...))(t)
			}
			for i, p := range pods {
				for f, dst := range []netip.Addr{lab.Outside, lab.OutsideV6} {
					labtest.Do(t, lab.Poll(ctx, fmt.Sprintf("%s to see %s", dst, p.Addrs()[f]), func() error {
						return seenAs(ctx, p.Namespace, dst, p.Addrs()[f])
					}))
					labtest.Do(t, l.Outside.WaitPing(ctx, p.Addrs()[f]))
				}
				labtest.Do(t, seenAs(ctx, p.Namespace, l.Nodes()[1-i].IPv4, l.Nodes()[i].IPv4))
			}
			expectNoDiff(ctx, t, l.Nodes()...)
		})
	}
}

// TestEgress: the packets of one pod leave by way of another node, with an address that only that node has. This is as
// Documentation/neighbours.md has it. The pod talks to other pods as before, and the other pods of its node leave there.
func TestEgress(t *testing.T) {
	t.Parallel()
	for _, backend := range []string{"vxlan", "host-gw"} {
		if !labtest.Selected(false) {
			continue
		}
		t.Run(backend, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t, time.Minute)
			l := labtest.New(ctx, t, configuration(ipv4Network, fmt.Sprintf(`{"Type": %q}`, backend), false), lab.NodeOptions{}, lab.NodeOptions{})
			labtest.Start(ctx, t, l, "--ip-masq")
			node, gateway := l.Nodes()[0], l.Nodes()[1]
			pods := addPods(ctx, t, l)
			other := labtest.Must(node.AddPod(ctx, "other"))(t)
			labtest.Do(t, l.Outside.Mirror())
			labtest.Do(t, pods[1].Mirror())
			const vip = "198.18.0.240"
			pod := pods[0].IPv4.String()
			run := func(n *lab.Node, lines ...string) {
				t.Helper()
				for _, line := range lines {
					labtest.Must(n.Run(ctx, line))(t)
				}
			}
			there := labtest.Must(gateway.SubnetEnv())(t).Subnets.IPv4.Masked().Addr().String()
			via := "via " + there + " dev flannel.1 onlink"
			if backend == "host-gw" {
				via = "via " + gateway.IPv4.String()
			}
			run(gateway, "ip addr add "+vip+"/32 dev eth0", "iptables -t nat -I POSTROUTING -s "+pod+" ! -d 10.5.0.0/16 -j SNAT --to-source "+vip)
			run(node, "iptables -t nat -I POSTROUTING -s "+pod+" ! -d 10.5.0.0/16 -j ACCEPT",
				"ip rule add to 10.5.0.0/16 lookup main priority 1000", "ip rule add from "+pod+" lookup 100 priority 1001",
				"ip route add default table 100 "+via)
			check := func() {
				t.Helper()
				for _, c := range []struct {
					from      *lab.Pod
					dst, want netip.Addr
				}{
					{pods[0], lab.Outside, netip.MustParseAddr(vip)},
					{other, lab.Outside, node.IPv4},
					{pods[0], pods[1].IPv4, pods[0].IPv4},
				} {
					labtest.Do(t, lab.Poll(ctx, fmt.Sprintf("%s to see %s", c.dst, c.want), func() error {
						return seenAs(ctx, c.from.Namespace, c.dst, c.want)
					}))
				}
			}
			check()
			for _, n := range l.Nodes() {
				labtest.Do(t, n.Restart(ctx))
				labtest.Do(t, n.WaitReady(ctx))
			}
			check()
			if backend == "vxlan" {
				run(node, "ip link del flannel.1")
				labtest.Do(t, waitDiff(ctx, node, ""))
				if left, _ := node.Run(ctx, "ip route show table 100"); left != "" {
					t.Errorf("the route of another program is back: %s; Documentation/neighbours.md has it otherwise", left)
				}
				run(node, "ip route add default table 100 "+via)
				check()
			}
			expectNoDiff(ctx, t, l.Nodes()...)
			for _, n := range l.Nodes() {
				if text, _, _ := n.Ctl(ctx, "doctor"); strings.Contains(text, "table 100") || strings.Contains(text, vip) {
					t.Errorf("%s: the doctor finds\n%s", n.Hostname, text)
				}
			}
		})
	}
}
