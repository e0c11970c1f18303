package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/flanneld/flanneld/test/lab"
)

// manifest is what a user applies, as seen from the repository.
const manifest = "Documentation/kube-flannel.yml"

// cluster is a demo of a Kubernetes cluster: the commands that a user gives it,
// and what they print.
type cluster struct {
	*demo
	*lab.Cluster
}

func (d *demo) showKube(ctx context.Context, s settings) error {
	proxy := "iptables"
	if s.nftables {
		proxy = "nftables"
	}
	heading(fmt.Sprintf("A cluster of %d nodes with containerd, kubelet and kube-proxy (%s), without a network",
		s.nodes, proxy))
	started := time.Now()
	k, err := d.NewCluster(ctx, lab.ClusterOptions{Nodes: s.nodes, ProxyMode: proxy, ClusterCIDR: "10.244.0.0/16"})
	if err != nil {
		return err
	}
	if err := k.Import(ctx, filepath.Join(d.Build, "image", "flannel-"+runtime.GOARCH+".tar")); err != nil {
		return err
	}
	c := &cluster{demo: d, Cluster: k}
	fmt.Printf("  up after %.1f s\n", time.Since(started).Seconds())
	c.kubectl(ctx, "get nodes")

	heading("The network")
	text, err := os.ReadFile(filepath.Join(d.Build, "..", manifest))
	if err != nil {
		return err
	}
	started = time.Now()
	c.apply(ctx, manifest, string(text))
	c.kubectl(ctx, "-n kube-flannel rollout status --timeout=90s daemonset/kube-flannel-ds")
	c.kubectl(ctx, "wait nodes --all --for=condition=Ready --timeout=60s")
	fmt.Printf("  after %.1f s\n", time.Since(started).Seconds())
	c.kubectl(ctx, "get nodes")
	c.kubectl(ctx, "-n kube-flannel get pods -o wide")

	heading("Pods, and a Service")
	c.apply(ctx, "test/lab/echo.yaml", lab.Echo)
	c.kubectl(ctx, "rollout status --timeout=90s deployment/echo")
	c.kubectl(ctx, "get pods,services -l app=echo -o wide")
	pods, err := c.Pods(ctx, "default", "app=echo")
	if err != nil {
		return err
	}
	service, err := c.Kubectl(ctx, "get", "service", "echo", "--output=jsonpath={.spec.clusterIP}")
	if err != nil || len(pods) < 2 {
		return fmt.Errorf("%d pods, %w", len(pods), err)
	}

	heading("A pod calls another on another node: who answers, and whom it saw")
	for i, p := range pods[:2] {
		c.kubectl(ctx, "exec "+p.Metadata.Name+" -- /echo "+pods[1-i].Status.PodIP.String()+":8080")
	}
	heading("A pod calls the Service")
	call := "exec " + pods[0].Metadata.Name + " -- /echo " + service + ":80"
	err = lab.Poll(ctx, "kube-proxy", func() error {
		_, err := c.Kubectl(ctx, strings.Fields(call)...)
		return err
	})
	if err != nil {
		return err
	}
	for range 4 {
		c.kubectl(ctx, call)
	}

	heading("A rolling update of the network while a pod pings the other, 50 packets a second")
	return c.update(ctx, pods)
}

// update restarts the DaemonSet's pods, and counts what gets lost meanwhile.
func (c *cluster) update(ctx context.Context, pods []lab.ClusterPod) error {
	ns, err := c.Enter(ctx, pods[0])
	if err != nil {
		return err
	}
	ping, err := ns.StartPing(ctx, pods[1].Status.PodIP)
	if err != nil {
		return err
	}
	c.kubectl(ctx, "-n kube-flannel rollout restart daemonset/kube-flannel-ds")
	c.kubectl(ctx, "-n kube-flannel rollout status --timeout=90s daemonset/kube-flannel-ds")
	got, err := ping.Stop()
	if err == nil && len(got.Lost) > 0 {
		err = fmt.Errorf("of %d packets these were lost: %d", got.Sent, got.Lost)
	}
	if err != nil {
		return err
	}
	fmt.Printf("  %d of %d packets answered\n", got.Received, got.Sent)
	return nil
}

// kubectl shows a command and what it prints.
func (c *cluster) kubectl(ctx context.Context, line string) {
	fmt.Printf("  $ kubectl %s\n", line)
	c.print(c.Kubectl(ctx, strings.Fields(line)...))
}

// apply shows how a file of the repository is applied.
func (c *cluster) apply(ctx context.Context, file, text string) {
	fmt.Printf("  $ kubectl apply -f %s\n", file)
	c.print(c.KubectlApply(ctx, text))
}

func (c *cluster) print(out string, err error) {
	if err != nil {
		c.fail(err)
		return
	}
	for line := range strings.Lines(out) {
		fmt.Printf("  %s\n", strings.TrimRight(line, " \n"))
	}
}

// hintsKube is hints for showKube.
func (d *demo) hintsKube(w io.Writer) {
	fmt.Fprintf(w, "  ip netns exec %s-net %s/kube/kubectl --kubeconfig=%s/kube/admin.kubeconfig get pods -A\tgive it orders\n", d.Name, d.Build, d.Dir)
	fmt.Fprintf(w, "  ip netns exec %s-n1 ip route\tlook at a node's network\n", d.Name)
	fmt.Fprintf(w, "  less %s/n1/kubelet.log\tread what its programs said\n", d.Dir)
}
