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
func dropV6(more ...string) func(context.Context, *doctorTestbed) error {
	var lines []string
	for _, match := range append([]string{"-m conntrack --ctstate RELATED,ESTABLISHED", "-i lo", "-p icmpv6"}, more...) {
		lines = append(lines, "ip6tables -A INPUT "+match+" -j ACCEPT")
	}
	return shell(append(lines, "ip6tables -P INPUT DROP")...)
}

var acceptV6 = shell("ip6tables -P INPUT ACCEPT", "ip6tables -F INPUT")

// signalCharon stops or continues it.
func signalCharon(signal string) func(context.Context, *doctorTestbed) error {
	return func(ctx context.Context, c *doctorTestbed) error {
		pids, err := charonPIDs(ctx, c.Node)
		if err == nil {
			_, err = c.Run(ctx, "kill -"+signal+" "+strings.Join(pids, " "))
		}
		return err
	}
}

// silentCharon is another program at charon's socket, which answers nothing, until closeSocket.
func silentCharon(_ context.Context, c *doctorTestbed) error {
	return c.Do(func() (err error) {
		c.socket, err = net.Listen("unix", "/run/charon.vici")
		return err
	})
}

// strangerKey is the lease of a peer that answers to ping, and to nothing else.
var strangerKey = subnetKey("10.5.240.0-24")

func strangerJoins(ctx context.Context, c *doctorTestbed) error {
	return c.Etcd.Put(ctx, strangerKey, `{"PublicIP":"198.18.0.254","BackendType":"ipsec"}`)
}

func strangerLeaves(ctx context.Context, c *doctorTestbed) error {
	return c.Etcd.Delete(ctx, strangerKey)
}

// silentPeer has the node replace its device while the peer receives nothing.
var silentPeer = steps(
	func(ctx context.Context, c *doctorTestbed) error {
		_, err := c.peer.Run(ctx, "iptables -I INPUT -p udp --dport 51820 -j DROP")
		return err
	},
	shell("ip link del flannel-wg"))

func peerListens(ctx context.Context, c *doctorTestbed) error {
	_, err := c.peer.Run(ctx, "iptables -D INPUT -p udp --dport 51820 -j DROP")
	return err
}

// tunnels are the faults of each backend that puts packets into others.
var tunnels = []struct {
	name, backend, kind string
	network             string
	findings            []finding
}{
	{"wireguard", `{"Type": "wireguard"%s}`, "", ipv4Network + ", " + ipv6Network, []finding{
		{name: "INPUT drops", finds: "port-blocked", inject: inputDrop("-p udp -m udp --dport 51821"), restore: inputAccept},
		{name: "INPUT drops IPv6", finds: "port-blocked", inject: dropV6("-p udp -m udp --dport 51820"), restore: acceptV6},
		{name: "INPUT drops all but the ports",
			inject: steps(inputDrop("-p udp -m udp --dport 51820"),
				dropV6("-p udp -m udp --dport 51821")), restore: steps(inputAccept, acceptV6)},
		{name: "a program on the port", finds: "daemon-down port-taken", inject: steps(stop, listenUDP("udp", 51821)),
			restore: steps(closeSocket, startAgain)},
		{name: "an MTU that the uplink lacks", finds: "mtu-uplink", inject: configureTunnel(`, "MTU": 1501`),
			restore: configureTunnel("")},
		{name: "a peer that hears nothing", finds: "no-tunnel", inject: silentPeer, restore: peerListens},
	}},
	{"udp", `{"Type": "udp"%s}`, "", ipv4Network, []finding{
		{name: "INPUT drops", finds: "port-blocked", inject: inputDrop("-p udp -m udp --dport 8472"), restore: inputAccept},
		{name: "INPUT drops all but the port", inject: inputDrop("-p udp -m udp --dport 8285"), restore: inputAccept},
		{name: "a program on the port", finds: "daemon-down port-taken", inject: steps(stop, listenUDP("udp", 8285)),
			restore: steps(closeSocket, startAgain)},
	}},
	{"extension", `{"Type": "extension"%s}`, "", ipv4Network, []finding{
		{name: "an MTU that the uplink lacks", finds: "mtu-uplink", inject: configureTunnel(`, "MTU": 1501`),
			restore: configureTunnel("")},
		{name: "INPUT drops", inject: inputDrop(), restore: inputAccept},
	}},
	{"ipip", `{"Type": "ipip"%s}`, "ipip local 198.18.0.1", ipv4Network, []finding{
		{name: "INPUT drops", finds: "port-blocked", inject: inputDrop("-p udp"), restore: inputAccept},
		{name: "INPUT drops all but that", inject: inputDrop("-p 4"), restore: inputAccept},
		{name: "another table drops what comes in", finds: "port-blocked",
			inject: table(nftInput, nftAnswer, "rule inet fw in meta l4proto { icmp, udp } accept"), restore: noTable},
		{name: "another table lets that in", inject: table(nftInput, nftAnswer, nftICMP,
			"rule inet fw in ip protocol 4 accept"), restore: noTable},
	}},
	{"ipsec", `{"Type": "ipsec", "PSK": "` + psk + `"%s}`, "", ipv4Network, []finding{
		{name: "INPUT drops", finds: "port-blocked port-blocked port-blocked",
			inject: inputDrop("-p udp -m udp --dport 501:4499"), restore: inputAccept},
		{name: "INPUT drops ESP", finds: "port-blocked", inject: inputDrop("-p udp -m multiport --dports 500,4500"),
			restore: inputAccept},
		{name: "INPUT drops all but that", inject: inputDrop("-p udp -m multiport --dports 500,4500", "-p esp"),
			restore: inputAccept},
		{name: "ESP inside UDP", inject: steps(configureTunnel(`, "UDPEncap": true`), shell("ip link set cni0 mtu 1415"),
			inputDrop("-p udp -m multiport --dports 500,4500")), restore: steps(inputAccept, configureTunnel(""))},
	}},
}

