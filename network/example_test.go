package network_test

import (
	"context"
	"log"
	"net/netip"
	"os"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/network"
	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/subnet/kube"

	_ "github.com/flanneld/flanneld/backend/vxlan" // or backend/all
)

// mesh is a backend of the program that embeds flannel. It routes the subnet of each peer through the peer itself, over
// a network in which all nodes are neighbours.
type mesh struct{ uplink iface.Uplink }

func newMesh(_ *subnet.Config, uplink iface.Uplink) (backend.Backend, error) {
	return mesh{uplink}, nil
}

func (m mesh) Info() backend.Info { return backend.Info{MTU: m.uplink.MTU()} }

func (m mesh) Attrs(context.Context, subnet.Attrs) (subnet.Attrs, error) {
	return subnet.Attrs{BackendType: "mesh"}, nil
}

func (m mesh) Local(subnet.Lease) []kernel.Object { return nil }

func (m mesh) Peer(own, peer subnet.Lease) (routes []kernel.Object, err error) {
	for _, side := range backend.Sides(own, peer).Each() {
		if side.On {
			routes = append(routes, side.Direct(m.uplink))
		}
	}
	return routes, nil
}

// netConf is for a cluster with IPv4 alone. The network of the other family is not used.
const netConf = `{
	"EnableIPv4": true, "Network": "10.42.0.0/16",
	"EnableIPv6": false, "IPv6Network": "::/0",
	"Backend": {"Type": "vxlan"}
}`

// An agent of a Kubernetes distribution runs flannel in its own process, as k3s does. The leases come from the API server
// that a kubeconfig names.
func Example() {
	backend.Register(backend.Type{Name: "mesh", New: newMesh}) // {"Type": "mesh"} works, too

	const config = "/var/lib/agent/net-conf.json"
	if err := os.WriteFile(config, []byte(netConf), 0o644); err != nil {
		log.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background()) // klog.NewContext gives it a logger
	defer stop()
	manager, err := kube.New(ctx, kube.Options{
		Kubeconfig: "/var/lib/agent/flannel.kubeconfig",
		NodeName:   "node1",
		ConfigPath: config,
	})
	if err != nil {
		log.Fatal(err)
	}
	defer manager.Close()
	ready := make(chan struct{}, 1)
	ended := make(chan error, 1)
	go func() {
		ended <- network.Run(ctx, network.Options{
			Manager:    manager,
			Uplink:     iface.Selector{PublicIP: netip.MustParseAddr("192.0.2.7")}, // the node's address
			SubnetFile: "/run/flannel/subnet.env",
			IPMasq:     family.Pair[bool]{IPv4: true, IPv6: false},
			Forward:    true,
			Metrics:    prometheus.DefaultRegisterer,
			Waiting: func(what string) {
				if what != "" {
					log.Print("flannel waits for ", what)
					return
				}
				select {
				case ready <- struct{}{}:
				default: // it is ready again
				}
			},
		})
	}()
	select {
	case <-ready: // pods can start
	case err := <-ended:
		log.Fatal("flannel cannot work: ", err)
	}

	// When the agent ends, the network stays for the pods.
	stop()
	if err := <-ended; err != nil {
		log.Print(err)
	}
}
