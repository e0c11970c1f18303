// Package stores runs the daemon against the API servers, and what they keep
// their state in, that people have: older and newer ones, kine, and broken ones.
package stores

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// A program is one of the build directory.
type program struct{ name, path string }

var (
	apiServers = []program{{"1.34", "stores/kube-apiserver-1.34"}, {"1.37", "kube/kube-apiserver"}}
	keepers    = []program{{"etcd 3.4", "stores/etcd-3.4"}, {"etcd 3.6", "stores/etcd-3.6"}, {"etcd 3.7", "bin/etcd"},
		{"kine", "stores/kine"}}

	// quick is tested each time. The end-to-end tests have 1.37 on etcd 3.7.
	quick = "1.34 on etcd 3.4"
)

// TestStores takes each API server on each store through what may become of
// them.
func TestStores(t *testing.T) {
	t.Parallel()
	for _, server := range apiServers {
		for _, keeper := range keepers {
			name := server.name + " on " + keeper.name
			if !labtest.Selected(name == quick) {
				continue
			}
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				ctx := labtest.Context(t, 4*time.Minute)
				l := labtest.NewWith(ctx, t, lab.Options{Store: keeper.path, APIServer: server.path}, "{}",
					make([]lab.NodeOptions, 3)...)
				c := newCluster(ctx, t, l)
				c.bindToken(ctx, t, "first")
				for _, step := range []struct {
					name string
					run  func(*cluster, context.Context, *testing.T)
				}{
					{"first start", (*cluster).firstStart}, {"outage", (*cluster).outage}, {"restart of the store",
						(*cluster).restartStore},
					{"credentials", (*cluster).expireToken}, {"authority", (*cluster).renewCA},
				} {
					began := time.Now()
					step.run(c, ctx, t)
					t.Logf("%s: %v", step.name, time.Since(began).Round(time.Millisecond))
				}
				c.lossless(t)
			})
		}
	}
}

// A cluster is a control plane, and nodes of which two run from the start.
type cluster struct {
	*lab.Lab
	kube     *lab.Kube
	args     []string // of the daemons
	pods     []*lab.Pod
	pings    []*lab.Pinging
	peers    int // that are not there, see addPeer
	lastPeer string
}

// newCluster starts a control plane, in which daemons have the rights that are
// published. The arguments are for the API server.
func newCluster(ctx context.Context, t *testing.T, l *lab.Lab, args ...string) *cluster {
	t.Helper()
	c := &cluster{Lab: l, kube: labtest.Must(l.NewKube(ctx, "", args...))(t)}
	labtest.Do(t, c.kube.Install(ctx, string(labtest.Must(os.ReadFile("../../Documentation/kube-flannel.yml"))(t))))
	c.args = labtest.Must(c.kube.DaemonArgs(`{"Network": "10.5.0.0/16", "Backend": {"Type": "host-gw"}}`))(t)
	return c
}

// bindToken gives the daemons a token that ends with a Secret of that name.
func (c *cluster) bindToken(ctx context.Context, t *testing.T, secret string) {
	t.Helper()
	labtest.Must(c.kube.Do(ctx, "POST", "/api/v1/namespaces/kube-flannel/secrets",
		fmt.Appendf(nil, `{"metadata": {"name": %q}}`, secret)))(t)
	labtest.Do(t, c.kube.WriteToken(ctx, fmt.Sprintf(`{"boundObjectRef": {"apiVersion": "v1", "kind": "Secret", "name": %q}}`, secret)))
}

// register makes a node's Node, whose subnet has the number of the node.
func (c *cluster) register(ctx context.Context, t *testing.T, n *lab.Node) {
	t.Helper()
	labtest.Do(t, c.kube.AddNode(ctx, n, fmt.Sprintf("10.5.%d.0/24", n.Number)))
}

// firstStart starts two nodes, one of them before there is a Node.
func (c *cluster) firstStart(ctx context.Context, t *testing.T) {
	early, late := c.Nodes()[0], c.Nodes()[1]
	labtest.Do(t, early.Start(c.args...))
	waitLog(ctx, t, early, 0, `"Waiting for the Node" missing="Node n1"`)
	c.register(ctx, t, early)
	c.register(ctx, t, late)
	labtest.Do(t, late.Start(c.args...))
	for _, n := range c.Nodes()[:2] {
		labtest.Do(t, n.WaitReady(ctx))
		c.pods = append(c.pods, labtest.Must(n.AddPod(ctx, "pod"))(t))
	}
	for i, from := range c.pods {
		c.pings = append(c.pings, labtest.Must(from.StartPing(ctx, c.pods[1-i].IPv4))(t))
	}
	c.join(ctx, t, c.Nodes()[:2])
}

