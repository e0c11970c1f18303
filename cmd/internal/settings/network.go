package settings

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/flanneld/flanneld/network"
	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/subnet/etcd"
	"github.com/flanneld/flanneld/subnet/kube"
)

// LeaseFile returns the path of the file in which a node with etcd keeps its lease: beside the subnet file.
func (o *Options) LeaseFile() string { return o.SubnetFile + ".lease" }

// Network returns the options of network.Run, but for those that concern the process.
func (o *Options) Network(m subnet.Manager) network.Options {
	n := network.Options{
		Manager:      m,
		Uplink:       o.Uplink,
		SubnetFile:   o.SubnetFile,
		Name:         o.NetworkName(),
		StatusSocket: o.StatusSocket,
		IPMasq:       family.Pair[bool]{IPv4: o.IPMasq && o.IPMasqFamilies.IPv4, IPv6: o.IPMasq && o.IPMasqFamilies.IPv6},
		RandomFully:  !o.IPMasqNotRandom,
		Forward:      o.ForwardRules,
		RulesResync:  o.RulesResync,
		KernelResync: o.KernelResync,
		Blackhole:    o.BlackholeRoute,
		RouteTable:   o.RouteTable,
		RulePriority: o.RulePriority,
		PeerMetrics:  o.ProbePeerMetrics,
		Health:       netip.AddrPortFrom(o.HealthzIP, uint16(o.HealthzPort)),
	}
	if o.ProbePeers {
		n.ProbeInterval = o.ProbeInterval
	}
	return n
}

// NetworkName returns the name of the network on this host, where several networks may be: the name of the subnet file
// without ".env", but "" for subnet.env.
func (o *Options) NetworkName() string {
	name := strings.TrimSuffix(filepath.Base(o.SubnetFile), ".env")
	if name == "subnet" {
		return ""
	}
	return name
}

// managers are the constructors of the subnet managers, by name (the Kind of the manager's State). Each constructor has
// options of its own type: these functions fill them in from the flags.
var managers = map[string]func(context.Context, *Options) (subnet.Manager, error){
	"etcd": func(ctx context.Context, o *Options) (subnet.Manager, error) {
		return etcd.New(ctx, etcd.Options{
			Endpoints: o.EtcdEndpoints, Prefix: o.EtcdPrefix,
			DiscoverySRV: o.DiscoverySRV, DiscoverySRVName: o.DiscoverySRVName,
			CAFile: o.EtcdCAFile, CertFile: o.EtcdCertFile, KeyFile: o.EtcdKeyFile,
			Username: o.EtcdUsername, Password: string(o.EtcdPassword),
			RenewMargin: o.LeaseRenewMargin,
			Identity:    identity(),
			LeaseFile:   o.LeaseFile(),
		})
	},
	"kubernetes": func(ctx context.Context, o *Options) (subnet.Manager, error) {
		return kube.New(ctx, kube.Options{
			APIURL: o.KubeAPIURL, Kubeconfig: o.KubeconfigFile,
			AnnotationPrefix: o.KubeAnnotationPrefix,
			ConfigPath:       o.NetConfigPath,
			NodeName:         os.Getenv("NODE_NAME"),
			Namespace:        os.Getenv("POD_NAMESPACE"), Pod: os.Getenv("POD_NAME"),
			NodeAddress:  o.IfaceNodeAddress,
			SetCondition: o.SetNodeNetworkUnavailable,
		})
	},
}

// manager returns the name of the subnet manager that the options choose.
func (o *Options) manager() string {
	if o.KubeSubnetMgr {
		return "kubernetes"
	}
	return "etcd"
}

// Manager returns the subnet manager that the options choose. The manager does not use its store yet.
func (o *Options) Manager(ctx context.Context) (subnet.Manager, error) {
	return managers[o.manager()](ctx, o)
}
