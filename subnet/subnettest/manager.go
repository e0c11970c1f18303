package subnettest

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/subnet"
)

// lifetime is how long a lease lasts.
const lifetime = 24 * time.Hour

// A Manager is a subnet.Manager for tests, whose leases are in a Store.
type Manager struct {
	store *Store
	node  string

	ctx     context.Context // ends with Close
	cancel  context.CancelFunc
	running sync.WaitGroup

	mu     sync.Mutex
	state  subnet.State
	events map[string]string // messages by subject
}

var (
	_ subnet.Manager       = (*Manager)(nil)
	_ subnet.EventRecorder = (*Manager)(nil)
)

// NewManager returns a Manager of a node, which is known by its name.
func NewManager(s *Store, node string) *Manager {
	state := subnet.State{Kind: "test", Store: "the store of the test"}
	m := &Manager{store: s, node: node, state: state, events: map[string]string{}}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	return m
}

// Close implements subnet.Manager.
func (m *Manager) Close() error {
	m.cancel()
	m.running.Wait()
	return nil
}

// await calls try, which holds the store's lock, after each change of the store until it returns true.
func (m *Manager) await(ctx context.Context, try func() bool) error {
	for {
		m.store.mu.Lock()
		problem, changed := m.store.problem, m.store.next()
		done := problem == "" && try()
		m.store.mu.Unlock()
		m.mu.Lock()
		m.state.Connected, m.state.Problem = problem == "", problem
		m.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		case <-m.ctx.Done():
			return m.ctx.Err()
		}
	}
}

// Config implements subnet.Manager.
func (m *Manager) Config(ctx context.Context) (*subnet.Config, error) {
	var text string
	if err := m.await(ctx, func() bool { text = m.store.config; return text != "" }); err != nil {
		return nil, err
	}
	return ParseConfig(text)
}

// ParseConfig reads a configuration, as managers do that hand out subnets themselves.
func ParseConfig(text string) (*subnet.Config, error) {
	cfg, err := subnet.ParseConfig([]byte(text))
	if err != nil {
		return nil, err
	}
	return cfg, cfg.Divide()
}

// Configs implements subnet.Manager.
func (m *Manager) Configs(ctx context.Context) <-chan *subnet.Config {
	out := make(chan *subnet.Config)
	m.store.mu.Lock()
	known := m.store.config
	m.store.mu.Unlock()
	m.running.Go(func() {
		defer close(out)
		for m.await(ctx, func() bool { return m.store.config != known }) == nil {
			m.store.mu.Lock()
			known = m.store.config
			m.store.mu.Unlock()
			cfg, err := ParseConfig(known)
			if err != nil {
				continue
			}
			select {
			case out <- cfg:
			case <-ctx.Done():
			case <-m.ctx.Done():
			}
		}
	})
	return out
}

// Select implements subnet.Manager.
func (m *Manager) Select(ctx context.Context, sel iface.Selector) <-chan iface.Selector {
	out := make(chan iface.Selector, 1)
	out <- sel
	m.running.Go(func() {
		defer close(out)
		m.await(ctx, func() bool { return false })
	})
	return out
}

// Previous implements subnet.Manager.
func (m *Manager) Previous(ctx context.Context, _ subnet.Attrs) (attrs subnet.Attrs, err error) {
	err = m.await(ctx, func() bool {
		if own, ok := m.own(func(subnet.Subnets) bool { return true }); ok {
			attrs = own.Attrs
		}
		return true
	})
	return attrs, err
}

// own returns this node's lease that fits. The caller holds the store's lock.
func (m *Manager) own(fits func(subnet.Subnets) bool) (own subnet.Lease, ok bool) {
	for subnets, l := range m.store.leases {
		if l.node == m.node && fits(subnets) {
			return l.Lease, true
		}
	}
	return subnet.Lease{}, false
}

// Acquire implements subnet.Manager.
func (m *Manager) Acquire(ctx context.Context, cfg *subnet.Config, want subnet.Lease) (lease subnet.Lease, err error) {
	if len(want.Attrs.PublicIPs()) == 0 {
		return lease, errors.New("a lease needs a public address")
	}
	err = m.await(ctx, func() bool {
		own, held := m.own(cfg.Fits)
		subnets := own.Subnets
		if !held {
			if subnets, held = free(cfg, want.Subnets, m.store.taken(m.node)); !held {
				return false
			}
		}
		maps.DeleteFunc(m.store.leases, func(_ subnet.Subnets, l leaseOf) bool { return l.node == m.node })
		lease = subnet.Lease{Subnets: subnets, Attrs: want.Attrs, Expires: time.Now().Add(lifetime)}
		if ip := m.store.publish[m.node]; ip.IsValid() {
			lease.Attrs.PublicIP = ip
		}
		m.store.put(m.node, lease)
		return true
	})
	if err == nil {
		m.store.change(func() {}) // which await does not make known
	}
	return lease, err
}

