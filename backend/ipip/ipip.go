// Package ipip carries pods' IPv4 packets inside IPv4 packets, in the kernel (RFC
// 2003). The node has one device, and for each peer a route on it whose gateway
// is the peer's own address. See README.md.
package ipip

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/subnet"
)

// Type is the backend's name in configurations and leases.
const Type = "ipip"

const (
	device   = "flannel.ipip"
	overhead = 20  // the outer IP header
	leastMTU = 576 // what a host must be able to receive (RFC 791)
)

func init() { backend.Register(Type, New) }

// options are the backend's keys in the configuration. What is said of them here
// is what README.md says: make docs writes it there.
type options struct {
	// a peer on the uplink's own link is routed to without a second header
	DirectRouting bool
}

type ipip struct {
	options
	uplink iface.Uplink
}

// New makes the backend.
func New(cfg *subnet.Config, uplink iface.Uplink) (backend.Backend, error) {
	b := &ipip{uplink: uplink}
	if err := backend.Options(cfg, &b.options); err != nil {
		return nil, err
	}
	if cfg.IPv6.Enabled() {
		return nil, errors.New("it carries IPv4 only: set EnableIPv6 to false, or use the vxlan backend, which carries both")
	}
	if b.MTU() < leastMTU {
		return nil, fmt.Errorf("MTU %d of the uplink %s leaves %d for pods: it must be at least %d", uplink.MTU, uplink.Name, b.MTU(), leastMTU+overhead)
	}
	return b, nil
}

func (b *ipip) MTU() int { return b.uplink.MTU - overhead }

func (b *ipip) Attrs(context.Context, subnet.Attrs) (subnet.Attrs, error) {
	return subnet.Attrs{BackendType: Type}, nil
}

func (b *ipip) Local(own subnet.Lease) []kernel.Object {
	base := own.IPv4.Addr()
	return []kernel.Object{
		kernel.Link{Name: device, MTU: b.MTU(), Type: kernel.IPIP{Local: b.uplink.IPv4}},
		// A host address, so that there is no broadcast. It is what the node
		// itself sends from to remote pods.
		kernel.Addr{Dev: device, Prefix: netip.PrefixFrom(base, base.BitLen())},
	}
}

func (b *ipip) Peer(own, peer subnet.Lease) ([]kernel.Object, error) {
	var objects []kernel.Object
	for _, f := range backend.Families(own, peer) {
		if !f.On {
			continue
		}
		route := f.Direct(b.uplink)
		if !b.DirectRouting || !b.uplink.OnLink(f.PublicIP) {
			route.Dev, route.Onlink = device, true
		}
		objects = append(objects, route)
	}
	return objects, nil
}

// Endpoints implements backend.Tunnel.
func (b *ipip) Endpoints() []backend.Endpoint {
	return []backend.Endpoint{{Addr: b.uplink.IPv4, Protocol: "4"}}
}
