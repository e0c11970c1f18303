// Command flanneld leases a subnet for this node and keeps the way to the other
// nodes' subnets open.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/network"
	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/subnet/etcd"
	"github.com/flanneld/flanneld/subnet/kube"

	_ "github.com/flanneld/flanneld/backend/alloc"
	_ "github.com/flanneld/flanneld/backend/awsvpc"
	_ "github.com/flanneld/flanneld/backend/extension"
	_ "github.com/flanneld/flanneld/backend/hostgw"
	_ "github.com/flanneld/flanneld/backend/ipip"
	_ "github.com/flanneld/flanneld/backend/ipsec"
	_ "github.com/flanneld/flanneld/backend/udp"
	_ "github.com/flanneld/flanneld/backend/vxlan"
)

// version is set when the program is linked: -ldflags "-X main.version=v1.2.3".
var version = "unknown"

func main() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(50) // the node's memory is the pods'; collecting costs little where little changes
	}
	o, err := parseOptions(os.Args[1:], os.Environ())
	switch {
	case errors.Is(err, errHelp):
		fmt.Print(helpText())
		return
	case errors.Is(err, errVersion):
		fmt.Println(version)
		return
	case err != nil:
		fmt.Fprintf(os.Stderr, "flanneld: %v\n", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	err = run(ctx, o)
	stop()
	if err != nil {
		klog.Errorf("flanneld cannot go on: %v", err)
	} else {
		klog.Info("flanneld ends; the network stays as it is")
	}
	klog.Flush()
	if err != nil {
		os.Exit(1)
	}
}

func run(ctx context.Context, o *options) error {
	klog.Infof("flanneld %s, %s, %s", version, runtime.Version(), strings.Join(o.redacted(), " "))
	for _, w := range o.Warnings {
		klog.Warning(w)
	}
	manager, err := newManager(ctx, o)
	if err != nil {
		return err
	}
	defer manager.Close()
	return network.Run(ctx, network.Options{
		Manager:      manager,
		Uplink:       o.Uplink,
		SubnetFile:   o.SubnetFile,
		IPMasq:       o.IPMasq,
		RandomFully:  !o.IPMasqNotRandom,
		Forward:      o.ForwardRules,
		RulesResync:  o.RulesResync,
		KernelResync: o.KernelResync,
		Blackhole:    o.BlackholeRoute,
		Health:       netip.AddrPortFrom(o.HealthzIP, uint16(o.HealthzPort)),
	})
}

// manager is a subnet manager that can be closed.
type manager interface {
	subnet.Manager
	io.Closer
}

func newManager(ctx context.Context, o *options) (manager, error) {
	if o.KubeSubnetMgr {
		return kube.New(ctx, kube.Options{
			APIURL: o.KubeAPIURL, Kubeconfig: o.KubeconfigFile,
			AnnotationPrefix: o.KubeAnnotationPrefix,
			ConfigPath:       o.NetConfigPath,
			NodeName:         os.Getenv("NODE_NAME"),
			Namespace:        os.Getenv("POD_NAMESPACE"), Pod: os.Getenv("POD_NAME"),
			NodeAddress:  o.IfaceNodeAddress,
			SetCondition: o.SetNodeNetworkUnavailable,
		})
	}
	return etcd.New(ctx, etcd.Options{
		Endpoints: o.EtcdEndpoints, Prefix: o.EtcdPrefix,
		CAFile: o.EtcdCAFile, CertFile: o.EtcdCertFile, KeyFile: o.EtcdKeyFile,
		Username: o.EtcdUsername, Password: string(o.EtcdPassword),
		RenewMargin: o.LeaseRenewMargin,
		Identity:    identity(),
	})
}
