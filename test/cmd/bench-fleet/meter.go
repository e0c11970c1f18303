package main

import (
	"context"
	"sync"
	"time"
)

// A meter reads the counters of the store's servers once a second, and probes the store.
type meter struct {
	store store

	mu     sync.Mutex
	total  traffic       // since reset
	peak   float64       // requests in a second, since reset
	slow   time.Duration // what the slowest of the probe's requests took, since reset
	failed int           // the probe's requests without an answer within probePatience, since reset
}

// probePatience is how long the probe waits for an answer.
const probePatience = 10 * time.Second

func (m *meter) run(ctx context.Context) {
	var running sync.WaitGroup
	running.Go(func() { m.probe(ctx) })
	defer running.Wait()
	at, counted := time.Now(), m.store.own()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for first := true; ctx.Err() == nil; first = false {
		var more traffic
		for _, s := range m.store.servers() {
			if now, err := s.more(ctx); err == nil { // otherwise it is down
				more.add(now)
			}
		}
		own := m.store.own()
		more.requests -= float64(own - counted)
		elapsed := time.Since(at).Seconds()
		at, counted = time.Now(), own
		m.mu.Lock()
		if m.total.add(more); !first {
			m.peak = max(m.peak, more.requests/elapsed)
		}
		m.mu.Unlock()
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// probe uses the store as another client does, ten times a second.
func (m *meter) probe(ctx context.Context) {
	for ctx.Err() == nil {
		began := time.Now()
		limited, cancel := context.WithTimeout(ctx, probePatience)
		err := m.store.probe(limited)
		cancel()
		if ctx.Err() != nil {
			return
		}
		m.mu.Lock()
		m.slow = max(m.slow, time.Since(began))
		if err != nil {
			m.failed++
		}
		m.mu.Unlock()
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// reset has all counts begin at nothing.
func (m *meter) reset() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.total, m.peak, m.slow, m.failed = traffic{}, 0, 0, 0
}

// read returns what was counted since the last reset.
func (m *meter) read() (total traffic, peak float64, slow time.Duration, failed int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.total, m.peak, m.slow, m.failed
}
