package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flanneld/flanneld/network"
	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// A finding is a fault that flannelctl doctor must find, by these checks and by no others.
type finding struct {
	name            string
	finds           string // names of checks, sorted
	inject, restore func(context.Context, *doctorTestbed) error
	by              []string // the program that runs the doctor; nil: none
	args            []string // of the doctor
}

// A doctorTestbed is two nodes on a link, with a pod each. Faults happen to the first node.
type doctorTestbed struct {
	*lab.Lab
	*lab.Node
	peer *lab.Node
	key  string // of the node's lease

	config string    // with a %s for more keys of the Backend
	socket io.Closer // of another program
}

const doctorNetwork = `{` + ipv4Network + `, ` + ipv6Network + `, "Backend": {"Type": "vxlan"%s}}`

func shell(lines ...string) func(context.Context, *doctorTestbed) error {
	return func(ctx context.Context, c *doctorTestbed) error {
		for _, line := range lines {
			if _, err := c.Run(ctx, line); err != nil {
				return err
			}
		}
		return nil
	}
}

// steps runs all functions in turn, until one fails.
func steps(all ...func(context.Context, *doctorTestbed) error) func(context.Context, *doctorTestbed) error {
	return func(ctx context.Context, c *doctorTestbed) error {
		for _, step := range all {
			if err := step(ctx, c); err != nil {
				return err
			}
		}
		return nil
	}
}

func stop(ctx context.Context, c *doctorTestbed) error { return c.Stop(ctx) }

func startAgain(ctx context.Context, c *doctorTestbed) error {
	if err := c.Restart(ctx); err != nil {
		return err
	}
	return c.WaitReady(ctx)
}

func configure(more string) func(context.Context, *doctorTestbed) error {
	return func(ctx context.Context, c *doctorTestbed) error {
		return c.Etcd.Configure(ctx, fmt.Sprintf(doctorNetwork, more))
	}
}

// letThrough are the rules of a host that accepts nothing but answers and what the link itself needs.
var letThrough = []string{"-m conntrack --ctstate RELATED,ESTABLISHED", "-i lo", "-p icmp"}

func inputDrop(more ...string) func(context.Context, *doctorTestbed) error {
	var lines []string
	for _, match := range append(letThrough, more...) {
		lines = append(lines, "iptables -A INPUT "+match+" -j ACCEPT")
	}
	return shell(append(lines, "iptables -P INPUT DROP")...)
}

var (
	inputAccept = shell("iptables -P INPUT ACCEPT", "iptables -F INPUT")
	noTable     = shell("nft delete table inet fw")
)

func table(lines ...string) func(context.Context, *doctorTestbed) error {
	commands := []string{"nft add table inet fw"}
	for _, line := range lines {
		commands = append(commands, "nft add "+line)
	}
	return shell(commands...)
}

const (
	nftInput  = "chain inet fw in { type filter hook input priority 0 ; policy drop ; }"
	nftAnswer = "rule inet fw in ct state established,related accept"
	nftICMP   = "rule inet fw in meta l4proto { icmp, ipv6-icmp } accept"
)

