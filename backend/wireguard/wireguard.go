// Package wireguard carries pods' packets encrypted, in WireGuard (wireguard.com/protocol): with the kernel's WireGuard
// or, if the kernel has none, with wireguard-go in this process. See README.md.
package wireguard

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/subnet"
)

// Type is the backend's name in configurations and leases.
const Type = "wireguard"

// overhead is how much WireGuard adds to a packet: the outer IP header (40 for IPv6), UDP 8, type 4, receiver 4,
// counter 8, tag 16.
const overhead = 40 + 8 + 4 + 4 + 8 + 16

// The modes determine which addresses of the underlay carry the packets of each family.
const (
	separate = "separate" // each family has a device, over the same family
	auto     = "auto"     // one device, over the family that is more likely to get through
	overIPv4 = "ipv4"     // one device, over IPv4
	overIPv6 = "ipv6"     // one device, over IPv6
)

var modes = []string{separate, auto, overIPv4, overIPv6}

func init() { backend.Register(Host{}.Type()) }

// A Host is what a program chooses for the host that it runs on, beside the configuration, which all nodes share.
type Host struct {
	KeyFile   string // of the node's private key, which is made if it is missing; "": DefaultKeyFile
	UserSpace bool   // this process encrypts although the kernel could
}

// Type returns the type of backend on the host. It is for backend.Register, in place of the type for the zero Host.
func (h Host) Type() backend.Type {
	h.KeyFile = cmp.Or(h.KeyFile, DefaultKeyFile)
	return backend.Type{
		Name: Type, New: h.new, Devices: "flannel-wg(-v6)?", SharedAddresses: true, Checks: checks, Cleanup: h.cleanup,
	}
}

// options are the backend's keys in the configuration. make docs writes the comments of the fields into README.md.
type options struct {
	// UDP port
	ListenPort int

	// UDP port of the device for IPv6, with `Mode` `separate`
	ListenPortV6 int

	// `separate`: each family has its own device, and its packets are sent over the same family. `ipv4`, `ipv6`: both
	// families share one device, and all packets are sent over that family. `auto`: both families share one device, and
	// all packets are sent over IPv4, or over IPv6 if IPv4 is behind NAT and IPv6 is not
	Mode string

	// pre-shared key of all nodes, in addition to the nodes' own keys, made with `wg genpsk`; it protects packets that
	// are recorded today from being decrypted by a quantum computer later
	PSK secret

	// seconds between packets to a silent peer, 1 to 65535, so that NAT keeps the connection; 0 sends no such packets.
	// See below for the default
	PersistentKeepaliveInterval *int `default:"25 through NAT, 0 otherwise"`

	// MTU of the network between the nodes, if it is smaller than the uplink's; the MTU of pods is 80 bytes smaller
	MTU int `default:"the uplink's"`
}

var defaults = options{ListenPort: 51820, ListenPortV6: 51821, Mode: separate}

// data is what a node publishes in its lease.
type data struct {
	PublicKey wgtypes.Key
	Port      int // 0, as flannel publishes it: the port of this node
}

type wireguard struct {
	options
	host     Host
	uplink   iface.Uplink
	networks subnet.Networks
	tunnels  []tunnel
	info     backend.Info
	inKernel bool // the kernel has WireGuard
}

// A tunnel is one of this node's devices.
type tunnel struct {
	dev      string
	port     int
	families [2]bool // whose packets the device carries
	mtu      int
}

var (
	_ backend.Worker          = (*wireguard)(nil)
	_ backend.Differ          = (*wireguard)(nil)
	_ backend.SessionReporter = (*wireguard)(nil)
)

// new makes the backend.
func (h Host) new(cfg *subnet.Config, uplink iface.Uplink) (backend.Backend, error) {
	return newBackend(cfg, uplink, h, func() bool { return !h.UserSpace && kernel.HasWireGuard() })
}

