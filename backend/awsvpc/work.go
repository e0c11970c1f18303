package awsvpc

import (
	"cmp"
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/subnet"
)

const (
	// The route tables are reconciled at this interval, with a random shift, so that a thousand nodes do not ask at the
	// same time.
	reconcileInterval = time.Minute
	// Nodes that start at the same time spread their first requests over this time.
	startSpread = time.Second
	// A reconciliation that takes longer is cancelled.
	reconcileTimeout = time.Minute
	// mainInterval is the interval of checks whether the subnet of the uplink still uses the main route table of the
	// VPC. A check takes two more calls than reading the table.
	mainInterval = 10 * time.Minute
)

// A router reconciles the route tables of the VPC, for one lease of this node.
type router struct {
	*vpc
	own   []netip.Prefix
	peers map[subnet.Subnets]subnet.Lease // nil: not known yet

	cloud    *cloud // nil: not connected
	eni      eni    // zero: not known
	forwards string // the interface whose check is off, or which we have no permission to change

	main   string // the main table of the VPC, if the uplink's subnet uses it
	mainAt time.Time

	waits      bool                     // routes may have to be deleted once the peers are known
	lastErrors retry.LastErrors[string] // by operation
	pause      retry.Backoff            // after a reconciliation that has failed
}

// Work implements backend.Worker.
func (v *vpc) Work(ctx context.Context, own subnet.Lease, peers <-chan subnet.Update) error {
	r := &router{vpc: v, own: own.Each(), lastErrors: retry.LastErrors[string]{}}
	r.pause.Most = reconcileInterval
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
		r.peers = map[subnet.Subnets]subnet.Lease{}
	}
	u.Apply(r.peers)
}

// reconcile makes the route tables hold what they must, and returns the time until the next reconciliation.
func (r *router) reconcile(ctx context.Context) time.Duration {
	ctx, cancel := context.WithTimeout(ctx, reconcileTimeout)
	defer cancel()
	if r.apply(ctx) {
		r.pause.Reset()
		return jitter(reconcileInterval)
	}
	return jitter(r.pause.Next())
}

// jitter returns a random duration around d.
func jitter(d time.Duration) time.Duration { return 3*d/4 + rand.N(d/2) }

// apply reports whether everything is in place.
func (r *router) apply(ctx context.Context) bool {
	if r.cloud == nil {
		c, err := connect(ctx)
		if err != nil {
			r.logOnce(ctx, "AWS", err)
			return false
		}
		r.cloud = c
	}
	if _, err := r.cloud.login.Retrieve(ctx); err != nil {
		r.logOnce(ctx, "AWS", noCredentials(err))
		return false
	}
	r.logOnce(ctx, "AWS", nil)

	found, err := r.cloud.find(ctx, r.uplink)
	if err == nil && found != r.eni {
		klog.FromContext(ctx).Info("Found the network interface",
			"interface", found.id, "subnet", found.subnet, "vpc", found.vpc)
		r.eni = found
	}
	if r.logOnce(ctx, "Network interface", err); r.eni == (eni{}) {
		return false
	}
	ok := err == nil && r.disableCheck(ctx)
	tables, err := r.tables(ctx)
	if r.logOnce(ctx, "Route tables", err); err != nil {
		return false
	}
	r.waits = false
	for id, table := range tables {
		if !r.applyTable(ctx, id, table) {
			ok = false
		}
	}
	return ok
}

// disableCheck turns the source/destination check of the interface off: the packets of pods are neither to nor from the
// interface itself. A node without permission logs how to do so; an administrator may have done so already.
func (r *router) disableCheck(ctx context.Context) bool {
	if r.forwards == r.eni.id {
		return true
	}
	permitted, err := r.cloud.disableCheck(ctx, r.eni.id)
	if permitted {
		r.logOnce(ctx, "Source/destination check", err)
	} else {
		klog.FromContext(ctx).Error(err, "Cannot turn the source/destination check off, which must be off", "fix",
			"aws ec2 modify-network-interface-attribute --no-source-dest-check --network-interface-id "+plain.Shell(r.eni.id))
		err = nil
	}
	if err == nil {
		r.forwards = r.eni.id
	}
	return err == nil
}

// tables returns the route tables to reconcile, by ID; nil: the table is configured and does not exist.
func (r *router) tables(ctx context.Context) (map[string]*types.RouteTable, error) {
	all := map[string]*types.RouteTable{}
	for _, id := range r.vpc.tables {
		all[id] = nil
	}
	found, err := r.read(ctx)
	if err != nil {
		return nil, err
	}
	for _, t := range found {
		all[aws.ToString(t.RouteTableId)] = &t
	}
	return all, nil
}

func (r *router) read(ctx context.Context) ([]types.RouteTable, error) {
	if len(r.vpc.tables) > 0 {
		return r.cloud.describe(ctx, append([]string{"route-table-id"}, r.vpc.tables...))
	}
	if r.main != "" && time.Since(r.mainAt) < mainInterval {
		if found, err := r.cloud.describe(ctx, []string{"route-table-id", r.main}); err != nil || len(found) > 0 {
			return found, err
		}
	}
	r.main = ""
	found, err := r.cloud.describe(ctx, []string{"association.subnet-id", r.eni.subnet})
	if err != nil || len(found) > 0 {
		return found, err
	}
	found, err = r.cloud.describe(ctx, []string{"vpc-id", r.eni.vpc}, []string{"association.main", "true"})
	if err == nil && len(found) == 0 {
		err = errors.New("neither the subnet " + r.eni.subnet + " nor the VPC " + r.eni.vpc + " shows a route table: " +
			"is the VPC shared by another account? Only its owner can change its routes")
	}
	if err == nil {
		r.main, r.mainAt = aws.ToString(found[0].RouteTableId), time.Now()
	}
	return found, err
}

// desired returns what this node needs in every route table.
func (r *router) desired() desired {
	d := desired{eni: r.eni.id, own: r.own, networks: r.networks.Each(), known: r.peers != nil}
	for s := range r.peers {
		d.peers = append(d.peers, s.Each()...)
	}
	return d
}

// applyTable makes one route table hold what it must. After a failure, the remaining steps are still taken.
func (r *router) applyTable(ctx context.Context, id string, table *types.RouteTable) bool {
	operation := "Route table " + id
	if table == nil {
		r.logOnce(ctx, operation, r.cloud.noTable())
		return false
	}
	steps, waits := plan(*table, r.desired())
	r.waits = r.waits || waits
	ok := true
	var failed error // the first
	for _, s := range steps {
		done, err := r.cloud.apply(ctx, s)
		switch {
		case err != nil:
			ok = false
			failed = cmp.Or(failed, err)
		case done:
			klog.FromContext(ctx).Info("Applied", "command", s.String())
		case s.verb != deleteRoute: // another program was faster; the next reconciliation shows the result
			ok = false
		}
	}
	r.logOnce(ctx, operation, failed)
	return ok
}

// logOnce logs the error of an operation once, and then that the operation has recovered.
func (r *router) logOnce(ctx context.Context, operation string, err error) {
	if ctx.Err() == context.Canceled {
		return
	}
	r.lastErrors.Log(klog.FromContext(ctx), operation, err)
}