var findings = []finding{
	{name: "daemon stopped", finds: "daemon-down", inject: stop, restore: startAgain},
	{name: "daemon frozen", finds: "daemon-down",
		inject:  func(ctx context.Context, c *doctorTestbed) error { return c.Freeze(ctx) },
		restore: func(_ context.Context, c *doctorTestbed) error { return c.Thaw() }},
	{name: "etcd away", finds: "store-unreachable",
		inject:  func(_ context.Context, c *doctorTestbed) error { c.Etcd.Kill(); return nil },
		restore: func(ctx context.Context, c *doctorTestbed) error { return c.Etcd.Start(ctx) }},
	{name: "etcd away as the daemon starts", finds: "daemon-waiting store-unreachable",
		inject: func(ctx context.Context, c *doctorTestbed) error { c.Etcd.Kill(); return c.Restart(ctx) },
		restore: func(ctx context.Context, c *doctorTestbed) error {
			return errors.Join(c.Etcd.Start(ctx), c.WaitReady(ctx))
		}},
	{name: "no lease", finds: "daemon-down lease-missing",
		inject: steps(stop, func(ctx context.Context, c *doctorTestbed) error {
			return c.Etcd.Delete(ctx,
				c.key)
		}), restore: startAgain},
	{name: "lease not renewed", finds: "lease-expired store-unreachable", inject: shortLease,
		restore: steps(func(ctx context.Context, c *doctorTestbed) error { return c.Etcd.Start(ctx) }, stop,
			func(ctx context.Context, c *doctorTestbed) error { return c.Etcd.Delete(ctx, c.key) }, startAgain)},
	{name: "a lease of another backend", finds: "peer-left-out",
		inject: func(ctx context.Context, c *doctorTestbed) error {
			return c.Etcd.Put(ctx, subnetKey("10.5.240.0-24"), `{"PublicIP":"198.18.0.254","BackendType":"host-gw"}`)
		},
		restore: func(ctx context.Context, c *doctorTestbed) error {
			return c.Etcd.Delete(ctx, subnetKey("10.5.240.0-24"))
		}},
	{name: "a route gone", finds: "daemon-down out-of-sync", inject: steps(stop, shell("ip route flush proto 70")),
		restore: startAgain},
	{name: "rules gone", finds: "daemon-down out-of-sync", inject: steps(stop, shell("iptables -t nat -F")),
		restore: startAgain},
	{name: "no subnet.env", finds: "daemon-down subnet-file",
		inject: steps(stop, func(_ context.Context, c *doctorTestbed) error { return os.Remove(c.SubnetFile()) }), restore: startAgain},
	{name: "a bridge with an earlier subnet", finds: "bridge-subnet",
		inject:  shell("ip link add docker0 type bridge", "ip addr add 10.5.239.1/24 dev docker0"),
		restore: shell("ip link del docker0")},
	{name: "a prefix of the network on the uplink", finds: "network-overlap",
		inject: shell("ip addr add 10.5.238.1/24 dev eth0"), restore: shell("ip addr del 10.5.238.1/24 dev eth0")},
	{name: "no forwarding", finds: "ip-forward", inject: shell("sysctl -qw net.ipv4.ip_forward=0"),
		restore: shell("sysctl -qw net.ipv4.ip_forward=1")},
	{name: "no IPv6 forwarding", finds: "ip-forward",
		inject: shell("sysctl -qw net.ipv6.conf.all.forwarding=0"), restore: shell("sysctl -qw net.ipv6.conf.all.forwarding=1")},
	{name: "bridges past iptables", finds: "br-netfilter",
		inject: shell("sysctl -qw net.bridge.bridge-nf-call-iptables=0"), restore: shell("sysctl -qw net.bridge.bridge-nf-call-iptables=1")},
	{name: "strict rp_filter on the device", finds: "rp-filter",
		inject: shell("sysctl -qw net/ipv4/conf/flannel.1/rp_filter=1"), restore: shell("sysctl -qw net/ipv4/conf/flannel.1/rp_filter=0")},
	{name: "strict rp_filter everywhere", finds: "rp-filter rp-filter",
		inject: shell("sysctl -qw net.ipv4.conf.all.rp_filter=1"), restore: shell("sysctl -qw net.ipv4.conf.all.rp_filter=0")},
	{name: "FORWARD drops", finds: "daemon-down forward-drop out-of-sync",
		inject: steps(stop, shell("iptables -P FORWARD DROP",
			"iptables -F FORWARD")), restore: steps(shell("iptables -P FORWARD ACCEPT"), startAgain)},
	// A rule of somebody else stands behind the rule that drops: else flanneld would put its own before it.
	{name: "FORWARD drops before our rules", finds: "forward-drop",
		inject:  shell("iptables -I FORWARD -o lo -j ACCEPT", "iptables -I FORWARD -j DROP"),
		restore: shell("iptables -D FORWARD -j DROP", "iptables -D FORWARD -o lo -j ACCEPT")},
	{name: "another table drops what is forwarded", finds: "forward-drop forward-drop",
		inject: table("chain inet fw f { type filter hook forward priority 0 ; policy drop ; }",
			"rule inet fw f ct state established,related accept"), restore: noTable},
	{name: "INPUT drops", finds: "port-blocked",
		inject: inputDrop("-p udp -m udp --dport 8000:8471", "-p tcp -m tcp --dport 8472"), restore: inputAccept},
	{name: "another table drops what comes in", finds: "port-blocked port-blocked",
		inject: table(nftInput, nftAnswer, nftICMP, "rule inet fw in udp dport { 53, 8473 } accept",
			"rule inet fw in iifname lo accept"), restore: noTable},
	{name: "another device on the port", finds: "port-taken",
		inject: shell("ip link add vx0 type vxlan external dstport 8472"), restore: shell("ip link del vx0")},
	{name: "a program on the port", finds: "daemon-down out-of-sync port-taken",
		inject: steps(stop, shell("ip link del flannel.1"), listenUDP("udp4", 8472)), restore: steps(closeSocket,
			startAgain)},
	{name: "an MTU that the uplink lacks", finds: "daemon-error mtu-uplink out-of-sync subnet-file",
		inject: configure(`, "MTU": 9000`), restore: configure("")},
	{name: "a bridge with a larger MTU", finds: "mtu-bridge", inject: shell("ip link set cni0 mtu 1500"),
		restore: shell("ip link set cni0 mtu 1430")},
	{name: "an old kernel", finds: "checksum-offload checksum-offload", by: []string{"setarch", "--uname-2.6"},
		inject: shell(), restore: shell()},
	{name: "a clock that is wrong", finds: "clock-skew", inject: serveTime, restore: shell(),
		args: []string{"--direct", "--etcd-endpoints=http://127.0.0.1:9999," + lab.Endpoint}},
	{name: "a peer's host cut off", finds: "peer-unreachable peer-unreachable",
		// Without the flush the kernel takes the peer for reachable up to a minute longer.
		inject: steps(func(ctx context.Context, c *doctorTestbed) error { return c.peer.PullCable(ctx) },
			shell("ip neigh flush dev eth0")),
		restore: func(ctx context.Context, c *doctorTestbed) error { return c.peer.PlugCable(ctx) }},
}

// harmless are settings in which the doctor must find nothing.
var harmless = []finding{
	{name: "INPUT drops all but the port", inject: inputDrop("-p udp -m multiport --dports 53,8472"),
		restore: inputAccept},
	{name: "INPUT drops all but peers", inject: inputDrop("-s 198.18.0.0/24 -p udp"), restore: inputAccept},
	{name: "another table lets the port in", restore: noTable,
		inject: table(nftInput, nftAnswer, nftICMP, "rule inet fw in udp dport { 53, 8000-9000 } accept")},
	{name: "IPv6 off on the device", inject: shell("sysctl -qw net/ipv6/conf/flannel-v6.1/disable_ipv6=1"),
		restore: shell()},
	{name: "FORWARD drops all but ours", inject: shell("iptables -P FORWARD DROP"),
		restore: shell("iptables -P FORWARD ACCEPT")},
	{name: "loose rp_filter", inject: shell("sysctl -qw net.ipv4.conf.all.rp_filter=2"),
		restore: shell("sysctl -qw net.ipv4.conf.all.rp_filter=0")},
	{name: "VXLAN of others", inject: shell("ip link add vx0 type vxlan id 9 dstport 4789 dev eth0"),
		restore: shell("ip link del vx0")},
	{name: "larger frames", inject: shell("ip link set eth0 mtu 9000"), restore: shell("ip link set eth0 mtu 1500")},
}

