package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

const (
	dualConfig = `{` + ipv4Network + `, ` + ipv6Network + `, "Backend": {"Type": %q}}`
	dualCIDR   = "10.5.0.0/16,fd00:5::/48"
)

// newKube makes a lab with a control plane, which hands out podCIDRs of
// clusterCIDR, and no more rights for the daemons than are published.
func newKube(ctx context.Context, t *testing.T, clusterCIDR string, nodes []lab.NodeOptions, args ...string) (*lab.Lab,
	*lab.Kube) {
	t.Helper()
	l := labtest.New(ctx, t, "{}", nodes...)
	k := labtest.Must(l.NewKube(ctx, clusterCIDR, args...))(t)
	labtest.Do(t, k.Install(ctx, string(labtest.Must(os.ReadFile("../../Documentation/kube-flannel.yml"))(t))))
	return l, k
}

// daemonArgs are the daemons' for a network.
func daemonArgs(t *testing.T, k *lab.Kube, config string) []string {
	t.Helper()
	return append(labtest.Must(k.DaemonArgs(config))(t), "--ip-masq")
}

// An outage makes the API server useless to the daemons for some seconds, runs meanwhile against the cluster, and
// returns when it is over.
type outage func(ctx context.Context, t *testing.T, k *lab.Kube, pods []*lab.Pod, meanwhile func(*lab.Kube))

// dead kills the server; a spare one serves meanwhile.
func dead(ctx context.Context, t *testing.T, k *lab.Kube, pods []*lab.Pod, meanwhile func(*lab.Kube)) {
	t.Helper()
	k.Kill()
	spare := labtest.Must(k.Spare(ctx))(t)
	meanwhile(spare)
	fifteenSeconds(ctx, t, pods)
	spare.Kill()
	labtest.Do(t, k.Start(ctx))
}

// unreachable drops the daemons' packets to the server, which is another process afterwards.
func unreachable(ctx context.Context, t *testing.T, k *lab.Kube, pods []*lab.Pod, meanwhile func(*lab.Kube)) {
	t.Helper()
	labtest.Do(t, k.Cut(ctx))
	k.Kill()
	labtest.Do(t, k.Start(ctx))
	meanwhile(k)
	fifteenSeconds(ctx, t, pods)
	labtest.Do(t, k.Restore(ctx))
}

// fifteenSeconds are 750 packets.
func fifteenSeconds(ctx context.Context, t *testing.T, pods []*lab.Pod) {
	t.Helper()
	labtest.Must(pods[0].Ping(ctx, pods[1].IPv4, lab.PingOptions{Count: 750}))(t)
}

// A kubeCase is a cluster of TestKubernetes.
type kubeCase struct {
	backend     string
	config      string // of the families
	clusterCIDR string
	server      []string // arguments
	outage      outage
}

// TestKubernetes: subnets come from podCIDRs, peers from the other Nodes. The daemons catch up with what happened
// while the API server was down.
func TestKubernetes(t *testing.T) {
	t.Parallel()
	const dual = ipv4Network + `, ` + ipv6Network
	for name, c := range map[string]kubeCase{
		"vxlan": {"vxlan", dual, dualCIDR, nil, dead},
		// As servers before 1.32: the state comes in pages.
		"host-gw": {"host-gw", dual, dualCIDR, []string{"--feature-gates=WatchList=false"}, unreachable},
		"IPv4":    {"vxlan", ipv4Network, "10.5.0.0/16", nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testKubernetes(t, c)
		})
	}
}

