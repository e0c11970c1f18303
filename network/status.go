package network

import (
	"context"
	"encoding/json"
	"net/netip"
	"slices"
	"time"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/pkg/probe"
	"github.com/flanneld/flanneld/subnet"
)

// A Status is what a node's network is, and in which state. What is not known yet is
// left out of the JSON.
type Status struct {
	Daemon  bool      `json:"daemon"`            // flanneld reports it, or else flannelctl has inspected the node
	Version string    `json:"version,omitempty"` // of flanneld
	Started time.Time `json:"started,omitzero"`
	Ready   bool      `json:"ready"`
	Waiting string    `json:"waitingFor,omitempty"` // what flanneld waits for, while it is not ready

	Network []netip.Prefix `json:"network,omitempty"`
	Retired []netip.Prefix `json:"retired,omitempty"` // those that the configuration no longer has
	Backend string         `json:"backend,omitempty"`
	Uplinks []Uplink       `json:"uplinks,omitempty"` // one, or two if each family has an interface of its own
	Lease   *Lease         `json:"lease,omitempty"`
	Peers   int            `json:"peers"`
	LeftOut []Lease        `json:"leftOut,omitempty"` // that are no peers, or cannot be reached in full

	// Unreached are the peers at which packets do not arrive, and Reached counts all ways to peers by their state.
	Unreached []Lease             `json:"unreached,omitempty"`
	Reached   map[probe.State]int `json:"reached,omitempty"`

	// Overlaps say where the network, or this node's own subnet, overlaps what the host uses for something else.
	Overlaps []string `json:"overlaps,omitempty"`

	MTU        int              `json:"mtu,omitempty"`     // for pods
	Overhead   family.Pair[int] `json:"overhead,omitzero"` // bytes that the backend puts around their packets
	Devices    []Device         `json:"devices,omitempty"`
	Endpoints  []Endpoint       `json:"endpoints,omitempty"` // where peers' packets arrive
	Rules      Rules            `json:"rules"`
	SubnetFile SubnetFile       `json:"subnetFile"`

	Store  Store             `json:"store"`
	Errors map[string]string `json:"errors,omitempty"` // that persist, by duty
}

// An Uplink is an interface that peers reach the node on.
type Uplink struct {
	Name      string       `json:"name"`
	MTU       int          `json:"mtu"`
	Addresses []netip.Addr `json:"addresses"`
	PublicIPs []netip.Addr `json:"publicIPs"`
}

// UplinkOf returns the uplink with an address of a family, nil if there is none.
func (s Status) UplinkOf(f family.Family) *Uplink {
	for i, u := range s.Uplinks {
		if slices.ContainsFunc(u.Addresses, f.Has) {
			return &s.Uplinks[i]
		}
	}
	return nil
}

// A Lease is a node's claim to its subnets, and what it tells its peers.
type Lease struct {
	Subnets       []netip.Prefix  `json:"subnets"`
	PublicIPs     []netip.Addr    `json:"publicIPs"`
	Backend       string          `json:"backend,omitempty"`
	BackendData   json.RawMessage `json:"backendData,omitempty"`
	BackendV6Data json.RawMessage `json:"backendV6Data,omitempty"`
	Expires       time.Time       `json:"expires,omitzero"` // zero: never, or not known
	Own           bool            `json:"own"`
	Problem       string          `json:"problem,omitempty"`
	Keys          time.Time       `json:"keys,omitzero"`          // when the backend agreed on keys with the peer last, if it does
	Reachability  []Reachability  `json:"reachability,omitempty"` // what the daemon's probes know; none: it does not probe
}

// Lease returns the lease as the subnet manager has it, without its end.
func (l Lease) Lease() subnet.Lease {
	var s family.Pair[netip.Prefix]
	for _, p := range l.Subnets {
		*s.At(family.Of(p.Addr())) = p
	}
	var ips family.Pair[netip.Addr]
	for _, ip := range l.PublicIPs {
		*ips.At(family.Of(ip)) = ip
	}
	return subnet.Lease{Subnets: subnet.Subnets(s), Attrs: subnet.Attrs{
		PublicIP: ips.IPv4, PublicIPv6: ips.IPv6,
		BackendType: l.Backend, BackendData: l.BackendData, BackendV6Data: l.BackendV6Data,
	}}
}

