// Package hostgw routes pods' packets unchanged, with the peer as the gateway. All nodes must be on one link. See
// README.md.
package hostgw

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/subnet"
)

// Type is the backend's name in configurations and leases.
const Type = "host-gw"

func init() { backend.Register(backend.Type{Name: Type, New: New}) }

// options are the backend's keys in the configuration.
type options struct{}

type hostgw struct{ uplink iface.Uplink }

// New makes the backend.
func New(cfg *subnet.Config, uplink iface.Uplink) (backend.Backend, error) {
	if err := backend.Options(cfg, &options{}); err != nil {
		return nil, err
	}
	if err := uplink.CheckPublicIPs(); err != nil {
		return nil, fmt.Errorf("peers cannot route through %w, or use the vxlan backend across NAT", err)
	}
	return &hostgw{uplink}, nil
}

func (h *hostgw) Info() backend.Info { return backend.Info{MTU: h.uplink.MTU()} }

func (h *hostgw) Attrs(context.Context, subnet.Attrs) (subnet.Attrs, error) {
	return subnet.Attrs{BackendType: Type}, nil
}

func (h *hostgw) Local(subnet.Lease) []kernel.Object { return nil }

func (h *hostgw) Peer(own, peer subnet.Lease) ([]kernel.Object, error) {
	var objects []kernel.Object
	var errs []error
	for f, s := range backend.Sides(own, peer).Each() {
		if !s.On {
			continue
		}
		objects = append(objects, s.Direct(h.uplink))
		// Some clouds give hosts a /32 and a route to the others. Then the kernel decides whether the gateway can be used.
		if link := h.uplink.Of(f); !h.uplink.OnLink(s.PublicIP) && !hostAddrsOnly(link) {
			errs = append(errs, fmt.Errorf("its address %s is not on the link of %s (%v): host-gw needs all nodes on one link; "+
				"the vxlan backend does not, and with DirectRouting it does the same where it can",
				s.PublicIP, link.Name, link.Prefixes))
		}
	}
	return objects, backend.JoinErrors(errs)
}

// hostAddrsOnly reports whether all prefixes on a link are single addresses (/32, /128).
func hostAddrsOnly(link iface.Link) bool {
	return !slices.ContainsFunc(link.Prefixes, func(p netip.Prefix) bool { return !p.IsSingleIP() })
}