// shortLease has the node's lease expire in some seconds while etcd is down.
func shortLease(ctx context.Context, c *doctorTestbed) error {
	if err := c.Stop(ctx); err != nil {
		return err
	}
	text, err := c.Etcd.Get(ctx, c.key)
	if err != nil {
		return err
	}
	grant, err := c.Etcd.Client.Grant(ctx, 5)
	if err != nil {
		return err
	}
	if _, err := c.Etcd.Client.Put(ctx, c.key, text, clientv3.WithLease(grant.ID)); err != nil {
		return err
	}
	if err := startAgain(ctx, c); err != nil {
		return err
	}
	c.Etcd.Kill()
	return nil
}

// listenUDP has another program listen on a UDP port of the node, until closeSocket.
func listenUDP(network string, port int) func(context.Context, *doctorTestbed) error {
	return func(_ context.Context, c *doctorTestbed) error {
		return c.Do(func() (err error) {
			c.socket, err = net.ListenPacket(network, fmt.Sprintf(":%d", port))
			return err
		})
	}
}

func closeSocket(_ context.Context, c *doctorTestbed) error { return c.Do(c.socket.Close) }

// serveTime starts an HTTP server on the node whose clock is an hour slow.
func serveTime(_ context.Context, c *doctorTestbed) error {
	var l net.Listener
	err := c.Do(func() (err error) {
		l, err = net.Listen("tcp", "127.0.0.1:9999")
		return err
	})
	if err != nil {
		return err
	}
	go http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Date", time.Now().Add(-time.Hour).UTC().Format(http.TimeFormat))
	}))
	return nil
}

// expect runs the doctor until it finds what it should, and nothing else.
func (c *doctorTestbed) expect(ctx context.Context, m finding, finds string) error {
	return lab.Poll(ctx, "the doctor to find "+finds, func() error {
		out, _, err := c.CtlBy(ctx, m.by, append([]string{"doctor", "-o", "json"}, m.args...)...)
		if err != nil {
			return err
		}
		var found []struct {
			Check, Text string
			Fix         []string
		}
		if err := json.Unmarshal([]byte(out), &found); err != nil {
			return err
		}
		var names []string
		for _, f := range found {
			if len(f.Fix) == 0 || f.Text == "" {
				return fmt.Errorf("there is no remedy for %+v", f)
			}
			names = append(names, f.Check)
		}
		slices.Sort(names)
		if got := strings.Join(names, " "); got != finds {
			neighbours, _ := c.Run(ctx, "ip neigh show dev eth0")
			return fmt.Errorf("it finds %q: %s%s", got, out, neighbours)
		}
		return nil
	})
}

// TestDoctor: each fault is found, by its own checks alone. On a healthy node nothing is found.
func TestDoctor(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 8*time.Minute)
	l := labtest.New(ctx, t, fmt.Sprintf(doctorNetwork, ""), lab.NodeOptions{}, lab.NodeOptions{})
	c := &doctorTestbed{Lab: l, Node: l.Nodes()[0], peer: l.Nodes()[1]}
	for _, n := range l.Nodes() {
		labtest.Must(n.Run(ctx, "sysctl -qw net.ipv6.conf.default.accept_dad=0"))(t)
	}
	// What the probes of peers find depends on when they asked last: see TestReachability.
	labtest.Start(ctx, t, l, "--ip-masq", "--probe-peers=false")
	addPods(ctx, t, l)
	for key, lease := range labtest.Must(l.Etcd.Leases(ctx))(t) {
		if lease.Attrs.PublicIP == c.IPv4 {
			c.key = key
		}
	}
	out, status, err := c.Ctl(ctx, "doctor")
	if err != nil || status != 0 || !strings.HasPrefix(out, "No problems found: ") || strings.Count(out, "\n") != 1 {
		t.Fatalf("of a healthy node: %v, status %d\n%s", err, status, out)
	}
	list := strings.Fields(firsts(labtest.Must(first(c.Ctl(ctx, "doctor", "--list")))(t)))
	all := slices.Concat(findings, charonFindings)
	for _, b := range tunnels {
		all = append(all, b.findings...)
	}
	list = slices.DeleteFunc(list, func(name string) bool { return name == "peer-blocked" })
	for _, m := range all {
		list = slices.DeleteFunc(list, func(name string) bool { return slices.Contains(strings.Fields(m.finds), name) })
	}
	for _, m := range slices.Concat(findings, harmless) {
		t.Run(m.name, func(t *testing.T) {
			err := m.inject(ctx, c)
			if err == nil {
				err = c.expect(ctx, m, m.finds)
			}
			if err != nil {
				t.Error(err)
			}
			labtest.Do(t, m.restore(ctx, c))
			labtest.Do(t, c.expect(ctx, finding{}, ""))
		})
	}
	if len(list) > 0 {
		t.Errorf("there is no test of %v", list)
	}
}

func first(out string, _ int, err error) (string, error) { return out, err }

// firsts returns the first word of each line.
func firsts(text string) string {
	var words []string
	for line := range strings.Lines(text) {
		if w := strings.Fields(line); len(w) > 0 {
			words = append(words, w[0])
		}
	}
	return strings.Join(words, " ")
}

