// Package vxlan carries pods' packets in the kernel's VXLAN (RFC 7348). Each node has one VTEP for each family, and for
// each peer a route, a neighbour and an FDB entry, so that the kernel resolves, learns and floods nothing. See
// README.md.
package vxlan

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"math"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/subnet"
)

// Type is the backend's name in configurations and leases.
const Type = "vxlan"

const (
	maxVNI      = 1<<24 - 1 // RFC 7348, section 5
	defaultPort = 8472      // the kernel's (udp_port, drivers/net/vxlan); IANA's 4789 came later

	// overhead is the size of the headers between the outer IP header and the pod's packet: the outer UDP header, the
	// VXLAN header, the inner Ethernet header.
	overhead = 8 + 8 + 14
)

func init() {
	backend.Register(backend.Type{Name: Type, New: New, Devices: `flannel(-v6)?\.[0-9]+`})
}

// options are the backend's keys in the configuration. make docs writes the comments of the fields into README.md.
type options struct {
	// number of the VXLAN network, 0 to 16777215; the device has the name `flannel.<VNI>`, for IPv6 `flannel-v6.<VNI>`
	VNI int

	// UDP port to send to and listen on; 0 is the kernel's default, 8472
	Port int

	// packets to a peer on the uplink's link are sent without VXLAN
	DirectRouting bool

	// MTU of the network between the nodes, if it is smaller than the uplink's; the MTU of pods is 50 bytes smaller, 70
	// with IPv6
	MTU int `default:"the uplink's"`

	// use the group based policy extension, which carries packet marks
	GBP bool

	// the device also learns addresses from packets of peers
	Learning bool

	// the kernel computes the checksums of pods' packets instead of the uplink; flannel does not have this key
	DisableTxChecksumOffload bool
}

var defaults = options{VNI: 1}

// data is what a node publishes about a VTEP in its lease.
type data struct {
	VNI     int // its low 16 bits: flannel publishes no more, and cannot read more
	VtepMAC kernel.MAC
}

type vxlan struct {
	options
	uplink iface.Uplink
	info   backend.Info
	vteps  family.Pair[vtep]
}

// vtep is this node's end of one family's tunnels.
type vtep struct {
	dev  string     // empty if the family is off
	link iface.Link // that carries the outer packets
	mtu  int
}

// New makes the backend.
func New(cfg *subnet.Config, uplink iface.Uplink) (backend.Backend, error) {
	v := &vxlan{options: defaults, uplink: uplink}
	if err := backend.Options(cfg, &v.options); err != nil {
		return nil, err
	}
	if v.VNI < 0 || v.VNI > maxVNI {
		return nil, fmt.Errorf("VNI %d is not allowed: 0 to %d", v.VNI, maxVNI)
	}
	if v.Port < 0 || v.Port > 65535 {
		return nil, fmt.Errorf("Port %d is not allowed: 1 to 65535, or 0 for the kernel's default, %d", v.Port, defaultPort)
	}
	if v.Port == 0 {
		v.Port = defaultPort
	}
	mtu, info, err := backend.PodMTU(cfg, uplink, v.MTU, func(f family.Family) int { return f.HeaderLen() + overhead })
	if err != nil {
		return nil, err
	}
	v.info = info
	names := family.Pair[string]{IPv4: "flannel", IPv6: "flannel-v6"}
	for f, pool := range cfg.Pools().Each() {
		if !pool.Enabled() {
			continue
		}
		link := uplink.Of(f)
		*v.vteps.At(f) = vtep{fmt.Sprintf("%s.%d", names.Of(f), v.VNI), link, mtu.Of(f)}
		v.info.Endpoints = append(v.info.Endpoints, backend.Endpoint{Addr: link.Addr, Protocol: "udp", Port: v.Port})
	}
	return v, nil
}

func (v *vxlan) Info() backend.Info { return v.info }

