package settings

import (
	"context"
	"io"
	"net/netip"
	"os"

	"github.com/flanneld/flanneld/network"
	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/subnet/etcd"
	"github.com/flanneld/flanneld/subnet/kube"
)

// Network returns the options of the main loop.
func (o *Options) Network(m Manager) network.Options {
	return network.Options{
		Manager:      m,
		Uplink:       o.Uplink,
		SubnetFile:   o.SubnetFile,
		StatusSocket: o.StatusSocket,
		IPMasq:       o.IPMasq,
		RandomFully:  !o.IPMasqNotRandom,
		Forward:      o.ForwardRules,
		RulesResync:  o.RulesResync,
		KernelResync: o.KernelResync,
		Blackhole:    o.BlackholeRoute,
		Health:       netip.AddrPortFrom(o.HealthzIP, uint16(o.HealthzPort)),
		Profile:      o.Profile,
	}
}

// A Manager is a subnet manager that can be closed.
type Manager interface {
	subnet.Manager
	io.Closer
}

// Manager returns the subnet manager that the options choose. It does not talk to
// its store yet.
func (o *Options) Manager(ctx context.Context) (Manager, error) {
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
