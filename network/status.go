package network

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/firewall"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/subnet"
)

// A Status is what a node's network is, and how it does. What is not known yet
// is left out of its JSON.
type Status struct {
	Daemon  bool      `json:"daemon"`            // flanneld itself says so; or else flannelctl has looked
	Version string    `json:"version,omitempty"` // of flanneld
	Started time.Time `json:"started,omitzero"`
	Ready   bool      `json:"ready"`
	Waiting string    `json:"waitingFor,omitempty"` // for what, until it is ready

	Network []netip.Prefix `json:"network,omitempty"`
	Backend string         `json:"backend,omitempty"`
	Uplink  *Uplink        `json:"uplink,omitempty"`
	Lease   *Lease         `json:"lease,omitempty"`
	Peers   int            `json:"peers"`
	LeftOut []Lease        `json:"leftOut,omitempty"` // that are no peers, or not reached in full

	MTU        int        `json:"mtu,omitempty"`      // for pods
	Overhead   int        `json:"overhead,omitempty"` // bytes that the backend puts around their packets
	Devices    []Device   `json:"devices,omitempty"`
	Endpoints  []Endpoint `json:"endpoints,omitempty"` // where peers' packets arrive
	Rules      Rules      `json:"rules"`
	SubnetFile SubnetFile `json:"subnetFile"`

	Store  Store             `json:"store"`
	Errors map[string]string `json:"errors,omitempty"` // that last, by what they keep from being done
}

// An Uplink is the interface that peers reach the node on.
type Uplink struct {
	Name      string       `json:"name"`
	MTU       int          `json:"mtu"`
	Addresses []netip.Addr `json:"addresses"`
	PublicIPs []netip.Addr `json:"publicIPs"`
}

// A Lease is a node's claim to its subnets, and what it tells its peers.
type Lease struct {
	Subnets       []netip.Prefix  `json:"subnets"`
	PublicIPs     []netip.Addr    `json:"publicIPs"`
	Backend       string          `json:"backend,omitempty"`
	BackendData   json.RawMessage `json:"backendData,omitempty"`
	BackendV6Data json.RawMessage `json:"backendV6Data,omitempty"`
	Expires       time.Time       `json:"expires,omitzero"` // none: never, or it is not known
	Own           bool            `json:"own"`
	Problem       string          `json:"problem,omitempty"`
}

// A Device is one that the node is to have.
type Device struct {
	Name string `json:"name"`
	Type string `json:"type"` // as it follows "type" in ip link add
	MTU  int    `json:"mtu"`
	VNI  int    `json:"vni,omitempty"`
	Port int    `json:"port,omitempty"`
}

// An Endpoint is where peers send packets to.
type Endpoint struct {
	Address  netip.Addr `json:"address"`
	Protocol string     `json:"protocol"` // a name, or a number
	Port     int        `json:"port,omitempty"`
}

// Rules tell of the node's firewall rules.
type Rules struct {
	Mode       string `json:"mode"` // iptables or nftables
	InPlace    bool   `json:"inPlace"`
	Masquerade bool   `json:"masquerade"`
	Forward    bool   `json:"forward"`
}

// A SubnetFile is subnet.env.
type SubnetFile struct {
	Path    string `json:"path"`
	Written bool   `json:"written"` // and says what it should
}

// A Store is where leases come from.
type Store struct {
	Name    string `json:"name,omitempty"`
	Trouble string `json:"trouble,omitempty"` // why it is of no use at the moment
}

// status is of the goroutine that owns the node.
func (n *node) status() Status {
	s := n.statusOfStore()
	s.Started, s.Ready = n.started, n.ready
	if n.cfg == nil {
		return s
	}
	s.Network, s.Backend = n.cfg.Networks().Each(), n.cfg.BackendType
	s.Rules = Rules{Mode: "iptables", InPlace: n.rulesSet, Masquerade: n.IPMasq, Forward: n.Forward}
	if n.cfg.EnableNFTables {
		s.Rules.Mode = "nftables"
	}
	s.SubnetFile = SubnetFile{n.SubnetFile, n.fileSet}
	for duty, trouble := range n.trouble {
		if trouble != "" {
			if s.Errors == nil {
				s.Errors = map[string]string{}
			}
			s.Errors[duty] = string(trouble)
		}
	}
	if n.backend == nil {
		return s
	}
	s.MTU, s.Overhead = n.backend.MTU(), overhead(n.cfg, n.uplink)
	if t, ok := n.backend.(backend.Tunnel); ok {
		for _, e := range t.Endpoints() {
			s.Endpoints = append(s.Endpoints, Endpoint{e.Addr, e.Protocol, e.Port})
		}
	}
	s.Uplink = uplinkStatus(n.uplink)
	if n.lease == nil {
		return s
	}
	own := n.leaseStatus(*n.lease)
	s.Lease = &own
	for _, o := range n.backend.Local(*n.lease) {
		l, ok := o.(kernel.Link)
		if !ok {
			continue
		}
		d := Device{Name: l.Name, Type: l.Type.String(), MTU: l.MTU}
		if v, ok := l.Type.(kernel.VXLAN); ok {
			d.VNI, d.Port = v.VNI, v.Port
		}
		s.Devices = append(s.Devices, d)
	}
	s.Peers = n.others()
	for _, l := range n.leaseList() {
		if l.Problem != "" {
			s.LeftOut = append(s.LeftOut, l)
		}
	}
	return s
}

