package network

import (
	"context"
	"errors"

	"github.com/flanneld/flanneld/subnet"
)

// A tenant acquires the node's lease and keeps it, in a goroutine of its own:
// the store may be away for long, and the kernel must be looked after all the
// while.
type tenant struct {
	leases chan subnet.Lease // each one acquired
	failed chan error        // what no waiting can mend

	manager subnet.Manager
	cfg     *subnet.Config
	leave   func() // ends the goroutine and waits for it
}

func newTenant(m subnet.Manager, cfg *subnet.Config) *tenant {
	return &tenant{
		leases: make(chan subnet.Lease), failed: make(chan error),
		manager: m, cfg: cfg, leave: func() {},
	}
}

// settle has the lease wanted acquired and kept, in place of any before. With
// a furnish function, the tenant first asks what the node published when it
// last ran, for want.Attrs to be furnished from.
func (t *tenant) settle(ctx context.Context, want subnet.Lease, furnish func(previous subnet.Attrs) subnet.Attrs) {
	ctx, cancel := context.WithCancel(ctx)
	before, done := t.leave, make(chan struct{})
	t.leave = func() {
		cancel()
		<-done
	}
	go func() {
		defer close(done)
		before()
		if err := t.live(ctx, want, furnish); err != nil && ctx.Err() == nil {
			select {
			case t.failed <- err:
			case <-ctx.Done():
			}
		}
	}()
}

func (t *tenant) live(ctx context.Context, want subnet.Lease, furnish func(subnet.Attrs) subnet.Attrs) error {
	if furnish != nil {
		previous, err := t.manager.Previous(ctx, want.Attrs)
		if err != nil {
			return err
		}
		want.Attrs = addressed(furnish(previous), want.Attrs)
	}
	for {
		lease, err := t.manager.Acquire(ctx, t.cfg, want)
		if err != nil {
			return err
		}
		select {
		case t.leases <- lease:
		case <-ctx.Done():
			return nil
		}
		if err := t.manager.Keep(ctx, lease); !errors.Is(err, subnet.ErrLost) {
			return err
		}
		want.Subnets = lease.Subnets // in case it is free again
	}
}
