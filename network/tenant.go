package network

import (
	"context"
	"errors"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/subnet"
)

// A tenant acquires the node's lease and keeps it, in a goroutine of its own:
// the store may be away for long, and the kernel must be looked after all the
// while.
type tenant struct {
	leases chan tenancy // each one acquired
	failed chan error   // what no waiting can mend

	manager subnet.Manager
	metrics *metrics
	leave   func() // ends the goroutine and waits for it

	// Of the goroutine alone.
	held *subnet.Lease  // nil: none
	cfg  *subnet.Config // that it was acquired from
}

// A tenancy is a lease and what it was acquired for.
type tenancy struct {
	subnet.Lease
	situation
}

func newTenant(m subnet.Manager, s *metrics) *tenant {
	return &tenant{leases: make(chan tenancy), failed: make(chan error), manager: m, metrics: s, leave: func() {}}
}

// settle has a lease for s acquired and kept, in place of any before: with
// these subnets, if possible.
func (t *tenant) settle(ctx context.Context, s situation, subnets subnet.Subnets) {
	ctx, cancel := context.WithCancel(ctx)
	before, done := t.leave, make(chan struct{})
	t.leave = func() {
		cancel()
		<-done
	}
	go func() {
		defer close(done)
		before()
		if err := t.live(ctx, s, subnets); err != nil && ctx.Err() == nil {
			select {
			case t.failed <- err:
			case <-ctx.Done():
			}
		}
	}()
}

func (t *tenant) live(ctx context.Context, s situation, subnets subnet.Subnets) error {
	attrs, err := t.furnish(ctx, s)
	if err != nil {
		return err
	}
	if t.held != nil && (t.cfg != s.cfg || !t.held.Attrs.Equal(attrs)) {
		t.held = nil // as it is
	}
	for t.cfg = s.cfg; ; {
		if t.held == nil {
			lease, err := t.manager.Acquire(ctx, s.cfg, subnet.Lease{Subnets: subnets, Attrs: attrs})
			if err != nil {
				return err
			}
			t.held = &lease
		}
		select {
		case t.leases <- tenancy{*t.held, s}:
		case <-ctx.Done():
			return nil
		}
		if err := t.manager.Keep(ctx, *t.held); !errors.Is(err, subnet.ErrLost) && !errors.Is(err, subnet.ErrChanged) {
			return err
		}
		subnets, t.held = t.held.Subnets, nil // in case they are free again
	}
}

// furnish returns what the node is to publish: its addresses, and what the
// backend makes of what it published before.
func (t *tenant) furnish(ctx context.Context, s situation) (subnet.Attrs, error) {
	self := subnet.Attrs{PublicIP: s.uplink.PublicIP, PublicIPv6: s.uplink.PublicIPv6}
	var previous subnet.Attrs
	var err error
	if t.held != nil {
		previous = t.held.Attrs
	} else if previous, err = t.manager.Previous(ctx, self); err != nil {
		return self, err
	}
	var pause retry.Backoff
	var trouble retry.Trouble
	for {
		attrs, err := s.backend.Attrs(ctx, previous)
		if err == nil {
			attrs.PublicIP, attrs.PublicIPv6 = self.PublicIP, self.PublicIPv6
			return attrs, nil
		}
		if ctx.Err() == nil {
			t.metrics.failed("Publishing")
			if trouble.News(err) {
				klog.Errorf("Waiting for what this node is to publish: %v", err)
			}
		}
		if err := pause.Sleep(ctx); err != nil {
			return self, err
		}
	}
}
