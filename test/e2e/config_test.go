package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// TestReconfigure: what is written into etcd takes effect on all nodes by
// itself, traffic flows afterwards, and what need not change is not touched.
func TestReconfigure(t *testing.T) {
	t.Parallel()
	const vxlan, hostgw, wireguard = `{"Type": "vxlan"}`, `{"Type": "host-gw"}`, `{"Type": "wireguard"}`
	for _, c := range []struct {
		name        string
		from, to    string // Backend
		nftables    bool   // afterwards
		want, never []trace
		lossless    bool // pods' packets are not lost either
		keeps       bool // the device that is there
		mtu         int  // afterwards
		long        bool // left to make test-long
	}{
		{name: "VNI", from: vxlan, to: `{"Type": "vxlan", "VNI": 7}`, mtu: 1450,
			want: []trace{{"ip -d link show flannel.7", "vxlan id 7 "}}, never: []trace{{"ip link show type vxlan",
				"flannel.1:"}}},
		{name: "VNI 0", from: vxlan, to: `{"Type": "vxlan", "VNI": 0}`, mtu: 1450, long: true,
			want: []trace{{"ip -d link show flannel.0", "vxlan id 0 "}}, never: []trace{{"ip link show type vxlan",
				"flannel.1:"}}},
		{name: "Port", from: vxlan, to: `{"Type": "vxlan", "Port": 4789}`, mtu: 1450, long: true,
			want: []trace{{"ip -d link show flannel.1", "dstport 4789 "}}},
		{name: "MTU", from: vxlan, to: `{"Type": "vxlan", "MTU": 1400}`, mtu: 1350, long: true, keeps: true, lossless: true,
			want: []trace{{"ip link show flannel.1", "mtu 1350 "}}},
		{name: "DirectRouting", from: vxlan, to: `{"Type": "vxlan", "DirectRouting": true}`, mtu: 1450,
			keeps: true, lossless: true,
			want: []trace{{"ip route show proto 70", "dev eth0"}}, never: []trace{{"ip route show proto 70", "dev flannel.1"},
				{"bridge fdb show dev flannel.1", "dst 198.18"}}},
		{name: "no DirectRouting", from: `{"Type": "vxlan", "DirectRouting": true}`, to: vxlan, mtu: 1450, long: true,
			keeps: true, lossless: true,
			want: []trace{{"ip route show proto 70", "dev flannel.1"}}, never: []trace{{"ip route show proto 70", "dev eth0"}}},
		{name: "vxlan to host-gw", from: vxlan, to: hostgw, mtu: 1500,
			want: []trace{{"ip route show proto 70", "dev eth0"}}, never: []trace{{"ip link show", "flannel.1"}}},
		{name: "host-gw to vxlan", from: hostgw, to: vxlan, mtu: 1450, long: true,
			want: []trace{{"ip route show proto 70", "dev flannel.1"}}, never: []trace{{"ip route show proto 70", "dev eth0"}}},
		{name: "vxlan to wireguard", from: vxlan, to: wireguard, mtu: 1420,
			want: []trace{{"ip route show proto 70", "dev flannel-wg"}}, never: []trace{{"ip link show", "flannel.1"}}},
		{name: "wireguard to vxlan", from: wireguard, to: vxlan, mtu: 1450, long: true,
			want: []trace{{"ip route show proto 70", "dev flannel.1"}}, never: []trace{{"ip link show", "flannel-wg"}}},
		{name: "ListenPort and keepalive", from: wireguard,
			to: `{"Type": "wireguard", "ListenPort": 5182, "PersistentKeepaliveInterval": 7}`, mtu: 1420,
			want: []trace{{"wg show flannel-wg listen-port", "5182"}, {"wg show flannel-wg endpoints", ":5182"},
				{"wg show flannel-wg persistent-keepalive", "\t7"}}},
		{name: "EnableNFTables", from: vxlan, to: vxlan, nftables: true, mtu: 1450, keeps: true, lossless: true,
			want: []trace{{"nft list tables", "flannel-ipv4"}}, never: []trace{{"iptables-save", "FLANNEL"}}},
	} {
		if !labtest.Selected(!c.long) {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t, time.Minute)
			l := labtest.New(ctx, t, configuration(ipv4Network, c.from, false), oneLink...)
			labtest.Start(ctx, t, l, "--ip-masq")
			pods := addPods(ctx, t, l)
			lossless := startPings(ctx, t, pods)
			before := map[*lab.Node]string{}
			leases := labtest.Must(l.Etcd.Leases(ctx))(t)
			for _, n := range l.Nodes() {
				before[n], _ = n.Run(ctx, "cat /sys/class/net/flannel.1/ifindex")
			}

			labtest.Do(t, l.Etcd.Configure(ctx, configuration(ipv4Network, c.to, c.nftables)))
			for _, n := range l.Nodes() {
				waitTraces(ctx, t, n, c.want, true)
				waitTraces(ctx, t, n, c.never, false)
				labtest.Do(t, lab.Poll(ctx, n.Hostname+"'s subnet file", func() error {
					env, err := n.SubnetEnv()
					if err == nil && env.MTU != c.mtu {
						err = fmt.Errorf("MTU %d, want %d", env.MTU, c.mtu)
					}
					return err
				}))
				after, _ := n.Run(ctx, "cat /sys/class/net/flannel.1/ifindex")
				if c.keeps && (after != before[n] || after == "") {
					t.Errorf("%s: the device had number %q, has %q: it was made again", n.Hostname, before[n], after)
				}
			}
			checkTalk(ctx, t, l, pods)
			if c.lossless {
				lossless()
			}
			for key := range labtest.Must(l.Etcd.Leases(ctx))(t) {
				if _, ok := leases[key]; !ok {
					t.Errorf("%s is a new lease", key)
				}
			}
			for _, n := range l.Nodes() {
				if n.Exited() {
					t.Errorf("%s has exited", n.Hostname)
				}
			}
		})
	}
}

