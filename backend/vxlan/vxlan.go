// Package vxlan carries pods' packets in the kernel's VXLAN (RFC 7348). Each
// node has one VTEP, and holds for each peer a route, a neighbour and an FDB
// entry, so that nothing is ever looked up, learned or flooded. See README.md.
package vxlan

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/subnet"
)

// Type is the backend's name in configurations and leases.
const Type = "vxlan"

const (
	maxVNI      = 1<<24 - 1 // RFC 7348, section 5
	defaultPort = 8472      // the kernel's (udp_port, drivers/net/vxlan); IANA's 4789 came later
)

func init() { backend.Register(Type, New) }

// options are the backend's keys in the configuration. What is said of them here
// is what README.md says: make docs writes it there.
type options struct {
	// the VXLAN network's number, 1 to 16777215; the device is called
	// `flannel.<VNI>`, for IPv6 `flannel-v6.<VNI>`
	VNI int

	// UDP port to send to and listen on; 0 is the kernel's default, 8472
	Port int

	// a peer on the uplink's own link is routed to without VXLAN
	DirectRouting bool

	// of the network between the nodes, where that is not the uplink's; pods
	// get 50 bytes less, 70 with IPv6
	MTU int `default:"the uplink's"`

	// the group based policy extension, which carries packet marks
	GBP bool

	// the device also learns from what peers send
	Learning bool

	// the kernel computes pods' checksums itself, rather than leave them to the
	// uplink; flanneld's own, upstream does not know it
	DisableTxChecksumOffload bool
}

var defaults = options{VNI: 1}

// data is what a VTEP tells its peers, in its lease.
type data struct {
	VNI     int
	VtepMAC kernel.MAC
}

type vxlan struct {
	options
	uplink iface.Uplink
	vteps  [2]vtep // IPv4's and IPv6's
	mtu    int     // for pods, whichever family they use
}

// vtep is this node's end of one family's tunnels.
type vtep struct {
	dev   string
	local netip.Addr // outer source address
	mtu   int
}

// New makes the backend.
func New(cfg *subnet.Config, uplink iface.Uplink) (backend.Backend, error) {
	v := &vxlan{options: defaults, uplink: uplink}
	if err := backend.Options(cfg, &v.options); err != nil {
		return nil, err
	}
	if v.VNI < 1 || v.VNI > maxVNI {
		return nil, fmt.Errorf("VNI %d is not allowed: 1 to %d", v.VNI, maxVNI)
	}
	if v.Port < 0 || v.Port > 65535 {
		return nil, fmt.Errorf("Port %d is not allowed: 1 to 65535, or 0 for the kernel's default, %d", v.Port, defaultPort)
	}
	if v.Port == 0 {
		v.Port = defaultPort
	}
	underlay, whose := uplink.MTU, "of the uplink "+uplink.Name
	if v.options.MTU != 0 {
		underlay, whose = v.options.MTU, "in the configuration"
	}
	for i, f := range []struct {
		pool     subnet.Pool
		name     string
		local    netip.Addr
		overhead int // inner Ethernet 14, VXLAN 8, UDP 8, and the outer IP header
		least    int // what a host, or a link, must be able to carry
	}{
		{cfg.IPv4, "flannel", uplink.IPv4, 14 + 8 + 8 + 20, 576},     // RFC 791
		{cfg.IPv6, "flannel-v6", uplink.IPv6, 14 + 8 + 8 + 40, 1280}, // RFC 8200, section 5
	} {
		if !f.pool.Enabled() {
			continue
		}
		mtu := underlay - f.overhead
		if mtu < f.least {
			return nil, fmt.Errorf("MTU %d %s leaves %d for pods: it must be at least %d", underlay, whose, mtu, f.least+f.overhead)
		}
		v.vteps[i] = vtep{fmt.Sprintf("%s.%d", f.name, v.VNI), f.local, mtu}
		v.mtu = mtu // IPv6's is the smaller one
	}
	return v, nil
}

func (v *vxlan) MTU() int { return v.mtu }