// TestDiffCommand: diff prints what is missing and nothing else, whether the daemon answers or not. The commands that
// diff prints repair the node.
func TestDiffCommand(t *testing.T) {
	t.Parallel()
	for _, rules := range []string{"iptables", "nftables"} {
		t.Run(rules, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t, 2*time.Minute)
			l := labtest.New(ctx, t, fmt.Sprintf(`{%s, %s, "EnableNFTables": %v, "Backend": {"Type": "vxlan"}}`, ipv4Network,
				ipv6Network, rules == "nftables"),
				lab.NodeOptions{}, lab.NodeOptions{})
			labtest.Start(ctx, t, l, "--ip-masq", "--ip-blackhole-route")
			n := l.Nodes()[0]
			peer := labtest.Must(l.Nodes()[1].SubnetEnv())(t).Subnets.IPv4
			expectDiff := func(want string, status int) string {
				t.Helper()
				out, got, err := n.Ctl(ctx, "diff")
				if err != nil || got != status || want != "" && out != want || status == 0 && out != "" {
					t.Fatalf("diff: %v, status %d, want %d and\n%s\ngot\n%s", err, got, status, want, out)
				}
				return out
			}
			labtest.Do(t, waitDiff(ctx, n, ""))
			want := labtest.Must(n.Holds(ctx))(t)

			labtest.Do(t, n.Freeze(ctx))
			labtest.Must(n.Run(ctx, "ip route del "+peer.String()))(t)
			route := fmt.Sprintf("ip route replace %s via %s dev flannel.1 onlink proto 70\n", peer, peer.Addr())
			expectDiff(route, 1)
			labtest.Do(t, n.Thaw())
			labtest.Do(t, waitDiff(ctx, n, ""))

			labtest.Do(t, n.Stop(ctx))
			expectDiff("", 0)
			labtest.Must(n.Run(ctx, "ip route del "+peer.String()))(t)
			expectDiff(route, 1)
			for _, fault := range []string{"ip link del flannel.1", "ip link set flannel-v6.1 mtu 1300", "nft flush ruleset",
				"ip -6 route add fd00:5:0:77::/64 via fd18::2 proto 70"} {
				labtest.Must(n.Run(ctx, fault))(t)
			}
			script := filepath.Join(n.Dir, "repair")
			labtest.Do(t, os.WriteFile(script, []byte(expectDiff("", 1)), 0o644))
			labtest.Must(n.Run(ctx, "sh -e "+script))(t)
			expectDiff("", 0)
			if now := labtest.Must(n.Holds(ctx))(t); now != want {
				t.Errorf("it is repaired, except for %s", difference(want+"\n", now+"\n"))
			}
		})
	}
}

// waitDiff waits until diff prints just that.
func waitDiff(ctx context.Context, n *lab.Node, want string) error {
	return lab.Poll(ctx, "diff on "+n.Hostname, func() error {
		out, _, err := n.Ctl(ctx, "diff")
		if err == nil && out != want {
			err = fmt.Errorf("it prints\n%s", out)
		}
		return err
	})
}

// everything returns all of a node that cleanup could forget, or remove by mistake.
func everything(ctx context.Context, t *testing.T, n *lab.Node) string {
	t.Helper()
	var b strings.Builder
	for _, command := range []string{"ip -d -o link", "ip -o addr", "ip route show table all",
		"ip -6 route show table all",
		"ip nexthop", "ip neigh show nud permanent", "ip xfrm policy list nosock", "ip xfrm state list",
		"nft -s list ruleset", "iptables-legacy-save", "ip6tables-legacy-save",
		"find /run -path /run/netns -prune -o -print", "ls -A " + n.Dir} {
		out := labtest.Must(n.Run(ctx, command))(t)
		// ip prints this when a namespace of another test, which it asks about, ends at the same time.
		out = strings.ReplaceAll(out, "Error: Peer netns reference is invalid.\n", "")
		fmt.Fprintf(&b, "# %s\n%s\n", command, out)
	}
	return b.String()
}

const extensionCommands = `"PreStartupCommand": "echo static", ` +
	`"SubnetAddCommand": "ip route add $SUBNET via $PUBLIC_IP proto static", ` +
	`"SubnetRemoveCommand": "read data; ip route del $SUBNET proto $data"`

// A cleanupCase is a backend whose traces cleanup removes.
type cleanupCase struct {
	name, config string
	strangers    int
	kind         string   // of device, that the kernel must be able to make
	shows, what  string   // what the daemon has made, as a command shows it
	says         []string // by cleanup
	long         bool     // left to make test-long
}

// TestCleanup: whatever the backend, cleanup leaves a node as it was before the daemon started.
func TestCleanup(t *testing.T) {
	t.Parallel()
	for _, c := range []cleanupCase{
		{name: "vxlan, iptables", config: `"Backend": {"Type": "vxlan"}`, shows: "ip route", what: "dev flannel.1 "},
		{name: "vxlan, nftables", config: `"EnableNFTables": true, "Backend": {"Type": "vxlan"}`, shows: "ip route",
			what: "dev flannel.1 ", long: true},
		{name: "host-gw, nexthops, no subnet.env", config: `"EnableNFTables": true, "Backend": {"Type": "host-gw"}`,
			strangers: 300, shows: "ip route", what: "proto 70", long: true},
		{name: "udp", config: `"Backend": {"Type": "udp"}`, shows: "ip link", what: "flannel0", long: true},
		{name: "wireguard", config: `"Backend": {"Type": "wireguard"}`, shows: "wg show all endpoints", what: "51821",
			says: []string{"/wgkey\n"}},
		{name: "ipip", config: `"EnableIPv6": false, "Backend": {"Type": "ipip"}`, kind: "ipip local 198.18.0.1",
			shows: "ip route", what: "dev flannel.ipip"},
		{name: "ipsec, no subnet.env", config: `"Backend": {"Type": "ipsec", "PSK": "` + psk + `"}`,
			shows: "ip xfrm policy", what: "reqid 11", says: []string{"ip xfrm policy delete src "}},
		{name: "extension", config: `"Backend": {"Type": "extension", ` + extensionCommands + `}`,
			shows: "ip route", what: "via 198.18.0.2 dev eth0 proto static", says: []string{"PUBLIC_IP=198.18.0.2"}},
	} {
		if !labtest.Selected(!c.long) {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			labtest.NeedDevice(t, c.kind)
			testCleanup(t, c)
		})
	}
}

