package e2e

import (
	"context"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
	"k8s.io/klog/v2/textlogger"

	"github.com/flanneld/flanneld/network"
	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/subnet/kube"
	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"

	_ "github.com/flanneld/flanneld/backend/vxlan"
)

// embed runs a node's network in the process of the test, in the namespace of the node, until ctx ends. It writes to
// ready when the network is up.
func embed(ctx context.Context, n *lab.Node, kubeconfig, config string, ready chan<- string) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer home.Close()
	space, err := os.Open("/run/netns/" + n.Namespace.Name)
	if err != nil {
		return err
	}
	defer space.Close()
	if err := unix.Setns(int(space.Fd()), unix.CLONE_NEWNET); err != nil {
		return err
	}
	defer unix.Setns(int(home.Fd()), unix.CLONE_NEWNET)
	manager, err := kube.New(ctx, kube.Options{Kubeconfig: kubeconfig, NodeName: n.Hostname, ConfigPath: config,
		NodeAddress: true, SetCondition: true})
	if err != nil {
		return err
	}
	defer manager.Close()
	return network.Run(ctx, network.Options{
		Manager: manager, SubnetFile: n.SubnetFile(), Uplink: iface.Selector{PublicIP: n.IPv4},
		IPMasq: family.Pair[bool]{IPv4: true}, Forward: true,
		Waiting: func(what string) {
			if what == "" {
				ready <- n.Hostname
			}
		},
	})
}

// TestEmbedded: two nodes run in one process, the test's, as k3s embeds flannel, with the same files as k3s writes, and
// a third node runs the daemon. Pods of all of them reach each other.
func TestEmbedded(t *testing.T) {
	t.Parallel()
	labtest.NeedDevice(t, "vxlan id 1")
	ctx := labtest.Context(t, 2*time.Minute)
	l, k := newKube(ctx, t, "10.42.0.0/16", make([]lab.NodeOptions, 3))
	const conf = `{"Network": "10.42.0.0/16", "EnableIPv6": false, "EnableIPv4": true, "IPv6Network": "::/0",
		"Backend": {"Type": "vxlan"}}`
	args := daemonArgs(t, k, conf)
	config := filepath.Join(t.TempDir(), "net-conf.json")
	labtest.Do(t, os.WriteFile(config, []byte(conf), 0o644))
	nodes := l.Nodes()
	for _, n := range nodes {
		labtest.Do(t, k.AddNode(ctx, n))
	}
	inner, stop := context.WithCancel(klog.NewContext(ctx, textlogger.NewLogger(textlogger.NewConfig(
		textlogger.Output(t.Output())))))
	ready, ended := make(chan string, 100), make(chan error, 2)
	for _, n := range nodes[:2] {
		go func() { ended <- embed(inner, n, k.Kubeconfig("flannel"), config, ready) }()
	}
	defer func() {
		stop()
		for range 2 {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
	}()
	labtest.Do(t, nodes[2].Start(args...))
	for range 2 {
		select {
		case <-ready:
		case err := <-ended:
			ended <- nil
			t.Fatalf("an embedded node ends: %v", err)
		case <-ctx.Done():
			t.Fatal("an embedded node is not ready")
		}
	}
	labtest.Do(t, nodes[2].WaitReady(ctx))
	for _, n := range nodes {
		checkNode(ctx, t, k, n, "vxlan")
	}
	checkPaths(ctx, t, l, addPodsTo(ctx, t, nodes))
}
