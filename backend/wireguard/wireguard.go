// Package wireguard carries pods' packets encrypted, in WireGuard
// (wireguard.com/protocol): the kernel's or, where it has none, one in this
// process. See README.md.
package wireguard

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/subnet"
)

// Type is the backend's name in configurations and leases.
const Type = "wireguard"

// overhead is what is left for WireGuard of a packet on the underlay: the outer
// IP header, IPv6's 40, UDP 8, type 4, receiver 4, counter 8, tag 16.
const overhead = 40 + 8 + 4 + 4 + 8 + 16

// Modes say which addresses of the underlay carry what.
const (
	separate = "separate" // each family has a device, and goes over its own
	auto     = "auto"     // one device, over whichever is likely to get through
	overIPv4 = "ipv4"     // one device, over IPv4
	overIPv6 = "ipv6"     // one device, over IPv6
)

var modes = []string{separate, auto, overIPv4, overIPv6}

func init() {
	backend.Register(Type, New)
	backend.RegisterLeftovers(leftovers)
}

// options are the backend's keys in the configuration. What is said of them here
// is what README.md says: make docs writes it there.
type options struct {
	// UDP port
	ListenPort int

	// UDP port of IPv6's device, with `Mode` `separate`
	ListenPortV6 int

	// `separate`: each family has a device, and goes over its own. `ipv4`,
	// `ipv6`: one device for both, over that one. `auto`: one device, over IPv4,
	// or over IPv6 where IPv4 is behind NAT and IPv6 is not
	Mode string

	// a secret that all nodes have besides their keys, as `wg genpsk` prints
	// one: whoever records packets today cannot read them with a quantum
	// computer later
	PSK secret

	// seconds between packets to a silent peer, 1 to 65535, so that NAT does not
	// forget; 0: none
	PersistentKeepaliveInterval int

	// of the network between nodes; pods get 80 less
	MTU int `default:"the uplink's"`
}

var defaults = options{ListenPort: 51820, ListenPortV6: 51821, Mode: separate}

// data is what a node tells its peers, in its lease.
type data struct {
	PublicKey wgtypes.Key
	Port      int // 0, as upstream has it: the same as our own
}

type wireguard struct {
	options
	uplink   iface.Uplink
	networks subnet.Subnets
	tunnels  []tunnel
	mtu      int
	inKernel bool // the kernel has WireGuard
}

// A tunnel is one of this node's devices.
type tunnel struct {
	dev      string
	port     int
	families [2]bool // whose packets go through: IPv4's, IPv6's
}

var _ backend.Worker = (*wireguard)(nil)

// userSpace is the variable by which wireguard-go is told to do its work although
// the kernel could: it is heeded here too.
const userSpace = "WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD"

// New makes the backend.
func New(cfg *subnet.Config, uplink iface.Uplink) (backend.Backend, error) {
	return newBackend(cfg, uplink, func() bool { return os.Getenv(userSpace) != "1" && kernel.HasWireGuard() })
}