func configuration(network, backend string, nftables bool) string {
	return fmt.Sprintf(`{%s, "EnableNFTables": %v, "Backend": %s}`, network, nftables, backend)
}

// checkTalk waits until all pods reach each other, as themselves, and the
// outside as their nodes.
func checkTalk(ctx context.Context, t *testing.T, l *lab.Lab, pods []*lab.Pod) {
	t.Helper()
	labtest.Do(t, l.Outside.Mirror())
	for _, to := range pods {
		labtest.Do(t, to.Mirror())
	}
	for i, from := range pods {
		for j, to := range pods {
			if i != j {
				labtest.Do(t, lab.Poll(ctx, "pods to talk", func() error {
					return seenAs(ctx, from.Namespace, to.IPv4,
						from.IPv4)
				}))
			}
		}
		labtest.Do(t, lab.Poll(ctx, "pods to be masqueraded", func() error {
			return seenAs(ctx, from.Namespace, lab.Outside, l.Nodes()[i].IPv4)
		}))
	}
}

// seenAs calls the mirror at dst, which must see the caller as want.
func seenAs(ctx context.Context, from *lab.Namespace, dst, want netip.Addr) error {
	got, err := from.SeenAs(ctx, "udp", dst)
	if err == nil && got != want {
		err = fmt.Errorf("%s: %s sees %s, want %s", from.Name, dst, got, want)
	}
	return err
}

// TestReconfigureNetwork: with another network, nodes take other subnets, and
// pods that are started then talk.
func TestReconfigureNetwork(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, time.Minute)
	const backend = `{"Type": "vxlan"}`
	l := labtest.New(ctx, t, configuration(ipv4Network, backend, false), make([]lab.NodeOptions, 3)...)
	labtest.Start(ctx, t, l, "--ip-masq")
	addPods(ctx, t, l)

	network := netip.MustParsePrefix("10.9.0.0/16")
	labtest.Do(t, l.Etcd.Configure(ctx, configuration(`"Network": "10.9.0.0/16"`, backend, false)))
	var pods []*lab.Pod
	for _, n := range l.Nodes() {
		labtest.Do(t, lab.Poll(ctx, n.Hostname+"'s subnet file", func() error {
			env, err := n.SubnetEnv()
			if err == nil && (env.Networks.String() != network.String() || !network.Contains(env.Subnets.IPv4.Addr())) {
				err = fmt.Errorf("it has %s of %s", env.Subnets, env.Networks)
			}
			return err
		}))
		waitTraces(ctx, t, n, []trace{{"ip route show proto 70", "10.9."}, {"iptables-save", "10.9.0.0/16"}}, true)
		waitTraces(ctx, t, n, []trace{{"ip route show proto 70", "10.5."}, {"iptables-save", "10.5.0.0/16"},
			{"ip addr show dev flannel.1", "inet 10.5."}}, false)
		// The bridge keeps its address until another program removes it.
		labtest.Do(t, n.Script(ctx, "link del cni0"))
		pods = append(pods, labtest.Must(n.AddPod(ctx, "new"))(t))
	}
	checkTalk(ctx, t, l, pods)
}

// TestReconfigureRefused: a configuration that cannot work is refused, and the
// log says why; the one before stays in force, to the last route.
func TestReconfigureRefused(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, time.Minute)
	l := labtest.New(ctx, t, configuration(ipv4Network, `{"Type": "vxlan"}`, false), make([]lab.NodeOptions, 2)...)
	labtest.Start(ctx, t, l, "--ip-masq")
	pods := addPods(ctx, t, l)
	lossless := startPings(ctx, t, pods)
	before := map[*lab.Node]string{}
	for _, n := range l.Nodes() {
		before[n] = labtest.Must(n.Holds(ctx))(t)
	}
	for text, why := range map[string]string{
		`{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}`:               `JSON`,
		`{"Network": "10.5.0.0/33", "Backend": {"Type": "vxlan"}}`:              `10\.5\.0\.0/33`,
		`{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlam"}}`:              `vxlam`,
		`{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "VNI": -1}}`:   `VNI -1`,
		`{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "Port": "x"}}`: `Port`,
	} {
		var said []int
		for _, n := range l.Nodes() {
			said = append(said, len(n.Log()))
		}
		labtest.Do(t, l.Etcd.Configure(ctx, text))
		refused := regexp.MustCompile(`(?m)^E.*(refused.*stays in force.*(` + why + `))`)
		for i, n := range l.Nodes() {
			labtest.Do(t, lab.Poll(ctx, n.Hostname+" to refuse "+text, func() error {
				if !refused.MatchString(n.Log()[said[i]:]) {
					return errors.New(strings.TrimSpace(n.Log()[said[i]:]))
				}
				return nil
			}))
		}
	}
	for _, n := range l.Nodes() {
		if after := labtest.Must(n.Holds(ctx))(t); after != before[n] {
			t.Errorf("%s: %s", n.Hostname, difference(before[n], after))
		}
		if err := n.Ready(ctx); err != nil {
			t.Errorf("%s: %v", n.Hostname, err)
		}
	}
	// One that differs in nothing that counts changes nothing either.
	labtest.Do(t, l.Etcd.Configure(ctx, `{"Backend": {"Type": "vxlan"}, "Network": "10.5.0.0/16"}`))
	lossless()
	for _, n := range l.Nodes() {
		if after := labtest.Must(n.Holds(ctx))(t); after != before[n] {
			t.Errorf("%s: %s", n.Hostname, difference(before[n], after))
		}
	}
}
