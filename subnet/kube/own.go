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

	"github.com/flanneld/flanneld/subnet"
)

// patchAgain is how soon we patch a Node again after the answer was that it does not exist.
const patchAgain = 5 * time.Second

// ownNode is this node's Node. Nobody changes it: await gives it to several goroutines.
type ownNode struct {
	version     uint64 // its resourceVersion
	subnets     subnet.Subnets
	annotations map[string]string // those under our prefix, without it
	addresses   []netip.Addr      // InternalIPs
	conditioned bool              // NetworkUnavailable is False
}

// equal tells whether two states of a Node are the same for us. Either may be nil.
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
	if n.Name != s.node() { // a server that ignores our field selector
		return nil
	}
	s.setOwn(s.ownNode(n), false)
	return nil
}

func (s ownStore) ownNode(n *Node) *ownNode {
	own := &ownNode{
		subnets: subnetsOf(n.podCIDRs, bothFamilies), annotations: map[string]string{},
		conditioned: n.networkUp,
	}
	for _, a := range n.annotations {
		own.annotations[a.name] = a.value
	}
	own.version, _ = strconv.ParseUint(n.ResourceVersion, 10, 64)
	for _, text := range n.internalIPs {
		if ip, err := netip.ParseAddr(text); err == nil && ip.Zone() == "" {
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

// Replace implements cache.ReflectorStore. There is one Node with our name, or none.
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

// watchOwnNode keeps own up to date.
func (m *Manager) watchOwnNode() {
	if m.node() == "" {
		err := m.retry(m.ctx, "read which Node this pod runs on", func(ctx context.Context) error {
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

// setOwn records our Node as the API server has it; nil: there is none. Unless it is certainly the latest state, it may
// be older than the answer to a patch, which we have already.
func (m *Manager) setOwn(own *ownNode, latest bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !latest && m.own != nil && own.version < m.own.version {
		return
	}
	heartbeat := m.synced && m.own.equal(own) // of kubelet
	m.own, m.synced = own, true
	if !heartbeat {
		m.signal()
	}
}

// signal wakes all who wait for a change. The caller holds m.mu.
func (m *Manager) signal() {
	close(m.changed)
	m.changed = make(chan struct{})
}

// await waits for a Node of which nothing is missing: missing returns what is, as "what: what to do about it", or "".
// changed is closed when the Node changes.
func (m *Manager) await(ctx context.Context, missing func(*ownNode) string) (
	own *ownNode, changed <-chan struct{}, err error,
) {
	waiting := ""
	for {
		m.mu.Lock()
		own, changed = m.own, m.changed
		what, synced := fmt.Sprintf("Node %s: kubelet registers it", m.name), m.synced
		m.mu.Unlock()
		if own != nil {
			what = missing(own)
		}
		if what == "" {
			m.endWait(waiting, true)
			return own, changed, nil
		}
		if what != waiting && synced {
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

// startWait logs what is missing, unless another goroutine waits for the same. If the Node is registered, it also gets
// an event.
func (m *Manager) startWait(what string, registered bool) {
	m.mu.Lock()
	m.waits[what]++
	first := m.waits[what] == 1
	m.mu.Unlock()
	if !first {
		return
	}
	missing, fix, _ := strings.Cut(what, ": ")
	m.log.Error(nil, "Waiting for the Node", "missing", missing, "fix", fix)
	if registered {
		m.RecordEvent("waiting for "+what, "NodeIncomplete", "flanneld waits for "+what)
	}
}

// endWait ends what startWait began, if that is not "". When the last goroutine ends, because nothing is missing any
// more, endWait logs that.
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
		missing, _, _ := strings.Cut(what, ": ")
		m.log.Info("No longer waiting for the Node", "missing", missing)
	}
}

// waitChange waits until changed is closed. If the API server has answered that the Node does not exist, the Node may
// have been deleted and registered again as it was, or the answer may be a proxy's: then waitChange does not wait for
// long.
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
