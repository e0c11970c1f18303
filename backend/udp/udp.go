// Package udp carries the packets of pods in UDP, one packet in a datagram, by a proxy between a TUN device and a
// socket. See README.md.
package udp

import (
	"context"
	"fmt"
	"net/netip"
	"sync/atomic"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/subnet"
)

// Type is the backend's name in configurations. Leases carry none.
const Type = "udp"

const device = "flannel0"

func init() {
	backend.Register(backend.Type{Name: Type, New: New, Devices: "flannel[0-9]+"}) // upstream numbers them
}

// options are the backend's keys in the configuration. What is said of them here
// is what README.md says: make docs writes it there.
type options struct {
	// UDP port to send to, to send from and to listen on, 1 to 65535
	Port int
}

var defaults = options{Port: 8285}

type udp struct {
	options
	networks subnet.Networks
	local    [2]netip.Addr // that the sockets are bound to, by family
	info     backend.Info
	offloads offloads
	running  atomic.Pointer[proxy] // set by Work
}

var (
	_ backend.Worker        = (*udp)(nil)
	_ backend.StatsReporter = (*udp)(nil)
)

// New makes the backend.
func New(cfg *subnet.Config, uplink iface.Uplink) (backend.Backend, error) {
	u := &udp{
		options:  defaults,
		networks: cfg.Networks(),
		offloads: allOffloads,
	}
	if err := backend.Options(cfg, &u.options); err != nil {
		return nil, err
	}
	if u.Port < 1 || u.Port > 65535 {
		return nil, fmt.Errorf("Port %d is not allowed: 1 to 65535", u.Port)
	}
	var err error
	if _, u.info, err = backend.PodMTU(cfg, uplink, 0, func(f family.Family) int { return f.HeaderLen() + udpHeader }); err != nil {
		return nil, err
	}
	for f, pool := range cfg.Pools().Each() {
		if pool.Enabled() {
			u.local[f] = uplink.Addrs().Of(f)
			u.info.Endpoints = append(u.info.Endpoints, backend.Endpoint{Addr: u.local[f], Protocol: "udp", Port: u.Port})
		}
	}
	return u, nil
}

func (u *udp) Info() backend.Info { return u.info }

func (u *udp) Attrs(context.Context, subnet.Attrs) (subnet.Attrs, error) {
	return subnet.Attrs{}, nil
}

func (u *udp) Local(own subnet.Lease) []kernel.Object {
	objects := []kernel.Object{kernel.Link{Name: device, MTU: u.info.MTU, Type: kernel.TUN{}}}
	for _, f := range family.All {
		if own.Of(f).IsValid() {
			objects = append(objects, backend.HostAddr(device, own.Of(f)))
			for _, network := range u.networks.Of(f) {
				objects = append(objects, kernel.Route{Dst: network, Dev: device})
			}
		}
	}
	return objects
}

// Peer needs nothing in the kernel: the proxy has a table of peers.
func (u *udp) Peer(subnet.Lease, subnet.Lease) ([]kernel.Object, error) { return nil, nil }
