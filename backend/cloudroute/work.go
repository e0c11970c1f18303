package cloudroute

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/subnet"
)

const (
	// Route tables are reconciled at this interval, with a random shift, so that a thousand nodes do not ask at the same
	// time. It is longer where the nodes would make more requests than Provider.Rate.
	reconcileInterval = time.Minute
	// Nodes that start at the same time spread their first requests over this time.
	startSpread = time.Second
	// A reconciliation that takes longer is cut short. The next one goes on.
	reconcileTimeout = time.Minute
)

// A router reconciles the route tables of a cloud, for one lease of this node.
type router struct {
	*Backend
	own   []netip.Prefix
	peers map[subnet.Subnets]*subnet.Lease // nil: not known yet

	cloud    Cloud   // nil: not connected
	hop      NextHop // zero: not known
	forwards string  // the next hop that may forward, or of which we know that we cannot change it

	waits      bool                     // routes may have to be deleted once the peers are known
	lastErrors retry.LastErrors[string] // by operation
	pause      retry.Backoff            // after a reconciliation that has failed
}

func (b *Backend) router(own subnet.Lease) *router {
	return &router{Backend: b, own: own.Each(), lastErrors: retry.LastErrors[string]{}}
}

// Work implements backend.Worker.
func (b *Backend) Work(ctx context.Context, own subnet.Lease, peers <-chan subnet.Update) error {
	r := b.router(own)
	next := time.NewTimer(rand.N(startSpread))
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case u := <-peers:
			r.update(u)
			if r.waits {
				r.waits = false
				next.Reset(rand.N(startSpread))
			}
		case <-next.C:
			next.Reset(r.reconcile(ctx))
		}
	}
}

// update applies an update of peers. A peer that is gone is no reason to reconcile: its route becomes a blackhole when
// its instance is gone as well.
func (r *router) update(u subnet.Update) {
	if r.peers == nil {
		r.peers = map[subnet.Subnets]*subnet.Lease{}
	}
	u.Apply(r.peers)
}

// reconcile makes the route tables hold what they must, and returns the time until the next reconciliation.
func (r *router) reconcile(ctx context.Context) time.Duration {
	ctx, cancel := context.WithTimeout(ctx, reconcileTimeout)
	defer cancel()
	if r.apply(ctx) {
		r.pause.Reset()
		return jitter(r.interval())
	}
	r.pause.Most = r.interval()
	return jitter(r.pause.Next())
}

// interval returns the time between reconciliations that succeed: on a thousand nodes, at 5 a second, 200 s.
func (r *router) interval() time.Duration {
	nodes := time.Duration(1 + len(r.peers))
	return max(reconcileInterval, nodes*time.Duration(float64(time.Second)/r.provider.Rate))
}

// jitter returns a random duration around d.
func jitter(d time.Duration) time.Duration { return 3*d/4 + rand.N(d/2) }

// apply reports whether everything is in place.
func (r *router) apply(ctx context.Context) bool {
	if r.cloud == nil {
		c, err := r.provider.Connect(ctx)
		r.logOnce(ctx, r.provider.Name, err)
		if err != nil {
			return false
		}
		r.cloud = c
	}
	found, err := r.cloud.NextHop(ctx, r.uplink)
	if err == nil && found != r.hop {
		klog.FromContext(ctx).Info("Found this node in the cloud", "nextHop", found.ID, "subnet", found.Subnet,
			"vpc", found.VPC)
		r.hop = found
	}
	if r.logOnce(ctx, "This node in the cloud", err); r.hop == (NextHop{}) {
		return false
	}
	ok := err == nil && r.allowForwarding(ctx)
	tables, err := r.cloud.Tables(ctx, r.hop)
	if r.logOnce(ctx, "Route tables", err); err != nil {
		return false
	}
	r.waits = false
	for _, table := range tables {
		ok = r.applyTable(ctx, table) && ok
	}
	return ok
}

// allowForwarding has the cloud accept the packets of pods, which are neither to nor from the next hop itself, once for
// each next hop. A node that cannot do so logs what to do; an administrator may have done so already.
func (r *router) allowForwarding(ctx context.Context) bool {
	if r.forwards == r.hop.ID {
		return true
	}
	err := r.cloud.AllowForwarding(ctx, r.hop)
	var cannot *CannotForward
	if errors.As(err, &cannot) {
		klog.FromContext(ctx).Error(cannot.Err, "Cannot make the cloud accept packets of pods, which it must", "fix", cannot.Fix)
		err = nil
	}
	if r.logOnce(ctx, "Forwarding", err); err == nil {
		r.forwards = r.hop.ID
	}
	return err == nil
}

