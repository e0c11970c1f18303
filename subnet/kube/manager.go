// Package kube, which other programs may import, is the subnet manager that takes leases from Kubernetes. A node's
// subnets are its Node's spec.podCIDRs, which another program assigns, such as kube-controller-manager. What the node
// publishes for its peers is in the Node's annotations, under upstream's names.
package kube

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/netspace"
	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/subnet"
)

// Options are where the API server is, and how this node is known.
type Options struct {
	APIURL, Kubeconfig string // neither: the cluster that the pod runs in
	AnnotationPrefix   string // complete; "": DefaultAnnotationPrefix
	ConfigPath         string // of the network's configuration, a JSON file
	NodeName           string // or else:
	Namespace, Pod     string // our own pod, whose node this is

	// NodeAddress makes the interface that holds the Node's InternalIP the uplink.
	NodeAddress bool
	// SetCondition sets the Node's condition NetworkUnavailable to False once the network is up.
	SetCondition bool
}

// DefaultAnnotationPrefix is flannel's.
const DefaultAnnotationPrefix = "flannel.alpha.coreos.com/"

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
	nodePublicIP        = "node-public-ip" // has the effect of --public-ip
	nodePublicIPv6      = "node-public-ipv6"
)

// annotationNames are all of these, whose texts the Nodes share: see annotationName.
var annotationNames = []string{
	backendType, backendData, backendV6Data, publicIP, publicIPv6, managed,
	publicIPOverwrite, publicIPv6Overwrite, nodePublicIP, nodePublicIPv6,
}

// Manager is a subnet.Manager.
type Manager struct {
	log     klog.Logger
	options Options
	client  *client
	health  *subnet.StoreHealth
	events  *events
	name    string // this node's

	ctx     context.Context // ends with Close
	cancel  context.CancelFunc
	running sync.WaitGroup

	configured []byte       // what Config read
	want       subnet.Attrs // what Acquire was asked to publish; of Acquire and Keep alone

	records    *subnet.RecordLog // what is wrong with annotations of Nodes, by name
	ownRecords *subnet.RecordLog // what is wrong with our Node, by annotation or address

	mu       sync.Mutex
	selector iface.Selector  // the latest one, see Select
	own      *ownNode        // nil: there is no Node yet
	changed  chan struct{}   // closed when own or up changes
	synced   bool            // own is what the API server answered
	waits    map[string]int  // what is missing, and how many goroutines wait for it: see await
	up       bool            // the network is up: see Ready
	on       subnet.Networks // of the families that are on: see setNetworks
	switched chan struct{}   // closed when on changes; nil: nobody waits
}

var (
	_ subnet.Manager       = (*Manager)(nil)
	_ subnet.EventRecorder = (*Manager)(nil)
)

// New returns a manager, which runs until ctx ends or Close is called. It sends no request to the API server yet: an error
// is about the options. Its connections are made in the network namespace of the calling thread.
func New(ctx context.Context, o Options) (*Manager, error) {
	if o.NodeName == "" && (o.Namespace == "" || o.Pod == "") {
		return nil, errors.New("which Node is this? Set the environment variable NODE_NAME, or POD_NAME and POD_NAMESPACE " +
			"(in a pod: valueFrom: fieldRef: spec.nodeName)")
	}
	o.AnnotationPrefix = cmp.Or(o.AnnotationPrefix, DefaultAnnotationPrefix)
	ctx, cancel := context.WithCancel(ctx)
	c, err := newClient(ctx, o)
	if err != nil {
		cancel()
		return nil, err
	}
	log := klog.FromContext(ctx)
	m := &Manager{
		log: log, options: o, client: c, name: o.NodeName, ctx: ctx, cancel: cancel,
		health: subnet.NewStoreHealth(log, subnet.State{
			Kind: "kubernetes", Store: "Kubernetes' API server at " + c.server, Endpoints: []string{c.server},
			Check: "curl -k " + plain.Shell(c.server+"/readyz"),
		}),
		records: subnet.NewRecordLog(log), ownRecords: subnet.NewRecordLog(log),
		changed: make(chan struct{}), waits: map[string]int{},
	}
	m.events = newEvents(log, c, m.node)
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
	m.running.Go(m.watchOwnNode)
	m.running.Go(func() { m.events.run(ctx) })
	return m, nil
}

// Close implements subnet.Manager. The Node stays as it is.
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

