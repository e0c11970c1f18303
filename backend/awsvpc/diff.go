package awsvpc

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/flanneld/flanneld/subnet"
)

// Diff implements backend.Differ: it compares the VPC's route tables with this node's
// lease. The routes of other nodes that are gone are no difference: any node removes
// them, within some minutes.
func (v *vpc) Diff(ctx context.Context, own subnet.Lease, peers []subnet.Lease) ([]string, error) {
	r := &router{vpc: v, own: own.Each(), peers: map[subnet.Subnets]subnet.Lease{}}
	for _, p := range peers {
		r.peers[p.Subnets] = p
	}
	var err error
	if r.cloud, err = connect(ctx); err != nil {
		return nil, fmt.Errorf("AWS: %w", err)
	}
	if _, err := r.cloud.login.Retrieve(ctx); err != nil {
		return nil, fmt.Errorf("AWS: %w", noCredentials(err))
	}
	if r.eni, err = r.cloud.find(ctx, v.uplink); err != nil {
		return nil, fmt.Errorf("network interface: %w", err)
	}
	tables, err := r.tables(ctx)
	if err != nil {
		return nil, fmt.Errorf("route tables: %w", err)
	}
	var commands []string
	for _, id := range slices.Sorted(maps.Keys(tables)) {
		if tables[id] == nil {
			return nil, fmt.Errorf("route table %s: %w", id, r.cloud.noTable())
		}
		steps, _ := plan(*tables[id], r.desired())
		for _, s := range steps {
			if s.verb != deleteRoute {
				commands = append(commands, s.String())
			}
		}
	}
	return commands, nil
}
