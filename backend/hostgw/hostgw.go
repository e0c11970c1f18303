// Package hostgw routes pods' packets as they are, with the peer as gateway.
// It needs all nodes on one link. See README.md.
package hostgw

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
const Type = "host-gw"

func init() { backend.Register(Type, New) }

// options are the backend's keys in the configuration.
type options struct{}

type hostgw struct{ uplink iface.Uplink }

// New makes the backend.
func New(cfg *subnet.Config, uplink iface.Uplink) (backend.Backend, error) {
	if err := backend.Options(cfg, &options{}); err != nil {
		return nil, err
	}
	for _, a := range []struct {
		flag        string
		own, public netip.Addr
	}{{"--public-ip", uplink.IPv4, uplink.PublicIP}, {"--public-ipv6", uplink.IPv6, uplink.PublicIPv6}} {
		if a.own != a.public {
			return nil, fmt.Errorf("peers cannot route through %s, which is not an address of %s (that is %s): "+
				"leave out %s, or use the vxlan backend across NAT", a.public, uplink.Name, a.own, a.flag)
		}
	}
	return &hostgw{uplink}, nil
}

func (h *hostgw) MTU() int { return h.uplink.MTU }

func (h *hostgw) Attrs(context.Context, subnet.Attrs) (subnet.Attrs, error) {
	return subnet.Attrs{BackendType: Type}, nil
}

func (h *hostgw) Local(subnet.Lease) []kernel.Object { return nil }

func (h *hostgw) Peer(own, peer subnet.Lease) ([]kernel.Object, error) {
	var objects []kernel.Object
	var errs []error
	for _, f := range backend.Families(own, peer) {
		if !f.On {
			continue
		}
		objects = append(objects, f.Direct(h.uplink))
		// Whether the gateway can be used is for the kernel to say: some
		// clouds give hosts a /32 and a route to the others.
		if !h.uplink.OnLink(f.PublicIP) && !h.single(f.PublicIP) {
			errs = append(errs, fmt.Errorf("its address %s is not on the link of %s (%v): host-gw needs all nodes on one link; "+
				"the vxlan backend does not, and with DirectRouting it does the same where it can", f.PublicIP, h.uplink.Name, h.uplink.Prefixes))
		}
	}
	return objects, errors.Join(errs...)
}

// single tells whether the uplink has host addresses only, of ip's family.
func (h *hostgw) single(ip netip.Addr) bool {
	for _, p := range h.uplink.Prefixes {
		if p.Addr().BitLen() == ip.BitLen() && !p.IsSingleIP() {
			return false
		}
	}
	return true
}