func (v *vxlan) Attrs(_ context.Context, previous subnet.Attrs) (subnet.Attrs, error) {
	attrs := subnet.Attrs{BackendType: Type}
	for f, t := range v.vteps.Each() {
		if t.dev != "" {
			attrs.SetData(f, v.data(previous.DataOf(f)))
		}
	}
	return attrs, nil
}

// data returns what to publish about a VTEP. The VTEP keeps the MAC that was published before, if there is one, so that
// peers need not change anything.
func (v *vxlan) data(previous json.RawMessage) json.RawMessage {
	d, err := parse(previous)
	if err != nil {
		rand.Read(d.VtepMAC[:])                  // never fails
		d.VtepMAC[0] = d.VtepMAC[0]&^0x01 | 0x02 // unicast, locally administered (IEEE 802, 8.2)
	}
	d.VNI = v.VNI & math.MaxUint16
	text, _ := json.Marshal(d) // has nothing that could fail
	return text
}

// parse parses what a node has published about a VTEP.
func parse(text json.RawMessage) (data, error) {
	var d data
	if len(text) == 0 {
		return d, errors.New("the lease has no backend data")
	}
	if err := json.Unmarshal(text, &d); err != nil {
		return data{}, backend.DataError(text, err.Error())
	}
	if d.VtepMAC == (kernel.MAC{}) || d.VtepMAC[0]&1 != 0 {
		return data{}, backend.DataError(text, "VtepMAC must be the address of one device")
	}
	return d, nil
}

func (v *vxlan) Local(own subnet.Lease) []kernel.Object {
	var objects []kernel.Object
	for f, t := range v.vteps.Each() {
		if !own.Of(f).IsValid() {
			continue
		}
		d, _ := parse(own.Attrs.DataOf(f)) // our own; without a MAC the kernel would choose one
		objects = append(objects,
			kernel.Link{Name: t.dev, MAC: d.VtepMAC, MTU: t.mtu, Type: kernel.VXLAN{
				VNI: v.VNI, Port: v.Port, Local: t.link.Addr, Dev: t.link.Name, Learning: v.Learning, GBP: v.GBP,
			}, TXChecksumOff: v.DisableTxChecksumOffload},
			backend.HostAddr(t.dev, own.Of(f)),
		)
	}
	return objects
}

// Identities implements backend.Identifier. The kernel holds one FDB entry for a MAC: with two peers of one MAC, the
// packets for one of them go to the other.
func (v *vxlan) Identities(l subnet.Lease) []string {
	identities := backend.PublicAddresses(l)
	for f, t := range v.vteps.Each() {
		if d, err := parse(l.Attrs.DataOf(f)); t.dev != "" && err == nil {
			identities = append(identities, fmt.Sprintf("VTEP MAC %v of %s", d.VtepMAC, t.dev))
		}
	}
	return identities
}

func (v *vxlan) Peer(own, peer subnet.Lease) ([]kernel.Object, error) {
	var objects []kernel.Object
	var errs []error
	for f, s := range backend.Sides(own, peer).Each() {
		if !s.On {
			continue
		}
		if v.DirectRouting && v.uplink.OnLink(s.PublicIP) {
			objects = append(objects, s.Direct(v.uplink))
			continue
		}
		d, err := parse(s.Data)
		if err == nil && d.VNI != v.VNI&math.MaxUint16 {
			err = fmt.Errorf("its VNI is %d, ours %d: it has not taken up the same configuration", d.VNI, v.VNI&math.MaxUint16)
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		dev, gateway := v.vteps.Of(f).dev, s.Peer.Addr()
		objects = append(objects,
			kernel.Neighbor{Dev: dev, IP: gateway, MAC: d.VtepMAC},
			kernel.FDBEntry{Dev: dev, MAC: d.VtepMAC, Dst: s.PublicIP},
			kernel.Route{Dst: s.Peer, Via: gateway, Dev: dev, Onlink: true},
		)
	}
	return objects, backend.JoinErrors(errs)
}
