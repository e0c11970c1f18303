package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"time"
)

// A result is what was measured with one size of the fleet.
type result struct {
	nodes    int
	rests    []load // what servers take beside what they take without nodes
	outcomes []outcome
}

// An outcome is what a bad moment led to.
type outcome struct {
	what   string
	took   time.Duration
	never  error // why all was not right in time
	peak   float64
	total  traffic
	cpu    map[string]time.Duration // of servers, by kind, and of the nodes
	moved  int                      // nodes that have another subnet
	slow   time.Duration
	failed int
}

// measure has n nodes start at once, rest, and live through the bad moments.
func (s settings) measure(ctx context.Context, n int) (r result, err error) {
	r.nodes = n
	dir, err := os.MkdirTemp("", "bench-fleet")
	if err != nil {
		return r, err
	}
	defer os.RemoveAll(dir)
	store, err := s.open(ctx, dir)
	if store != nil {
		defer store.close()
	}
	if err != nil {
		return r, err
	}
	chosen, err := choose(moments(store), s.moments)
	if err != nil {
		return r, err
	}
	m := &meter{store: store}
	f := newFleet(store, m)
	meterCtx, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		m.run(meterCtx)
	}()
	defer func() { stop(); <-done }()
	defer func() { end(f.nodes) }()
	empty, err := f.load(ctx, rest{}, 5*time.Second)
	if err != nil {
		return r, err
	}
	begin := func(ctx context.Context, f *fleet) (time.Time, error) { return f.start(ctx, n, s.within) }
	start := moment{"start", fmt.Sprintf("all start within %v", s.within), begin}
	first, err := s.live(ctx, f, start)
	if err != nil {
		return r, err
	}
	r.outcomes = append(r.outcomes, first)
	if err := pause(ctx, 2*time.Second); err != nil {
		return r, err
	}
	for _, rest := range store.rests() {
		l, err := f.load(ctx, rest, s.rest)
		if err != nil {
			return r, err
		}
		for kind, base := range empty.uses {
			u := l.uses[kind]
			l.uses[kind] = use{u.cpu - base.cpu, u.memory - base.memory}
		}
		r.rests = append(r.rests, l)
	}
	for _, moment := range chosen {
		o, err := s.live(ctx, f, moment)
		if err != nil {
			return r, err
		}
		r.outcomes = append(r.outcomes, o)
		if err := f.recover(ctx, n); err != nil {
			return r, err
		}
	}
	return r, nil
}

// recover brings the store and the fleet back to what they were before a bad moment.
func (f *fleet) recover(ctx context.Context, n int) error {
	if err := startServers(ctx, f.store); err != nil {
		return err
	}
	if err := f.remove(ctx, n); err != nil {
		return err
	}
	limited, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	if err := f.awaitRight(limited); err != nil {
		return fmt.Errorf("the fleet does not recover: %w", err)
	}
	return pause(ctx, 3*time.Second) // for what comes later than it has to
}

// live lives through a bad moment. A moment that does not end in time is no error.
func (s settings) live(ctx context.Context, f *fleet, m moment) (o outcome, err error) {
	o.what = m.what
	before, lost := f.holdings()
	used, err := f.usages()
	if err != nil {
		return o, err
	}
	f.meter.reset()
	since, err := m.happen(ctx, f)
	if err != nil {
		return o, fmt.Errorf("%s: %w", m.name, err)
	}
	limited, cancel := context.WithDeadline(ctx, since.Add(s.patient))
	defer cancel()
	o.never = f.awaitRight(limited)
	if ctx.Err() != nil {
		return o, ctx.Err()
	}
	o.took = time.Since(since)
	text := "all right after " + o.took.Round(time.Millisecond).String()
	if o.never != nil {
		text = "not " + text + ": " + o.never.Error()
	}
	fmt.Fprintf(os.Stderr, "%d nodes: %s: %s\n", len(f.nodes), m.what, text)
	if err := pause(ctx, 3*time.Second); err != nil { // the meter's next reading
		return o, err
	}
	o.total, o.peak, o.slow, o.failed = f.meter.read()
	now, err := f.usages()
	if err != nil {
		return o, err
	}
	o.cpu = map[string]time.Duration{}
	for kind, u := range now {
		o.cpu[kind] = u.cpu - used[kind].cpu
	}
	after, lostNow := f.holdings()
	o.moved = lostNow - lost
	for i, s := range before {
		if len(s.Each()) > 0 && after[i] != s {
			o.moved++
		}
	}
	return o, nil
}

// A load is what the servers and the nodes take at rest.
type load struct {
	what    string
	traffic // a second
	peak    float64
	uses    map[string]use // by the kind of server; the nodes'
}

// nodesUse is where load.uses and outcome.cpu have what all nodes take.
const nodesUse = "the nodes"

// usages returns what servers take, by kind, and what all nodes take.
func (f *fleet) usages() (map[string]usage, error) {
	nodes := &server{kind: nodesUse, cmd: &exec.Cmd{Process: &os.Process{Pid: os.Getpid()}}}
	return usages(append(f.store.servers(), nodes))
}

// A use is what processes take.
type use struct {
	cpu    float64 // seconds a second
	memory float64 // bytes
}

// load measures a rest for a while.
func (f *fleet) load(ctx context.Context, r rest, d time.Duration) (l load, err error) {
	l.what, l.uses = r.what, map[string]use{}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	others := make(chan error, 1)
	if r.others == nil {
		others <- nil
	} else {
		go func() { others <- r.others(ctx, len(f.nodes)) }()
	}
	f.meter.reset()
	began := time.Now()
	before, err := f.usages()
	if err != nil {
		return l, err
	}
	if err := pause(ctx, d); err != nil {
		return l, err
	}
	after, err := f.usages()
	if err != nil {
		return l, err
	}
	l.traffic, l.peak, _, _ = f.meter.read()
	elapsed := time.Since(began).Seconds()
	l.traffic.each(l.traffic, func(mine *float64, _ float64) { *mine /= elapsed })
	for kind, u := range after {
		l.uses[kind] = use{(u.cpu - before[kind].cpu).Seconds() / elapsed, float64(u.resident)}
	}
	stop()
	return l, <-others
}