func newBackend(cfg *subnet.Config, uplink iface.Uplink, host Host, hasWireGuard func() bool) (backend.Backend, error) {
	w := &wireguard{
		options:  defaults,
		host:     host,
		uplink:   uplink,
		networks: cfg.Networks(),
	}
	if err := backend.Options(cfg, &w.options); err != nil {
		return nil, err
	}
	on := [2]bool{cfg.IPv4.Enabled(), cfg.IPv6.Enabled()} // by family
	for _, p := range []struct {
		key  string
		port int
	}{{"ListenPort", w.ListenPort}, {"ListenPortV6", w.ListenPortV6}} {
		if p.port < 1 || p.port > 65535 {
			return nil, fmt.Errorf("%s %d is not allowed: 1 to 65535", p.key, p.port)
		}
	}
	if k := w.PersistentKeepaliveInterval; k != nil && (*k < 0 || *k > 65535) {
		return nil, fmt.Errorf("PersistentKeepaliveInterval %d is not allowed: 1 to 65535 seconds, or 0 for none", *k)
	}
	switch {
	case !slices.Contains(modes, w.Mode):
		return nil, fmt.Errorf("Mode %s is not known: known are %s", plain.Quote(w.Mode), strings.Join(modes, ", "))
	case w.Mode == overIPv4 && !on[0]:
		return nil, errors.New("Mode ipv4 needs IPv4: set EnableIPv4, or use another Mode")
	case w.Mode == overIPv6 && !on[1]:
		return nil, errors.New("Mode ipv6 needs IPv6: set EnableIPv6, or use another Mode")
	case w.Mode == separate && on[0] && on[1] && w.ListenPort == w.ListenPortV6:
		return nil, fmt.Errorf("ListenPort and ListenPortV6 are both %d: in Mode separate, each device needs its own port",
			w.ListenPort)
	}
	mtu, info, err := backend.PodMTU(cfg, uplink, w.MTU, func(family.Family) int { return overhead })
	if err != nil {
		return nil, err
	}
	w.info = info
	if w.Mode == separate {
		if on[0] {
			w.tunnels = append(w.tunnels, tunnel{"flannel-wg", w.ListenPort, [2]bool{true, false}, mtu.IPv4})
		}
		if on[1] {
			w.tunnels = append(w.tunnels, tunnel{"flannel-wg-v6", w.ListenPortV6, [2]bool{false, true}, mtu.IPv6})
		}
	} else {
		w.tunnels = []tunnel{{"flannel-wg", w.ListenPort, on, info.MTU}}
	}
	w.inKernel = hasWireGuard()
	for _, t := range w.tunnels {
		// The address that peers with the same configuration choose.
		public := w.publicIP(t, subnet.Attrs{PublicIP: uplink.IPv4.PublicIP, PublicIPv6: uplink.IPv6.PublicIP})
		ip := uplink.Addrs().Of(family.Of(public))
		w.info.Endpoints = append(w.info.Endpoints, backend.Endpoint{Addr: ip, Protocol: "udp", Port: t.port})
	}
	return w, nil
}

func (w *wireguard) Info() backend.Info { return w.info }

func (w *wireguard) Attrs(context.Context, subnet.Attrs) (subnet.Attrs, error) {
	key, err := privateKey(w.host.KeyFile)
	if err != nil {
		return subnet.Attrs{}, err
	}
	attrs := subnet.Attrs{BackendType: Type}
	for _, t := range w.tunnels {
		text, _ := json.Marshal(data{key.public(), t.port}) // cannot fail
		for _, f := range family.All {
			if t.families[f] {
				attrs.SetData(f, text)
			}
		}
	}
	return attrs, nil
}

func (w *wireguard) Local(own subnet.Lease) []kernel.Object {
	var kind kernel.LinkType = kernel.WireGuard{}
	if !w.inKernel {
		kind = kernel.TUN{}
	}
	var objects []kernel.Object
	for _, t := range w.tunnels {
		objects = append(objects, kernel.Link{Name: t.dev, MTU: t.mtu, Type: kind})
		for _, f := range family.All {
			if !t.families[f] || !own.Of(f).IsValid() {
				continue
			}
			objects = append(objects, backend.HostAddr(t.dev, own.Of(f)))
			for _, network := range w.networks.Of(f) {
				objects = append(objects, kernel.Route{Dst: network, Dev: t.dev})
			}
		}
	}
	return objects
}

// Peer returns no objects: Work configures the devices' peers. The error says what is wrong with the peer's lease.
func (w *wireguard) Peer(own, peer subnet.Lease) ([]kernel.Object, error) {
	var all []string
	for _, t := range w.tunnels {
		if _, _, err := w.peerOf(t, own, peer, published(own)); err != nil && !slices.Contains(all, err.Error()) {
			all = append(all, err.Error())
		}
	}
	if len(all) > 0 {
		return nil, errors.New(strings.Join(all, "; "))
	}
	return nil, nil
}