// charonFindings need charon.
var charonFindings = []finding{
	{name: "charon frozen", finds: "charon-down", inject: signalCharon("STOP"), restore: signalCharon("CONT")},
	{name: "a peer without tunnel", finds: "no-tunnel", inject: strangerJoins, restore: strangerLeaves},
}

// configureTunnel sets the backend's keys.
func configureTunnel(more string) func(context.Context, *doctorTestbed) error {
	return func(ctx context.Context, c *doctorTestbed) error {
		return c.Etcd.Configure(ctx, fmt.Sprintf(c.config, more))
	}
}

// TestDoctorTunnels is TestDoctor with backends that put packets into others.
func TestDoctorTunnels(t *testing.T) {
	t.Parallel()
	_, noCharon := os.Stat(charon)
	for _, b := range tunnels {
		if !labtest.Selected(b.name == "wireguard") {
			continue
		}
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			labtest.NeedDevice(t, b.kind)
			ctx := labtest.Context(t, 3*time.Minute)
			config := `{` + b.network + `, "Backend": ` + b.backend + `}`
			l := labtest.New(ctx, t, fmt.Sprintf(config, ""), lab.NodeOptions{}, lab.NodeOptions{})
			c := &doctorTestbed{Lab: l, Node: l.Nodes()[0], peer: l.Nodes()[1], config: config}
			for _, n := range l.Nodes() {
				charonRun(ctx, t, n)
				labtest.Must(n.Run(ctx, "sysctl -qw net.ipv6.conf.default.accept_dad=0"))(t)
			}
			labtest.Start(ctx, t, l, "--ip-masq", "--probe-peers=false")
			addPods(ctx, t, l)
			findings, always := b.findings, ""
			switch {
			case b.name != "ipsec":
			case noCharon != nil:
				always = "charon-down"
				findings = append(findings, finding{name: "another program at charon's socket", inject: silentCharon,
					restore: closeSocket})
			default:
				findings = slices.Concat(findings, charonFindings)
			}
			labtest.Do(t, c.expect(ctx, finding{}, always))
			for _, m := range findings {
				t.Run(m.name, func(t *testing.T) {
					err := m.inject(ctx, c)
					if err == nil {
						finds := strings.Fields(m.finds + " " + always)
						slices.Sort(finds)
						err = c.expect(ctx, m, strings.Join(finds, " "))
					}
					if err != nil {
						t.Error(err)
					}
					labtest.Do(t, m.restore(ctx, c))
					labtest.Do(t, c.expect(ctx, finding{}, always))
				})
			}
		})
	}
}
