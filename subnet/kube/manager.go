// Package kube is the subnet manager that takes leases from Kubernetes: a
// node's subnets are its Node's spec.podCIDRs, which somebody else hands out
// (kube-controller-manager, for one), and what it tells its peers is in the
// Node's annotations, under the same names as upstream's.
package kube

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/subnet"
)

// Options say where the API server is, and who this node is.
type Options struct {
	APIURL, Kubeconfig string // neither: the cluster that the pod runs in
	AnnotationPrefix   string // complete, "flannel.alpha.coreos.com/"
	ConfigPath         string // of the network's configuration, a JSON file
	NodeName           string // or else
	Namespace, Pod     string // the pod that this is, whose node it is

	// NodeAddress takes for the uplink the interface that holds the Node's
	// InternalIP.
	NodeAddress bool
	// SetCondition has the Node's condition NetworkUnavailable set to False
	// once the network is up.
	SetCondition bool
}

// The annotations, behind the prefix.
const (
	backendType   = "backend-type"
	backendData   = "backend-data"
	backendV6Data = "backend-v6-data"
	publicIP      = "public-ip"
	publicIPv6    = "public-ipv6"
	managed       = "kube-subnet-manager" // "true": the node is one of ours

	publicIPOverwrite   = "public-ip-overwrite" // wins over what is detected
	publicIPv6Overwrite = "public-ipv6-overwrite"
	nodePublicIP        = "node-public-ip" // as good as --public-ip
	nodePublicIPv6      = "node-public-ipv6"
)

// Manager is a subnet.Manager.
type Manager struct {
	options Options
	client  *client
	health  *subnet.StoreHealth
	events  *events
	name    string // this node's

	ctx     context.Context // ends with Close
	cancel  context.CancelFunc
	running sync.WaitGroup

	on     subnet.Subnets // the networks of the families that are on
	want   subnet.Attrs   // what Acquire was asked to publish; of Acquire and Keep alone
	warned sync.Map       // the texts of warnings that were logged

	mu      sync.Mutex
	asked   iface.Selector // what the operator and the Node say, see Select
	own     *ownNode       // nil: there is no Node yet
	changed chan struct{}  // closed when own, or up, changes
	told    bool           // own is what the API server says
	waits   map[string]int // what is waited for, by how many: see await
	up      bool           // the network is: see Ready
}

var (
	_ subnet.Manager       = (*Manager)(nil)
	_ subnet.EventRecorder = (*Manager)(nil)
)

// New returns a manager. An error is about the options: it does not talk to the
// API server yet.
func New(ctx context.Context, o Options) (*Manager, error) {
	if o.NodeName == "" && (o.Namespace == "" || o.Pod == "") {
		return nil, errors.New("which Node is this? Set the environment variable NODE_NAME, or POD_NAME and POD_NAMESPACE (in a pod: valueFrom: fieldRef: spec.nodeName)")
	}
	ctx, cancel := context.WithCancel(ctx)
	c, err := newClient(ctx, o.APIURL, o.Kubeconfig)
	if err != nil {
		cancel()
		return nil, err
	}
	m := &Manager{
		options: o, client: c, name: o.NodeName, ctx: ctx, cancel: cancel,
		health: subnet.NewStoreHealth(klog.FromContext(ctx), subnet.State{
			Kind: "kubernetes", Store: "Kubernetes' API server at " + c.server, Endpoints: []string{c.server},
			Check: "curl -k " + c.server + "/readyz",
		}),
		changed: make(chan struct{}), waits: map[string]int{},
	}
	m.events = newEvents(c, m.node)
	if o.NodeAddress {
		changes, err := iface.Changes(ctx)
		if err != nil {
			cancel()
			return nil, err
		}
		m.running.Go(func() {
			for range changes { // an interface may hold the Node's address by now
				m.mu.Lock()
				m.signal()
				m.mu.Unlock()
			}
		})
	}
	m.running.Go(m.followOwn)
	m.running.Go(func() { m.events.run(ctx) })
	return m, nil
}

// Close ends what runs. The Node stays as it is.
func (m *Manager) Close() error {
	m.cancel()
	m.running.Wait()
	return nil
}

