package kube

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/subnet"
)

// patchAgain is how soon a patch of a Node that is said to be gone is made again.
const patchAgain = 5 * time.Second

// ownNode is this node's Node.
type ownNode struct {
	version     uint64 // its resourceVersion
	subnets     subnet.Subnets
	annotations map[string]string // those under our prefix, without it
	addresses   []netip.Addr      // InternalIPs
	conditioned bool              // NetworkUnavailable is False
}

// equal tells whether two states of a Node are the same to us. Either may be nil.
func (n *ownNode) equal(to *ownNode) bool {
	if n == nil || to == nil {
		return n == to
	}
	return n.subnets == to.subnets && maps.Equal(n.annotations, to.annotations) &&
		slices.Equal(n.addresses, to.addresses) && n.conditioned == to.conditioned
}

// ownStore keeps Manager.own, for a reflector.
type ownStore struct{ *Manager }

var _ cache.ReflectorStore = ownStore{}

// Add implements cache.ReflectorStore.
func (s ownStore) Add(n any) error { return s.Update(n) }

// Update implements cache.ReflectorStore.
func (s ownStore) Update(v any) error {
	n := v.(*Node)
	if n.Name != s.node() { // a server that takes no heed of our field selector
		return nil
	}
	s.setOwn(s.ownNode(n), false)
	return nil
}

func (s ownStore) ownNode(n *Node) *ownNode {
	own := &ownNode{subnets: subnetsOf(n.podCIDRs, bothFamilies), annotations: n.annotations(s.options.AnnotationPrefix), conditioned: n.networkUp}
	own.version, _ = strconv.ParseUint(n.ResourceVersion, 10, 64)
	for _, text := range n.internalIPs {
		if ip, err := netip.ParseAddr(text); err == nil {
			own.addresses = append(own.addresses, ip)
		}
	}
	return own
}

// Delete implements cache.ReflectorStore.
func (s ownStore) Delete(n any) error {
	if n.(*Node).Name == s.node() {
		s.setOwn(nil, true)
	}
	return nil
}

// Replace implements cache.ReflectorStore. There is one Node of our name, or none.
func (s ownStore) Replace(nodes []any, _ string) error {
	for _, n := range nodes {
		if n.(*Node).Name == s.node() {
			s.setOwn(s.ownNode(n.(*Node)), true)
			return nil
		}
	}
	s.setOwn(nil, true)
	return nil
}

// Resync implements cache.ReflectorStore; none is asked for.
func (s ownStore) Resync() error { return nil }

// followOwn keeps own.
func (m *Manager) followOwn() {
	if m.node() == "" {
		err := m.retry(m.ctx, "learn which Node this is", func(ctx context.Context) error {
			name, err := m.client.nodeOfPod(ctx, m.options.Namespace, m.options.Pod)
			m.mu.Lock()
			m.name = name
			m.mu.Unlock()
			return err
		})
		if err != nil {
			return
		}
	}
	m.reflectNodes(m.ctx, "metadata.name="+m.name, "read Node "+m.name, ownStore{m})
}

// setOwn takes note of what the API server says of our Node; nil: there is none.
// What is not sure to be the latest may be of before a patch whose answer we have.
func (m *Manager) setOwn(own *ownNode, latest bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !latest && m.own != nil && own.version < m.own.version {
		return
	}
	if m.told && m.own.equal(own) { // a heartbeat
		if own != nil {
			m.own.version = own.version
		}
		return
	}
	m.own, m.told = own, true
	m.signal()
}

// signal tells those who wait that something changed. The caller holds m.mu.
func (m *Manager) signal() {
	close(m.changed)
	m.changed = make(chan struct{})
}

// await waits for a Node for which missing returns "", and otherwise what is
// waited for. changed is closed when it changes.
func (m *Manager) await(ctx context.Context, missing func(*ownNode) string) (own *ownNode, changed <-chan struct{}, err error) {
	waiting := ""
	for {
		m.mu.Lock()
		own, changed = m.own, m.changed
		what, told := fmt.Sprintf("Node %s, which kubelet registers", m.name), m.told
		m.mu.Unlock()
		if own != nil {
			what = missing(own)
		}
		if what == "" {
			m.endWait(waiting, true)
			return own, changed, nil
		}
		if what != waiting && told {
			m.startWait(what, own != nil)
			m.endWait(waiting, false)
			waiting = what
		}
		select {
		case <-changed:
			continue
		case <-ctx.Done():
			err = ctx.Err()
		case <-m.ctx.Done():
			err = m.ctx.Err()
		}
		m.endWait(waiting, false)
		return nil, nil, err
	}
}

// startWait logs what is waited for, unless somebody else waits for it already. A
// Node that is registered is told, too.
func (m *Manager) startWait(what string, registered bool) {
	m.mu.Lock()
	m.waits[what]++
	first := m.waits[what] == 1
	m.mu.Unlock()
	if !first {
		return
	}
	klog.Warningf("Waiting for %s", what)
	if registered {
		m.RecordEvent("waiting for "+what, "NodeIncomplete", "flanneld waits for "+what)
	}
}

// endWait ends what startWait began, if that is not "", and logs it if what was
// waited for is there and nobody else waits for it.
func (m *Manager) endWait(what string, there bool) {
	if what == "" {
		return
	}
	m.mu.Lock()
	m.waits[what]--
	last := m.waits[what] == 0
	if last {
		delete(m.waits, what)
	}
	m.mu.Unlock()
	if last {
		m.RecordEvent("waiting for "+what, "", "")
	}
	if last && there {
		what, _, _ = strings.Cut(what, ": ") // without the remedy
		klog.Infof("No longer waiting for %s", what)
	}
}

// waitChange waits for changed to be closed. Where the API server says that the
// Node is not there, it may have been deleted and registered again as it was, or a
// proxy may have said so: then waitChange does not wait for long.
func (m *Manager) waitChange(ctx context.Context, changed <-chan struct{}, there bool) error {
	var again <-chan time.Time
	if !there {
		again = time.After(patchAgain)
	}
	select {
	case <-changed:
	case <-again:
	case <-ctx.Done():
		return ctx.Err()
	case <-m.ctx.Done():
		return m.ctx.Err()
	}
	return nil
}
