package e2e

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

const dualConfig = `{` + ipv4Network + `, ` + ipv6Network + `, "Backend": {"Type": %q}}`

// newKube makes a lab with a control plane, and no more rights for the daemons
// than are published.
func newKube(ctx context.Context, t *testing.T, nodes int, args ...string) (*lab.Lab, *lab.Kube) {
	t.Helper()
	l := labtest.New(ctx, t, "{}", make([]lab.NodeOptions, nodes)...)
	k := labtest.Must(l.NewKube(ctx, "10.5.0.0/16,fd00:5::/48", args...))(t)
	labtest.Do(t, k.Apply(ctx, string(labtest.Must(os.ReadFile("../../dist/kubernetes/rbac.yaml"))(t))))
	return l, k
}

// TestKubernetes: subnets come from podCIDRs, peers from the other Nodes, and
// what happens while the API server is away is caught up with.
func TestKubernetes(t *testing.T) {
	for backend, args := range map[string][]string{
		"vxlan":   nil,
		"host-gw": {"--feature-gates=WatchList=false"}, // as servers before 1.32: the state comes in pages
	} {
		t.Run(backend, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t, 4*time.Minute)
			l, k := newKube(ctx, t, 4, args...)
			args := append(labtest.Must(k.DaemonArgs(fmt.Sprintf(dualConfig, backend)))(t), "--ip-masq")
			nodes := l.Nodes()
			early, rest, late := nodes[0], nodes[1:3], nodes[3]

			// One starts before there is a Node.
			labtest.Do(t, early.Start(args...))
			labtest.Do(t, lab.Poll(ctx, "the daemon to say what it waits for", func() error {
				if !strings.Contains(early.Log(), "Waiting for Node n1") {
					return fmt.Errorf("it says\n%s", early.Log())
				}
				return nil
			}))
			labtest.Do(t, k.AddNode(ctx, early))
			for _, n := range rest {
				labtest.Do(t, k.AddNode(ctx, n))
				labtest.Do(t, n.Start(args...))
			}
			for _, n := range nodes[:3] {
				labtest.Do(t, n.WaitReady(ctx))
			}
			for _, n := range nodes[:3] {
				checkNode(ctx, t, k, n, backend)
			}
			pods := addPodsTo(ctx, t, nodes[:3])
			checkPaths(ctx, t, l, pods)

			// Somebody meddles.
			_, err := k.Do(ctx, "PATCH", "/api/v1/nodes/n1", []byte(`{"metadata":{"annotations":{"flannel.alpha.coreos.com/public-ip":"192.0.2.1","flannel.alpha.coreos.com/kube-subnet-manager":"false"}}}`))
			labtest.Do(t, err)
			labtest.Do(t, lab.Poll(ctx, "the annotations to be right again", func() error {
				return nodeIs(ctx, k, early, backend)
			}))

			// The API server dies; meanwhile a node goes and another comes.
			lossless := startPings(ctx, t, pods)
			gone := nodes[2]
			route := trace{"ip route show proto 70", labtest.Must(gone.SubnetEnv())(t).Subnets.IPv4.String() + " via "}
			waitTraces(ctx, t, early, []trace{route}, true)
			labtest.Do(t, gone.Stop(ctx))
			k.Kill()
			labtest.Must(pods[0].Ping(ctx, pods[1].IPv4, lab.PingOptions{Count: 250}))(t) // five seconds
			labtest.Do(t, late.Start(args...))
			labtest.Do(t, k.Start(ctx))
			labtest.Do(t, k.DeleteNode(ctx, gone.Hostname))
			labtest.Do(t, k.AddNode(ctx, late))
			labtest.Do(t, late.WaitReady(ctx))
			for _, n := range nodes[:2] {
				waitTraces(ctx, t, n, []trace{route}, false)
			}
			pod := labtest.Must(late.AddPod(ctx, "pod"))(t)
			labtest.Do(t, pods[0].WaitPing(ctx, pod.IPv4))
			labtest.Do(t, pod.WaitPing(ctx, pods[0].IPv6))
			lossless()
		})
	}
}

func addPodsTo(ctx context.Context, t *testing.T, nodes []*lab.Node) []*lab.Pod {
	t.Helper()
	var pods []*lab.Pod
	for _, n := range nodes {
		pods = append(pods, labtest.Must(n.AddPod(ctx, "pod"))(t))
	}
	return pods
}

// checkNode waits until a Node says all that it should of a daemon that is
// ready.
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
	for key, want := range map[string]string{
		"kube-subnet-manager": "true", "backend-type": backend, "public-ip": n.IPv4.String(), "public-ipv6": n.IPv6.String(),
	} {
		if a := got.Metadata.Annotations["flannel.alpha.coreos.com/"+key]; a != want {
			return fmt.Errorf("annotation %s is %q, want %q", key, a, want)
		}
	}
	data := got.Metadata.Annotations["flannel.alpha.coreos.com/backend-data"]
	if backend == "vxlan" && !strings.HasPrefix(data, `{"VNI":1,"VtepMAC":"`) || backend == "host-gw" && data != "null" {
		return fmt.Errorf("annotation backend-data is %q", data)
	}
	for _, c := range got.Status.Conditions {
		if c.Type == "NetworkUnavailable" && c.Status == "False" && c.Reason == "FlannelIsUp" && c.Message == "Flannel is running on this node" {
			return nil
		}
	}
	return fmt.Errorf("conditions are %+v", got.Status.Conditions)
}