// node returns the name of this node's Node; "" while it is not known.
func (m *Manager) node() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.name
}

// RecordEvent implements subnet.EventRecorder, as an Event of the Node.
func (m *Manager) RecordEvent(subject, reason, message string) {
	if message == "" {
		m.events.end(subject)
	} else {
		m.events.begin(subject, reason, message)
	}
}

// Config implements subnet.Manager. The file comes with the pod: that it is not
// there is for a person to mend.
func (m *Manager) Config(context.Context) (*subnet.Config, error) {
	text, err := os.ReadFile(m.options.ConfigPath)
	if err != nil {
		return nil, fmt.Errorf("--net-config-path: %w (in a pod, the ConfigMap kube-flannel-cfg has it)", err)
	}
	cfg, err := subnet.ParseConfig(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", m.options.ConfigPath, err)
	}
	m.on = cfg.Networks()
	return cfg, nil
}

// Configs implements subnet.Manager: what the file says is read once.
func (m *Manager) Configs(context.Context) <-chan *subnet.Config { return nil }

// Select implements subnet.Manager: the Node may say what peers are to use.
func (m *Manager) Select(ctx context.Context, sel iface.Selector) <-chan iface.Selector {
	out := make(chan iface.Selector)
	go func() {
		defer close(out)
		for first := true; ; first = false {
			own, changed, err := m.await(ctx, m.addressMissing)
			if err != nil {
				return
			}
			if now, news := m.selector(own, sel); first || news {
				select {
				case out <- now:
				case <-ctx.Done():
					return
				}
			}
			if m.waitChange(ctx, changed, true) != nil {
				return
			}
		}
	}()
	return out
}