// Select implements subnet.Manager: the Node's annotations may name the public addresses.
func (m *Manager) Select(ctx context.Context, sel iface.Selector) <-chan iface.Selector {
	out := make(chan iface.Selector)
	go netspace.FromContext(ctx).In(func() { // which reads the addresses of this host
		defer close(out)
		for first := true; ; first = false {
			own, changed, err := m.await(ctx, m.addressMissing)
			if err != nil {
				return
			}
			if now, changed := m.updateSelector(own, sel); first || changed {
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
	})()
	return out
}

// updateSelector completes the operator's selector by the Node's annotations and addresses, and tells whether it has
// changed.
func (m *Manager) updateSelector(own *ownNode, sel iface.Selector) (now iface.Selector, changed bool) {
	for _, a := range []struct {
		annotation string
		into       *netip.Addr
	}{{nodePublicIP, &sel.PublicIP}, {nodePublicIPv6, &sel.PublicIPv6}} {
		if ip, ok := m.address(own, a.annotation); ok && !a.into.IsValid() {
			*a.into = ip
		}
	}
	sel.Prefer = slices.Clone(sel.Prefer)
	for _, a := range []string{publicIP, publicIPv6} {
		if ip, err := parseAddress(own.annotations[a], a); err == nil && ip.IsValid() {
			sel.Prefer = append(sel.Prefer, ip) // peers know it
		}
	}
	if m.options.NodeAddress {
		m.selectInternalIPs(own, &sel)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	before := m.selector
	m.selector = sel
	return sel, sel.PublicIP != before.PublicIP || sel.PublicIPv6 != before.PublicIPv6 ||
		!slices.Equal(sel.Names, before.Names) || !slices.Equal(sel.IPv6.Names, before.IPv6.Names)
}

// selectInternalIPs has the selector choose the interface that holds an InternalIP of the Node. Where this host holds
// InternalIPs of both families, each family has the interface that holds its own.
func (m *Manager) selectInternalIPs(own *ownNode, sel *iface.Selector) {
	var ips family.Pair[[]netip.Addr]
	for _, ip := range m.internalIPs(own) {
		of := ips.At(family.Of(ip))
		*of = append(*of, ip)
	}
	names := func(ips []netip.Addr) (all []string) {
		for _, ip := range ips {
			all = append(all, ip.String())
		}
		return all
	}
	if held(ips.IPv4) && held(ips.IPv6) {
		sel.Names, sel.IPv6.Names = names(ips.IPv4), names(ips.IPv6)
	} else {
		sel.Names, sel.IPv6.Names = names(m.internalIPs(own)), nil
	}
}

// internalIPs returns the Node's InternalIPs of the families that are on.
func (m *Manager) internalIPs(own *ownNode) []netip.Addr {
	on, _ := m.networks()
	return slices.DeleteFunc(slices.Clone(own.addresses), func(ip netip.Addr) bool {
		return len(on.Of(family.Of(ip))) == 0
	})
}

// setNetworks sets the networks of the families that are on: those of the configuration that Config returned, and then
// of the one that a lease was acquired for last.
func (m *Manager) setNetworks(on subnet.Networks) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if on.Equal(m.on) {
		return
	}
	m.on = on
	if m.switched != nil {
		close(m.switched)
		m.switched = nil
	}
	m.signal() // for --iface-node-address
}

// networks returns the networks of the families that are on, and a channel that is closed when they change.
func (m *Manager) networks() (on subnet.Networks, changed <-chan struct{}) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.switched == nil {
		m.switched = make(chan struct{})
	}
	return m.on, m.switched
}

// addressMissing returns what --iface-node-address lacks to find the uplink; "" if nothing is missing.
func (m *Manager) addressMissing(own *ownNode) string {
	if !m.options.NodeAddress {
		return ""
	}
	switch ips := m.internalIPs(own); {
	case len(ips) == 0:
		return "an InternalIP in status.addresses of Node " + m.name + ", of a family that is on, for --iface-node-address" +
			": set kubelet's --node-ip"
	case !held(ips):
		return fmt.Sprintf("an interface that holds an InternalIP of Node %s, %v: "+
			"set kubelet's --node-ip to an address of this host, or give --iface instead of --iface-node-address", m.name, ips)
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

// address reads an annotation that is an address; an IPv6 address if the annotation's name has "ipv6" in it.
func (m *Manager) address(n *ownNode, annotation string) (netip.Addr, bool) {
	ip, err := parseAddress(n.annotations[annotation], annotation)
	if err != nil {
		m.ownRecords.Error(annotation, err.Error(), err, "Ignoring an annotation of the Node",
			"annotation", m.options.AnnotationPrefix+annotation, "node", m.name)
	} else {
		m.ownRecords.Forget(annotation)
	}
	return ip, ip.IsValid()
}

// parseAddress reads the text of an annotation: the zero Addr for none.
func parseAddress(text, annotation string) (netip.Addr, error) {
	if text == "" {
		return netip.Addr{}, nil
	}
	ip, err := netip.ParseAddr(text)
	if err != nil || ip.Is4() == strings.Contains(annotation, "ipv6") || ip.Is4In6() || ip.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("%s is not an address of the annotation's family", plain.Quote(text))
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
				return "spec.podCIDR of Node " + m.name +
					": set --allocate-node-cidrs and --cluster-cidr on kube-controller-manager, or spec.podCIDR on the node"
			case cfg.IPv4.Enabled() && !have.IPv4.IsValid() || cfg.IPv6.Enabled() && !have.IPv6.IsValid():
				return fmt.Sprintf("spec.podCIDRs of Node %s for each family of the network %s: they are %s",
					m.name, cfg.Networks(), have)
			}
			if o, hindered := cfg.Hinders(have); hindered {
				return fmt.Sprintf("a spec.podCIDR of Node %s that does not overlap %s of this host (it is %s): give "+
					"kube-controller-manager another --cluster-cidr, with the same Network in %s, and register the Node again",
					m.name, o.Name, have, m.options.ConfigPath)
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
		if err != nil {
			return subnet.Lease{}, err
		}
		if there {
			m.setNetworks(cfg.Networks())
			return lease, nil
		}
		if err := m.waitChange(ctx, changed, false); err != nil {
			return subnet.Lease{}, err
		}
	}
}

// leaseOf returns the lease that a Node's podCIDRs stand for, with the public addresses that its annotations overwrite.
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
		if _, inside := f.pool.Range(f.have); !inside {
			err := m.outside(f.have, f.pool)
			m.RecordEvent("podCIDR", "PodCIDROutsideNetwork", err.Error())
			return subnet.Lease{}, err
		}
		*f.into = f.have
	}
	return lease, nil
}

