// Package e2e tests the daemon as it is built, in a lab: the kernel's own
// devices and routes, a real etcd, pods attached by real CNI plugins.
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

// Networks of the tests' configurations.
const (
	ipv4Network = `"Network": "10.5.0.0/16"`
	ipv6Network = `"EnableIPv6": true, "IPv6Network": "fd00:5::/48"`
	vxlanConfig = `{` + ipv4Network + `, "Backend": {"Type": "vxlan"}}`
)

var (
	oneLink  = make([]lab.NodeOptions, 2)
	twoLinks = []lab.NodeOptions{{}, {}, {Routed: true}}
)

// A matrixBackend is a row of TestMatrix.
type matrixBackend struct {
	name, config string
	nodes        []lab.NodeOptions
	overhead     [2]int // over IPv4, over IPv6
	near, far    string // device towards a peer on the same link, and on another link
	device       string // of a type that not every kernel has
	ipv4         bool   // without IPv6
	once         bool   // with nftables only: another row has the same device
}

var matrixBackends = []matrixBackend{
	{name: "vxlan", config: `{"Type": "vxlan"}`, nodes: twoLinks, overhead: [2]int{50, 70}, near: "flannel",
		far: "flannel"},
	{name: "vxlan direct", config: `{"Type": "vxlan", "DirectRouting": true}`, nodes: twoLinks, overhead: [2]int{50, 70},
		near: "eth0", far: "flannel"},
	{name: "host-gw", config: `{"Type": "host-gw"}`, nodes: oneLink, near: "eth0"},
	{name: "udp", config: `{"Type": "udp"}`, nodes: twoLinks, overhead: [2]int{28, 48}, near: "flannel", far: "flannel"},
	{name: "ipip", config: `{"Type": "ipip"}`, nodes: twoLinks, overhead: [2]int{20}, near: "flannel", far: "flannel",
		device: "ipip local 198.18.0.1", ipv4: true},
	{name: "ipip direct", config: `{"Type": "ipip", "DirectRouting": true}`, nodes: twoLinks, overhead: [2]int{20},
		near: "eth0", far: "flannel", device: "ipip local 198.18.0.1", ipv4: true},
	{name: "wireguard", config: `{"Type": "wireguard"}`, nodes: twoLinks, overhead: [2]int{80, 80},
		near: "flannel-wg", far: "flannel-wg"},
	{name: "wireguard auto", config: `{"Type": "wireguard", "Mode": "auto"}`, nodes: twoLinks, overhead: [2]int{80, 80},
		near: "flannel-wg", far: "flannel-wg", once: true},
}

// A matrixFamily is a column of TestMatrix.
type matrixFamily struct {
	name, config string
	on           [2]bool
}

var matrixFamilies = []matrixFamily{
	{"IPv4", ipv4Network, [2]bool{true, false}},
	{"dual stack", ipv4Network + `, ` + ipv6Network, [2]bool{true, true}},
	{"IPv6", `"EnableIPv4": false, ` + ipv6Network, [2]bool{false, true}},
}

// TestMatrix: with every backend, every choice of families, and every kind of rules, pods reach each other with their
// own addresses, and the outside with the address of their node. In make test, each backend has both families at once,
// and vxlan also each family alone.
func TestMatrix(t *testing.T) {
	t.Parallel()
	for i, b := range matrixBackends {
		for j, f := range matrixFamilies {
			if b.ipv4 && f.on[1] {
				continue
			}
			for k, rules := range []string{"iptables", "nftables"} {
				// A backend has nothing to do with the kind of rules: each two of the three are tried together, not all three.
				once := b.once && rules == "nftables" || !b.once && (i+j+k)%2 == 1
				quick := i == 0 || f.on[0] == f.on[1]
				if !once || !labtest.Selected(quick) {
					continue
				}
				t.Run(strings.Join([]string{b.name, f.name, rules}, "/"), func(t *testing.T) {
					t.Parallel()
					testMatrix(t, b, f, rules)
				})
			}
		}
	}
}