// selector adds to the operator's selector what the Node says, and tells whether
// that is another one than before.
func (m *Manager) selector(own *ownNode, sel iface.Selector) (now iface.Selector, news bool) {
	for _, a := range []struct {
		annotation string
		into       *netip.Addr
	}{{nodePublicIP, &sel.PublicIP}, {nodePublicIPv6, &sel.PublicIPv6}} {
		if ip, ok := m.address(own, a.annotation); ok && !a.into.IsValid() {
			*a.into = ip
		}
	}
	if m.options.NodeAddress {
		sel.Names = nil
		for _, ip := range m.internalIPs(own) {
			sel.Names = append(sel.Names, ip.String())
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	before := m.asked
	m.asked = sel
	return sel, sel.PublicIP != before.PublicIP || sel.PublicIPv6 != before.PublicIPv6 || !slices.Equal(sel.Names, before.Names)
}

// internalIPs are the Node's of the families that are on.
func (m *Manager) internalIPs(own *ownNode) []netip.Addr {
	return slices.DeleteFunc(slices.Clone(own.addresses), func(ip netip.Addr) bool {
		return ip.Is4() && !m.on.IPv4.IsValid() || ip.Is6() && !m.on.IPv6.IsValid()
	})
}

// addressMissing tells what keeps --iface-node-address from finding the uplink.
func (m *Manager) addressMissing(own *ownNode) string {
	if !m.options.NodeAddress {
		return ""
	}
	switch ips := m.internalIPs(own); {
	case len(ips) == 0:
		return "status.addresses of Node " + m.name + " to have an InternalIP of a family that is on, for --iface-node-address: kubelet's --node-ip sets it"
	case !held(ips):
		return fmt.Sprintf("an interface that holds an InternalIP of Node %s, %v: have kubelet's --node-ip name an address of this host, or give --iface rather than --iface-node-address", m.name, ips)
	}
	return ""
}

// held tells whether an interface of this host has one of the addresses.
func held(ips []netip.Addr) bool {
	addrs, err := net.InterfaceAddrs()
	return err == nil && slices.ContainsFunc(addrs, func(a net.Addr) bool {
		p, err := netip.ParsePrefix(a.String())
		return err == nil && slices.Contains(ips, p.Addr())
	})
}

// address reads an annotation that is an address, of IPv6 where its name says
// so.
func (m *Manager) address(n *ownNode, annotation string) (netip.Addr, bool) {
	ip, err := parseAddress(n.annotations[annotation], annotation)
	if err != nil {
		m.warnOnce("The annotation %s%s of Node %s is ignored: %v", m.options.AnnotationPrefix, annotation, m.name, err)
	}
	return ip, ip.IsValid()
}

// warnOnce logs a warning that was not logged before.
func (m *Manager) warnOnce(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if _, known := m.warned.LoadOrStore(text, true); !known {
		klog.WarningDepth(1, text)
	}
}

// parseAddress reads the text of an annotation: the zero Addr for none.
func parseAddress(text, annotation string) (netip.Addr, error) {
	if text == "" {
		return netip.Addr{}, nil
	}
	ip, err := netip.ParseAddr(text)
	if err != nil || ip.Is4() == strings.Contains(annotation, "ipv6") || ip.Is4In6() || ip.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("%q is no address of that family", text)
	}
	return ip, nil
}

// Previous implements subnet.Manager.
func (m *Manager) Previous(ctx context.Context, _ subnet.Attrs) (subnet.Attrs, error) {
	own, _, err := m.await(ctx, func(*ownNode) string { return "" })
	if err != nil {
		return subnet.Attrs{}, err
	}
	return attrsOf(func(name string) string { return own.annotations[name] }), nil
}

// Acquire implements subnet.Manager.
func (m *Manager) Acquire(ctx context.Context, cfg *subnet.Config, want subnet.Lease) (subnet.Lease, error) {
	m.want = want.Attrs
	for {
		own, changed, err := m.await(ctx, func(n *ownNode) string {
			have := n.subnets
			switch {
			case len(have.Each()) == 0:
				return "spec.podCIDR of Node " + m.name + ": set --allocate-node-cidrs and --cluster-cidr on kube-controller-manager, or spec.podCIDR on the node"
			case cfg.IPv4.Enabled() && !have.IPv4.IsValid() || cfg.IPv6.Enabled() && !have.IPv6.IsValid():
				return fmt.Sprintf("spec.podCIDRs of Node %s to have a subnet of each family of the network %s: they are %s", m.name, cfg.Networks(), have)
			}
			return ""
		})
		if err != nil {
			return subnet.Lease{}, err
		}
		lease, err := m.leaseOf(own, cfg, want.Attrs)
		if err != nil {
			return subnet.Lease{}, err
		}
		there, err := m.publish(ctx, own, lease)
		if err != nil || there {
			return lease, err
		}
		if err := m.waitChange(ctx, changed, false); err != nil {
			return subnet.Lease{}, err
		}
	}
}

// leaseOf returns the lease that a Node's podCIDRs are, with what it says of
// the public addresses.
func (m *Manager) leaseOf(own *ownNode, cfg *subnet.Config, attrs subnet.Attrs) (subnet.Lease, error) {
	lease := subnet.Lease{Attrs: m.overwrite(own, attrs)}
	for _, f := range []struct {
		pool subnet.Pool
		have netip.Prefix
		into *netip.Prefix
	}{{cfg.IPv4, own.subnets.IPv4, &lease.IPv4}, {cfg.IPv6, own.subnets.IPv6, &lease.IPv6}} {
		if !f.pool.Enabled() {
			continue
		}
		// Neither can change while both the Node and this configuration stay.
		if !f.pool.Network.Contains(f.have.Addr()) || f.have.Bits() < f.pool.Network.Bits() {
			err := fmt.Errorf("the podCIDR %s of Node %s is outside the Network %s in %s: make Network the same as --cluster-cidr of kube-controller-manager",
				f.have, m.name, f.pool.Network, m.options.ConfigPath)
			m.RecordEvent("podCIDR", "PodCIDROutsideNetwork", err.Error())
			return subnet.Lease{}, err
		}
		*f.into = f.have
	}
	return lease, nil
}

// overwrite returns what is to be published with the public addresses that the
// Node's annotations overwrite.
func (m *Manager) overwrite(own *ownNode, attrs subnet.Attrs) subnet.Attrs {
	for _, f := range []struct {
		annotation string
		public     *netip.Addr
	}{{publicIPOverwrite, &attrs.PublicIP}, {publicIPv6Overwrite, &attrs.PublicIPv6}} {
		if !f.public.IsValid() {
			continue // the family is off
		}
		if ip, ok := m.address(own, f.annotation); ok {
			*f.public = ip
		} else {
			m.compare(own, *f.public)
		}
	}
	return attrs
}

// compare warns, once, of an address that was found but is not one of the Node's
// of that family: the classic mistake on hosts with two interfaces.
func (m *Manager) compare(own *ownNode, found netip.Addr) {
	m.mu.Lock()
	asked := m.asked
	m.mu.Unlock()
	same := func(ip netip.Addr) bool { return ip.BitLen() == found.BitLen() }
	if found == asked.PublicIP || found == asked.PublicIPv6 || !slices.ContainsFunc(own.addresses, same) || slices.Contains(own.addresses, found) {
		return
	}
	m.warnOnce("The address that peers are told, %s, is not among those of Node %s, %v. If this host has several interfaces, give --iface-node-address or --iface", found, m.name, own.addresses)
}

// publish writes the lease's annotations where they differ, and tells whether
// the Node is there still.
func (m *Manager) publish(ctx context.Context, own *ownNode, lease subnet.Lease) (there bool, err error) {
	patch := map[string]string{}
	for key, value := range annotationsOf(lease.Attrs) {
		if own.annotations[key] != value {
			patch[m.options.AnnotationPrefix+key] = value
		}
	}
	if len(patch) == 0 {
		return true, nil
	}
	return m.patch(ctx, "publish this node's lease", map[string]any{"metadata": map[string]any{"annotations": patch}})
}

// patch merges into the Node, and tells whether it is there still. The Node is
// then known as it is in the answer, whatever the watch brings of before.
func (m *Manager) patch(ctx context.Context, purpose string, patch any) (there bool, err error) {
	there = true
	err = m.retry(ctx, purpose, func(ctx context.Context) error {
		now, err := m.client.patchStatus(ctx, m.name, patch)
		switch {
		case err == nil:
			m.mu.Lock()
			known := m.own != nil // or the watch says by now that the Node is gone
			m.mu.Unlock()
			if known {
				return ownStore{m}.Update(now)
			}
		case apierrors.IsNotFound(err) && !apierrors.IsUnexpectedServerError(err): // rather than from a proxy
			there, err = false, nil
		}
		return err
	})
	return there, err
}

// Ready implements subnet.Manager.
func (m *Manager) Ready() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.up = true
	m.signal()
}