// A Device is a device that the node must have.
type Device struct {
	Name      string         `json:"name"`
	Type      string         `json:"type"` // as it follows "type" in ip link add
	MTU       int            `json:"mtu"`
	Addresses []netip.Prefix `json:"addresses,omitempty"`
	VNI       int            `json:"vni,omitempty"`
	Port      int            `json:"port,omitempty"` // not 0 for vxlan, to which VNI and Port belong
}

// An Endpoint is where peers send packets to.
type Endpoint struct {
	Address  netip.Addr `json:"address"`
	Protocol string     `json:"protocol"` // a name, or a number
	Port     int        `json:"port,omitempty"`
	Program  string     `json:"program,omitempty"` // that has the port; empty: flanneld or the kernel
}

// Rules are the state of the node's firewall rules.
type Rules struct {
	Mode       string `json:"mode"` // iptables or nftables
	InPlace    bool   `json:"inPlace"`
	Masquerade bool   `json:"masquerade"` // of a family at least
	Forward    bool   `json:"forward"`
}

// A SubnetFile is subnet.env.
type SubnetFile struct {
	Path    string `json:"path"`
	Written bool   `json:"written"` // and has the right content
}

// A Store is where leases come from.
type Store struct {
	Kind      string   `json:"kind,omitempty"` // "etcd", "kubernetes"
	Name      string   `json:"name,omitempty"`
	Endpoints []string `json:"endpoints,omitempty"`
	Check     string   `json:"check,omitempty"`   // a command that asks the store whether it works
	Trouble   string   `json:"trouble,omitempty"` // why it cannot be used now
}

// A view is what a Status is made from.
type view struct {
	Options
	*state                    // nil: the configuration is not known yet
	prober      *probe.Prober // nil: peers are not probed
	waiting     string
	started     time.Time
	ready       bool
	rulesSet    bool
	fileWritten bool
	errors      map[string]string
}

// view returns the view of the running node. It is for the goroutine that owns the
// node.
func (n *node) view() view {
	v := view{
		Options: n.Options, state: &n.state, prober: n.prober, waiting: n.health.waitingFor(), started: n.started,
		rulesSet: n.rulesSet, fileWritten: n.fileSet,
	}
	v.ready = n.ready && v.waiting == ""
	v.errors = map[string]string{}
	for duty, err := range n.errors {
		v.errors[duty] = string(err)
	}
	if n.fileFight != "" {
		v.errors["Subnet file"] = n.fileFight
	}
	if text := n.cannotProbe(); text != "" {
		v.errors["Probes"] = text
	}
	return v
}

func (v view) status() Status {
	s := v.statusOfStore()
	s.Started, s.Ready, s.Errors = byClock(v.started), v.ready, v.errors
	if v.state == nil || v.cfg == nil {
		return s
	}
	s.Network, s.Retired, s.Backend = v.cfg.Networks().Each(), v.cfg.Retired().Each(), v.cfg.BackendType
	s.Rules = Rules{Mode: "iptables", InPlace: v.rulesSet, Masquerade: v.masquerades(), Forward: v.Forward}
	if v.cfg.EnableNFTables {
		s.Rules.Mode = "nftables"
	}
	s.SubnetFile.Written = v.fileWritten
	if v.backend == nil {
		return s
	}
	info := v.backend.Info()
	s.MTU, s.Overhead = info.MTU, info.Overhead
	for _, e := range info.Endpoints {
		s.Endpoints = append(s.Endpoints, Endpoint{e.Addr, e.Protocol, e.Port, e.Program})
	}
	for i, l := range v.uplink.Links() {
		if i == 0 || v.uplink.Apart() {
			s.Uplinks = append(s.Uplinks, Uplink{Name: l.Name, MTU: l.MTU})
		}
		u := &s.Uplinks[len(s.Uplinks)-1]
		u.Addresses, u.PublicIPs = append(u.Addresses, l.Addr), append(u.PublicIPs, l.PublicIP)
	}
	s.Overlaps = v.setup.overlaps(v.host, v.own)
	if v.own == nil || waitingFor(v.Manager) != "" { // there is none, or it is not kept any more
		return s
	}
	own := v.leaseStatus(*v.own)
	s.Lease = &own
	s.Devices = devices(v.backend.Local(v.working()))
	s.Peers = v.others()
	for _, l := range v.leaseList() {
		if l.Problem != "" {
			s.LeftOut = append(s.LeftOut, l)
		}
		if l.unreached() {
			s.Unreached = append(s.Unreached, l)
		}
	}
	if v.prober != nil {
		s.Reached = v.prober.Count()
	}
	return s
}