// outage: while nodes cannot reach the API server, one leaves and another
// joins, what they knew is compacted away, and the server starts again.
func (c *cluster) outage(ctx context.Context, t *testing.T) {
	joins := c.Nodes()[2]
	version := c.version(ctx, t)
	labtest.Do(t, c.kube.Cut(ctx))
	leaves := c.leave(ctx, t)
	c.register(ctx, t, joins)
	labtest.Do(t, joins.Start(c.args...))
	c.join(ctx, t, nil)
	labtest.Do(t, c.Etcd.Compact(ctx))
	c.forget(ctx, t, version)
	for _, n := range c.Nodes()[:2] {
		waitRoute(ctx, t, n, leaves, true) // no node knows yet
	}
	labtest.Do(t, c.kube.Restore(ctx))
	labtest.Do(t, joins.WaitReady(ctx))
	for _, n := range c.Nodes() {
		waitRoute(ctx, t, n, c.lastPeer, true)
		waitRoute(ctx, t, n, leaves, false)
	}
	pod := labtest.Must(joins.AddPod(ctx, "pod"))(t)
	for _, other := range c.pods {
		labtest.Do(t, other.WaitPing(ctx, pod.IPv4))
		labtest.Do(t, pod.WaitPing(ctx, other.IPv4))
	}
}

// restartStore ends what the API server keeps its state in.
func (c *cluster) restartStore(ctx context.Context, t *testing.T) {
	c.Etcd.Kill()
	labtest.Do(t, c.Etcd.Start(ctx))
	labtest.Do(t, lab.Poll(ctx, "the API server to find its store again", func() error {
		_, err := c.kube.Do(ctx, "GET", "/readyz", nil)
		return err
	}))
	leaves := c.leave(ctx, t)
	c.join(ctx, t, c.Nodes())
	for _, n := range c.Nodes() {
		waitRoute(ctx, t, n, leaves, false)
	}
}

// expireToken ends the token that daemons have, and later gives them another
// one. The API server starts again, since it remembers whom it has let in.
func (c *cluster) expireToken(ctx context.Context, t *testing.T) {
	logs := c.logs()
	labtest.Must(c.kube.Do(ctx, "DELETE", "/api/v1/namespaces/kube-flannel/secrets/first", nil))(t)
	c.kube.Kill()
	labtest.Do(t, c.kube.Start(ctx))
	for i, n := range c.Nodes() {
		waitLog(ctx, t, n, logs[i], "Unauthorized")
	}
	c.bindToken(ctx, t, "second")
	c.join(ctx, t, c.Nodes())
	c.meddle(ctx, t)
}

// renewCA gives the API server a certificate of another authority, which
// daemons come to trust later.
func (c *cluster) renewCA(ctx context.Context, t *testing.T) {
	logs := c.logs()
	trust := labtest.Must(c.kube.RenewCA())(t)
	c.kube.Kill()
	labtest.Do(t, c.kube.Start(ctx))
	for i, n := range c.Nodes() {
		waitLog(ctx, t, n, logs[i], "x509: ")
	}
	labtest.Do(t, trust())
	c.join(ctx, t, c.Nodes())
	c.meddle(ctx, t)
}

// lossless ends the pings between the first two pods: none may have been lost.
func (c *cluster) lossless(t *testing.T) {
	t.Helper()
	for _, p := range c.pings {
		if got := labtest.Must(p.Stop())(t); len(got.Lost) > 0 {
			t.Errorf("%s: lost %d of %d packets, numbers %v", p, len(got.Lost), got.Sent, got.Lost)
		}
	}
}

// join makes a Node of a machine that is not there, and waits until it is a peer
// on nodes.
func (c *cluster) join(ctx context.Context, t *testing.T, nodes []*lab.Node) {
	t.Helper()
	c.peers++
	c.lastPeer = c.addPeer(ctx, t, 100+c.peers)
	for _, n := range nodes {
		waitRoute(ctx, t, n, c.lastPeer, true)
	}
}