// State implements subnet.Manager. A lease lasts as long as the Node.
func (m *Manager) State() subnet.State {
	return m.health.State()
}

// Keep implements subnet.Manager: annotations, and the condition once the
// network is up, are written again when somebody changes them.
func (m *Manager) Keep(ctx context.Context, lease subnet.Lease) error {
	quarrel := subnet.Backoff()
	var last time.Time
	for {
		own, changed, err := m.await(ctx, func(*ownNode) string { return "" })
		if err != nil {
			return err
		}
		for _, f := range [][2]netip.Prefix{{lease.IPv4, own.subnets.IPv4}, {lease.IPv6, own.subnets.IPv6}} {
			if f[0].IsValid() && f[0] != f[1] {
				klog.Warningf("The podCIDRs of Node %s are %s now, no longer %s", m.name, cmp.Or(own.subnets.String(), "gone"), lease.Subnets)
				return subnet.ErrLost
			}
		}
		if now := m.overwrite(own, m.want); len(m.want.PublicIPs()) > 0 && !now.Equal(lease.Attrs) {
			klog.Infof("The annotations of Node %s overwrite other public addresses now: publishing %v, no longer %v", m.name, now.PublicIPs(), lease.Attrs.PublicIPs())
			return subnet.ErrChanged
		}
		m.mu.Lock()
		up := m.up
		m.mu.Unlock()
		wrong := slices.ContainsFunc(slices.Collect(maps.Keys(annotationsOf(lease.Attrs))), func(key string) bool {
			return own.annotations[key] != annotationsOf(lease.Attrs)[key]
		})
		condition := up && m.options.SetCondition && !own.conditioned
		if wrong || condition {
			// Somebody else may want it otherwise, as often as we do.
			if time.Since(last) > time.Minute {
				quarrel.Reset()
			} else if err := quarrel.Sleep(ctx); err != nil {
				return err
			}
			last = time.Now()
		}
		there := true
		switch {
		case wrong:
			klog.Warningf("Somebody changed the annotations of Node %s: writing them again", m.name)
			there, err = m.publish(ctx, own, lease)
		case condition:
			there, err = m.setCondition(ctx)
		}
		if err != nil {
			return err
		}
		if err := m.waitChange(ctx, changed, there); err != nil { // a change of ours is one, too
			return err
		}
	}
}

