package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/test/lab"
)

// A fleet is many nodes on one store.
type fleet struct {
	store *store
	meter *meter
	dir   string
	nodes []*node
	marks int // records of no node, which are written to see how long it takes until all know of them

	seed    maphash.Seed
	slotsMu sync.RWMutex
	slotOf  map[subnet.Subnets]int
}

func newFleet(s *store, m *meter, dir string) *fleet {
	return &fleet{store: s, meter: m, dir: dir, seed: maphash.MakeSeed(), slotOf: map[subnet.Subnets]int{}}
}

// start starts more nodes, all within the given time.
func (f *fleet) start(ctx context.Context, count int, within time.Duration) {
	began := time.Now()
	for i := range count {
		n := &node{fleet: f, number: len(f.nodes)}
		f.nodes = append(f.nodes, n)
		time.Sleep(time.Until(began.Add(within * time.Duration(i) / time.Duration(count))))
		n.start(ctx)
	}
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
	for _, n := range gone {
		f.meter.ours.Add(1)
		if _, err := f.store.Delete(ctx, subnetsPrefix+n.lease.Key()); err != nil {
			return err
		}
	}
	return nil
}

const subnetsPrefix = lab.Prefix + "/subnets/"

// mark writes the lease of a node that does not exist.
func (f *fleet) mark(ctx context.Context) error {
	f.marks++
	value := fmt.Sprintf(`{"PublicIP":"198.19.255.%d","BackendType":"vxlan","BackendData":{"VNI":1}}`, f.marks)
	return f.meter.put(ctx, fmt.Sprintf("%s9.0.%d.0-24", subnetsPrefix, f.marks), value)
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
	f.meter.ours.Add(2)
	claims, err := f.store.Get(ctx, lab.Prefix+"/nodes/", clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil {
		return err
	}
	records, err := f.store.Get(ctx, subnetsPrefix, clientv3.WithPrefix())
	if err != nil {
		return err
	}
	there := map[subnet.Subnets]bool{}
	var sum uint64
	for _, kv := range records.Kvs {
		s, err := subnet.ParseKey(strings.TrimPrefix(string(kv.Key), subnetsPrefix))
		if err != nil {
			return err
		}
		var a subnet.Attrs
		if err := json.Unmarshal(kv.Value, &a); err != nil {
			return err
		}
		there[s] = true
		sum += weigh(f.slot(s), f.checksum(a))
	}
	for _, n := range f.nodes {
		n.mu.Lock()
		lease, known := n.lease, n.sum
		n.mu.Unlock()
		if !there[lease] || known != sum {
			return errors.New("nodes know something else than the store has")
		}
	}
	if int(claims.Count) != len(f.nodes) || len(there) != len(f.nodes)+f.marks {
		return fmt.Errorf("the store has %d claims and %d leases, of %d nodes and %d others", claims.Count, len(there),
			len(f.nodes), f.marks)
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
