package e2e

import (
	"context"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// dropV6 is inputDrop for IPv6.
func dropV6(more ...string) func(context.Context, *clinic) error {
	var lines []string
	for _, match := range append([]string{"-m conntrack --ctstate RELATED,ESTABLISHED", "-i lo", "-p icmpv6"}, more...) {
		lines = append(lines, "ip6tables -A INPUT "+match+" -j ACCEPT")
	}
	return shell(append(lines, "ip6tables -P INPUT DROP")...)
}

var acceptV6 = shell("ip6tables -P INPUT ACCEPT", "ip6tables -F INPUT")

// occupy has a program of another name listen on a UDP port of the node.
func occupy(port int) func(context.Context, *clinic) error {
	return func(_ context.Context, c *clinic) error {
		return c.Do(func() (err error) {
			taken, err = net.ListenPacket("udp", fmt.Sprintf(":%d", port))
			return err
		})
	}
}

// signalCharon stops or continues it.
func signalCharon(signal string) func(context.Context, *clinic) error {
	return func(ctx context.Context, c *clinic) error {
		pids, err := charonPIDs(ctx, c.Node)
		if err == nil {
			_, err = c.Run(ctx, "kill -"+signal+" "+strings.Join(pids, " "))
		}
		return err
	}
}

var silent net.Listener

// silentCharon is somebody at charon's socket who says nothing.
func silentCharon(_ context.Context, c *clinic) error {
	return c.Do(func() (err error) {
		silent, err = net.Listen("unix", "/run/charon.vici")
		return err
	})
}

// closeCharon ends that, where the socket is.
func closeCharon(_ context.Context, c *clinic) error { return c.Do(silent.Close) }

// strangerKey is the lease of one who answers to ping, and to nothing else.
var strangerKey = subnetKey("10.5.240.0-24")

func strangerJoins(ctx context.Context, c *clinic) error {
	return c.Etcd.Put(ctx, strangerKey, `{"PublicIP":"198.18.0.254","BackendType":"ipsec"}`)
}

func strangerLeaves(ctx context.Context, c *clinic) error { return c.Etcd.Delete(ctx, strangerKey) }

// silentPeer has the node make its device anew while the peer hears nothing.
var silentPeer = steps(
	func(ctx context.Context, c *clinic) error {
		_, err := c.peer.Run(ctx, "iptables -I INPUT -p udp --dport 51820 -j DROP")
		return err
	},
	shell("ip link del flannel-wg"))

func peerListens(ctx context.Context, c *clinic) error {
	_, err := c.peer.Run(ctx, "iptables -D INPUT -p udp --dport 51820 -j DROP")
	return err
}

// tunnels are what may befall those of each backend.
var tunnels = []struct {
	name, backend, kind string
	network             string
	maladies            []malady
}{
	{"wireguard", `{"Type": "wireguard"%s}`, "", ipv4Network + ", " + ipv6Network, []malady{
		{name: "INPUT drops", finds: "port-blocked", harm: inputDrop("-p udp -m udp --dport 51821"), heal: inputAccept},
		{name: "INPUT drops IPv6", finds: "port-blocked", harm: dropV6("-p udp -m udp --dport 51820"), heal: acceptV6},
		{name: "INPUT drops all but the ports", harm: steps(inputDrop("-p udp -m udp --dport 51820"), dropV6("-p udp -m udp --dport 51821")), heal: steps(inputAccept, acceptV6)},
		{name: "a program on the port", finds: "daemon-down port-taken", harm: steps(stop, occupy(51821)), heal: steps(closeUDP, startAgain)},
		{name: "an MTU that the uplink lacks", finds: "mtu-uplink", harm: configureTunnel(`, "MTU": 1501`), heal: configureTunnel("")},
		{name: "a peer that hears nothing", finds: "no-tunnel", harm: silentPeer, heal: peerListens},
	}},
	{"udp", `{"Type": "udp"%s}`, "", ipv4Network, []malady{
		{name: "INPUT drops", finds: "port-blocked", harm: inputDrop("-p udp -m udp --dport 8472"), heal: inputAccept},
		{name: "INPUT drops all but the port", harm: inputDrop("-p udp -m udp --dport 8285"), heal: inputAccept},
		{name: "a program on the port", finds: "daemon-down port-taken", harm: steps(stop, occupy(8285)), heal: steps(closeUDP, startAgain)},
	}},
	{"extension", `{"Type": "extension"%s}`, "", ipv4Network, []malady{
		{name: "an MTU that the uplink lacks", finds: "mtu-uplink", harm: configureTunnel(`, "MTU": 1501`), heal: configureTunnel("")},
		{name: "INPUT drops", harm: inputDrop(), heal: inputAccept},
	}},
	{"ipip", `{"Type": "ipip"%s}`, "ipip local 198.18.0.1", ipv4Network, []malady{
		{name: "INPUT drops", finds: "port-blocked", harm: inputDrop("-p udp"), heal: inputAccept},
		{name: "INPUT drops all but that", harm: inputDrop("-p 4"), heal: inputAccept},
		{name: "another table drops what comes in", finds: "port-blocked", harm: table(nftInput, nftAnswer, "rule inet fw in meta l4proto { icmp, udp } accept"), heal: noTable},
		{name: "another table lets that in", harm: table(nftInput, nftAnswer, nftICMP, "rule inet fw in ip protocol 4 accept"), heal: noTable},
	}},
	{"ipsec", `{"Type": "ipsec", "PSK": "` + strings.Repeat("0123456789abcdef", 6) + `"%s}`, "", ipv4Network, []malady{
		{name: "INPUT drops", finds: "port-blocked port-blocked port-blocked", harm: inputDrop("-p udp -m udp --dport 501:4499"), heal: inputAccept},
		{name: "INPUT drops ESP", finds: "port-blocked", harm: inputDrop("-p udp -m multiport --dports 500,4500"), heal: inputAccept},
		{name: "INPUT drops all but that", harm: inputDrop("-p udp -m multiport --dports 500,4500", "-p esp"), heal: inputAccept},
		{name: "ESP inside UDP", harm: steps(configureTunnel(`, "UDPEncap": true`), shell("ip link set cni0 mtu 1415"), inputDrop("-p udp -m multiport --dports 500,4500")), heal: steps(inputAccept, configureTunnel(""))},
	}},
}

// charonMaladies need one.
var charonMaladies = []malady{
	{name: "charon frozen", finds: "charon-down", harm: signalCharon("STOP"), heal: signalCharon("CONT")},
	{name: "a peer without tunnel", finds: "no-tunnel", harm: strangerJoins, heal: strangerLeaves},
}

// configureTunnel sets the backend's keys.
func configureTunnel(more string) func(context.Context, *clinic) error {
	return func(ctx context.Context, c *clinic) error { return c.Etcd.Configure(ctx, fmt.Sprintf(c.config, more)) }
}

// TestDoctorTunnels: the same with backends that put packets into others.
func TestDoctorTunnels(t *testing.T) {
	_, noCharon := os.Stat("/usr/lib/ipsec/charon")
	for _, b := range tunnels {
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			labtest.NeedDevice(t, b.kind)
			ctx := labtest.Context(t, 3*time.Minute)
			config := `{` + b.network + `, "Backend": ` + b.backend + `}`
			l := labtest.New(ctx, t, fmt.Sprintf(config, ""), lab.NodeOptions{}, lab.NodeOptions{})
			c := &clinic{Lab: l, Node: l.Nodes()[0], peer: l.Nodes()[1], config: config}
			for _, n := range l.Nodes() {
				charonRun(ctx, t, n)
				labtest.Must(n.Run(ctx, "sysctl -qw net.ipv6.conf.default.accept_dad=0"))(t)
			}
			labtest.Start(ctx, t, l, "--ip-masq")
			addPods(ctx, t, l)
			maladies, always := b.maladies, ""
			switch {
			case b.name != "ipsec":
			case noCharon != nil:
				always = "charon-down"
				maladies = append(maladies, malady{name: "somebody else at charon's socket", harm: silentCharon, heal: closeCharon})
			default:
				maladies = slices.Concat(maladies, charonMaladies)
			}
			labtest.Do(t, c.expect(ctx, malady{}, always))
			for _, m := range maladies {
				t.Run(m.name, func(t *testing.T) {
					err := m.harm(ctx, c)
					if err == nil {
						finds := strings.Fields(m.finds + " " + always)
						slices.Sort(finds)
						err = c.expect(ctx, m, strings.Join(finds, " "))
					}
					if err != nil {
						t.Error(err)
					}
					labtest.Do(t, m.heal(ctx, c))
					labtest.Do(t, c.expect(ctx, malady{}, always))
				})
			}
		})
	}
}
