// Package ipip carries pods' IPv4 packets inside IPv4 packets, in the kernel (RFC 2003). The node has one device, and
// for each peer a route on the device, with the peer's own address as the gateway. See README.md.
package ipip

import (
	"context"
	"errors"
	"regexp"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/subnet"
)

// Type is the backend's name in configurations and leases.
const Type = "ipip"

const device = "flannel.ipip"

func init() {
	backend.Register(backend.Type{Name: Type, New: New, Devices: regexp.QuoteMeta(device)})
}

// options are the backend's keys in the configuration. make docs writes the comments of the fields into README.md.
type options struct {
	// packets to a peer on the uplink's link are sent without the outer header
	DirectRouting bool
}

type ipip struct {
	options
	uplink iface.Uplink
	info   backend.Info
}

// New makes the backend.
func New(cfg *subnet.Config, uplink iface.Uplink) (backend.Backend, error) {
	b := &ipip{uplink: uplink}
	if err := backend.Options(cfg, &b.options); err != nil {
		return nil, err
	}
	if cfg.IPv6.Enabled() {
		return nil, errors.New("only IPv4 is supported: set EnableIPv6 to false, " +
			"or use the vxlan backend, which carries both families")
	}
	var err error
	_, b.info, err = backend.PodMTU(cfg, uplink, 0, family.Family.HeaderLen) // the outer IP header
	b.info.Endpoints = []backend.Endpoint{{Addr: uplink.IPv4.Addr, Protocol: "4"}}
	return b, err
}

func (b *ipip) Info() backend.Info { return b.info }

func (b *ipip) Attrs(context.Context, subnet.Attrs) (subnet.Attrs, error) {
	return subnet.Attrs{BackendType: Type}, nil
}

func (b *ipip) Local(own subnet.Lease) []kernel.Object {
	return []kernel.Object{
		kernel.Link{Name: device, MTU: b.info.MTU, Type: kernel.IPIP{Local: b.uplink.IPv4.Addr}},
		backend.HostAddr(device, own.IPv4),
	}
}

func (b *ipip) Peer(own, peer subnet.Lease) ([]kernel.Object, error) {
	var objects []kernel.Object
	for _, s := range backend.Sides(own, peer).Each() {
		if !s.On {
			continue
		}
		route := s.Direct(b.uplink)
		if !b.DirectRouting || !b.uplink.OnLink(s.PublicIP) {
			route.Dev, route.Onlink = device, true
		}
		objects = append(objects, route)
	}
	return objects, nil
}
