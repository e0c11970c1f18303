// Package udp carries pods' packets in UDP, each as it is in one datagram, by a
// proxy between a TUN device and a socket. See README.md.
package udp

import (
	"context"
	"fmt"
	"net/netip"
	"sync/atomic"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/subnet"
)

// Type is the backend's name in configurations. Leases carry none.
const Type = "udp"

const device = "flannel0"

func init() { backend.Register(Type, New) }

// options are the backend's keys in the configuration. What is said of them here
// is what README.md says: make docs writes it there.
type options struct {
	// UDP port to send to, to send from and to listen on, 1 to 65535
	Port int
}

var defaults = options{Port: 8285}

type udp struct {
	options
	networks subnet.Subnets
	local    [2]netip.Addr // what the sockets are bound to, for IPv4 and IPv6
	mtu      int
	able     abilities
	queues   int
	running  atomic.Pointer[proxy] // by Work
}

var (
	_ backend.Worker  = (*udp)(nil)
	_ backend.Metered = (*udp)(nil)
)

// New makes the backend.
func New(cfg *subnet.Config, uplink iface.Uplink) (backend.Backend, error) {
	u := &udp{
		options:  defaults,
		networks: cfg.Networks(),
		able:     everything,
		queues:   queues,
	}
	if err := backend.Options(cfg, &u.options); err != nil {
		return nil, err
	}
	if u.Port < 1 || u.Port > 65535 {
		return nil, fmt.Errorf("Port %d is not allowed: 1 to 65535", u.Port)
	}
	for i, f := range []struct {
		pool     subnet.Pool
		local    netip.Addr
		overhead int // UDP 8, and the outer IP header
		least    int // what a host, or a link, must be able to carry
	}{
		{cfg.IPv4, uplink.IPv4, 8 + 20, 576},  // RFC 791
		{cfg.IPv6, uplink.IPv6, 8 + 40, 1280}, // RFC 8200, section 5
	} {
		if !f.pool.Enabled() {
			continue
		}
		u.local[i] = f.local
		// IPv6's is the smaller one. A datagram takes no more than 65535 bytes.
		u.mtu = min(uplink.MTU, 65535) - f.overhead
		if u.mtu < f.least {
			return nil, fmt.Errorf("MTU %d of the uplink %s leaves %d for pods: it must be at least %d", uplink.MTU, uplink.Name, u.mtu, f.least+f.overhead)
		}
	}
	return u, nil
}

func (u *udp) MTU() int { return u.mtu }

func (u *udp) Attrs(context.Context, subnet.Attrs) (subnet.Attrs, error) {
	return subnet.Attrs{}, nil
}

func (u *udp) Local(own subnet.Lease) []kernel.Object {
	objects := []kernel.Object{kernel.Link{Name: device, MTU: u.mtu, Type: kernel.TUN{}}}
	for _, f := range []struct{ network, subnet netip.Prefix }{{u.networks.IPv4, own.IPv4}, {u.networks.IPv6, own.IPv6}} {
		if !f.subnet.IsValid() {
			continue
		}
		base := f.subnet.Addr()
		objects = append(objects,
			// A host address: what the node itself sends from to remote pods.
			kernel.Addr{Dev: device, Prefix: netip.PrefixFrom(base, base.BitLen())},
			kernel.Route{Dst: f.network, Dev: device},
		)
	}
	return objects
}

// Peer wants nothing of the kernel: the proxy knows the way.
func (u *udp) Peer(subnet.Lease, subnet.Lease) ([]kernel.Object, error) { return nil, nil }

// Endpoints implements backend.Tunnel.
func (u *udp) Endpoints() []backend.Endpoint {
	var all []backend.Endpoint
	for _, ip := range u.local {
		if ip.IsValid() {
			all = append(all, backend.Endpoint{Addr: ip, Protocol: "udp", Port: u.Port})
		}
	}
	return all
}
