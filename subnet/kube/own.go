package kube

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/subnet"
)

// ownNode is this node's Node.
type ownNode struct {
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
	own := &ownNode{subnets: subnetsOf(n.podCIDRs, bothFamilies), annotations: n.annotations(s.options.AnnotationPrefix), conditioned: n.networkUp}
	for _, text := range n.internalIPs {
		if ip, err := netip.ParseAddr(text); err == nil {
			own.addresses = append(own.addresses, ip)
		}
	}
	s.setOwn(own)
	return nil
}

// Delete implements cache.ReflectorStore.
func (s ownStore) Delete(any) error {
	s.setOwn(nil)
	return nil
}

// Replace implements cache.ReflectorStore. There is one Node of our name, or none.
func (s ownStore) Replace(nodes []any, _ string) error {
	for _, n := range nodes {
		return s.Update(n)
	}
	return s.Delete(nil)
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
func (m *Manager) setOwn(own *ownNode) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.told && m.own.equal(own) {
		return // a heartbeat
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
	said := ""
	for {
		m.mu.Lock()
		own, changed = m.own, m.changed
		what, told := fmt.Sprintf("Node %s, which kubelet registers", m.name), m.told
		m.mu.Unlock()
		if own != nil {
			what = missing(own)
		}
		if what == "" {
			if said != "" {
				what, _, _ = strings.Cut(said, ": ") // without the remedy
				klog.Infof("No longer waiting for %s", what)
				m.Notify("waiting", "", "")
			}
			return own, changed, nil
		}
		if what != said && told {
			said = what
			klog.Warningf("Waiting for %s", what)
			if own != nil {
				m.Notify("waiting", "NodeIncomplete", "flanneld waits for "+what)
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		case <-m.ctx.Done():
			return nil, nil, m.ctx.Err()
		}
	}
}

// closed waits for changed to be closed.
func closed(ctx context.Context, changed <-chan struct{}) error {
	select {
	case <-changed:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
