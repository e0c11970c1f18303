package network

import (
	"context"
	"errors"
	"sync/atomic"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/pkg/task"
	"github.com/flanneld/flanneld/subnet"
)

// A leaseKeeper acquires the node's lease and keeps it, in a goroutine of its own:
// the store may be away for long, while the kernel's objects are still reconciled.
type leaseKeeper struct {
	*task.Task               // fails with what neither waiting nor retrying can solve
	leases     chan acquired // each lease that was acquired

	manager   subnet.Manager
	metrics   *metrics
	obstacles atomic.Pointer[[]subnet.Obstacle] // which subnets must not be leased

	// Of the task alone.
	held *subnet.Lease  // nil: none
	cfg  *subnet.Config // that the lease was acquired from
}

// An acquired lease comes with the setup that it was acquired for.
type acquired struct {
	subnet.Lease
	setup
}

func newLeaseKeeper(m subnet.Manager, s *metrics) *leaseKeeper {
	k := &leaseKeeper{Task: task.New(), leases: make(chan acquired), manager: m, metrics: s}
	k.setObstacles(nil)
	return k
}

// setObstacles sets what the subnets that are leased from now on must not conflict with.
func (k *leaseKeeper) setObstacles(o []subnet.Obstacle) { k.obstacles.Store(&o) }

// acquire has a lease for s acquired and kept, in place of any earlier one: of these
// subnets, if possible.
func (k *leaseKeeper) acquire(ctx context.Context, s setup, subnets subnet.Subnets) {
	k.Restart(ctx, nil, func(ctx context.Context) error { return k.keep(ctx, s, subnets) })
}

func (k *leaseKeeper) keep(ctx context.Context, s setup, subnets subnet.Subnets) error {
	attrs, err := k.attrs(ctx, s)
	if err != nil {
		return err
	}
	if k.held != nil && (k.cfg != s.cfg || !k.held.Attrs.Equal(attrs)) {
		k.held = nil
	}
	for k.cfg = s.cfg; ; {
		if k.held == nil {
			lease, err := k.manager.Acquire(ctx, s.cfg.Around(*k.obstacles.Load()), subnet.Lease{Subnets: subnets, Attrs: attrs})
			if err != nil {
				return err
			}
			k.held = &lease
		}
		select {
		case k.leases <- acquired{*k.held, s}:
		case <-ctx.Done():
			return nil
		}
		if err := k.manager.Keep(ctx, *k.held); !errors.Is(err, subnet.ErrLost) && !errors.Is(err, subnet.ErrChanged) {
			return err
		}
		subnets, k.held = k.held.Subnets, nil // the subnets may be free again
	}
}

// attrs returns what the node is to publish: its addresses, and the backend's data,
// which depends on what the node published before.
func (k *leaseKeeper) attrs(ctx context.Context, s setup) (subnet.Attrs, error) {
	self := subnet.Attrs{PublicIP: s.uplink.IPv4.PublicIP, PublicIPv6: s.uplink.IPv6.PublicIP}
	var previous subnet.Attrs
	var err error
	if k.held != nil {
		previous = k.held.Attrs
	} else if previous, err = k.manager.Previous(ctx, self); err != nil {
		return self, err
	}
	var pause retry.Backoff
	var last retry.LastError
	for {
		attrs, err := s.backend.Attrs(ctx, previous)
		if err == nil {
			attrs.PublicIP, attrs.PublicIPv6 = self.PublicIP, self.PublicIPv6
			return attrs, nil
		}
		if ctx.Err() == nil {
			k.metrics.failed("Publishing")
			if last.Changed(err) {
				klog.FromContext(ctx).Error(err, "Waiting for what this node is to publish")
			}
		}
		if err := pause.Sleep(ctx); err != nil {
			return self, err
		}
	}
}
