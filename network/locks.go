package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/pkg/lock"
	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/subnet"
)

// Two daemons in one network namespace must not keep the same rules, routes and devices: each would undo what the
// other does. A daemon holds a lock for the network's name on this host, a lock for each of its devices, and a lock for
// each prefix of its network, whose name shows the prefix to others. A setup is put in force only with all of its locks.

// becomeOnly waits until no other flanneld keeps this network in the network namespace, and serves health: already
// while it waits, unless the other one has the port.
func (n *node) becomeOnly(ctx context.Context) error {
	serveErr := n.health.serve(ctx, &n.group, n.Health, n.Handler)
	if serveErr != nil && !errors.Is(serveErr, unix.EADDRINUSE) {
		return serveErr
	}
	waited, last := false, "" // last: the holder that was logged
	var pause retry.Backoff
	for {
		holder := n.take(ctx, "network/"+n.Name)
		if holder == nil {
			break
		}
		if waited { // another one was faster, or does not let us wait for its end
			if err := pause.Sleep(ctx); err != nil {
				holder.Close()
				return err
			}
		}
		waited = true
		if name := holder.String(); name != last {
			last = name
			n.log.Error(nil, "Another flanneld runs in this network namespace; waiting for its end", "holder", name,
				"fix", "Stop one of the two. In Kubernetes, kubectl get daemonsets -A shows whether there are two of flannel. "+
					"Two networks on one host need two values of --subnet-file, with names of their own")
		}
		n.health.waitFor(fmt.Sprintf("another flanneld in this network namespace to end: %s", holder))
		holder.Wait(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	if waited {
		n.log.Info("The other flanneld has ended; taking over")
		if serveErr != nil {
			serveErr = n.health.serve(ctx, &n.group, n.Health, n.Handler)
		}
	}
	return serveErr
}

const (
	deviceLock  = "device/"
	networkLock = "prefix/"
)

// locks returns the names of the locks that a setup needs. The names of devices are the same for any lease.
func (s setup) locks() (names []string) {
	if s.backend == nil {
		return nil
	}
	for _, network := range s.cfg.Networks().Each() {
		names = append(names, networkLock+network.String())
	}
	leased := state{setup: s, own: &subnet.Lease{Subnets: s.cfg.Networks().First()}}
	for _, o := range s.backend.Local(leased.working()) {
		if l, ok := o.(kernel.Link); ok {
			names = append(names, deviceLock+l.Name)
		}
	}
	return names
}

// takeLocks takes the locks of a setup, beside those that are held; all of them or none. The error names the process
// that has one of them, or a network that overlaps.
func (n *node) takeLocks(ctx context.Context, s setup) (err error) {
	defer func() {
		if err != nil {
			n.releaseOthers()
		}
	}()
	for _, name := range s.locks() {
		if _, tried := n.locks[name]; tried {
			continue
		}
		if holder := n.take(ctx, name); holder != nil {
			holder.Close()
			return heldBy(holder, name)
		}
		// Of two daemons that start at the same time, at least one finds the lock of the other.
		if text, ok := strings.CutPrefix(name, networkLock); ok {
			if err := n.checkOverlap(ctx, netip.MustParsePrefix(text)); err != nil {
				return err
			}
		}
	}
	return nil
}

func heldBy(holder *lock.Holder, name string) error {
	if device, ok := strings.CutPrefix(name, deviceLock); ok {
		return fmt.Errorf("another flanneld in this network namespace, %s, has the device %s: "+
			"give one of the two networks another Type of backend or another VNI", holder, device)
	}
	return fmt.Errorf("another flanneld in this network namespace, %s, has the network %s: "+
		"give one of the two networks another Network, or stop one of the daemons", holder, strings.TrimPrefix(name, networkLock))
}

// overlapTimeout is how long sockets that only look like locks can hold up checkOverlap.
const overlapTimeout = 5 * time.Second

// checkOverlap returns which other daemon has a network that overlaps a network.
func (n *node) checkOverlap(ctx context.Context, network netip.Prefix) error {
	names, err := lock.Names(networkLock)
	if err != nil {
		n.log.Error(err, "A network of another flanneld that overlaps would not be noticed")
	}
	ctx, cancel := context.WithTimeout(ctx, overlapTimeout)
	defer cancel()
	for _, name := range names {
		other, err := netip.ParsePrefix(strings.TrimPrefix(name, networkLock))
		if _, ours := n.locks[name]; ours || err != nil || !other.Overlaps(network) {
			continue
		}
		l, holder, err := lock.Take(ctx, name)
		release(l) // the other has ended
		if err != nil || holder == nil {
			continue // any user can make a socket of any name
		}
		if holder.Close(); !holder.Silent { // of a silent one, it is not known whether it is a flanneld
			return fmt.Errorf("%w: it overlaps %s", heldBy(holder, name), network)
		}
	}
	return nil
}

// releaseOthers releases the locks that neither the setup in force needs, nor the latest one.
func (n *node) releaseOthers() {
	needed := append(n.setup.locks(), n.target.locks()...)
	for name, l := range n.locks {
		if name != "network/"+n.Name && !slices.Contains(needed, name) {
			release(l)
			delete(n.locks, name)
		}
	}
}

// giveUp gives up what the setup in force does not need, when the kernel holds the setup: the locks of earlier ones, and
// the routes in earlier networks.
func (n *node) giveUp() {
	if n.leftOver && n.kernelErr == nil && n.target.backend == n.backend {
		n.leftOver = false
		n.releaseOthers()
		n.within = n.cfg.Networks().Each()
		n.kernel.SetNetworks(n.planNode(n.Options).networks, n.within)
	}
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