// leave deletes the Node that joined last, and returns its subnet.
func (c *cluster) leave(ctx context.Context, t *testing.T) string {
	t.Helper()
	labtest.Do(t, c.kube.DeleteNode(ctx, fmt.Sprintf("peer%d", 100+c.peers)))
	return c.lastPeer
}

// addPeer makes the Node of a peer with that number, and returns its subnet.
func (c *cluster) addPeer(ctx context.Context, t *testing.T, number int) string {
	t.Helper()
	peer := &lab.Node{
		Hostname: fmt.Sprintf("peer%d", number),
		IPv4:     netip.AddrFrom4([4]byte{198, 18, 0, byte(number)}), IPv6: netip.AddrFrom16([16]byte{0xfd, 0x18,
			15: byte(number)}),
	}
	subnet := fmt.Sprintf("10.5.%d.0/24", number)
	labtest.Do(t, c.kube.AddNode(ctx, peer, subnet))
	labtest.Do(t, c.kube.Annotate(ctx, peer.Hostname, "kube-subnet-manager=true", "backend-type=host-gw",
		"backend-data=null", "public-ip="+peer.IPv4.String()))
	return subnet
}

// meddle removes an annotation of the first node, which its daemon writes again:
// one that peers of host-gw do not need.
func (c *cluster) meddle(ctx context.Context, t *testing.T) {
	t.Helper()
	labtest.Do(t, c.kube.Annotate(ctx, "n1", "backend-data"))
	labtest.Do(t, lab.Poll(ctx, "Node n1 to have its annotation again", func() error {
		n, err := c.kube.Node(ctx, "n1")
		if err == nil && n.Metadata.Annotations["flannel.alpha.coreos.com/backend-data"] != "null" {
			err = fmt.Errorf("the annotations are %v", n.Metadata.Annotations)
		}
		return err
	}))
}

// version returns the version of the list of Nodes that there is now.
func (c *cluster) version(ctx context.Context, t *testing.T) string {
	t.Helper()
	var list struct {
		Metadata struct{ ResourceVersion string }
	}
	labtest.Do(t, json.Unmarshal(labtest.Must(c.kube.Do(ctx, "GET", "/api/v1/nodes", nil))(t), &list))
	return list.Metadata.ResourceVersion
}

// forget restarts the API server, which must then refuse to watch Nodes from a
// version that it has had before.
func (c *cluster) forget(ctx context.Context, t *testing.T, version string) {
	t.Helper()
	c.kube.Kill()
	labtest.Do(t, c.kube.Start(ctx))
	if answer, err := c.kube.Do(ctx, "GET", "/api/v1/nodes?watch=1&timeoutSeconds=1&resourceVersion="+version,
		nil); !strings.Contains(fmt.Sprint(string(answer), err), `"code":410`) {
		t.Errorf("the API server knows version %s still: %s %v", version, answer, err)
	}
}

// logs returns how much each node has logged.
func (c *cluster) logs() []int {
	var lengths []int
	for _, n := range c.Nodes() {
		lengths = append(lengths, len(n.Log()))
	}
	return lengths
}

// waitLog waits until what a daemon has logged, from an offset on, matches.
func waitLog(ctx context.Context, t *testing.T, n *lab.Node, from int, pattern string) {
	t.Helper()
	expression := regexp.MustCompile(pattern)
	labtest.Do(t, lab.Poll(ctx, n.Hostname+" to log: "+pattern, func() error {
		if text := n.Log()[from:]; !expression.MatchString(text) {
			return fmt.Errorf("it has logged\n%s", text)
		}
		return nil
	}))
}

// waitRoute waits until a node has a route to a peer's subnet, or none.
func waitRoute(ctx context.Context, t *testing.T, n *lab.Node, subnet string, present bool) {
	t.Helper()
	labtest.Do(t, lab.Poll(ctx, "the routes of "+n.Hostname, func() error {
		routes, err := n.Run(ctx, "ip route show proto 70")
		if err == nil && strings.Contains(routes, subnet+" via ") != present {
			err = fmt.Errorf("a route to %s should be there: %t; there are\n%s", subnet, present, routes)
		}
		return err
	}))
}