func testKubernetes(t *testing.T, c kubeCase) {
	ctx := labtest.Context(t, 4*time.Minute)
	l, k := newKube(ctx, t, c.clusterCIDR, make([]lab.NodeOptions, 4), c.server...)
	args := daemonArgs(t, k, fmt.Sprintf(`{%s, "Backend": {"Type": %q}}`, c.config, c.backend))
	nodes := l.Nodes()
	early, rest := nodes[0], nodes[1:3]

	// One starts before there is a Node.
	labtest.Do(t, early.Start(args...))
	waitSaid(ctx, t, early, `"Waiting for the Node" missing="Node n1"`)
	labtest.Do(t, k.AddNode(ctx, early))
	for _, n := range rest {
		labtest.Do(t, k.AddNode(ctx, n))
		labtest.Do(t, n.Start(args...))
	}
	for _, n := range nodes[:3] {
		labtest.Do(t, n.WaitReady(ctx))
	}
	for _, n := range nodes[:3] {
		checkNode(ctx, t, k, n, c.backend)
	}
	pods := addPodsTo(ctx, t, nodes[:3])
	checkPaths(ctx, t, l, pods)

	// Another program changes annotations.
	labtest.Do(t, k.Annotate(ctx, "n1", "public-ip=192.0.2.1", "kube-subnet-manager=false", "backend-type"))
	checkNode(ctx, t, k, early, c.backend)

	gone := nodes[2]
	route := trace{"ip route show proto 70", labtest.Must(gone.SubnetEnv())(t).Subnets.IPv4.String() + " via "}
	for _, n := range nodes[:2] {
		waitTraces(ctx, t, n, []trace{route}, true)
	}
	labtest.Do(t, gone.Stop(ctx))
	lossless := startPings(ctx, t, pods)
	if c.outage == nil {
		deleted := time.Now()
		labtest.Do(t, k.DeleteNode(ctx, gone.Hostname))
		for _, n := range nodes[:2] {
			waitTraces(ctx, t, n, []trace{route}, false)
		}
		t.Logf("the deleted node's routes were gone after %v", time.Since(deleted).Round(time.Millisecond))
		lossless()
		return
	}
	c.changeInOutage(ctx, t, k, nodes, pods, route, args)
	lossless()
}

// changeInOutage replaces the third node by the fourth during an outage.
func (c kubeCase) changeInOutage(ctx context.Context, t *testing.T, k *lab.Kube, nodes []*lab.Node, pods []*lab.Pod,
	route trace, args []string) {
	gone, late := nodes[2], nodes[3]
	subnets := []string{"10.5.200.0/24", "fd00:5:0:c8::/64"}
	c.outage(ctx, t, k, pods, func(k *lab.Kube) {
		labtest.Do(t, k.DeleteNode(ctx, gone.Hostname))
		labtest.Do(t, k.AddNode(ctx, late, subnets...))
		labtest.Do(t, late.Start(args...))
		waitSaid(ctx, t, late, `operation="read Node n4"`)
	})
	back := time.Now()
	labtest.Do(t, late.WaitReady(ctx))
	for _, n := range nodes[:2] {
		waitTraces(ctx, t, n, []trace{{route.command, subnets[0] + " via "},
			{"ip -6 route show proto 70", subnets[1] + " via "}}, true)
		waitTraces(ctx, t, n, []trace{route}, false)
	}
	t.Logf("all is caught up with %v after the API server's return", time.Since(back).Round(time.Millisecond))
	pod := labtest.Must(late.AddPod(ctx, "pod"))(t)
	labtest.Do(t, pods[0].WaitPing(ctx, pod.IPv4))
	labtest.Do(t, pod.WaitPing(ctx, pods[0].IPv6))
}

// TestPodCIDRs: a daemon waits for its Node and its podCIDR, follows when they
// change, and does not start with one that is wrong.
func TestPodCIDRs(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 2*time.Minute)
	l, k := newKube(ctx, t, "", make([]lab.NodeOptions, 2))
	n, misfit := l.Nodes()[0], l.Nodes()[1]
	args := daemonArgs(t, k, fmt.Sprintf(dualConfig, "vxlan"))
	labtest.Do(t, k.AddNode(ctx, n))
	labtest.Do(t, n.Start(args...))
	const missing = `"Waiting for the Node" missing="spec.podCIDR of Node n1" fix="set --allocate-node-cidrs and --cluster-cidr ` +
		`on kube-controller-manager, or spec.podCIDR on the node"`
	waitSaid(ctx, t, n, missing)
	if n.Ready(ctx) == nil {
		t.Error("a node without podCIDR is ready")
	}
	labtest.Do(t, k.StartControllers(dualCIDR))
	labtest.Do(t, n.WaitReady(ctx))
	checkNode(ctx, t, k, n, "vxlan")
	if times := strings.Count(n.Log(), missing); times != 1 {
		t.Errorf("what is missing is said %d times", times)
	}

	// kubelet is reset, and registers again.
	const away = `"Waiting for the Node" missing="Node n1"`
	labtest.Do(t, k.DeleteNode(ctx, "n1"))
	waitSaid(ctx, t, n, away)
	labtest.Do(t, k.AddNode(ctx, n, "10.5.77.0/24", "fd00:5:0:4d::/64"))
	checkNode(ctx, t, k, n, "vxlan")
	if env := labtest.Must(n.SubnetEnv())(t); env.Subnets.IPv4.String() != "10.5.77.0/24" {
		t.Errorf("the subnet is %s still", env.Subnets)
	}
	if times := strings.Count(n.Log(), away); times != 1 {
		t.Errorf("that the Node is away is said %d times", times)
	}

	labtest.Do(t, k.AddNode(ctx, misfit, "10.99.1.0/24", "fd00:5:0:63::/64"))
	labtest.Do(t, misfit.Start(args...))
	waitSaid(ctx, t, misfit, "the podCIDR 10.99.1.0/24 of Node n2 is outside the Network 10.5.0.0/16")
	labtest.Do(t, lab.Poll(ctx, "the daemon to give up", func() error {
		if !misfit.Exited() {
			return fmt.Errorf("it runs still")
		}
		return nil
	}))
}

