package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
)

// ClusterOptions for a cluster.
type ClusterOptions struct {
	Nodes       int
	ProxyMode   string // kube-proxy's: iptables or nftables
	ClusterCIDR string // of the pods, for kube-controller-manager and kube-proxy
}

// A Cluster is a whole one: a control plane with a scheduler and all
// controllers, and nodes with containerd, kubelet and kube-proxy. Pods come from
// the API server rather than from AddPod, their images from Import. There is no
// pod network: nodes are not Ready until something puts a configuration into
// /etc/cni/net.d. All else that a node needs is there, CNI's standard plugins
// included. Nothing is privileged, nor may be.
type Cluster struct {
	*Kube
	Nodes []*Node
}

// More users, with the rights that Kubernetes gives these names.
const (
	kubeScheduler = "system:kube-scheduler"
	KubeProxy     = "system:kube-proxy"
)

// NewCluster starts a cluster, on nodes that it adds to the lab. They are
// registered when it returns.
func (l *Lab) NewCluster(ctx context.Context, o ClusterOptions) (*Cluster, error) {
	k, err := l.NewKube(ctx, "", "--authorization-mode=Node", "--kubelet-preferred-address-types=InternalIP")
	if err != nil {
		return nil, err
	}
	if err := k.StartControllers(o.ClusterCIDR, "--controllers=*"); err != nil {
		return nil, err
	}
	if err := errors.Join(k.AddUser(kubeScheduler), k.AddUser(KubeProxy)); err != nil {
		return nil, err
	}
	if _, err := k.launch("kube/kube-scheduler", "--kubeconfig="+k.Kubeconfig(kubeScheduler), "--leader-elect=false",
		"--bind-address=127.0.0.1"); err != nil {
		return nil, err
	}
	c := &Cluster{Kube: k}
	for range o.Nodes {
		n, err := l.AddNode(ctx, NodeOptions{})
		if err != nil {
			return nil, err
		}
		c.Nodes = append(c.Nodes, n)
	}
	if err := c.each(func(n *Node) error { return n.furnish(ctx) }); err != nil {
		return nil, err
	}
	for _, image := range []string{pauseImage, echoImage} {
		file, err := l.makeImage(ctx, image)
		if err != nil {
			return nil, err
		}
		if err := c.Import(ctx, file); err != nil {
			return nil, err
		}
	}
	return c, c.each(func(n *Node) error {
		if err := n.startKubelet(k); err != nil {
			return err
		}
		err := Poll(ctx, "node "+n.Hostname+" to register", func() error {
			_, err := c.Node(ctx, n.Hostname)
			return err
		})
		if err != nil {
			return fmt.Errorf("%w\n%s", err, tail(n.logOf("kubelet")))
		}
		_, err = n.StartProxy(k, o.ProxyMode, o.ClusterCIDR)
		return err
	})
}

// each does something on all nodes at once.
func (c *Cluster) each(do func(*Node) error) error {
	errs := make([]error, len(c.Nodes))
	var wg sync.WaitGroup
	for i, n := range c.Nodes {
		wg.Go(func() { errs[i] = do(n) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// Import gives every node the images of a file that `docker save` wrote.
func (c *Cluster) Import(ctx context.Context, file string) error {
	if _, err := os.Stat(file); err != nil {
		return fmt.Errorf("%w: run make image", err)
	}
	return c.each(func(n *Node) error {
		_, err := n.run(ctx, "", "ctr", "--namespace=k8s.io", "images", "import", file)
		return err
	})
}

// A ClusterPod has the fields of a pod that tests read.
type ClusterPod struct {
	Metadata struct{ Name, Namespace, UID string }
	Spec     struct{ NodeName string }
	Status   struct{ PodIP netip.Addr }
}

// Pods lists the pods of a namespace with a label, such as app=echo.
func (c *Cluster) Pods(ctx context.Context, namespace, label string) ([]ClusterPod, error) {
	text, err := c.Kubectl(ctx, "get", "pods", "--namespace="+namespace, "--selector="+label, "--output=json")
	if err != nil {
		return nil, err
	}
	var list struct{ Items []ClusterPod }
	err = json.Unmarshal([]byte(text), &list)
	return list.Items, err
}

// Enter makes a pod's network namespace one of the lab's, unless it is already.
func (c *Cluster) Enter(ctx context.Context, p ClusterPod) (*Namespace, error) {
	name := fmt.Sprintf("%s-%s-%s", c.lab.Name, p.Spec.NodeName, p.Metadata.Name)
	if ns := c.lab.owned(name); ns != nil {
		return ns, nil
	}
	pids, err := c.Processes(p)
	if err != nil {
		return nil, err
	}
	if err := ip(ctx, "netns attach "+name+" "+pids[0]); err != nil {
		return nil, err
	}
	ns, err := inhabit(name, c.lab.keep, nil)
	if err != nil {
		return nil, err
	}
	c.lab.own(ns)
	return ns, nil
}

// Processes lists the ids of a pod's processes: at least one, or it is an error.
func (c *Cluster) Processes(p ClusterPod) ([]string, error) {
	dirs, err := cgroupDirs(c.lab.Name + "-" + p.Spec.NodeName)
	if err != nil {
		return nil, err
	}
	var pids []string
	for _, dir := range dirs {
		if strings.Contains(dir, "/pod"+p.Metadata.UID+"/") {
			pids = append(pids, cgroupProcs(dir)...)
		}
	}
	if len(pids) == 0 {
		return nil, fmt.Errorf("pod %s has no process", p.Metadata.Name)
	}
	slices.Sort(pids)
	return slices.Compact(pids), nil // once for each controller
}
