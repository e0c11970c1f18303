package cloudroute

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/subnet"
)

// cleanupTimeout is for how long a cleanup waits for the cloud.
const cleanupTimeout = 20 * time.Second

// Cleanup returns the routes that lead to this node's subnets, or to this node and into the networks. Where the cloud
// cannot be asked, they are notes: the operator can delete them elsewhere. The tables are for these notes, where the
// configuration names none: what the cloud's tool wants in place of an ID.
func Cleanup(ctx context.Context, cfg *subnet.Config, env subnet.Env, p Provider, tables TableIDs) backend.Cleanup {
	ctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
	defer cancel()
	var c backend.Cleanup
	r, found, err := leftovers(ctx, cfg, p)
	if err != nil {
		for _, table := range tables {
			for _, s := range env.Subnets.Each() {
				command := p.Command(Step{Verb: Delete, Table: table, Route: Route{Destination: s}})
				c.Notes = append(c.Notes, fmt.Sprintf("the route to %s in the cloud, until the instance is gone: %s # if it is "+
					"there: %s", s, command, plain.Line(err.Error())))
			}
		}
		return c
	}
	for _, table := range found {
		for _, route := range table.Routes {
			own := slices.Contains(env.Subnets.Each(), route.Destination)
			if route.NextHop == "" || !own && !inside(route.Destination, r.networks) {
				continue
			}
			step := Step{Verb: Delete, Table: table.ID, Route: route}
			switch command := p.Command(step); {
			case route.NextHop == r.hop.ID:
				c.Steps = append(c.Steps, backend.CleanupStep{Command: command, Do: r.do(step)})
			case own:
				c.Notes = append(c.Notes, fmt.Sprintf("the route to %s, which leads to %s, if that is this node: %s",
					route.Destination, plain.Text(route.NextHop), command))
			}
		}
	}
	return c
}

// leftovers returns the route tables, and a router that knows this node.
func leftovers(ctx context.Context, cfg *subnet.Config, p Provider) (*router, []Table, error) {
	uplink, err := iface.Find(iface.Selector{}, cfg.IPv4.Enabled(), cfg.IPv6.Enabled())
	if err != nil {
		return nil, nil, err
	}
	r := newBackend(cfg, uplink, p).router(subnet.Lease{})
	tables, err := r.look(ctx)
	return r, tables, err
}

// do returns a function that takes a step.
func (r *router) do(s Step) func(context.Context) error {
	return func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
		defer cancel()
		_, err := r.cloud.Apply(ctx, s)
		return err
	}
}