// TestNodeAddresses: how a Node chooses what peers reach it at, and that two
// Nodes that claim the same are told of.
func TestNodeAddresses(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 3*time.Minute)
	l, k := newKube(ctx, t, "10.5.0.0/16", []lab.NodeOptions{{}, {NAT: true}, {NAT: true}, {}})
	nodes := l.Nodes()
	n1, n2, n3, n4 := nodes[0], nodes[1], nodes[2], nodes[3]
	args := daemonArgs(t, k, vxlanConfig)
	for _, n := range nodes[:3] {
		labtest.Do(t, k.AddNode(ctx, n))
		labtest.Do(t, n.Start(args...))
		labtest.Do(t, n.WaitReady(ctx))
	}

	// Two interfaces, of which the default route's is the wrong one.
	const mistake = `"The public address is not an address of the Node" address="` + lab.NATAddress +
		`" node="n2" nodeAddresses=["198.18.0.2","fd18::2"] fix="if this host has several interfaces, give --iface-node-address or --iface"`
	waitSaid(ctx, t, n2, mistake)
	waitSaid(ctx, t, n1, conflicts("n2", "n3", "the public address "+lab.NATAddress))
	labtest.Do(t, n3.Stop(ctx))
	labtest.Do(t, n3.Start(append(args, "--iface-node-address")...))
	waitSaid(ctx, t, n1, conflictsNoLonger("n2", "n3", "the public address "+lab.NATAddress))
	waitAnnotation(ctx, t, k, n3, "public-ip", "198.18.0.3")
	before := labtest.Must(n2.SubnetEnv())(t).Subnets
	labtest.Do(t, k.DeleteNode(ctx, "n2")) // which brings a new lease, with the old address
	labtest.Do(t, k.AddNode(ctx, n2))
	waitAnnotation(ctx, t, k, n2, "public-ip", lab.NATAddress)
	for said, n := range map[string]*lab.Node{mistake: n2, conflicts("n2", "n3", ""): n1} {
		if times := strings.Count(n.Log(), said); times != 1 {
			t.Errorf("%s says %d times: %s", n.Hostname, times, said)
		}
	}
	if strings.Contains(n1.Log(), "is not an address of the Node") {
		t.Error("n1 warns of its own address")
	}

	// An annotation of the Node changes the address while the daemon runs.
	labtest.Do(t, k.Annotate(ctx, "n2", "node-public-ip=198.18.0.2"))
	waitAnnotation(ctx, t, k, n2, "public-ip", "198.18.0.2")
	waitSaid(ctx, t, n2, `uplink="eth0 198.18.0.2`)
	labtest.Do(t, lab.Poll(ctx, "the new subnet in n2's subnet file", func() error {
		env, err := n2.SubnetEnv()
		if err == nil && env.Subnets == before {
			err = fmt.Errorf("it has %s", before)
		}
		return err
	}))
	pods := addPodsTo(ctx, t, nodes[:3])
	for _, from := range pods {
		for _, to := range pods {
			labtest.Do(t, from.WaitPing(ctx, to.IPv4))
		}
	}
	labtest.Do(t, k.Annotate(ctx, "n2", "public-ip-overwrite=203.0.113.7"))
	waitAnnotation(ctx, t, k, n2, "public-ip", "203.0.113.7")
	waitTraces(ctx, t, n1, []trace{{"bridge fdb show dev flannel.1", " dst 203.0.113.7 "}}, true)
	labtest.Do(t, k.Annotate(ctx, "n2", "public-ip-overwrite"))
	waitAnnotation(ctx, t, k, n2, "public-ip", "198.18.0.2")
	labtest.Do(t, pods[0].WaitPing(ctx, pods[1].IPv4))

	// A second Node with a podCIDR that there is.
	taken := labtest.Must(n1.SubnetEnv())(t).Subnets.IPv4.String()
	labtest.Do(t, k.AddNode(ctx, n4, taken))
	labtest.Do(t, n4.Start(args...))
	for _, n := range []*lab.Node{n1, n3, n4} {
		waitSaid(ctx, t, n, conflicts("n1", "n4", "the podCIDR "+taken))
	}
	labtest.Do(t, pods[2].WaitPing(ctx, pods[0].IPv4))
	labtest.Do(t, n4.Stop(ctx))
	labtest.Do(t, k.DeleteNode(ctx, "n4"))
	waitSaid(ctx, t, n3, conflictsNoLonger("n1", "n4", "the podCIDR "+taken))

	// A Node whose address no interface has, at first.
	elsewhere := *n4
	elsewhere.IPv4 = elsewhere.IPv4.Next()
	labtest.Do(t, k.AddNode(ctx, &elsewhere))
	labtest.Do(t, n4.Start(append(args, "--iface-node-address")...))
	waitSaid(ctx, t, n4, `"Waiting for the Node" missing="an interface that holds an InternalIP of Node n4, [198.18.0.5]"`)
	labtest.Do(t, n4.Script(ctx, "addr add 198.18.0.5/24 dev eth0"))
	labtest.Do(t, n4.WaitReady(ctx))
	waitAnnotation(ctx, t, k, n4, "public-ip", "198.18.0.5")
}

