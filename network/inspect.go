package network

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/firewall"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/subnet"
)

// desired is what a node needs of its host, beside what its kernel lacks.
type desired struct {
	plan     nodePlan
	commands []string // that the kernel needs
	network  string   // its name
	backend  backend.Backend
	own      subnet.Lease
	peers    []subnet.Lease
}

// desired returns what the node needs. r reads the kernel's tables; it knows what
// the plans call for.
func (v view) desired(r *kernel.Reconciler) (desired, error) {
	if v.state == nil || v.own == nil || v.leases == nil {
		return desired{}, fmt.Errorf("the plan for this node is not known yet: waiting for %s", v.waiting)
	}
	commands, err := r.Diff()
	return desired{v.planNode(v.Options), commands, v.Name, v.backend, v.working(), v.peers()}, err
}

// diff returns the commands that the kernel, the backend and the firewall need.
func (d desired) diff(ctx context.Context) ([]string, error) {
	var more []string
	if b, ok := d.backend.(backend.Differ); ok {
		var err error
		if more, err = b.Diff(ctx, d.own, d.peers); err != nil {
			// The other differences must be seen all the same.
			more = append(more, "# what the backend holds cannot be compared: "+plain.Line(err.Error()))
		}
	}
	rules, err := d.plan.diffRules(ctx, d.network)
	return slices.Concat(d.commands, more, rules), err
}

// diffRules returns the commands that the firewall needs for the network of a name.
func (p nodePlan) diffRules(ctx context.Context, network string) ([]string, error) {
	driver, err := firewall.New(ctx, network, p.nftables)
	if err != nil {
		if p.rules.IPv4.IsZero() && p.rules.IPv6.IsZero() {
			return nil, nil
		}
		return nil, err
	}
	return driver.Plan(ctx, p.rules)
}

// An Inspection compares a node with the plans for it without the daemon: with the
// store, subnet.env and the flags. It is for one goroutine.
type Inspection struct {
	view
	kernel *kernel.Reconciler
}

// Inspect reads the store of o's Manager and the host until ctx ends, and changes
// neither. What cannot be found out is missing in the Status, which says why.
func Inspect(ctx context.Context, o Options) (*Inspection, error) {
	r, err := kernel.New(klog.FromContext(ctx))
	if err != nil {
		return nil, err
	}
	o.Uplink.Overlay = backend.Device
	i := &Inspection{view{Options: o, state: &state{table: o.RouteTable}}, r}
	if err := i.inspect(ctx); err != nil {
		i.waiting = err.Error()
		if s := i.statusOfStore().Store; s.Trouble != "" && errors.Is(err, context.DeadlineExceeded) {
			i.waiting = s.Name + ": " + s.Trouble
		}
	}
	return i, nil
}

func (i *Inspection) inspect(ctx context.Context) (err error) {
	if i.cfg, err = i.Manager.Config(ctx); err != nil {
		return fmt.Errorf("the network's configuration: %w", err)
	}
	i.cfg = retainFromFile(i.cfg, i.SubnetFile)
	var known bool
	if i.Uplink, known = <-i.Manager.Select(ctx, i.Uplink); !known {
		return fmt.Errorf("this node to be known: %w", ctx.Err())
	}
	if i.uplink, _, err = findUplink(i.Uplink, i.cfg, iface.Uplink{}, true); err != nil {
		return fmt.Errorf("an uplink: %w", err)
	}
	if i.backend, err = backend.New(backendConfig(i.cfg, i.uplink), i.uplink); err != nil {
		return err
	}
	i.kernel.SetOverlays(i.cfg.Networks().Each())
	i.host.routes = i.kernel.Foreign()
	i.host.store, i.host.stores = storeOf(i.Manager.State())
	select {
	case u, ok := <-i.Manager.Watch(ctx):
		if !ok {
			return ctx.Err()
		}
		i.applyUpdate(u)
	case <-ctx.Done():
		return fmt.Errorf("the leases: %w", ctx.Err())
	}
	env, envErr := subnet.ReadEnv(i.SubnetFile)
	stored := i.ownLease(env.Subnets)
	if stored == nil {
		ips := strings.Trim(fmt.Sprint(family.Valid(i.uplink.PublicIPs())), "[]")
		return fmt.Errorf("a lease: none is this node's, which has %s", ips)
	}
	own := *stored
	if ends, err := i.Manager.Expiries(ctx, own.Subnets); err == nil { // else the end is not known
		own.Expires = ends[own.Subnets]
	}
	i.own = &own
	p := i.planNode(i.Options)
	i.kernel.Network, i.kernel.Table = i.Name, i.RouteTable
	i.kernel.SetNetworks(p.networks, slices.Concat(i.cfg.Networks().Each(), env.Networks.Each()))
	i.kernel.Set(nodeOwner, p.objects)
	for owner, objects := range i.planAllPeers().objects {
		i.kernel.Set(owner, objects)
	}
	i.fileWritten = envErr == nil && env.Equal(p.env)
	missing, err := p.diffRules(ctx, i.Name)
	i.rulesSet = err == nil && len(missing) == 0
	return nil
}

// Close closes what reads the kernel.
func (i *Inspection) Close() { i.kernel.Close() }

// Status returns what was found.
func (i *Inspection) Status(context.Context) (Status, error) { return i.status(), nil }

// Leases returns all leases, with their ends where the store knows them.
func (i *Inspection) Leases(ctx context.Context) ([]Lease, error) {
	if i.leases == nil {
		return nil, errors.New(i.waiting)
	}
	leases := i.leaseList()
	fillExpiries(ctx, i.Manager, leases)
	fillKeys(ctx, i.backend, leases)
	return leases, nil
}

// Diff returns the commands that would make the host what it should be.
func (i *Inspection) Diff(ctx context.Context) ([]string, error) {
	d, err := i.desired(i.kernel)
	if err != nil {
		return nil, err
	}
	return d.diff(ctx)
}

// Skew returns how much this host's clock is ahead of the store's.
func (i *Inspection) Skew(ctx context.Context) (time.Duration, error) {
	return clockSkew(ctx, i.Manager)
}