func newBackend(cfg *subnet.Config, uplink iface.Uplink, hasWireGuard func() bool) (backend.Backend, error) {
	w := &wireguard{
		options:  defaults,
		uplink:   uplink,
		networks: cfg.Networks(),
	}
	if err := backend.Options(cfg, &w.options); err != nil {
		return nil, err
	}
	on := [2]bool{cfg.IPv4.Enabled(), cfg.IPv6.Enabled()}
	for _, p := range []struct {
		key  string
		port int
	}{{"ListenPort", w.ListenPort}, {"ListenPortV6", w.ListenPortV6}} {
		if p.port < 1 || p.port > 65535 {
			return nil, fmt.Errorf("%s %d is not allowed: 1 to 65535", p.key, p.port)
		}
	}
	if k := w.PersistentKeepaliveInterval; k < 0 || k > 65535 {
		return nil, fmt.Errorf("PersistentKeepaliveInterval %d is not allowed: 1 to 65535 seconds, or 0 for none", k)
	}
	switch {
	case !slices.Contains(modes, w.Mode):
		return nil, fmt.Errorf("Mode %q is not known: known are %s", w.Mode, strings.Join(modes, ", "))
	case w.Mode == overIPv4 && !on[0]:
		return nil, errors.New("Mode ipv4 needs IPv4: set EnableIPv4, or take another Mode")
	case w.Mode == overIPv6 && !on[1]:
		return nil, errors.New("Mode ipv6 needs IPv6: set EnableIPv6, or take another Mode")
	case w.Mode == separate && on[0] && on[1] && w.ListenPort == w.ListenPortV6:
		return nil, fmt.Errorf("ListenPort and ListenPortV6 are both %d: in Mode separate, each device needs a port of its own", w.ListenPort)
	}
	underlay, whose := uplink.MTU, "of the uplink "+uplink.Name
	if w.options.MTU != 0 {
		underlay, whose = w.options.MTU, "in the configuration"
	}
	least := 576 // what a host, or a link, must be able to carry: RFC 791
	if on[1] {
		least = 1280 // RFC 8200, section 5
	}
	// A datagram takes no more than 65535 bytes.
	if w.mtu = min(underlay, 65535) - overhead; w.mtu < least {
		return nil, fmt.Errorf("MTU %d %s leaves %d for pods: it must be at least %d", underlay, whose, w.mtu, least+overhead)
	}
	if w.Mode == separate {
		if on[0] {
			w.tunnels = append(w.tunnels, tunnel{"flannel-wg", w.ListenPort, [2]bool{true, false}})
		}
		if on[1] {
			w.tunnels = append(w.tunnels, tunnel{"flannel-wg-v6", w.ListenPortV6, [2]bool{false, true}})
		}
	} else {
		w.tunnels = []tunnel{{"flannel-wg", w.ListenPort, on}}
	}
	w.inKernel = hasWireGuard()
	return w, nil
}

func (w *wireguard) MTU() int { return w.mtu }

func (w *wireguard) Attrs(context.Context, subnet.Attrs) (subnet.Attrs, error) {
	key, err := privateKey(keyFile())
	if err != nil {
		return subnet.Attrs{}, err
	}
	attrs := subnet.Attrs{BackendType: Type}
	for _, t := range w.tunnels {
		text, _ := json.Marshal(data{key.public(), t.port}) // has nothing that could fail
		if t.families[0] {
			attrs.BackendData = text
		}
		if t.families[1] {
			attrs.BackendV6Data = text
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
		objects = append(objects, kernel.Link{Name: t.dev, MTU: w.mtu, Type: kind})
		for i, f := range []struct{ network, subnet netip.Prefix }{{w.networks.IPv4, own.IPv4}, {w.networks.IPv6, own.IPv6}} {
			if !t.families[i] || !f.subnet.IsValid() {
				continue
			}
			base := f.subnet.Addr()
			objects = append(objects,
				// A host address: what the node itself sends from to remote pods.
				kernel.Addr{Dev: t.dev, Prefix: netip.PrefixFrom(base, base.BitLen())},
				kernel.Route{Dst: f.network, Dev: t.dev},
			)
		}
	}
	return objects
}

// Peer wants nothing of the reconciler: Work tells the devices of peers. It tells
// what is wrong with one.
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

// Endpoints implements backend.Tunnel.
func (w *wireguard) Endpoints() []backend.Endpoint {
	var all []backend.Endpoint
	for _, t := range w.tunnels {
		// Which address peers that are like us choose.
		public := w.publicIP(t, subnet.Attrs{PublicIP: w.uplink.PublicIP, PublicIPv6: w.uplink.PublicIPv6})
		ip := w.uplink.IPv4
		if public.Is6() {
			ip = w.uplink.IPv6
		}
		all = append(all, backend.Endpoint{Addr: ip, Protocol: "udp", Port: t.port})
	}
	return all
}
