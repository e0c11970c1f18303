package subnettest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/subnet"
)

// patience bounds every wait: it is meant for a busy machine, and measures nothing.
const patience = 60 * time.Second

// A Harness makes subnet managers on a store of their own, and acts on that store. Nodes are numbered from 1: node 3
// has the public address PublicIP(3). A nil function stands for what cannot happen to this kind of store.
type Harness struct {
	// Manager returns a manager for a node. Each call returns another one, as each start of the daemon has its own. The
	// suite closes it.
	Manager func(node int) subnet.Manager

	// Configure writes the network's configuration; "" deletes it.
	Configure func(config string)

	// ConfigFirst: the configuration is there before a manager is, so that Config does not wait.
	ConfigFirst bool

	// SetLease writes a lease of a node, as the node's own manager would. If another node holds the same subnets, the
	// lease of that node is lost.
	SetLease func(node int, l subnet.Lease)

	// DeleteLease removes what a node has published of its lease.
	DeleteLease func(node int, s subnet.Subnets)

	// Assign gives a node its subnets, in a store where managers do not choose subnets themselves. A node is not known
	// to such a store before it is assigned subnets.
	Assign func(node int, s subnet.Subnets)

	// NoExpiry: leases never end.
	NoExpiry bool

	// Republish has the store want another public address published for a node.
	Republish func(node int, ip netip.Addr)

	// Ready tells whether the store knows that a node's network is up.
	Ready func(node int) bool

	// Fail makes all requests to the store fail, until restore is called.
	Fail func() (restore func())

	// Gap calls change, and hides from the watches that run what it does to the store: the history that they would need
	// to continue is gone afterwards.
	Gap func(change func())
}

// Configurations of the suite. In usual and other, 200 nodes have room; in small, two.
const (
	usual = `{"Network": "10.5.0.0/16", "SubnetMax": "10.5.200.0", "Backend": {"Type": "vxlan"}}`
	other = `{"Network": "10.5.0.0/16", "SubnetMax": "10.5.200.0", "Backend": {"Type": "host-gw"}}`
	small = `{"Network": "10.5.0.0/16", "SubnetMax": "10.5.2.0", "Backend": {"Type": "vxlan"}}`
	wrong = `{"Network": "10.5.0.0/33", "Backend": {"Type": "vxlan"}}`
)

// PublicIP returns the public address of a node.
func PublicIP(node int) netip.Addr { return netip.AddrFrom4([4]byte{198, 18, 0, byte(node)}) }

// Subnets returns the subnets 10.5.number.0/24.
func Subnets(number int) subnet.Subnets {
	return subnet.Subnets{IPv4: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 5, byte(number), 0}), 24)}
}

// Lease returns a lease of a node, with the subnets 10.5.number.0/24.
func Lease(node, number int) subnet.Lease {
	return subnet.Lease{Subnets: Subnets(number), Attrs: subnet.Attrs{
		PublicIP: PublicIP(node), BackendType: "vxlan", BackendData: fmt.Appendf(nil, `{"VNI":%d}`, node),
	}}
}

// want returns what a node passes to Acquire: wishes for no subnets in particular if number is 0.
func want(node, number int) subnet.Lease {
	l := Lease(node, number)
	if number == 0 {
		l.Subnets = subnet.Subnets{}
	}
	return l
}

// Run checks that managers do what the comments of subnet.Manager promise. For each of its tests, it calls open, which
// returns a Harness with an empty store.
func Run(t *testing.T, open func(t *testing.T) Harness) {
	for _, test := range []struct {
		name string
		run  func(*suite)
	}{
		{"Config waits", (*suite).configWaits},
		{"Config refuses", (*suite).configRefuses},
		{"Configs", (*suite).configs},
		{"Select", (*suite).selects},
		{"Acquire", (*suite).acquire},
		{"Acquire the lease that is held", (*suite).acquireHeld},
		{"Acquire the wanted subnets", (*suite).acquireWanted},
		{"Acquire waits", (*suite).acquireWaits},
		{"Keep", (*suite).keep},
		{"Keep loses the lease", (*suite).keepLoses},
		{"Keep has to publish other addresses", (*suite).keepRepublishes},
		{"Previous", (*suite).previous},
		{"Ready", (*suite).ready},
		{"Watch", (*suite).watch},
		{"Watch merges", (*suite).watchMerges},
		{"Watch after a gap", (*suite).watchGap},
		{"State", (*suite).state},
		{"Expiries and Clock", (*suite).expiries},
		{"Close", (*suite).closes},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(&suite{T: t, Harness: open(t)}) })
	}
}