// overhead returns how many bytes the backend puts around a packet: what it leaves
// less of on an uplink that carries much, while nobody tells it an MTU.
func overhead(cfg *subnet.Config, uplink iface.Uplink) int {
	untold := *cfg
	var keys map[string]json.RawMessage
	if json.Unmarshal(cfg.Backend, &keys) == nil { // there is a Backend
		maps.DeleteFunc(keys, func(key string, _ json.RawMessage) bool { return strings.EqualFold(key, "MTU") })
		untold.Backend, _ = json.Marshal(keys) // which was JSON before
	}
	uplink.MTU = 9000
	b, err := backend.New(&untold, uplink)
	if err != nil {
		return 0 // the configuration is as it was, but for what must be in order
	}
	return uplink.MTU - b.MTU()
}

// statusOfStore is what anybody may know of the node's Status.
func (n *node) statusOfStore() Status {
	s := Status{Version: n.Version, Waiting: n.health.waitingFor(), SubnetFile: SubnetFile{Path: n.SubnetFile}}
	state := n.Manager.State()
	s.Store = Store{state.Store, state.Trouble}
	return s
}

func uplinkStatus(u iface.Uplink) *Uplink {
	s := &Uplink{Name: u.Name, MTU: u.MTU}
	for _, a := range [][2]netip.Addr{{u.IPv4, u.PublicIP}, {u.IPv6, u.PublicIPv6}} {
		if a[0].IsValid() {
			s.Addresses, s.PublicIPs = append(s.Addresses, a[0]), append(s.PublicIPs, a[1])
		}
	}
	return s
}

func (n *node) leaseStatus(l subnet.Lease) Lease {
	a := l.Attrs
	s := Lease{
		Subnets: l.Each(), PublicIPs: a.PublicIPs(), Backend: a.BackendType, BackendData: a.BackendData, BackendV6Data: a.BackendV6Data,
		Expires: l.Expires, Own: n.lease != nil && l.Subnets == n.lease.Subnets, Problem: n.warned[l.Subnets],
	}
	if at := n.Manager.State().Expires; s.Own && at.After(s.Expires) {
		s.Expires = at
	}
	return s
}

// leaseList returns all leases, by their subnets.
func (n *node) leaseList() []Lease {
	list := make([]Lease, 0, len(n.peers))
	for _, l := range n.peers {
		list = append(list, n.leaseStatus(l))
	}
	slices.SortFunc(list, func(a, b Lease) int { return slices.CompareFunc(a.Subnets, b.Subnets, netip.Prefix.Compare) })
	return list
}

// expiriesFor is how long the store is asked when leases end.
const expiriesFor = 3 * time.Second

// expiries fills in when leases end, as far as the store can be asked.
func (n *node) expiries(ctx context.Context, leases []Lease) {
	r, ok := n.Manager.(subnet.Reporter)
	if !ok || n.Manager.State().Trouble != "" {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, expiriesFor)
	defer cancel()
	ends, err := r.Expiries(ctx)
	if err != nil {
		return
	}
	for i, l := range leases {
		var s subnet.Subnets
		for _, p := range l.Subnets {
			if p.Addr().Is4() {
				s.IPv4 = p
			} else {
				s.IPv6 = p
			}
		}
		if at, ok := ends[s]; ok {
			leases[i].Expires = at.Round(time.Second)
		}
	}
}

// skew returns how much this host's clock is ahead of the store's.
func skew(ctx context.Context, m subnet.Manager) (time.Duration, error) {
	r, ok := m.(subnet.Reporter)
	if !ok {
		return 0, errors.New("the store tells no time")
	}
	at, err := r.Clock(ctx)
	if err != nil {
		return 0, err
	}
	return time.Since(at), nil
}

// A demand is all that a node wants of its host.
type demand struct {
	rules    firewall.Desired
	nftables bool
	commands []string // that the kernel needs
}

// demand is of the goroutine that owns the node.
func (n *node) demand() (demand, error) {
	if n.lease == nil || n.peers == nil {
		return demand{}, fmt.Errorf("what is wanted is not known yet: waiting for %s", n.health.waitingFor())
	}
	commands, err := n.kernel.Diff()
	return demand{n.wantedRules(), n.cfg.EnableNFTables, commands}, err
}

