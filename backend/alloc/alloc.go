// Package alloc leases a subnet for the node, and leaves the routes to the other
// nodes' subnets to the operator or another program. See README.md.
package alloc

import (
	"context"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/subnet"
)

// Type is the backend's name in configurations. Leases carry none.
const Type = "alloc"

func init() { backend.Register(backend.Type{Name: Type, New: New}) }

// options are the backend's keys in the configuration.
type options struct{}

type alloc struct{ mtu int }

// New makes the backend.
func New(cfg *subnet.Config, uplink iface.Uplink) (backend.Backend, error) {
	if err := backend.Options(cfg, &options{}); err != nil {
		return nil, err
	}
	return &alloc{uplink.MTU()}, nil
}

func (a *alloc) Info() backend.Info {
	return backend.Info{MTU: a.mtu, NoPeers: true, ForeignRoutes: true}
}

func (a *alloc) Attrs(context.Context, subnet.Attrs) (subnet.Attrs, error) {
	return subnet.Attrs{}, nil
}

func (a *alloc) Local(subnet.Lease) []kernel.Object { return nil }

func (a *alloc) Peer(subnet.Lease, subnet.Lease) ([]kernel.Object, error) { return nil, nil }
