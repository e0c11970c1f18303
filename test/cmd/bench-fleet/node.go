package main

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"net/netip"
	"sync"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/subnet"
)

// A node runs the daemon's manager of leases, and calls it as the daemon's main loop does. It has no kernel: what it
// knows of its peers is a checksum.
type node struct {
	*fleet
	number int

	stop context.CancelFunc // nil: it does not run
	done chan struct{}

	mu      sync.Mutex
	manager subnet.Manager
	lease   subnet.Subnets // the last one
	held    bool
	lost    int      // leases
	slots   []uint32 // of what it knows, see fleet.slot
	sum     uint64   // of slots
	failed  error
}

// attrs are what a node publishes, as vxlan does.
func (n *node) attrs() subnet.Attrs {
	return subnet.Attrs{
		PublicIP: publicIP(n.number), BackendType: "vxlan",
		BackendData: fmt.Appendf(nil, `{"VNI":1,"VtepMAC":"0e:01:00:00:%02x:%02x"}`, byte(n.number>>8), byte(n.number)),
	}
}

func publicIP(number int) netip.Addr {
	number += 1 << 16
	return netip.AddrFrom4([4]byte{198, 18 + byte(number>>16), byte(number >> 8), byte(number)})
}

// half is the half of the network that the node is in: it reaches the store at 127.0.half.x, see fleet.cutHalf.
func (n *node) half() int { return 1 + n.number%2 }

// start starts the node.
func (n *node) start(ctx context.Context) {
	ctx, n.stop = context.WithCancel(klog.NewContext(ctx, klog.Logger{}))
	n.done = make(chan struct{})
	n.mu.Lock()
	n.slots, n.sum, n.held = nil, 0, false
	n.mu.Unlock()
	go func() {
		defer close(n.done)
		if err := n.run(ctx); err != nil && ctx.Err() == nil {
			n.mu.Lock()
			n.failed = err
			n.mu.Unlock()
		}
	}()
}

// end ends the node in good order, as a service manager does.
func (n *node) end() {
	if n.stop != nil {
		n.stop()
		<-n.done
		n.stop = nil
	}
}

func (n *node) run(ctx context.Context) error {
	m, err := n.store.manager(ctx, n)
	if err != nil {
		return err
	}
	defer m.Close()
	n.mu.Lock()
	n.manager = m
	n.mu.Unlock()
	var running sync.WaitGroup
	defer running.Wait()
	cfg, err := m.Config(ctx)
	if err != nil {
		return err
	}
	configs := m.Configs(ctx)
	<-m.Select(ctx, iface.Selector{})
	leases := m.Watch(ctx)
	running.Go(func() {
		for range configs {
		}
	})
	running.Go(func() {
		for u := range leases {
			n.update(u)
		}
	})
	attrs := n.attrs()
	if _, err := m.Previous(ctx, attrs); err != nil {
		return err
	}
	for {
		lease, err := m.Acquire(ctx, cfg, subnet.Lease{Subnets: n.lease, Attrs: attrs})
		if err != nil {
			return err
		}
		n.setLease(lease.Subnets, true)
		m.Ready()
		if err := m.Keep(ctx, lease); !errors.Is(err, subnet.ErrLost) {
			return err
		}
		n.setLease(lease.Subnets, false)
	}
}

func (n *node) setLease(s subnet.Subnets, held bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.lease, n.held = s, held; !held {
		n.lost++
	}
}

// update takes an update of leases.
func (n *node) update(u subnet.Update) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if u.Snapshot {
		clear(n.slots)
		n.sum = 0
	}
	for s := range u.Gone {
		n.set(s, 0)
	}
	for s, l := range u.Leases {
		n.set(s, n.checksum(l.Attrs))
	}
}

func (n *node) set(s subnet.Subnets, value uint32) {
	slot := n.slot(s)
	for len(n.slots) <= slot {
		n.slots = append(n.slots, make([]uint32, 64)...)
	}
	n.sum += weigh(slot, value) - weigh(slot, n.slots[slot])
	n.slots[slot] = value
}

// weigh returns the share of a slot in a sum.
func weigh(slot int, value uint32) uint64 { return uint64(value) * uint64(2*slot+1) }

// checksum returns a number for what a lease publishes, which is not 0.
func (f *fleet) checksum(a subnet.Attrs) uint32 {
	var h maphash.Hash
	h.SetSeed(f.seed)
	h.WriteString(a.PublicIP.String())
	h.WriteString(a.BackendType)
	h.Write(a.BackendData)
	return uint32(h.Sum64()) | 1
}

// slot numbers the subnets, for all nodes alike.
func (f *fleet) slot(s subnet.Subnets) int {
	f.slotsMu.RLock()
	slot, known := f.slotOf[s]
	f.slotsMu.RUnlock()
	if known {
		return slot
	}
	f.slotsMu.Lock()
	defer f.slotsMu.Unlock()
	if slot, known := f.slotOf[s]; known {
		return slot
	}
	f.slotOf[s] = len(f.slotOf)
	return len(f.slotOf) - 1
}