// all returns the commands that the kernel needs, and those that the firewall
// does.
func (d demand) all(ctx context.Context) ([]string, error) {
	rules, err := d.plan(ctx)
	return slices.Concat(d.commands, rules), err
}

func (d demand) plan(ctx context.Context) ([]string, error) {
	driver, err := firewall.New(ctx, d.nftables)
	if err != nil {
		if d.rules.IPv4.IsZero() && d.rules.IPv6.IsZero() {
			return nil, nil
		}
		return nil, err
	}
	return driver.Plan(ctx, d.rules)
}

// An Inspection is what a node's network should be, worked out without the
// daemon: from the store, subnet.env and the flags. It is for one goroutine.
type Inspection struct{ n *node }

// Inspect asks the store of o's Manager and looks at the host until ctx ends,
// and changes neither. What cannot be found out is missing in the Status, which
// says why.
func Inspect(ctx context.Context, o Options) (*Inspection, error) {
	n := &node{
		Options: o, warned: map[subnet.Subnets]string{}, trouble: map[string]retry.Trouble{},
		health: &health{}, worker: newWorker(), metrics: newMetrics(o.Manager, o.Version),
	}
	var err error
	if n.kernel, err = kernel.New(); err != nil {
		return nil, err
	}
	if err := n.inspect(ctx); err != nil {
		text := err.Error()
		if s := n.statusOfStore().Store; s.Trouble != "" && errors.Is(err, context.DeadlineExceeded) {
			text = s.Name + ": " + s.Trouble
		}
		n.health.missing = text
	}
	return &Inspection{n}, nil
}

func (n *node) inspect(ctx context.Context) (err error) {
	if n.cfg, err = n.Manager.Config(ctx); err != nil {
		return fmt.Errorf("the network's configuration: %w", err)
	}
	var known bool
	if n.Uplink, known = <-n.Manager.Select(ctx, n.Uplink); !known {
		return fmt.Errorf("this node to be known: %w", ctx.Err())
	}
	if n.uplink, err = iface.Find(n.Uplink, n.cfg.IPv4.Enabled(), n.cfg.IPv6.Enabled()); err != nil {
		return fmt.Errorf("an uplink: %w", err)
	}
	if n.backend, err = backend.New(n.cfg, n.uplink); err != nil {
		return err
	}
	select {
	case u, ok := <-n.Manager.Watch(ctx):
		if !ok {
			return ctx.Err()
		}
		n.peers = u.Leases
	case <-ctx.Done():
		return fmt.Errorf("the leases: %w", ctx.Err())
	}
	if n.peers == nil {
		n.peers = map[subnet.Subnets]subnet.Lease{}
	}
	env, envErr := subnet.ReadEnv(n.SubnetFile)
	for _, l := range n.peers {
		a := l.Attrs
		if l.Subnets == env.Subnets || n.lease == nil && (a.PublicIP.IsValid() && a.PublicIP == n.uplink.PublicIP || !a.PublicIP.IsValid() && a.PublicIPv6 == n.uplink.PublicIPv6) {
			n.lease = &l
		}
	}
	if n.lease == nil {
		return fmt.Errorf("a lease: none is this node's, which has %s", strings.Trim(fmt.Sprint(uplinkStatus(n.uplink).PublicIPs), "[]"))
	}
	if r, ok := n.Manager.(subnet.Reporter); ok {
		ends, err := r.Expiries(ctx, n.lease.Subnets)
		if err != nil {
			return err
		}
		n.lease.Expires = ends[n.lease.Subnets]
	}
	n.worker.backend, n.worker.own = n.backend, *n.lease // as if it worked
	n.program(ctx)
	n.fileSet = envErr == nil && env == n.env()
	missing, err := demand{n.wantedRules(), n.cfg.EnableNFTables, nil}.plan(ctx)
	n.rulesSet = err == nil && len(missing) == 0
	return nil
}

// Close ends it.
func (i *Inspection) Close() { i.n.kernel.Close() }

// Status returns what was found.
func (i *Inspection) Status(context.Context) (Status, error) { return i.n.status(), nil }

// Leases returns all leases, with their ends where they can be had.
func (i *Inspection) Leases(ctx context.Context) ([]Lease, error) {
	if i.n.peers == nil {
		return nil, errors.New(i.n.health.missing)
	}
	leases := i.n.leaseList()
	i.n.expiries(ctx, leases)
	return leases, nil
}

// Diff returns the commands that would make the host what it should be.
func (i *Inspection) Diff(ctx context.Context) ([]string, error) {
	d, err := i.n.demand()
	if err != nil {
		return nil, err
	}
	return d.all(ctx)
}

// Skew returns how much this host's clock is ahead of the store's.
func (i *Inspection) Skew(ctx context.Context) (time.Duration, error) {
	return skew(ctx, i.n.Manager)
}

// waitingFor returns what the node waits for, "" once it has been ready.
func (h *health) waitingFor() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.missing
}