// suite is one test of Run.
type suite struct {
	*testing.T
	Harness
}

// manager returns a manager of a node that has read the configuration. In a store that assigns subnets, the node has
// 10.5.node.0/24.
func (s *suite) manager(node int) (subnet.Manager, *subnet.Config) {
	s.Helper()
	if s.Assign != nil {
		s.Assign(node, Subnets(node))
	}
	return s.restart(node)
}

// restart returns another manager of a node that the store knows.
func (s *suite) restart(node int) (subnet.Manager, *subnet.Config) {
	s.Helper()
	m := s.open(node)
	cfg, err := m.Config(s.ctx())
	if err != nil {
		s.Fatal(err)
	}
	return m, cfg
}

// open returns a manager that has done nothing yet.
func (s *suite) open(node int) subnet.Manager {
	m := s.Manager(node)
	s.Cleanup(func() { m.Close() })
	return m
}

// ctx returns a context that ends with the test, or with patience.
func (s *suite) ctx() context.Context {
	ctx, cancel := context.WithTimeout(s.Context(), patience)
	s.Cleanup(cancel)
	return ctx
}

// eventually waits for a condition of which no event tells.
func (s *suite) eventually(what string, condition func() bool) {
	s.Helper()
	for deadline := time.Now().Add(patience); !condition(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			s.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// outcome is what a call returns.
type outcome[T any] struct {
	value T
	err   error
}

// later calls f in a goroutine of its own.
func later[T any](f func() (T, error)) <-chan outcome[T] {
	done := make(chan outcome[T], 1)
	go func() {
		v, err := f()
		done <- outcome[T]{v, err}
	}()
	return done
}

// receive waits for a value.
func receive[T any](s *suite, what string, from <-chan T) (v T, open bool) {
	s.Helper()
	select {
	case v, open = <-from:
		return v, open
	case <-time.After(patience):
		s.Fatalf("not within %v: %s", patience, what)
		panic("unreachable")
	}
}

// drained waits for a channel to be closed.
func drained[T any](s *suite, what string, from <-chan T) {
	s.Helper()
	for {
		if _, open := receive(s, what+" closes its channel", from); !open {
			return
		}
	}
}

// acquired calls Acquire.
func (s *suite) acquired(m subnet.Manager, cfg *subnet.Config, want subnet.Lease) subnet.Lease {
	s.Helper()
	l, err := m.Acquire(s.ctx(), cfg, want)
	if err != nil {
		s.Fatal(err)
	}
	return l
}

// keeping calls Keep in a goroutine, until stop is called or the test ends.
func (s *suite) keeping(m subnet.Manager, l subnet.Lease) (kept <-chan outcome[bool], stop func()) {
	ctx, cancel := context.WithCancel(s.Context())
	return later(func() (bool, error) { return false, m.Keep(ctx, l) }), cancel
}

// A view is what a reader of updates knows.
type view struct {
	*suite
	updates   <-chan subnet.Update
	leases    map[subnet.Subnets]*subnet.Lease
	count     int // of updates
	snapshots int
}

func (s *suite) view(m subnet.Manager) *view {
	return &view{suite: s, updates: m.Watch(s.Context()), leases: map[subnet.Subnets]*subnet.Lease{}}
}

// read reads an update.
func (v *view) read() {
	v.Helper()
	u, open := receive(v.suite, "an update", v.updates)
	if !open {
		v.Fatal("Watch has closed its channel")
	}
	v.count++
	if u.Snapshot {
		v.snapshots++
	}
	switch {
	case v.count == 1 && !u.Snapshot:
		v.Error("the first update is no snapshot")
	case u.Snapshot && u.Gone != nil:
		v.Errorf("a snapshot with Gone %v", u.Gone)
	}
	u.Apply(v.leases)
}

// until reads until the leases are as wanted.
func (v *view) until(want ...subnet.Lease) {
	v.Helper()
	for v.count == 0 || describe(v.leases) != describeAll(want) {
		v.Logf("there are %q, expecting %q", describe(v.leases), describeAll(want))
		v.read()
	}
}

func describeAll(leases []subnet.Lease) string {
	all := map[subnet.Subnets]*subnet.Lease{}
	for _, l := range leases {
		all[l.Subnets] = &l
	}
	return describe(all)
}

func describe(leases map[subnet.Subnets]*subnet.Lease) string {
	var lines []string
	for s, l := range leases {
		lines = append(lines, fmt.Sprintf("%v: %v %s %s", s, l.Attrs.PublicIPs(), l.Attrs.BackendType, l.Attrs.BackendData))
	}
	slices.Sort(lines)
	return strings.Join(lines, "; ")
}

// stored waits until the store has these leases: a watch that begins now has them.
func (s *suite) stored(want ...subnet.Lease) {
	s.Helper()
	if s.Assign != nil {
		s.Assign(9, Subnets(9)) // which publishes nothing
	}
	m, _ := s.restart(9)
	s.view(m).until(want...)
	m.Close()
}

func (s *suite) configWaits() {
	if s.ConfigFirst {
		s.Skip("the configuration is there first")
	}
	m := s.open(1)
	got := later(func() (*subnet.Config, error) { return m.Config(s.Context()) })
	select {
	case o := <-got:
		s.Fatalf("without a configuration, Config returns %+v, %v", o.value, o.err)
	case <-time.After(100 * time.Millisecond): // enough for an implementation that does not wait
	}
	s.Configure(usual)
	if o, _ := receive(s, "Config", got); o.err != nil || o.value.BackendType != "vxlan" {
		s.Errorf("got %+v, %v", o.value, o.err)
	}
	s.Configure("")
	ctx, cancel := context.WithCancel(s.Context())
	got = later(func() (*subnet.Config, error) { return m.Config(ctx) })
	cancel()
	if o, _ := receive(s, "Config", got); !errors.Is(o.err, context.Canceled) {
		s.Errorf("when its context ends, Config returns %v", o.err)
	}
}

func (s *suite) configRefuses() {
	s.Configure(wrong)
	if s.Assign != nil {
		s.Assign(1, Subnets(1))
	}
	if cfg, err := s.open(1).Config(s.ctx()); err == nil || !strings.Contains(err.Error(), "Network") {
		s.Errorf("got %+v, %v", cfg, err)
	}
}

func (s *suite) configs() {
	s.Configure(usual)
	m, _ := s.manager(1)
	ctx, cancel := context.WithCancel(s.Context())
	defer cancel()
	configs := m.Configs(ctx)
	for _, change := range []struct{ config, backend string }{{other, "host-gw"}, {usual, "vxlan"}} {
		for _, refused := range []string{wrong, ""} { // they are logged: the old configuration stays in force
			s.Configure(refused)
			select {
			case cfg, open := <-configs:
				s.Fatalf("after the configuration %q, Configs sends %+v, %t", refused, cfg, open)
			case <-time.After(100 * time.Millisecond): // enough for the manager to read it
			}
		}
		s.Configure(change.config)
		if cfg, open := receive(s, "a configuration", configs); !open || cfg.BackendType != change.backend {
			s.Errorf("got %+v, want the backend %s", cfg, change.backend)
		}
	}
	cancel()
	drained(s, "Configs", configs)
}

func (s *suite) selects() {
	s.Configure(usual)
	m, _ := s.manager(1)
	ctx, cancel := context.WithCancel(s.Context())
	defer cancel()
	selectors := m.Select(ctx, iface.Selector{Criteria: iface.Criteria{Names: []string{"eth7"}}, PublicIP: PublicIP(7)})
	sel, open := receive(s, "a selector", selectors)
	if !open || !slices.Equal(sel.Names, []string{"eth7"}) || sel.PublicIP != PublicIP(7) {
		s.Errorf("got %+v", sel)
	}
	cancel()
	drained(s, "Select", selectors)
	selectors = m.Select(s.Context(), iface.Selector{})
	m.Close()
	drained(s, "Select of a Manager that is closed", selectors)
}

func (s *suite) acquire() {
	s.Configure(usual)
	var leases []subnet.Lease
	for node := 1; node <= 3; node++ {
		m, cfg := s.manager(node)
		l := s.acquired(m, cfg, want(node, 0))
		switch {
		case s.Assign != nil && l.Subnets != Subnets(node):
			s.Errorf("node %d was assigned %v and has %v", node, Subnets(node), l.Subnets)
		case s.Assign == nil && !cfg.Fits(l.Subnets):
			s.Errorf("node %d has %v, which does not fit %+v", node, l.Subnets, cfg.IPv4)
		case !l.Attrs.Equal(want(node, 0).Attrs):
			s.Errorf("node %d publishes %+v", node, l.Attrs)
		case s.NoExpiry != l.Expires.IsZero() || !s.NoExpiry && time.Until(l.Expires) <= 0:
			s.Errorf("the lease of node %d ends at %v", node, l.Expires)
		}
		for _, before := range leases {
			if before.IPv4.Overlaps(l.IPv4) {
				s.Errorf("node %d has %v, and another node %v", node, l.Subnets, before.Subnets)
			}
		}
		leases = append(leases, l)
	}
	s.stored(leases...)
}

func (s *suite) acquireHeld() {
	s.Configure(usual)
	first, cfg := s.manager(1)
	held := s.acquired(first, cfg, want(1, 77))
	if again := s.acquired(first, cfg, want(1, 0)); again.Subnets != held.Subnets {
		s.Errorf("it has %v, and then %v", held.Subnets, again.Subnets)
	}
	first.Close()
	second, cfg := s.restart(1)
	changed := want(1, 0)
	changed.Attrs.BackendData = []byte(`{"VNI":100}`)
	after := s.acquired(second, cfg, changed)
	if after.Subnets != held.Subnets {
		s.Errorf("before the restart it had %v, and now %v", held.Subnets, after.Subnets)
	}
	changed.Subnets = held.Subnets
	s.stored(changed)
}

func (s *suite) acquireWanted() {
	if s.Assign != nil {
		s.Skip("the store chooses the subnets")
	}
	s.Configure(usual)
	one, cfg := s.manager(1)
	if l := s.acquired(one, cfg, want(1, 77)); l.Subnets != Subnets(77) {
		s.Errorf("it wants 10.5.77.0/24, which is free, and has %v", l.Subnets)
	}
	two, cfg := s.manager(2)
	if l := s.acquired(two, cfg, want(2, 77)); l.Subnets == Subnets(77) || !cfg.Fits(l.Subnets) {
		s.Errorf("it wants 10.5.77.0/24, which is taken, and has %v", l.Subnets)
	}
	three, cfg := s.manager(3)
	if l := s.acquired(three, cfg, want(3, 201)); !cfg.Fits(l.Subnets) {
		s.Errorf("it wants 10.5.201.0/24, which does not fit, and has %v", l.Subnets)
	}
}

func (s *suite) acquireWaits() {
	s.Configure(small)
	free := func() { s.DeleteLease(7, Subnets(2)) }
	if s.Assign != nil {
		free = func() { s.Assign(1, Subnets(2)) }
	} else {
		s.SetLease(6, Lease(6, 1))
		s.SetLease(7, Lease(7, 2))
	}
	m, cfg := s.restart(1)
	ctx, cancel := context.WithCancel(s.Context())
	acquiring := func(ctx context.Context) <-chan outcome[subnet.Lease] {
		return later(func() (subnet.Lease, error) { return m.Acquire(ctx, cfg, want(1, 0)) })
	}
	got := acquiring(ctx)
	select {
	case o := <-got:
		s.Fatalf("with no subnet to be had, Acquire returns %+v, %v", o.value, o.err)
	case <-time.After(100 * time.Millisecond): // enough for an implementation that does not wait
	}
	cancel()
	if o, _ := receive(s, "Acquire", got); !errors.Is(o.err, context.Canceled) {
		s.Errorf("when its context ends, Acquire returns %v", o.err)
	}
	got = acquiring(s.Context())
	free()
	if o, _ := receive(s, "Acquire", got); o.err != nil || o.value.Subnets != Subnets(2) {
		s.Errorf("got %v, %v", o.value.Subnets, o.err)
	}
}

func (s *suite) keep() {
	s.Configure(usual)
	m, cfg := s.manager(1)
	l := s.acquired(m, cfg, want(1, 0))
	kept, stop := s.keeping(m, l)
	defer stop()
	if !s.NoExpiry {
		s.eventually("State tells when the lease ends", func() bool { return time.Until(m.State().Expires) > 0 })
	}
	s.DeleteLease(1, l.Subnets)
	s.stored(l)
	changed := l
	changed.Attrs.BackendData = []byte(`{"VNI":666}`)
	s.SetLease(1, changed)
	s.stored(l)
	stop()
	if o, _ := receive(s, "Keep", kept); !errors.Is(o.err, context.Canceled) {
		s.Errorf("when its context ends, Keep returns %v", o.err)
	}
	if at := m.State().Expires; !at.IsZero() {
		s.Errorf("the lease is not kept any more, and State says that it ends at %v", at)
	}
	s.stored(l) // it stays in the store
}

func (s *suite) keepLoses() {
	s.Configure(usual)
	m, cfg := s.manager(1)
	l := s.acquired(m, cfg, want(1, 0))
	kept, stop := s.keeping(m, l)
	defer stop()
	taken := want(2, 0)
	taken.Subnets = l.Subnets
	s.SetLease(2, taken)
	if o, _ := receive(s, "Keep", kept); !errors.Is(o.err, subnet.ErrLost) {
		s.Errorf("the lease went to another node, and Keep returns %v", o.err)
	}
	s.stored(taken)
}

func (s *suite) keepRepublishes() {
	if s.Republish == nil {
		s.Skip("the store has no say in addresses")
	}
	s.Configure(usual)
	m, cfg := s.manager(1)
	l := s.acquired(m, cfg, want(1, 0))
	kept, stop := s.keeping(m, l)
	defer stop()
	s.Republish(1, PublicIP(200))
	if o, _ := receive(s, "Keep", kept); !errors.Is(o.err, subnet.ErrChanged) {
		s.Errorf("Keep returns %v", o.err)
	}
	again := s.acquired(m, cfg, want(1, 0))
	if again.Subnets != l.Subnets || again.Attrs.PublicIP != PublicIP(200) {
		s.Errorf("acquired again, the lease is %+v", again)
	}
	s.stored(again)
}

func (s *suite) previous() {
	s.Configure(usual)
	m, cfg := s.manager(1)
	self := want(1, 0).Attrs
	if a, err := m.Previous(s.ctx(), self); err != nil || !a.Equal(subnet.Attrs{}) {
		s.Errorf("before there was a lease, Previous returns %+v, %v", a, err)
	}
	s.acquired(m, cfg, want(1, 0))
	m.Close()
	m, _ = s.restart(1)
	if a, err := m.Previous(s.ctx(), self); err != nil || !a.Equal(self) {
		s.Errorf("Previous returns %+v, %v", a, err)
	}
	m, _ = s.manager(2)
	if a, err := m.Previous(s.ctx(), want(2, 0).Attrs); err != nil || !a.Equal(subnet.Attrs{}) {
		s.Errorf("for a node that never had a lease, Previous returns %+v, %v", a, err)
	}
}

func (s *suite) ready() {
	s.Configure(usual)
	m, cfg := s.manager(1)
	_, stop := s.keeping(m, s.acquired(m, cfg, want(1, 0)))
	defer stop()
	if s.Ready != nil && s.Ready(1) {
		s.Error("the store says that the node is ready, before it is")
	}
	m.Ready()
	if s.Ready != nil {
		s.eventually("the store says that the node is ready", func() bool { return s.Ready(1) })
	}
}

func (s *suite) watch() {
	s.Configure(usual)
	m, cfg := s.manager(1)
	ctx, cancel := context.WithCancel(s.Context())
	defer cancel()
	v := &view{suite: s, updates: m.Watch(ctx), leases: map[subnet.Subnets]*subnet.Lease{}}
	v.until() // an empty store has a snapshot, too
	own := s.acquired(m, cfg, want(1, 0))
	v.until(own)
	two, three := Lease(2, 102), Lease(3, 103)
	s.SetLease(2, two)
	v.until(own, two)
	s.SetLease(3, three)
	three.Attrs.BackendData = []byte(`{"VNI":33}`)
	s.SetLease(3, three)
	v.until(own, two, three)
	s.DeleteLease(2, two.Subnets)
	v.until(own, three)
	if v.snapshots != 1 {
		s.Errorf("there were %d snapshots, though nothing was missed", v.snapshots)
	}
	if a, b := v.leases[own.Subnets].Created, v.leases[three.Subnets].Created; a == 0 || a > b {
		s.Errorf("two leases were created at %d and then at %d", a, b)
	}
	cancel()
	drained(s, "Watch", v.updates)
}

func (s *suite) watchMerges() {
	s.Configure(usual)
	one, _ := s.manager(1)
	two, _ := s.manager(2)
	slow, quick := s.view(one), s.view(two)
	slow.until()
	quick.until()
	// How many updates there are depends also on when the store sends the changes: hence several attempts.
	const changes, attempts = 60, 10
	three, four := Lease(3, 103), Lease(4, 104)
	var counts []int
	for i := range attempts {
		for n := range changes {
			three.Attrs.BackendData = fmt.Appendf(nil, `{"VNI":%d}`, i*changes+n+1)
			s.SetLease(3, three)
		}
		four.Attrs.BackendData = three.Attrs.BackendData
		s.SetLease(4, four)
		quick.until(three, four)
		slow.count = 1 // more than none: see until
		slow.until(three, four)
		if counts = append(counts, slow.count-1); slow.count-1 <= changes/4 {
			return
		}
	}
	s.Errorf("of %d changes each, a slow reader received %d updates", changes+1, counts)
}

func (s *suite) watchGap() {
	s.Configure(usual)
	m, _ := s.manager(1)
	v := s.view(m)
	two, three := Lease(2, 102), Lease(3, 103)
	s.SetLease(2, two)
	v.until(two)
	s.Gap(func() {
		s.DeleteLease(2, two.Subnets)
		s.SetLease(3, three)
	})
	v.until(three)
	four := Lease(4, 104)
	s.SetLease(4, four)
	v.until(three, four)
}

func (s *suite) state() {
	s.Configure(usual)
	m, cfg := s.manager(1)
	v := s.view(m)
	v.until()
	l := s.acquired(m, cfg, want(1, 0))
	v.until(l)
	if st := m.State(); st.Kind == "" || st.Store == "" || !st.Connected || st.Problem != "" {
		s.Errorf("when all is well, the state is %+v", st)
	}
	restore := s.Fail()
	asked := later(func() (subnet.Attrs, error) { return m.Previous(s.Context(), l.Attrs) })
	s.eventually("State tells the problem", func() bool { st := m.State(); return st.Problem != "" && !st.Connected })
	restore()
	if o, _ := receive(s, "Previous", asked); o.err != nil || !o.value.Equal(l.Attrs) {
		s.Errorf("asked while the store was away, Previous returns %+v, %v", o.value, o.err)
	}
	two := Lease(2, 102)
	s.SetLease(2, two)
	v.until(l, two)
	s.eventually("State tells that the problem is over", func() bool {
		st := m.State()
		return st.Problem == "" && st.Connected
	})
}

func (s *suite) expiries() {
	s.Configure(usual)
	m, cfg := s.manager(1)
	one := s.acquired(m, cfg, want(1, 0))
	if s.Assign == nil {
		two, cfg := s.manager(2)
		s.acquired(two, cfg, want(2, 0))
	}
	for _, c := range []struct {
		of   []subnet.Subnets
		want int
	}{{nil, 2}, {[]subnet.Subnets{one.Subnets}, 1}, {[]subnet.Subnets{Subnets(199)}, 0}} {
		ends, err := m.Expiries(s.ctx(), c.of...)
		if s.NoExpiry {
			c.want = 0
		}
		if err != nil || len(ends) != c.want {
			s.Errorf("asked for %v, Expiries returns %v, %v", c.of, ends, err)
		}
		for at := range maps.Values(ends) {
			if time.Until(at) <= 0 {
				s.Errorf("a lease ends at %v", at)
			}
		}
	}
	if at, err := m.Clock(s.ctx()); err != nil || time.Since(at).Abs() > patience {
		s.Errorf("Clock returns %v, %v", at, err)
	}
}

func (s *suite) closes() {
	s.Configure(small)
	if s.Assign == nil {
		s.SetLease(6, Lease(6, 1))
		s.SetLease(7, Lease(7, 2))
	}
	m, cfg := s.restart(1)
	got := later(func() (subnet.Lease, error) { return m.Acquire(s.Context(), cfg, want(1, 0)) })
	for range 2 {
		if err := m.Close(); err != nil {
			s.Errorf("Close returns %v", err)
		}
	}
	if o, _ := receive(s, "Acquire of a Manager that is closed", got); o.err == nil {
		s.Errorf("Acquire returns %+v", o.value)
	}
}
