package main

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/flanneld/flanneld/test/lab"
)

// A meter reads the store's counters once a second, and probes the store as another client of it does.
type meter struct {
	store *store
	ours  atomic.Int64 // requests of the simulator, which are not counted

	mu     sync.Mutex
	total  traffic
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
	last := make([]traffic, members)
	at, counted := time.Now(), m.ours.Load()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for first := true; ctx.Err() == nil; first = false {
		var more traffic
		for i, member := range m.store.members {
			now, err := member.traffic(ctx)
			if err != nil {
				continue // it is down
			}
			before := last[i]
			last[i] = now
			now.since(before)
			more.add(now)
		}
		ours := m.ours.Load()
		more.requests -= float64(ours - counted)
		elapsed := time.Since(at).Seconds()
		at, counted = time.Now(), ours
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

// probe writes and reads a key ten times a second.
func (m *meter) probe(ctx context.Context) {
	for ctx.Err() == nil {
		began := time.Now()
		limited, cancel := context.WithTimeout(ctx, probePatience)
		_, err := m.store.Put(limited, "/probe", began.String())
		if err == nil {
			_, err = m.store.Get(limited, "/probe")
			m.ours.Add(1)
		}
		m.ours.Add(1)
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

// reset starts the peak and the probe's figures from nothing, and returns what was counted so far.
func (m *meter) reset() traffic {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.peak, m.slow, m.failed = 0, 0, 0
	return m.total
}

func (m *meter) read() (total traffic, peak float64, slow time.Duration, failed int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.total, m.peak, m.slow, m.failed
}

// put writes a key for the simulator, until that succeeds.
func (m *meter) put(ctx context.Context, key, value string) error {
	return lab.Poll(ctx, "writing "+key, func() error {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		m.ours.Add(1)
		_, err := m.store.Put(ctx, key, value)
		return err
	})
}