// statusOfStore returns the part of the Status that is known at any time.
func (v view) statusOfStore() Status {
	state := v.Manager.State()
	return Status{
		Version: v.Version, Waiting: v.waiting,
		SubnetFile: SubnetFile{Path: v.SubnetFile},
		Store:      Store{state.Kind, state.Store, state.Endpoints, state.Check, state.Problem},
	}
}

// devices returns the devices among kernel objects.
func devices(objects []kernel.Object) []Device {
	var all []Device
	for _, o := range objects {
		switch o := o.(type) {
		case kernel.Link:
			d := Device{Name: o.Name, Type: o.Type.String(), MTU: o.MTU}
			if v, ok := o.Type.(kernel.VXLAN); ok {
				d.VNI, d.Port = v.VNI, v.Port
			}
			all = append(all, d)
		case kernel.Addr:
			for i := range all {
				if all[i].Name == o.Dev {
					all[i].Addresses = append(all[i].Addresses, o.Prefix)
				}
			}
		}
	}
	return all
}

func (v view) leaseStatus(l subnet.Lease) Lease {
	a := l.Attrs
	s := Lease{
		Subnets: l.Each(), PublicIPs: a.PublicIPs(),
		Backend: a.BackendType, BackendData: a.BackendData, BackendV6Data: a.BackendV6Data,
		Expires: l.Expires, Own: v.own != nil && l.Subnets == v.own.Subnets, Problem: string(v.problems[l.Subnets]),
	}
	if v.own != nil && !s.Own {
		s.Reachability = v.reachability(l)
	}
	if at := v.Manager.State().Expires; s.Own && at.After(s.Expires) {
		s.Expires = byClock(at)
	}
	return s
}

// leaseList returns all leases, sorted by their subnets.
func (v view) leaseList() []Lease {
	if v.state == nil {
		return nil
	}
	list := make([]Lease, 0, len(v.leases))
	for _, l := range v.leases {
		list = append(list, v.leaseStatus(*l))
	}
	slices.SortFunc(list, func(a, b Lease) int { return slices.CompareFunc(a.Subnets, b.Subnets, netip.Prefix.Compare) })
	return list
}

// expiriesTimeout is how long the store may take to tell when leases end.
const expiriesTimeout = 3 * time.Second

// fillExpiries fills in when leases end, as far as the store answers.
func fillExpiries(ctx context.Context, m subnet.Manager, leases []Lease) {
	if m.State().Problem != "" {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, expiriesTimeout)
	defer cancel()
	ends, err := m.Expiries(ctx)
	if err != nil {
		return
	}
	for i, l := range leases {
		if at, ok := ends[l.Lease().Subnets]; ok {
			leases[i].Expires = at.Round(time.Second)
		}
	}
}

// fillKeys fills in when the backend agreed on keys with peers last, as far as that is known.
func fillKeys(ctx context.Context, b backend.Backend, leases []Lease) {
	reporter, ok := b.(backend.SessionReporter)
	if !ok {
		return
	}
	var peers []subnet.Lease
	for _, l := range leases {
		if !l.Own {
			peers = append(peers, l.Lease())
		}
	}
	sessions, err := reporter.Sessions(ctx, peers)
	if err != nil {
		return
	}
	for i, l := range leases {
		leases[i].Keys = sessions[l.Lease().Subnets].Round(time.Second)
	}
}

// clockSkew returns how much this host's clock is ahead of the store's.
func clockSkew(ctx context.Context, m subnet.Manager) (time.Duration, error) {
	at, err := m.Clock(ctx)
	if err != nil {
		return 0, err
	}
	return time.Since(at), nil
}

// byClock returns a moment that this process has taken or computed as this host's clock shows it now. The clock may have
// been set since, as after a boot with a wrong clock: this process has its own count of time then, other programs do not.
func byClock(at time.Time) time.Time {
	now := time.Now()
	if set := now.Round(0).Sub(at.Round(0)) - now.Sub(at); set.Abs() > time.Second {
		return at.Add(set)
	}
	return at
}