// TestNodeAddressOfEachFamily: the Node's InternalIPs of the two families are on two interfaces. Either flag finds them;
// a node with one interface goes with these nodes.
func TestNodeAddressOfEachFamily(t *testing.T) {
	t.Parallel()
	for _, backend := range []string{"vxlan", "host-gw"} {
		if !labtest.Selected(backend == "vxlan") {
			continue
		}
		t.Run(backend, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t, 2*time.Minute)
			l, k := newKube(ctx, t, dualCIDR, make([]lab.NodeOptions, 3))
			args := daemonArgs(t, k, fmt.Sprintf(dualConfig, backend))
			flags := [][]string{{"--iface-node-address"}, {"--iface=eth0", "--iface-v6=eth1"}, nil}
			for i, n := range l.Nodes() {
				if flags[i] != nil {
					labtest.Do(t, n.MoveIPv6(ctx))
				}
				labtest.Do(t, k.AddNode(ctx, n))
				labtest.Do(t, n.Start(slices.Concat(args, flags[i])...))
			}
			for _, n := range l.Nodes() {
				labtest.Do(t, n.WaitReady(ctx))
				waitAnnotation(ctx, t, k, n, "public-ip", n.IPv4.String())
				waitAnnotation(ctx, t, k, n, "public-ipv6", n.IPv6.String())
				checkNode(ctx, t, k, n, backend)
			}
			pods := addPods(ctx, t, l)
			for _, from := range pods {
				for _, to := range pods {
					labtest.Do(t, from.WaitPing(ctx, to.IPv4))
					labtest.Do(t, from.WaitPing(ctx, to.IPv6))
				}
			}
			checkUplinks(ctx, t, l.Nodes()[0])
			checkUplinks(ctx, t, l.Nodes()[1])

			// Peers learn another address from the Node.
			n, other := l.Nodes()[1], netip.MustParseAddr("fd18::77")
			labtest.Do(t, n.Script(ctx, "addr del "+n.IPv6.String()+"/64 dev eth1"))
			labtest.Do(t, n.ConfigureIPv6(ctx, other))
			waitAnnotation(ctx, t, k, n, "public-ipv6", other.String())
			waitAnnotation(ctx, t, k, n, "public-ip", n.IPv4.String())
			for _, from := range pods {
				labtest.Do(t, from.WaitPing(ctx, pods[1].IPv6))
			}
		})
	}
}

// TestToken: the token is another one after a while, as kubelet rotates it, and
// what the first one was is of no use any more.
func TestToken(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 2*time.Minute)
	l, k := newKube(ctx, t, dualCIDR, make([]lab.NodeOptions, 1))
	n := l.Nodes()[0]
	bound := func(name string) { // to a Secret: it ends with that
		labtest.Must(k.Do(ctx, "POST", "/api/v1/namespaces/kube-flannel/secrets",
			fmt.Appendf(nil, `{"metadata": {"name": %q}}`, name)))(t)
		labtest.Do(t, k.WriteToken(ctx, fmt.Sprintf(`{"boundObjectRef": {"apiVersion": "v1", "kind": "Secret", "name": %q}}`, name)))
	}
	bound("first")
	labtest.Do(t, k.AddNode(ctx, n))
	labtest.Do(t, n.Start(daemonArgs(t, k, fmt.Sprintf(dualConfig, "vxlan"))...))
	labtest.Do(t, n.WaitReady(ctx))
	bound("second")
	labtest.Must(k.Do(ctx, "DELETE", "/api/v1/namespaces/kube-flannel/secrets/first", nil))(t)
	k.Kill() // which ends the watch, and whatever the server remembers of the token
	labtest.Do(t, k.Start(ctx))
	labtest.Do(t, k.Annotate(ctx, "n1", "public-ip=192.0.2.1"))
	checkNode(ctx, t, k, n, "vxlan")
}