// overwrite returns attrs with the public addresses that the Node's annotations overwrite.
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
			m.checkAddress(own, *f.public)
		}
	}
	return attrs
}

// checkAddress logs, once, a public address that was found on this host but is not one of the Node's addresses of its
// family: a frequent mistake on hosts with two interfaces. A Node that has no addresses for a while changes nothing.
func (m *Manager) checkAddress(own *ownNode, found netip.Addr) {
	m.mu.Lock()
	asked := m.selector
	m.mu.Unlock()
	sameFamily := func(ip netip.Addr) bool { return ip.BitLen() == found.BitLen() }
	switch {
	case found == asked.PublicIP || found == asked.PublicIPv6 || slices.Contains(own.addresses, found):
		m.ownRecords.Forget(found.String())
		return
	case !slices.ContainsFunc(own.addresses, sameFamily):
		return // not known: kubelet registers a Node before it publishes the addresses
	}
	m.ownRecords.Error(found.String(), fmt.Sprint(own.addresses), nil, "The public address is not an address of the Node",
		"address", found, "node", m.name, "nodeAddresses", own.addresses,
		"fix", "if this host has several interfaces, give --iface-node-address or --iface")
}

// publish writes the lease's annotations that differ, and tells whether the Node still exists.
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

// patch merges a patch into the Node, and tells whether the Node still exists. The Node is then known as it is in the
// answer, even if the watch brings an older state later.
func (m *Manager) patch(ctx context.Context, operation string, patch any) (there bool, err error) {
	there = true
	err = m.retry(ctx, operation, func(ctx context.Context) error {
		now, err := m.client.patchStatus(ctx, m.name, patch)
		switch {
		case err == nil:
			m.mu.Lock()
			known := m.own != nil // nil: by now, the watch knows that the Node is gone
			m.mu.Unlock()
			if known {
				return ownStore{m}.Update(now)
			}
		case apierrors.IsNotFound(err) && !apierrors.IsUnexpectedServerError(err): // a proxy's answer is unexpected
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
	s := m.health.State()
	s.Addresses = m.client.dialer.Remotes()
	return s
}

// Keep implements subnet.Manager: it writes the annotations again when somebody changes them, and so the condition,
// once the network is up.
func (m *Manager) Keep(ctx context.Context, lease subnet.Lease) error {
	fight := subnet.Backoff()
	var restored time.Time
	annotations := annotationsOf(lease.Attrs)
	for {
		own, changed, err := m.await(ctx, func(*ownNode) string { return "" })
		if err != nil {
			return err
		}
		if err := m.checkLease(own, lease); err != nil {
			return err
		}
		m.mu.Lock()
		up := m.up
		m.mu.Unlock()
		overwritten := false
		for key, value := range annotations {
			overwritten = overwritten || own.annotations[key] != value
		}
		unconditioned := up && m.options.SetCondition && !own.conditioned
		if overwritten || unconditioned {
			// Another program may write something else as often as we write this.
			if time.Since(restored) > time.Minute {
				fight.Reset()
			} else if err := fight.Sleep(ctx); err != nil {
				return err
			}
			restored = time.Now()
		}
		there := true
		switch {
		case overwritten:
			m.ownRecords.Error("annotations", own.version, nil,
				"Another program changed the annotations of the Node; writing them again", "node", m.name)
			there, err = m.publish(ctx, own, lease)
		case unconditioned:
			there, err = m.setCondition(ctx)
		}
		if err != nil {
			return err
		}
		if err := m.waitChange(ctx, changed, there); err != nil { // our own change counts, too
			return err
		}
	}
}

// checkLease returns ErrLost when the Node has other podCIDRs than the lease, and ErrChanged when its annotations
// overwrite other public addresses.
func (m *Manager) checkLease(own *ownNode, lease subnet.Lease) error {
	for _, f := range family.All {
		if held := lease.Of(f); held.IsValid() && held != own.subnets.Of(f) {
			m.log.Error(nil, "The podCIDRs of the Node have changed",
				"node", m.name, "before", lease.Subnets, "podCIDRs", own.subnets)
			return subnet.ErrLost
		}
	}
	if now := m.overwrite(own, m.want); len(m.want.PublicIPs()) > 0 && !now.Equal(lease.Attrs) {
		m.log.Info("The annotations of the Node overwrite other public addresses now",
			"node", m.name, "before", lease.Attrs.PublicIPs(), "addresses", now.PublicIPs())
		return subnet.ErrChanged
	}
	return nil
}

// setCondition writes the condition that lets the scheduler use the node.
func (m *Manager) setCondition(ctx context.Context) (there bool, err error) {
	now := time.Now().UTC().Format(time.RFC3339)
	conditions := []map[string]string{{
		"type": "NetworkUnavailable", "status": "False", "reason": "FlannelIsUp",
		"message":            "Flannel is running on this node",
		"lastTransitionTime": now, "lastHeartbeatTime": now,
	}}
	patch := map[string]any{"status": map[string]any{"conditions": conditions}}
	return m.patch(ctx, "set the condition NetworkUnavailable", patch)
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

// subnetsOf reads podCIDRs of the families that are on. It skips texts that are not prefixes.
func subnetsOf(cidrs []string, on subnet.Networks) subnet.Subnets {
	var s subnet.Subnets
	for _, text := range cidrs {
		p, err := netip.ParsePrefix(text)
		switch {
		case err != nil:
		case p.Addr().Is4() && len(on.IPv4) > 0:
			s.IPv4 = p.Masked()
		case p.Addr().Is6() && len(on.IPv6) > 0:
			s.IPv6 = p.Masked()
		}
	}
	return s
}

// bothFamilies are the networks that hold everything.
var bothFamilies = subnet.Networks{
	IPv4: []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0)},
	IPv6: []netip.Prefix{netip.PrefixFrom(netip.IPv6Unspecified(), 0)},
}

// retry calls f until it succeeds or ctx ends.
func (m *Manager) retry(ctx context.Context, operation string, f func(context.Context) error) error {
	pause := subnet.Backoff()
	for {
		attempt, cancel := context.WithTimeout(ctx, requestTimeout)
		err := f(attempt)
		cancel()
		if err == nil {
			m.health.Succeeded(operation)
			return nil
		}
		if ctx.Err() == nil {
			m.fail(operation, err)
		}
		if err := retry.Sleep(ctx, askedPause(err)+pause.Next()); err != nil {
			return err
		}
	}
}

// askedPause returns how long a server that refuses a request asks us to wait; 0 if it does not ask. A busy server asks
// all nodes to wait for the same time: they pause for longer than that, so that they do not come back together.
func askedPause(err error) time.Duration {
	seconds, _ := apierrors.SuggestsClientDelay(err)
	return min(time.Duration(seconds)*time.Second, maxRetryAfter)
}

// fail records that an attempt has failed.
func (m *Manager) fail(operation string, err error) {
	m.client.refresh()
	cause, text := explain(err)
	m.health.Failed(operation, cause, text)
}