// setCondition writes the condition that lets the scheduler use the node.
func (m *Manager) setCondition(ctx context.Context) (there bool, err error) {
	now := time.Now().UTC().Format(time.RFC3339)
	return m.patch(ctx, "set the condition NetworkUnavailable", map[string]any{"status": map[string]any{"conditions": []map[string]string{{
		"type": "NetworkUnavailable", "status": "False", "reason": "FlannelIsUp", "message": "Flannel is running on this node",
		"lastTransitionTime": now, "lastHeartbeatTime": now,
	}}}})
}

// attrsOf reads a lease's annotations.
func attrsOf(annotation func(name string) string) subnet.Attrs {
	a := subnet.Attrs{
		BackendType:   annotation(backendType),
		BackendData:   raw(annotation(backendData)),
		BackendV6Data: raw(annotation(backendV6Data)),
	}
	a.PublicIP, _ = parseAddress(annotation(publicIP), publicIP) // a peer's: it may be nonsense
	a.PublicIPv6, _ = parseAddress(annotation(publicIPv6), publicIPv6)
	return a
}

// raw returns the JSON of an annotation; nil for none, which upstream writes as
// "null".
func raw(text string) json.RawMessage {
	if text == "" || text == "null" {
		return nil
	}
	return json.RawMessage(text)
}

// annotationsOf is the inverse of attrsOf.
func annotationsOf(a subnet.Attrs) map[string]string {
	all := map[string]string{managed: "true", backendType: a.BackendType}
	for _, f := range []struct {
		ip      netip.Addr
		address string
		data    json.RawMessage
		key     string
	}{{a.PublicIP, publicIP, a.BackendData, backendData}, {a.PublicIPv6, publicIPv6, a.BackendV6Data, backendV6Data}} {
		if !f.ip.IsValid() {
			continue
		}
		all[f.address], all[f.key] = f.ip.String(), "null"
		if f.data != nil {
			all[f.key] = string(f.data)
		}
	}
	return all
}

// subnetsOf reads podCIDRs of the families that are on; what is none is left
// out.
func subnetsOf(cidrs []string, on subnet.Subnets) subnet.Subnets {
	var s subnet.Subnets
	for _, text := range cidrs {
		p, err := netip.ParsePrefix(text)
		switch {
		case err != nil:
		case p.Addr().Is4() && on.IPv4.IsValid():
			s.IPv4 = p.Masked()
		case p.Addr().Is6() && on.IPv6.IsValid():
			s.IPv6 = p.Masked()
		}
	}
	return s
}

// bothFamilies are the networks that hold everything.
var bothFamilies = subnet.Subnets{IPv4: netip.PrefixFrom(netip.IPv4Unspecified(), 0), IPv6: netip.PrefixFrom(netip.IPv6Unspecified(), 0)}

// retry calls f until it succeeds or ctx ends.
func (m *Manager) retry(ctx context.Context, purpose string, f func(context.Context) error) error {
	pause := subnet.Backoff()
	for {
		attempt, cancel := context.WithTimeout(ctx, requestTimeout)
		err := f(attempt)
		cancel()
		if err == nil {
			m.health.Succeeded(purpose)
			return nil
		}
		if ctx.Err() == nil {
			m.fail(purpose, err)
		}
		rest := pause.Next()
		if seconds, ok := apierrors.SuggestsClientDelay(err); ok {
			rest = max(rest, min(time.Duration(seconds)*time.Second, maxRetryAfter))
		}
		if err := retry.Sleep(ctx, rest); err != nil {
			return err
		}
	}
}

// fail takes note that an attempt has failed.
func (m *Manager) fail(purpose string, err error) {
	m.client.refresh()
	why, text := explain(err)
	m.health.Failed(purpose, why, text)
}