// TestManifest: the API server takes the manifest as it is published, as a
// whole.
func TestManifest(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, time.Minute)
	_, k := newKube(ctx, t, "", nil)
	labtest.Do(t, k.DryRun(ctx, string(labtest.Must(os.ReadFile("../../Documentation/kube-flannel.yml"))(t))))
	if err := k.DryRun(ctx, "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\ndatum: {}\n"); err == nil {
		t.Error("a misspelt field is accepted")
	}
}

// conflicts returns the beginning of the log line about a conflict; "" stands for any conflict of the two Nodes.
func conflicts(older, younger, what string) string {
	return conflictLine("conflict", older, younger, what)
}

func conflictsNoLonger(older, younger, what string) string {
	return conflictLine("no longer conflict", older, younger, what)
}

func conflictLine(verb, older, younger, what string) string {
	line := fmt.Sprintf(`"Two Nodes %s" older=%q younger=%q conflict="%s"`, verb, older, younger, what)
	if what == "" {
		line = strings.TrimSuffix(line, `"`)
	}
	return line
}

// waitSaid waits until the daemon has said something.
func waitSaid(ctx context.Context, t *testing.T, n *lab.Node, text string) {
	t.Helper()
	labtest.Do(t, lab.Poll(ctx, n.Hostname+" to say: "+text, func() error {
		if !strings.Contains(n.Log(), text) {
			return fmt.Errorf("it says\n%s", n.Log())
		}
		return nil
	}))
}

// waitAnnotation waits until a Node has an annotation of flannel's.
func waitAnnotation(ctx context.Context, t *testing.T, k *lab.Kube, n *lab.Node, key, want string) {
	t.Helper()
	labtest.Do(t, lab.Poll(ctx, fmt.Sprintf("Node %s to have %s %s", n.Hostname, key, want), func() error {
		node, err := k.Node(ctx, n.Hostname)
		if err != nil {
			return err
		}
		if got := node.Metadata.Annotations["flannel.alpha.coreos.com/"+key]; got != want {
			return fmt.Errorf("it is %q", got)
		}
		return nil
	}))
}

func addPodsTo(ctx context.Context, t *testing.T, nodes []*lab.Node) []*lab.Pod {
	t.Helper()
	var pods []*lab.Pod
	for _, n := range nodes {
		pods = append(pods, labtest.Must(n.AddPod(ctx, "pod"))(t))
	}
	return pods
}

// checkNode waits until a Node has all annotations of a daemon that is ready.
func checkNode(ctx context.Context, t *testing.T, k *lab.Kube, n *lab.Node, backend string) {
	t.Helper()
	labtest.Do(t, lab.Poll(ctx, "Node "+n.Hostname, func() error { return nodeIs(ctx, k, n, backend) }))
}

func nodeIs(ctx context.Context, k *lab.Kube, n *lab.Node, backend string) error {
	got, err := k.Node(ctx, n.Hostname)
	if err != nil {
		return err
	}
	env, err := n.SubnetEnv()
	if err != nil {
		return err
	}
	if cidrs := strings.Join(got.Spec.PodCIDRs, ","); cidrs != env.Subnets.String() {
		return fmt.Errorf("podCIDRs are %s, the subnet file says %s", cidrs, env.Subnets)
	}
	annotations := map[string]string{"kube-subnet-manager": "true", "backend-type": backend, "public-ip": n.IPv4.String()}
	if env.Subnets.IPv6.IsValid() {
		annotations["public-ipv6"] = n.IPv6.String()
	}
	for key, want := range annotations {
		if a := got.Metadata.Annotations["flannel.alpha.coreos.com/"+key]; a != want {
			return fmt.Errorf("annotation %s is %q, want %q", key, a, want)
		}
	}
	data := got.Metadata.Annotations["flannel.alpha.coreos.com/backend-data"]
	if backend == "vxlan" && !strings.HasPrefix(data, `{"VNI":1,"VtepMAC":"`) || backend == "host-gw" && data != "null" {
		return fmt.Errorf("annotation backend-data is %q", data)
	}
	for _, c := range got.Status.Conditions {
		if c.Type == "NetworkUnavailable" && c.Status == "False" && c.Reason == "FlannelIsUp" &&
			c.Message == "Flannel is running on this node" {
			return nil
		}
	}
	return fmt.Errorf("conditions are %+v", got.Status.Conditions)
}
