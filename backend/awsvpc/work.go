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

	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/subnet"
)

const (
	// The route tables are looked at this often; each time is shifted at
	// random, lest a thousand nodes ask at once.
	lookInterval = time.Minute
	// Nodes that start at the same moment spread over this.
	startSpread = time.Second
	// A look that takes longer is broken off.
	lookLimit = time.Minute
	// Whether the uplink's subnet still uses the VPC's main route table is
	// asked this often; that takes two more calls than to read the table.
	mainInterval = 10 * time.Minute
)

// router keeps the VPC's route tables, for one lease of this node's.
type router struct {
	*vpc
	own   []netip.Prefix
	peers map[subnet.Subnets]subnet.Lease // nil: not known yet

	cloud    *cloud // nil: not connected
	eni      eni    // zero: not known
	forwards string // the interface whose check is off, or is not ours to turn off

	main   string // the VPC's main table, if that is ours
	mainAt time.Time

	unsure  bool                     // there are routes that may have to go, once the peers are known
	trouble retry.LastErrors[string] // of each duty
	pause   retry.Backoff            // until the next look, if this one fails
}

// Work implements backend.Worker.
func (v *vpc) Work(ctx context.Context, own subnet.Lease, peers <-chan subnet.Update) error {
	r := &router{vpc: v, own: own.Each(), trouble: retry.LastErrors[string]{}, pause: retry.Backoff{Most: lookInterval}}
	look := time.NewTimer(rand.N(startSpread))
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case u := <-peers:
			r.update(u)
			if r.unsure {
				r.unsure = false
				look.Reset(rand.N(startSpread))
			}
		case <-look.C:
			look.Reset(r.look(ctx))
		}
	}
}

// update takes news of peers. That one is gone is no reason to look: its route
// becomes a blackhole when its instance is gone, too.
func (r *router) update(u subnet.Update) {
	if r.peers == nil {
		r.peers = map[subnet.Subnets]subnet.Lease{}
	}
	u.Apply(r.peers)
}

// look brings the route tables in order, and returns when to look again.
func (r *router) look(ctx context.Context) time.Duration {
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	if r.converge(ctx) {
		r.pause.Reset()
		return jitter(lookInterval)
	}
	return jitter(r.pause.Next())
}

// jitter returns about as much.
func jitter(d time.Duration) time.Duration { return 3*d/4 + rand.N(d/2) }

// converge tells whether all is as it should be.
func (r *router) converge(ctx context.Context) bool {
	if r.cloud == nil {
		c, err := connect(ctx)
		if err != nil {
			r.say(ctx, "AWS", err)
			return false
		}
		r.cloud = c
	}
	if _, err := r.cloud.login.Retrieve(ctx); err != nil {
		r.say(ctx, "AWS", noCredentials(err))
		return false
	}
	r.say(ctx, "AWS", nil)

	found, err := r.cloud.find(ctx, r.uplink)
	if err == nil && found != r.eni {
		klog.Infof("Network interface %s, of %s in %s", found.id, found.subnet, found.vpc)
		r.eni = found
	}
	if r.say(ctx, "Network interface", err); r.eni == (eni{}) {
		return false
	}
	well := err == nil && r.forward(ctx)
	tables, err := r.tables(ctx)
	if r.say(ctx, "Route tables", err); err != nil {
		return false
	}
	r.unsure = false
	for id, table := range tables {
		if !r.correct(ctx, id, table) {
			well = false
		}
	}
	return well
}

// forward has the interface forward pods' packets, which are neither to nor
// from itself. Who may not say so to EC2 is warned: somebody else may have.
func (r *router) forward(ctx context.Context) bool {
	if r.forwards == r.eni.id {
		return true
	}
	permitted, err := r.cloud.forward(ctx, r.eni.id)
	switch {
	case permitted:
		r.say(ctx, "Source/destination check", err)
	default:
		klog.Warningf("Source/destination check: %v; it must be off: aws ec2 modify-network-interface-attribute --no-source-dest-check --network-interface-id %s", err, r.eni.id)
		err = nil
	}
	if err == nil {
		r.forwards = r.eni.id
	}
	return err == nil
}

// tables returns the route tables to keep, by ID; nil stands for one that is
// configured and not there.
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

// desired returns what this node wants of every route table.
func (r *router) desired() wishes {
	w := wishes{eni: r.eni.id, own: r.own, networks: r.networks.Each(), known: r.peers != nil}
	for s := range r.peers {
		w.peers = append(w.peers, s.Each()...)
	}
	return w
}

// correct brings one route table in order. What fails does not keep the rest
// from being done.
func (r *router) correct(ctx context.Context, id string, table *types.RouteTable) bool {
	duty := "Route table " + id
	if table == nil {
		r.say(ctx, duty, r.cloud.noTable())
		return false
	}
	steps, unsure := plan(*table, r.desired())
	r.unsure = r.unsure || unsure
	well := true
	var failed error // the first
	for _, s := range steps {
		done, err := r.cloud.take(ctx, s)
		switch {
		case err != nil:
			well = false
			failed = cmp.Or(failed, err)
		case done:
			klog.Info(s)
		case s.verb != deleteRoute: // others were faster, with what is still to be seen
			well = false
		}
	}
	r.say(ctx, duty, failed)
	return well
}

// say logs a duty's error, once, and when it is over.
func (r *router) say(ctx context.Context, duty string, err error) {
	if ctx.Err() == context.Canceled {
		return
	}
	r.trouble.Log(klog.FromContext(ctx), duty, err)
}