// desired returns what this node needs in every route table.
func (r *router) desired() desired {
	d := desired{hop: r.hop.ID, own: r.own, networks: r.networks, known: r.peers != nil}
	for s := range r.peers {
		d.peers = append(d.peers, s.Each()...)
	}
	return d
}

// applyTable makes one route table hold what it must. After a failure, the remaining steps are still taken. Where there
// are more steps than the time permits, that is no failure.
func (r *router) applyTable(ctx context.Context, table Table) bool {
	operation := "Route table " + table.ID
	if table.Err != nil {
		r.logOnce(ctx, operation, table.Err)
		return false
	}
	r.findBlackholes(ctx, table)
	steps, waits := plan(table, r.desired())
	r.waits = r.waits || waits
	ok := true
	var failed error // the first
	for i, s := range steps {
		done, err := r.cloud.Apply(ctx, s)
		switch {
		case done:
			klog.FromContext(ctx).Info("Applied", "command", r.provider.Command(s))
		case i > 0 && ctx.Err() != nil:
			ok = false
		case err != nil:
			ok = false
			failed = cmp.Or(failed, err)
		case s.Verb != Delete: // another program was faster; the next reconciliation shows the result
			ok = false
		}
	}
	r.logOnce(ctx, operation, failed)
	return ok
}

// findBlackholes marks routes to next hops that are gone, where the cloud's tables do not show that. It asks only about
// the next hops of routes that would then be deleted: usually, there are none.
func (r *router) findBlackholes(ctx context.Context, table Table) {
	checker, ok := r.cloud.(HopChecker)
	if !ok {
		return
	}
	var hops []string
	want := r.desired()
	for _, route := range table.Routes {
		if want.leftover(route) && route.NextHop != want.hop {
			hops = append(hops, route.NextHop)
		}
	}
	if !want.known {
		r.waits = r.waits || len(hops) > 0
		return
	}
	var gone []string
	var err error
	if len(hops) > 0 {
		slices.Sort(hops)
		gone, err = checker.Gone(ctx, slices.Compact(hops))
	}
	r.logOnce(ctx, "Next hops in route table "+table.ID, err)
	for i, route := range table.Routes {
		if slices.Contains(gone, route.NextHop) {
			table.Routes[i].Blackhole = true
		}
	}
}

// logOnce logs the error of an operation once, and then that the operation has recovered.
func (r *router) logOnce(ctx context.Context, operation string, err error) {
	if ctx.Err() == context.Canceled {
		return
	}
	r.lastErrors.Log(klog.FromContext(ctx), operation, err)
}

// Diff implements backend.Differ: it compares the cloud's route tables with this node's lease. The routes of other nodes
// that are gone are no difference: any node removes them, within some minutes.
func (b *Backend) Diff(ctx context.Context, own subnet.Lease, peers []subnet.Lease) ([]string, error) {
	r := b.router(own)
	r.peers = map[subnet.Subnets]*subnet.Lease{}
	for _, p := range peers {
		r.peers[p.Subnets] = &p
	}
	tables, err := r.look(ctx)
	if err != nil {
		return nil, err
	}
	var commands []string
	for _, table := range tables {
		if table.Err != nil {
			return nil, fmt.Errorf("route table %s: %w", table.ID, table.Err)
		}
		steps, _ := plan(table, r.desired())
		for _, s := range steps {
			if s.Verb != Delete {
				commands = append(commands, b.provider.Command(s))
			}
		}
	}
	return commands, nil
}

// look reads the route tables, and changes nothing.
func (r *router) look(ctx context.Context) (_ []Table, err error) {
	if r.cloud, err = r.provider.Connect(ctx); err != nil {
		return nil, fmt.Errorf("%s: %w", r.provider.Name, err)
	}
	if r.hop, err = r.cloud.NextHop(ctx, r.uplink); err != nil {
		return nil, fmt.Errorf("this node in the cloud: %w", err)
	}
	tables, err := r.cloud.Tables(ctx, r.hop)
	if err != nil {
		return nil, fmt.Errorf("route tables: %w", err)
	}
	return tables, nil
}
