package lab

import (
	"cmp"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// ClusterOptions for a cluster.
type ClusterOptions struct {
	Nodes       int
	ProxyMode   string // kube-proxy's: iptables or nftables
	ClusterCIDR string // of the pods, for kube-controller-manager and kube-proxy; two with a comma are dual stack

	// ServiceCIDR is where Services have their addresses, of one family or of both, with a comma. Empty: a few of IPv4.
	ServiceCIDR string
	// DNS gives the cluster a DNS, CoreDNS, which pods ask first: they know no other.
	DNS bool
	// Privileged lets pods be privileged, which none is otherwise.
	Privileged bool
}

// families returns in which families nodes and pods have addresses.
func (o ClusterOptions) families() (v4, v6 bool) {
	for _, cidr := range strings.Split(o.ClusterCIDR, ",") {
		six := strings.Contains(cidr, ":")
		v4, v6 = v4 || !six, v6 || six
	}
	return v4, v6
}

// apiServerArgs are the arguments of the API server besides those of every control plane.
func (o ClusterOptions) apiServerArgs() []string {
	args := []string{"--authorization-mode=Node", "--kubelet-preferred-address-types=InternalIP"}
	if o.Privileged {
		args = append(args, "--allow-privileged")
	}
	if o.ServiceCIDR != "" {
		args = append(args, "--service-cluster-ip-range="+o.ServiceCIDR)
	}
	if strings.Contains(firstOf(o.ServiceCIDR), ":") {
		args = append(args, "--bind-address=::", "--advertise-address="+GatewayV6.String())
	}
	return args
}

// dnsIP is the tenth address of Services, which the cluster's DNS has.
func (o ClusterOptions) dnsIP() (string, error) {
	services, err := netip.ParsePrefix(cmp.Or(firstOf(o.ServiceCIDR), serviceRange))
	if err != nil {
		return "", fmt.Errorf("addresses of Services: %w", err)
	}
	bytes := services.Addr().AsSlice()
	bytes[len(bytes)-1] = 10
	ip, _ := netip.AddrFromSlice(bytes)
	return ip.String(), nil
}

// firstOf returns what is before a comma.
func firstOf(list string) string {
	first, _, _ := strings.Cut(list, ",")
	return first
}

// dns is a manifest: CoreDNS and its Service.
//
//go:embed coredns.yaml
var dns string

// A Cluster is a whole one: a control plane with a scheduler and all
// controllers, and nodes with containerd, kubelet and kube-proxy. Pods come from
// the API server rather than from AddPod, their images from Import. There is no
// pod network: nodes are not Ready until something puts a configuration into
// /etc/cni/net.d. All else that a node needs is there, CNI's standard plugins
// included. Nothing is privileged, nor may be, without the option for that.
type Cluster struct {
	*Kube
	Nodes []*Node

	options ClusterOptions
}

// More users, with the rights that Kubernetes gives these names.
const (
	kubeScheduler = "system:kube-scheduler"
	KubeProxy     = "system:kube-proxy"
)

// NewCluster starts a cluster, on nodes that it adds to the lab. They are
// registered when it returns.
func (l *Lab) NewCluster(ctx context.Context, o ClusterOptions) (*Cluster, error) {
	k, err := l.NewKube(ctx, "", o.apiServerArgs()...)
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
	c := &Cluster{Kube: k, options: o}
	for range o.Nodes {
		n, err := l.AddNode(ctx, NodeOptions{})
		if err != nil {
			return nil, err
		}
		c.Nodes = append(c.Nodes, n)
	}
	if err := c.each(func(n *Node) error { return n.furnish(ctx, o) }); err != nil {
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
	if o.DNS {
		if err := c.startDNS(ctx); err != nil {
			return nil, err
		}
	}
	return c, c.each(func(n *Node) error {
		if err := n.startKubelet(k, o); err != nil {
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

// startDNS gives the nodes CoreDNS, whose pods start once there are nodes and a pod network.
func (c *Cluster) startDNS(ctx context.Context) error {
	program, err := c.lab.Program("conformance/coredns")
	if err != nil {
		return err
	}
	file, err := c.lab.WriteImage(Image{Names: []string{dnsImage}, Files: map[string]string{"/coredns": program},
		Entrypoint: []string{"/coredns"}})
	if err != nil {
		return err
	}
	if err := c.Import(ctx, file); err != nil {
		return err
	}
	ip, err := c.options.dnsIP()
	if err != nil {
		return err
	}
	return Poll(ctx, "the namespace kube-system", func() error {
		return c.Apply(ctx, strings.ReplaceAll(dns, "clusterIP: IP", "clusterIP: "+strconv.Quote(ip)))
	})
}

// podTable is the table with the control plane's routes to pods.
const podTable = "100"

// RoutePods lets the control plane reach pods by way of their nodes, as the API server does for kubectl proxy and
// webhooks: it is on no node. The nodes must have their podCIDRs. What the control plane's namespace forwards, as the
// nodes' default gateway, does not use these routes: packets that a node has no route for must get lost.
func (c *Cluster) RoutePods(ctx context.Context) error {
	var lines []string
	for _, n := range c.Nodes {
		node, err := c.Node(ctx, n.Hostname)
		if err != nil {
			return err
		}
		if len(node.Spec.PodCIDRs) == 0 {
			return fmt.Errorf("node %s has no podCIDR", n.Hostname)
		}
		for _, cidr := range node.Spec.PodCIDRs {
			via := n.IPv4
			if strings.Contains(cidr, ":") {
				via = n.IPv6
			}
			lines = append(lines, "route replace "+cidr+" via "+via.String()+" table "+podTable)
		}
	}
	for _, family := range []string{"-4", "-6"} {
		if _, err := c.lab.net.Run(ctx, "ip "+family+" rule add iif lo lookup "+podTable); err != nil {
			return err
		}
	}
	return c.lab.net.Script(ctx, lines...)
}

// Launch starts a program where the control plane is, from where nodes, and after RoutePods pods, are reached.
func (c *Cluster) Launch(cmd *exec.Cmd) (*Process, error) { return c.lab.net.Launch(cmd) }

// AdminKubeconfig is the path of an administrator's credentials.
func (c *Cluster) AdminKubeconfig() string { return c.Kubeconfig(kubeAdmin) }

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