// free returns the wanted subnets, if they fit and are free, or else the first free ones.
func free(cfg *subnet.Config, want subnet.Subnets, taken []netip.Prefix) (s subnet.Subnets, ok bool) {
	overlaps := func(p netip.Prefix) bool { return slices.ContainsFunc(taken, p.Overlaps) }
	if len(want.Each()) > 0 && cfg.Fits(want) && !slices.ContainsFunc(want.Each(), overlaps) {
		return want, true
	}
	for _, f := range []struct {
		pool subnet.Pool
		into *netip.Prefix
	}{{cfg.IPv4, &s.IPv4}, {cfg.IPv6, &s.IPv6}} {
		if !f.pool.Enabled() {
			continue
		}
		first := cfg.Free(f.pool, slices.DeleteFunc(slices.Clone(taken), func(p netip.Prefix) bool {
			return p.Addr().BitLen() != f.pool.Ranges[0].Network.Addr().BitLen()
		}), 1)
		if len(first) == 0 {
			return s, false
		}
		*f.into = first[0]
	}
	return s, true
}

// Keep implements subnet.Manager.
func (m *Manager) Keep(ctx context.Context, lease subnet.Lease) error {
	m.expire(lease.Expires)
	defer m.expire(time.Time{})
	for {
		var result error
		restored := false
		err := m.await(ctx, func() bool {
			now, there := m.store.leases[lease.Subnets]
			switch ip := m.store.publish[m.node]; {
			case there && now.node != m.node:
				result = subnet.ErrLost
			case ip.IsValid() && ip != lease.Attrs.PublicIP:
				result = subnet.ErrChanged
			case !there || !now.Attrs.Equal(lease.Attrs):
				m.store.put(m.node, lease)
				restored = true
			default:
				return false
			}
			return true
		})
		switch {
		case err != nil:
			return err
		case result != nil:
			return result
		case restored:
			m.store.change(func() {})
		}
	}
}

// expire records when this node's lease ends.
func (m *Manager) expire(at time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state.Expires = at
}

// Ready implements subnet.Manager.
func (m *Manager) Ready() {
	m.store.change(func() {
		if m.store.ready == nil {
			m.store.ready = map[string]bool{}
		}
		m.store.ready[m.node] = true
	})
}

// Watch implements subnet.Manager.
func (m *Manager) Watch(ctx context.Context) <-chan subnet.Update {
	updates := subnet.NewMailbox()
	m.running.Go(func() {
		defer updates.Close()
		gaps := -1
		known := map[subnet.Subnets]leaseOf{}
		var u subnet.Update
		for m.await(ctx, func() bool {
			u = subnet.Update{Snapshot: gaps != m.store.gaps, Since: time.Now()}
			if u.Snapshot {
				known, gaps = nil, m.store.gaps
			}
			for s := range known {
				if _, there := m.store.leases[s]; !there {
					u.Delete(s)
				}
			}
			for s, l := range m.store.leases {
				if before, ok := known[s]; !ok || !before.Attrs.Equal(l.Attrs) {
					u.Put(&l.Lease)
				}
			}
			known = maps.Clone(m.store.leases)
			return u.Snapshot || len(u.Leases)+len(u.Gone) > 0
		}) == nil {
			updates.Put(u)
		}
	})
	return updates.C()
}

// State implements subnet.Manager.
func (m *Manager) State() subnet.State {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state
}

// SetState sets what State returns, until the Manager uses its store the next time.
func (m *Manager) SetState(s subnet.State) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state = s
}

// Expiries implements subnet.Manager.
func (m *Manager) Expiries(ctx context.Context, of ...subnet.Subnets) (map[subnet.Subnets]time.Time, error) {
	if err := m.await(ctx, func() bool { return true }); err != nil {
		return nil, err
	}
	ends := m.store.expiries()
	maps.DeleteFunc(ends, func(s subnet.Subnets, _ time.Time) bool { return len(of) > 0 && !slices.Contains(of, s) })
	return ends, nil
}

// Clock implements subnet.Manager.
func (m *Manager) Clock(ctx context.Context) (time.Time, error) {
	return time.Now(), m.await(ctx, func() bool { return true })
}

// RecordEvent implements subnet.EventRecorder.
func (m *Manager) RecordEvent(subject, reason, message string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if message == "" {
		delete(m.events, subject)
	} else {
		m.events[subject] = reason + ": " + message
	}
}

// Events returns the events that go on, each as "Reason: message", by their subjects.
func (m *Manager) Events() map[string]string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.events)
}