func testCleanup(t *testing.T, c cleanupCase) {
	ctx := labtest.Context(t, 2*time.Minute)
	l := labtest.New(ctx, t, `{"Network": "10.4.0.0/14", `+ipv6Network+`, `+c.config+`}`, lab.NodeOptions{},
		lab.NodeOptions{})
	n := l.Nodes()[0]
	for _, n := range l.Nodes() {
		charonRun(ctx, t, n)
	}
	s := &testbed{Lab: l, scenario: scenario{backend: c.config, strangers: c.strangers}}
	labtest.Do(t, joinAll(ctx, s))
	before := beforeDaemon(ctx, t, n)
	if out, _, err := n.Ctl(ctx, "cleanup", "--yes"); err != nil ||
		out != "Nothing of flanneld is on this node.\n" {
		t.Fatalf("of a node without: %v\n%s", err, out)
	}

	labtest.Start(ctx, t, l, "--ip-masq", "--ip-blackhole-route")
	refuseCleanup(ctx, t, n)
	labtest.Do(t, lab.Poll(ctx, "what the daemon makes", func() error {
		out, err := n.Run(ctx, c.shows)
		if err == nil && !strings.Contains(out, c.what) {
			err = errors.New(out)
		}
		return err
	}))
	n.Kill()
	if _, err := os.Stat(charon); err == nil && strings.HasPrefix(c.name, "ipsec") && len(charons(ctx, t, n)) == 0 {
		t.Error("there is no charon that could be left behind")
	}
	labtest.Must(n.Run(ctx, "ip link add flannel.9 type vxlan id 9 dstport 4789 dev eth0"))(t) // upstream's
	labtest.Must(n.Run(ctx, "ip route add 10.7.255.0/24 via 198.18.0.2"))(t)                   // and upstream's host-gw's
	if strings.HasSuffix(c.name, "no subnet.env") {                                            // etcd knows the network as well
		labtest.Do(t, os.Remove(n.SubnetFile()))
	}
	held := labtest.Must(n.Holds(ctx))(t)
	_, status, err := n.Ctl(ctx, "cleanup")
	if status != 2 || strings.Count(err.Error(), "\n") != 1 || !strings.Contains(err.Error(), "--yes") {
		t.Errorf("without a terminal: status %d, %v", status, err)
	}
	dry := labtest.Must(first(n.Ctl(ctx, "cleanup", "--dry-run")))(t)
	if now := labtest.Must(n.Holds(ctx))(t); now != held {
		t.Errorf("--dry-run changes %s", difference(held, now))
	}
	done := labtest.Must(first(n.Ctl(ctx, "cleanup", "--yes")))(t)
	for _, want := range c.says {
		if !strings.Contains(done, want) {
			t.Errorf("%q is not in\n%s", want, done)
		}
	}
	if pids := charons(ctx, t, n); len(pids) > 0 {
		t.Errorf("charon is left: %v", pids)
	}
	if done != dry+"Done.\n" {
		t.Errorf("--dry-run says\n%s\nand without it\n%s", dry, done)
	}
	if now := everything(ctx, t, n); now != before {
		t.Errorf("cleanup leaves %s", difference(before, now))
	}
	if held := labtest.Must(n.Holds(ctx))(t); held != "" {
		t.Errorf("the node holds\n%s", held)
	}
}

// beforeDaemon makes rules and routes of other programs, and returns everything of the node.
func beforeDaemon(ctx context.Context, t *testing.T, n *lab.Node) string {
	t.Helper()
	for _, ipt := range []string{"iptables", "ip6tables"} { // which make their tables and leave them
		for _, rule := range []string{"FORWARD -j ACCEPT", "POSTROUTING -t nat -j RETURN"} {
			labtest.Must(n.Run(ctx, ipt+" -A "+rule))(t)
			labtest.Must(n.Run(ctx, ipt+" -D "+rule))(t)
		}
		labtest.Must(n.Run(ctx, ipt+" -A FORWARD -p tcp -j ACCEPT"))(t)
	}
	labtest.Do(t, os.WriteFile(filepath.Join(n.Dir, "flanneld.log"), nil, 0o644))
	labtest.Must(n.Run(ctx, "ip route add 10.4.0.0/16 via 198.18.0.254 proto static"))(t)
	labtest.Do(t, lab.Poll(ctx, "IPv6 addresses to settle", func() error {
		if strings.Contains(everything(ctx, t, n), " tentative") {
			return errors.New("they have not")
		}
		return nil
	}))
	return everything(ctx, t, n)
}

// refuseCleanup: cleanup does nothing while there is a daemon, frozen or not.
func refuseCleanup(ctx context.Context, t *testing.T, n *lab.Node) {
	t.Helper()
	refuse := func(when string) {
		t.Helper()
		_, status, err := n.Ctl(ctx, "cleanup", "--yes")
		if status != 2 || !strings.Contains(err.Error(), "flanneld runs on this node") {
			t.Errorf("while the daemon %s: status %d, %v", when, status, err)
		}
	}
	refuse("runs")
	labtest.Do(t, n.Freeze(ctx))
	refuse("is frozen")
	labtest.Do(t, n.Thaw())
}

