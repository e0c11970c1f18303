package network

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/pkg/lock"
)

// Two daemons in one network namespace must not keep the same rules, routes and devices: each would undo what the
// other does. A daemon holds a lock for the network's name on this host, and a lock for each of its devices.

// becomeOnly waits until no other flanneld keeps this network in the network namespace, and serves health: already
// while it waits, unless the other one has the port.
func (n *node) becomeOnly(ctx context.Context) error {
	serveErr := n.health.serve(ctx, &n.group, n.Health, n.metrics, n.Profile)
	if serveErr != nil && !errors.Is(serveErr, unix.EADDRINUSE) {
		return serveErr
	}
	waited := false
	for {
		holder := n.take(ctx, "network/"+n.Name)
		if holder == nil {
			break
		}
		waited = true
		n.log.Error(nil, "Another flanneld runs in this network namespace; waiting for its end", "holder", holder.String(),
			"fix", "Stop one of the two. Two networks on one host need two values of --subnet-file, with names of their own")
		n.health.waitFor(fmt.Sprintf("another flanneld in this network namespace to end: %s", holder))
		holder.Wait(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	if waited {
		n.log.Info("The other flanneld has ended; taking over")
		if serveErr != nil {
			serveErr = n.health.serve(ctx, &n.group, n.Health, n.metrics, n.Profile)
		}
	}
	return serveErr
}

// takeDevices takes the locks of the devices among objects, and releases those of other devices. The error names the
// process that has one of the devices.
func (n *node) takeDevices(ctx context.Context, objects []kernel.Object) error {
	devices := map[string]bool{}
	for _, o := range objects {
		l, ok := o.(kernel.Link)
		if !ok {
			continue
		}
		name := "device/" + l.Name
		devices[name] = true
		if _, tried := n.locks[name]; tried {
			continue
		}
		if holder := n.take(ctx, name); holder != nil {
			holder.Close()
			return fmt.Errorf("another flanneld in this network namespace, %s, has the device %s: "+
				"give one of the two networks another Type of backend or another VNI", holder, l.Name)
		}
	}
	for name, l := range n.locks {
		if !devices[name] && name != "network/"+n.Name {
			release(l)
			delete(n.locks, name)
		}
	}
	return nil
}

// take takes a lock, or returns the process that has it. Where there can be no lock, flanneld does without.
func (n *node) take(ctx context.Context, name string) *lock.Holder {
	l, holder, err := lock.Take(ctx, name)
	if err != nil && ctx.Err() == nil {
		n.log.Error(err, "A second flanneld in this network namespace would not be noticed")
	}
	if holder == nil {
		n.locks[name] = l
	}
	return holder
}

func (n *node) releaseLocks() {
	for _, l := range n.locks {
		release(l)
	}
}

func release(l *lock.Lock) {
	if l != nil {
		l.Release()
	}
}