func testMatrix(t *testing.T, b matrixBackend, f matrixFamily, rules string) {
	labtest.NeedDevice(t, b.device)
	ctx := labtest.Context(t, 2*time.Minute)
	l := labtest.New(ctx, t, configuration(f.config, b.config, rules == "nftables"), b.nodes...)
	args := []string{"--ip-masq", "--probe-interval=1"}
	if !f.on[0] {
		args = append(args, "--etcd-endpoints="+lab.EndpointV6)
	}
	labtest.Start(ctx, t, l, args...)
	pods := addPods(ctx, t, l)

	mtu := 1500
	for i, on := range f.on {
		if on {
			mtu = min(mtu, 1500-b.overhead[i])
		}
	}
	if pods[0].MTU != mtu {
		t.Errorf("the MTU for pods is %d, want %d", pods[0].MTU, mtu)
	}
	checkPaths(ctx, t, l, pods)
	node := l.Nodes()[0]
	labtest.Do(t, waitReached(ctx, node, b.near == "flannel-wg"))
	labtest.Do(t, waitDiff(ctx, node, ""))
	if out, status, err := node.Ctl(ctx, "doctor"); status != 0 {
		t.Errorf("flannelctl doctor: %v\n%s", err, out)
	}
	if r, err := connectivity(ctx, node); err != nil || len(r.findings)+len(r.notes) > 0 {
		t.Errorf("flannelctl connectivity: %v\n%+v", err, r)
	}
	for i, to := range pods[1:] {
		device := b.near
		if b.nodes[i+1].Routed {
			device = b.far
		}
		for _, dst := range to.Addrs() {
			route := labtest.Must(node.Run(ctx, "ip route get "+dst.String()))(t)
			if !strings.Contains(route, "dev "+device) {
				t.Errorf("the route to n%d's pod is %q, want it on %s", i+2, route, device)
			}
		}
	}
}

// addPods adds a pod to every node.
func addPods(ctx context.Context, t *testing.T, l *lab.Lab) []*lab.Pod {
	t.Helper()
	var pods []*lab.Pod
	for _, n := range l.Nodes() {
		pods = append(pods, labtest.Must(n.AddPod(ctx, "pod"))(t))
	}
	return pods
}

// checkPaths checks the paths between pods, one on each node in the order of the nodes, from the nodes to the pods,
// and from the pods to the outside. The daemons must run with --ip-masq.
func checkPaths(ctx context.Context, t *testing.T, l *lab.Lab, pods []*lab.Pod) {
	t.Helper()
	labtest.Do(t, l.Outside.Mirror())
	for _, p := range pods {
		labtest.Do(t, p.Mirror())
	}
	checkPathsAgain(ctx, t, l, pods)
}

// checkPathsAgain is checkPaths for pods that it has been called with before.
func checkPathsAgain(ctx context.Context, t *testing.T, l *lab.Lab, pods []*lab.Pod) {
	t.Helper()
	for i, from := range pods {
		node := l.Nodes()[i]
		for j, to := range pods {
			if i == j {
				continue
			}
			for k, dst := range to.Addrs() {
				// Ready means that the others' routes were there. The others may learn of this node a little later.
				packet := lab.PingOptions{Packet: from.MTU, DF: true}
				err := lab.Poll(ctx, fmt.Sprintf("%s to answer %d bytes from %s", dst, from.MTU, from.Name), func() error {
					_, err := from.Ping(ctx, dst, packet)
					return err
				})
				if err != nil {
					t.Error(err)
					continue
				}
				packet.Packet++
				if _, err := from.Ping(ctx, dst, packet); err == nil {
					t.Errorf("%s: ping %s: %d bytes pass, with an MTU of %d", from.Name, dst, packet.Packet, from.MTU)
				}
				if err := node.WaitPing(ctx, dst); err != nil {
					t.Errorf("from the host: %v", err)
				}
				expectSeenAs(ctx, t, from.Namespace, dst, from.Addrs()[k])
			}
		}
		for _, pair := range [][3]netip.Addr{{from.IPv4, lab.Outside, node.IPv4}, {from.IPv6, lab.OutsideV6, node.IPv6}} {
			if pair[0].IsValid() {
				expectSeenAs(ctx, t, from.Namespace, pair[1], pair[2])
			}
		}
	}
}

// expectSeenAs calls the mirror at dst, which must see the caller as want.
func expectSeenAs(ctx context.Context, t *testing.T, from *lab.Namespace, dst, want netip.Addr) {
	t.Helper()
	for _, network := range []string{"tcp", "udp"} {
		if got, err := from.SeenAs(ctx, network, dst); err != nil {
			t.Errorf("%s to %s: %v", network, dst, err)
		} else if got != want {
			t.Errorf("%s: %s sees %s come from %s, want %s", from.Name, dst, network, got, want)
		}
	}
}