// TestCleanupCharon: in a charon that another program has started, cleanup removes the connections of flanneld, and
// nothing else.
func TestCleanupCharon(t *testing.T) {
	t.Parallel()
	needCharon(t)
	ctx := labtest.Context(t, 2*time.Minute)
	l := labtest.New(ctx, t, `{`+ipv4Network+`, "Backend": {"Type": "ipsec", "PSK": "`+psk+`"}}`, lab.NodeOptions{},
		lab.NodeOptions{})
	n := l.Nodes()[0]
	for _, n := range l.Nodes() {
		charonRun(ctx, t, n)
	}
	labtest.Must(n.Launch(exec.Command(charon)))(t)
	connections := func() (string, error) { return n.Run(ctx, "swanctl --list-conns --uri unix:///run/charon.vici") }
	others := filepath.Join(n.Dir, "swanctl.conf")
	labtest.Do(t, os.WriteFile(others, []byte("connections { theirs { remote_addrs = 192.0.2.1 } }\n"), 0o644))
	labtest.Do(t, lab.Poll(ctx, "charon to take a connection of others", func() error {
		_, err := n.Run(ctx, "swanctl --load-conns --file "+others+" --uri unix:///run/charon.vici")
		return err
	}))
	labtest.Start(ctx, t, l)
	labtest.Do(t, lab.Poll(ctx, "charon to be told of the peer", func() error {
		out, err := connections()
		if err == nil && !strings.Contains(out, "198.18.0.1-10.5.") {
			err = errors.New(out)
		}
		return err
	}))
	labtest.Do(t, n.Stop(ctx))
	out := labtest.Must(first(n.Ctl(ctx, "cleanup", "--yes")))(t)
	if !strings.Contains(out, "swanctl --terminate --force --ike 198.18.0.1-10.5.") {
		t.Errorf("it says\n%s", out)
	}
	if now := labtest.Must(connections())(t); strings.Contains(now, "198.18.0.1-") || !strings.Contains(now, "theirs") {
		t.Errorf("charon has\n%s", now)
	}
	if len(charons(ctx, t, n)) != 1 {
		t.Error("charon has ended")
	}
	if out, _, err := n.Ctl(ctx, "cleanup", "--yes"); err != nil ||
		out != "Nothing of flanneld is on this node.\n" {
		t.Errorf("once more: %v\n%s", err, out)
	}
}

// TestCleanupNotes: cleanup names what it leaves to the user.
func TestCleanupNotes(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, time.Minute)
	l := labtest.New(ctx, t, `{`+ipv4Network+`, `+ipv6Network+`, "Backend": {"Type": "aws-vpc", "RouteTableID": "rtb-0a"}}`, lab.NodeOptions{})
	n := l.Nodes()[0]
	for _, line := range []string{"mount -t tmpfs tmpfs /etc/systemd", "mkdir -p /etc/systemd/system/docker.service.d",
		"touch /etc/systemd/system/flanneld.service /etc/systemd/system/docker.service.d/flannel.conf"} {
		labtest.Must(n.Run(ctx, line))(t)
	}
	env := "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.7.1/24\nFLANNEL_IPV6_NETWORK=fd00:5::/48\n" +
		"FLANNEL_IPV6_SUBNET=fd00:5:0:7::1/64\nFLANNEL_MTU=1500\nFLANNEL_IPMASQ=true\n"
	labtest.Do(t, os.WriteFile(n.SubnetFile(), []byte(env), 0o644))
	out := labtest.Must(first(n.Ctl(ctx, "cleanup", "--dry-run")))(t)
	for _, want := range []string{
		"to remove by hand: the route to 10.5.7.0/24 in the cloud, until the instance is gone: " +
			"aws ec2 delete-route --route-table-id rtb-0a --destination-cidr-block 10.5.7.0/24 # if it is there: AWS: the instance metadata service does not answer ",
		" --destination-ipv6-cidr-block fd00:5:0:7::/64 #",
		"to remove by hand: the unit: systemctl disable flanneld; rm /etc/systemd/system/flanneld.service; systemctl daemon-reload\n",
		"to remove by hand: the drop-in for Docker: rm /etc/systemd/system/docker.service.d/flannel.conf;",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
}

// TestCleanupCNI: cleanup removes what the CNI plugin keeps only when it is asked to.
func TestCleanupCNI(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, time.Minute)
	l := labtest.New(ctx, t, vxlanConfig, lab.NodeOptions{})
	n := l.Nodes()[0]
	dir := filepath.Join(n.Dir, "cni-flannel")
	labtest.Do(t, os.MkdirAll(filepath.Join(dir, "sub"), 0o700))
	labtest.Must(first(n.Ctl(ctx, "cleanup", "--yes", "--cni-data-dir="+dir)))(t)
	if _, err := os.Stat(dir); err != nil {
		t.Fatal(err)
	}
	labtest.Must(first(n.Ctl(ctx, "cleanup", "--yes", "--cni", "--cni-data-dir="+dir)))(t)
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("it is still there: %v", err)
	}
}

// getStatus returns what flannelctl status prints.
func getStatus(ctx context.Context, t *testing.T, n *lab.Node, args ...string) (s network.Status) {
	t.Helper()
	text := labtest.Must(first(n.Ctl(ctx, append([]string{"status", "-o", "json"}, args...)...)))(t)
	labtest.Do(t, json.Unmarshal([]byte(text), &s))
	return s
}