func (v *vxlan) Attrs(_ context.Context, previous subnet.Attrs) (subnet.Attrs, error) {
	attrs := subnet.Attrs{BackendType: Type}
	if v.vteps[0].dev != "" {
		attrs.BackendData = v.data(previous.BackendData)
	}
	if v.vteps[1].dev != "" {
		attrs.BackendV6Data = v.data(previous.BackendV6Data)
	}
	return attrs, nil
}

// data returns what to publish of a VTEP. It keeps the MAC that peers know, if
// there is one, so that they need not change anything.
func (v *vxlan) data(previous json.RawMessage) json.RawMessage {
	d, err := parse(previous)
	if err != nil {
		rand.Read(d.VtepMAC[:])                  // never fails
		d.VtepMAC[0] = d.VtepMAC[0]&^0x01 | 0x02 // unicast, locally administered (IEEE 802, 8.2)
	}
	d.VNI = v.VNI
	text, _ := json.Marshal(d) // has nothing that could fail
	return text
}

// parse reads what a VTEP published.
func parse(text json.RawMessage) (data, error) {
	var d data
	if len(text) == 0 {
		return d, errors.New("the lease has no backend data")
	}
	if err := json.Unmarshal(text, &d); err != nil {
		return data{}, fmt.Errorf("backend data %s: %w", text, err)
	}
	if d.VtepMAC == (kernel.MAC{}) || d.VtepMAC[0]&1 != 0 {
		return data{}, fmt.Errorf("backend data %s: VtepMAC must be the address of one device", text)
	}
	return d, nil
}

func (v *vxlan) Local(own subnet.Lease) []kernel.Object {
	var objects []kernel.Object
	for i, f := range []struct {
		subnet netip.Prefix
		data   json.RawMessage
	}{{own.IPv4, own.Attrs.BackendData}, {own.IPv6, own.Attrs.BackendV6Data}} {
		if !f.subnet.IsValid() {
			continue
		}
		d, _ := parse(f.data) // our own; without a MAC the kernel would choose one
		t := v.vteps[i]
		base := f.subnet.Addr()
		objects = append(objects,
			kernel.Link{Name: t.dev, MAC: d.VtepMAC, MTU: t.mtu, Type: kernel.VXLAN{
				VNI: v.VNI, Port: v.Port, Local: t.local, Dev: v.uplink.Name, Learning: v.Learning, GBP: v.GBP,
			}, TXChecksumOff: v.DisableTxChecksumOffload},
			// A host address, so that there is no broadcast. It is what the
			// node itself sends from to remote pods.
			kernel.Addr{Dev: t.dev, Prefix: netip.PrefixFrom(base, base.BitLen())},
		)
	}
	return objects
}

func (v *vxlan) Peer(own, peer subnet.Lease) ([]kernel.Object, error) {
	var objects []kernel.Object
	var errs []error
	for i, f := range backend.Families(own, peer) {
		if !f.On {
			continue
		}
		if v.DirectRouting && v.uplink.OnLink(f.PublicIP) {
			objects = append(objects, f.Direct(v.uplink))
			continue
		}
		d, err := parse(f.Data)
		if err == nil && d.VNI != v.VNI {
			err = fmt.Errorf("its VNI is %d, ours %d: it has not taken up the same configuration", d.VNI, v.VNI)
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		dev, gateway := v.vteps[i].dev, f.Peer.Addr()
		objects = append(objects,
			kernel.Neighbor{Dev: dev, IP: gateway, MAC: d.VtepMAC},
			kernel.FDBEntry{Dev: dev, MAC: d.VtepMAC, Dst: f.PublicIP},
			kernel.Route{Dst: f.Peer, Via: gateway, Dev: dev, Onlink: true},
		)
	}
	return objects, errors.Join(errs...)
}

// Endpoints implements backend.Tunnel.
func (v *vxlan) Endpoints() []backend.Endpoint {
	var all []backend.Endpoint
	for _, t := range v.vteps {
		if t.dev != "" {
			all = append(all, backend.Endpoint{Addr: t.local, Protocol: "udp", Port: v.Port})
		}
	}
	return all
}
