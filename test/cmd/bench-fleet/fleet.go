package main

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"sync"
	"time"

	"github.com/flanneld/flanneld/subnet"
)

// A fleet is many nodes on one store.
type fleet struct {
	store store
	meter *meter
	nodes []*node
	marks int // records of no node, which are written to see how long it takes until all know of them

	seed    maphash.Seed
	slotsMu sync.RWMutex
	slotOf  map[subnet.Subnets]int
}

func newFleet(s store, m *meter) *fleet {
	return &fleet{store: s, meter: m, seed: maphash.MakeSeed(), slotOf: map[subnet.Subnets]int{}}
}

// start starts more nodes, all within the given time, and returns when it began. What happens before that, when the
// store learns of these nodes, is not measured.
func (f *fleet) start(ctx context.Context, count int, within time.Duration) (began time.Time, err error) {
	if err := f.store.register(ctx, len(f.nodes), len(f.nodes)+count); err != nil {
		return began, err
	}
	if err := pause(ctx, 3*time.Second); err != nil { // the meter's next reading
		return began, err
	}
	f.meter.reset()
	began = time.Now()
	for i := range count {
		n := &node{fleet: f, number: len(f.nodes)}
		f.nodes = append(f.nodes, n)
		time.Sleep(time.Until(began.Add(within * time.Duration(i) / time.Duration(count))))
		n.start(ctx)
	}
	return began, nil
}

// end ends nodes, all at a time.
func end(nodes []*node) {
	var running sync.WaitGroup
	for _, n := range nodes {
		running.Go(n.end)
	}
	running.Wait()
}

// remove ends the nodes from one number on, and deletes their leases.
func (f *fleet) remove(ctx context.Context, from int) error {
	gone := f.nodes[from:]
	f.nodes = f.nodes[:from]
	end(gone)
	return f.store.remove(ctx, gone)
}

// mark writes the lease of a node that does not exist.
func (f *fleet) mark(ctx context.Context) error {
	f.marks++
	return f.store.mark(ctx, f.marks)
}

// awaitRight waits until all is right: each node holds a lease and has a store, and knows what the store has.
func (f *fleet) awaitRight(ctx context.Context) error {
	for {
		err := f.checkNodes()
		if err == nil {
			err = f.checkStore(ctx)
		}
		if err == nil {
			return nil
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}

// checkNodes returns why the nodes do not agree with each other.
func (f *fleet) checkNodes() error {
	unheld, away, behind := 0, 0, 0
	var sum uint64
	var example string
	for i, n := range f.nodes {
		n.mu.Lock()
		switch {
		case n.failed != nil:
			n.mu.Unlock()
			return fmt.Errorf("node %d has failed: %w", i, n.failed)
		case !n.held:
			unheld++
			if n.manager != nil {
				state := n.manager.State()
				example = fmt.Sprintf(": node %d waits for %q, %s", i, state.Waiting, state.Problem)
			}
		case !n.manager.State().Connected:
			away++
		case i > 0 && n.sum != sum:
			behind++
		}
		sum = n.sum
		n.mu.Unlock()
	}
	if unheld+away+behind > 0 {
		return fmt.Errorf("%d nodes have no lease, %d have no store, %d differ from others%s", unheld, away, behind,
			example)
	}
	return nil
}

// checkStore returns how the store differs from what the nodes, which agree with each other, hold and know.
func (f *fleet) checkStore(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	there, err := f.store.leases(ctx, len(f.nodes))
	if err != nil {
		return err
	}
	var sum uint64
	for s, a := range there {
		sum += weigh(f.slot(s), f.checksum(a))
	}
	for _, n := range f.nodes {
		n.mu.Lock()
		lease, known := n.lease, n.sum
		n.mu.Unlock()
		if _, held := there[lease]; !held || known != sum {
			return errors.New("nodes know something else than the store has")
		}
	}
	if len(there) != len(f.nodes)+f.marks {
		return fmt.Errorf("the store has %d leases, of %d nodes and %d others", len(there), len(f.nodes), f.marks)
	}
	return nil
}

// holdings returns the nodes' subnets, and how many leases they have lost so far.
func (f *fleet) holdings() (subnets []subnet.Subnets, lost int) {
	for _, n := range f.nodes {
		n.mu.Lock()
		subnets, lost = append(subnets, n.lease), lost+n.lost
		n.mu.Unlock()
	}
	return subnets, lost
}