// TestStatus: the daemon reports what it does, also before it is ready. Without the daemon, flannelctl finds the same.
func TestStatus(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, time.Minute)
	l := labtest.New(ctx, t, `{`+ipv4Network+`, `+ipv6Network+`, "Backend": {"Type": "vxlan"}}`, lab.NodeOptions{},
		lab.NodeOptions{})
	n := l.Nodes()[0]
	if s := getStatus(ctx, t, n); s.Daemon || s.Ready || s.Lease != nil || s.Backend != "vxlan" ||
		!strings.Contains(s.Waiting, "a lease: none is this node's") {
		t.Errorf("before the daemon starts: %+v", s)
	}
	labtest.Start(ctx, t, l, "--ip-masq", "--probe-peers=false") // the daemon alone knows what probes find
	labtest.Do(t, lab.Poll(ctx, "both nodes' leases", func() error {
		if s := getStatus(ctx, t, n); s.Peers != 1 {
			return fmt.Errorf("%+v", s)
		}
		return nil
	}))
	env := labtest.Must(n.SubnetEnv())(t)
	checkStatus(ctx, t, n, env)
	checkLeases(ctx, t, n)

	// A daemon that was killed leaves its socket, and the next one replaces it.
	n.Kill()
	if s := getStatus(ctx, t, n); s.Daemon {
		t.Errorf("of a dead daemon: %+v", s)
	}
	if _, status, err := n.Ctl(ctx, "status"); err != nil || status != 1 {
		t.Errorf("flannelctl status, of a dead daemon: %d, %v", status, err)
	}
	l.Etcd.Kill()
	text := labtest.Must(first(n.Ctl(ctx, "status")))(t)
	if !strings.Contains(text, env.Subnets.String()+", from the subnet file") ||
		!strings.Contains(text, "connection refused") {
		t.Errorf("without daemon and etcd:\n%s", text)
	}
	labtest.Do(t, l.Etcd.Start(ctx))
	labtest.Do(t, n.Restart(ctx))
	labtest.Do(t, n.WaitReady(ctx))
	if s := getStatus(ctx, t, n); !s.Daemon || !s.Ready {
		t.Errorf("after a restart: %+v", s)
	}
	socket := filepath.Join(filepath.Dir(n.SubnetFile()), "flanneld.sock")
	if info, err := os.Stat(socket); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket: %v, %v", info, err)
	}
	labtest.Do(t, n.Stop(ctx))
	if _, err := os.Stat(socket); !os.IsNotExist(err) {
		t.Errorf("the socket, after the daemon has ended: %v", err)
	}
	// The daemon works without a socket, too.
	labtest.Do(t, n.Start("--status-socket=/proc/nowhere/flanneld.sock"))
	labtest.Do(t, n.WaitReady(ctx))
	if c := strings.Count(n.Log(), `"Cannot serve flannelctl`); c != 1 {
		t.Errorf("it is said %d times that there is no socket", c)
	}
	if s := getStatus(ctx, t, n, "--status-socket="); s.Daemon || s.Lease == nil {
		t.Errorf("without a socket: %+v", s)
	}
}

// checkStatus compares what the daemon reports with what flannelctl finds, and with what is true.
func checkStatus(ctx context.Context, t *testing.T, n *lab.Node, env subnet.Env) {
	t.Helper()
	s, found := getStatus(ctx, t, n), getStatus(ctx, t, n, "--direct")
	if !s.Daemon || !s.Ready || s.Waiting != "" || s.Store.Trouble != "" || len(s.Errors) > 0 || !s.Rules.InPlace ||
		!s.SubnetFile.Written || s.Peers != 1 ||
		s.MTU != 1430 || len(s.Uplinks) != 1 || s.Uplinks[0].Name != "eth0" || !slices.Equal(s.Lease.Subnets, env.Subnets.Each()) || !s.Lease.Own ||
		time.Until(s.Lease.Expires) < 23*time.Hour || time.Until(s.Lease.Expires) > 24*time.Hour || len(s.Devices) != 2 ||
		s.Devices[0].Port != 8472 {
		t.Errorf("the daemon reports %+v", s)
	}
	// Nothing but the daemon knows its version, and what it waits for.
	found.Daemon, found.Ready, found.Version, found.Started = s.Daemon, s.Ready, s.Version, s.Started
	if d := found.Lease.Expires.Sub(s.Lease.Expires).Abs(); d > 5*time.Second {
		t.Errorf("of when the lease ends, they differ by %v", d)
	}
	found.Lease.Expires = s.Lease.Expires
	if a, b := labtest.Must(json.Marshal(s))(t), labtest.Must(json.Marshal(found))(t); string(a) != string(b) {
		t.Errorf("the daemon reports\n%s\nand without it we find\n%s", a, b)
	}
	text, status, err := n.Ctl(ctx, "status")
	if err != nil || status != 0 {
		t.Errorf("flannelctl status: %d, %v", status, err)
	}
	for _, want := range []string{"flanneld      ready, ", "\nuplink        eth0 198.18.0.1, fd18::1, mtu 1500\n",
		"\npeers         1\n", "\nrules         iptables, in place\n",
		"\nlease         " + env.Subnets.IPv4.String() + ", " + env.Subnets.IPv6.String() + ", expires in 2"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in\n%s", want, text)
		}
	}
	if strings.Contains(text, "\x1b") {
		t.Errorf("there are colours without a terminal: %q", text)
	}
}

