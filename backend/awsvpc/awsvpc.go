// Package awsvpc has an Amazon VPC route pods' packets as they are: each node
// puts a route to its own subnet into the VPC's route tables. See README.md.
package awsvpc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/subnet"
)

// Type is the backend's name in configurations. Leases carry none.
const Type = "aws-vpc"

func init() {
	backend.Register(backend.Type{Name: Type, New: New, Cleanup: cleanup})
}

// tableIDs are route tables, written as one text or as a list of them.
type tableIDs []string

var tableIDForm = regexp.MustCompile(`^rtb-[0-9a-f]+$`)

func (t *tableIDs) UnmarshalJSON(data []byte) error {
	var one string
	var all []string
	if json.Unmarshal(data, &one) == nil {
		if one != "" {
			all = []string{one}
		}
	} else if json.Unmarshal(data, &all) != nil {
		return errors.New(`RouteTableID: want a text such as "rtb-0a1b2c3d4e5f60718", or a list of these`)
	}
	for _, id := range all {
		if !tableIDForm.MatchString(id) {
			return fmt.Errorf("RouteTableID %q is not the ID of a route table, such as rtb-0a1b2c3d4e5f60718", id)
		}
	}
	slices.Sort(all)
	*t = slices.Compact(all)
	return nil
}

type vpc struct {
	tables   tableIDs // empty: those that the uplink's subnet uses
	uplink   iface.Uplink
	networks subnet.Subnets
}

var (
	_ backend.Worker = (*vpc)(nil)
	_ backend.Differ = (*vpc)(nil)
)

// options are the backend's keys in the configuration. What is said of them here
// is what README.md says: make docs writes it there.
type options struct {
	// the route table, or a list of them: `["rtb-0a1b2c3d4e5f60718",
	// "rtb-0f1e2d3c4b5a69780"]`. Without it, the one that the interface's subnet
	// is associated with, or else the VPC's main one. Where nodes' subnets use
	// different tables, list all
	RouteTableID tableIDs `default:"found"`
}

// New makes the backend.
func New(cfg *subnet.Config, uplink iface.Uplink) (backend.Backend, error) {
	var o options
	if err := backend.Options(cfg, &o); err != nil {
		return nil, err
	}
	return &vpc{uplink: uplink, networks: cfg.Networks(), tables: o.RouteTableID}, nil
}

func (v *vpc) Info() backend.Info { return backend.Info{MTU: v.uplink.MTU} }

func (v *vpc) Attrs(context.Context, subnet.Attrs) (subnet.Attrs, error) {
	return subnet.Attrs{}, nil
}

func (v *vpc) Local(subnet.Lease) []kernel.Object { return nil }

// Peer returns no objects: the default route leads to the VPC's router, which has
// the routes.
func (v *vpc) Peer(subnet.Lease, subnet.Lease) ([]kernel.Object, error) { return nil, nil }

// cleanup notes the node's routes in the VPC. Other nodes delete these once the
// instance and its lease are gone.
func cleanup(_ context.Context, cfg *subnet.Config, env subnet.Env) (backend.Cleanup, error) {
	if cfg == nil || cfg.BackendType != Type {
		return backend.Cleanup{}, nil
	}
	var o options
	_ = backend.Options(cfg, &o) // one that cannot be read names no table
	tables := o.RouteTableID
	if len(tables) == 0 {
		tables = tableIDs{"rtb-…"}
	}
	var c backend.Cleanup
	for _, table := range tables {
		for _, s := range env.Subnets.Each() {
			key := "destination-cidr-block"
			if s.Addr().Is6() {
				key = "destination-ipv6-cidr-block"
			}
			c.Notes = append(c.Notes, fmt.Sprintf("the route to %s in the VPC, until the instance is gone: aws ec2 delete-route --route-table-id %s --%s %s", s, table, key, s))
		}
	}
	return c, nil
}