// checkLeases compares the leases that the daemon lists with those that flannelctl finds.
func checkLeases(ctx context.Context, t *testing.T, n *lab.Node) {
	t.Helper()
	type lease struct {
		Subnets []netip.Prefix
		Own     bool
		Expires time.Time
	}
	var leases []lease
	labtest.Do(t, json.Unmarshal([]byte(labtest.Must(first(n.Ctl(ctx, "leases", "-o", "json")))(t)), &leases))
	if len(leases) != 2 || leases[0].Own == leases[1].Own || leases[0].Expires.IsZero() || leases[1].Expires.IsZero() {
		t.Errorf("leases: %+v", leases)
	}
	with, without := labtest.Must(first(n.Ctl(ctx, "leases")))(t), labtest.Must(first(n.Ctl(ctx, "leases", "--direct")))(t)
	if w, o := strings.Fields(with), strings.Fields(without); len(w) != len(o) || w[10] != o[10] ||
		!strings.Contains(with, "this node") {
		t.Errorf("the daemon lists\n%s\nand without it we do\n%s", with, without)
	}
}

// TestEnvironmentFile: flannelctl reads the settings that systemd passes to the daemon.
func TestEnvironmentFile(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, time.Minute)
	l := labtest.New(ctx, t, vxlanConfig, lab.NodeOptions{})
	n := l.Nodes()[0]
	labtest.Do(t, l.Etcd.Put(ctx, "/elsewhere/config", `{"Network": "10.77.0.0/16", "Backend": {"Type": "host-gw"}}`))
	file := filepath.Join(n.Dir, "default")
	labtest.Do(t, os.WriteFile(file, []byte("# comment\nFLANNELD_ETCD_PREFIX=\"/elsewhere\"\nOTHER=1\n"), 0o644))
	out := labtest.Must(first(n.Ctl(ctx, "status", "--env-file="+file)))(t)
	if !strings.Contains(out, "host-gw\n") {
		t.Errorf("the file was not read:\n%s", out)
	}
}

// TestKubernetesStatus: leases from Kubernetes, with the daemon and without.
func TestKubernetesStatus(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 3*time.Minute)
	l, k := newKube(ctx, t, "", []lab.NodeOptions{{}, {}})
	args := daemonArgs(t, k, vxlanConfig)
	want := map[string]bool{}
	for i, n := range l.Nodes() {
		cidr := fmt.Sprintf("10.5.%d.0/24", i+1)
		want[cidr] = true
		labtest.Do(t, k.AddNode(ctx, n, cidr))
	}
	labtest.Start(ctx, t, l, args...)
	n := l.Nodes()[0]
	labtest.Do(t, waitDiff(ctx, n, ""))
	checkNodes(ctx, t, k, n)
	for _, more := range []string{"--direct=false", "--direct"} {
		var leases []struct{ Subnets []netip.Prefix }
		labtest.Do(t, lab.Poll(ctx, "both leases", func() error {
			text, _, err := n.Ctl(ctx, "leases", "-o", "json", more)
			if err != nil {
				return err
			}
			if err := json.Unmarshal([]byte(text), &leases); err != nil {
				return err
			}
			if len(leases) != 2 || !want[leases[0].Subnets[0].String()] || !want[leases[1].Subnets[0].String()] {
				return fmt.Errorf("%s", text)
			}
			return nil
		}))
		if out, status, err := n.Ctl(ctx, "diff", more); err != nil || status != 0 {
			t.Errorf("diff %s: %d, %v\n%s", more, status, err, out)
		}
		var s network.Status
		labtest.Do(t, json.Unmarshal([]byte(labtest.Must(first(n.Ctl(ctx, "status", "-o", "json", more)))(t)), &s))
		if s.Lease == nil || s.Lease.Subnets[0].String() != "10.5.1.0/24" ||
			!strings.HasPrefix(s.Store.Name, "Kubernetes") || s.Store.Trouble != "" {
			t.Errorf("status %s: %+v", more, s)
		}
	}
}

// checkNodes checks what flannelctl lists of Nodes, with a daemon on the host, and on a machine that is no node.
func checkNodes(ctx context.Context, t *testing.T, k *lab.Kube, n *lab.Node) {
	t.Helper()
	labtest.Do(t, k.AddNode(ctx, &lab.Node{Hostname: "other", IPv4: netip.MustParseAddr("198.18.99.9")}, "10.5.3.0/24"))
	program := labtest.Must(lab.Program("bin/flannelctl"))(t)
	kubeconfig := strings.Join(labtest.Must(k.DaemonArgs(vxlanConfig))(t)[1:2], "")
	for what, list := range map[string]func() (string, error){
		"on a node": func() (string, error) { return first(n.Ctl(ctx, "leases", "list")) },
		"elsewhere": func() (string, error) {
			return first(n.Ctl(ctx, "leases", "list", "--direct", "--subnet-file=/nowhere/subnet.env",
				"--net-config-path=/nowhere/net-conf.json"))
		},
		"in a pod, where the daemon alone has the flag": func() (string, error) {
			return n.Run(ctx, program+" leases list --env-file=/dev/null "+kubeconfig+" --subnet-file="+n.SubnetFile())
		},
	} {
		text, err := list()
		var got []string
		for line := range strings.Lines(text) {
			got = append(got, strings.Join(strings.Fields(line), " "))
		}
		want := []string{"SUBNET NODE PUBLIC IP BACKEND EXPIRES IN NOTE", "10.5.1.0/24 n1 198.18.0.1 vxlan never",
			"10.5.2.0/24 n2 198.18.0.2 vxlan never", "10.5.3.0/24 other never flanneld has not run there"}
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %v, %q, want %q", what, err, got, want)
		}
	}
	if _, status, err := n.Ctl(ctx, "leases", "reserve", "10.5.9.0/24", "198.18.0.1"); status != 2 ||
		!strings.Contains(err.Error(), "there is nothing to reserve or to release") {
		t.Errorf("reserve: status %d, %v", status, err)
	}
}
