// Package awsvpc lets an Amazon VPC route pods' packets unchanged: each node adds a route to its own subnet to the
// route tables of the VPC. See README.md.
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
	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/subnet"
)

// Type is the backend's name in configurations. Leases carry none.
const Type = "aws-vpc"

func init() {
	backend.Register(backend.Type{Name: Type, New: New, Cleanup: cleanup})
}

// tableIDs are the IDs of route tables, in JSON one string or a list of strings.
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
		return errors.New(`RouteTableID: want a string such as "rtb-0a1b2c3d4e5f60718", or a list of such strings`)
	}
	for _, id := range all {
		if !tableIDForm.MatchString(id) {
			return fmt.Errorf("RouteTableID %s is not the ID of a route table, such as rtb-0a1b2c3d4e5f60718", plain.Quote(id))
		}
	}
	slices.Sort(all)
	*t = slices.Compact(all)
	return nil
}

type vpc struct {
	tables   tableIDs // empty: the table that the uplink's subnet uses
	uplink   iface.Uplink
	networks subnet.Subnets
}

var (
	_ backend.Worker = (*vpc)(nil)
	_ backend.Differ = (*vpc)(nil)
)

// options are the backend's keys in the configuration. make docs writes the comments of the fields into README.md.
type options struct {
	// ID of the route table, or a list of IDs: `["rtb-0a1b2c3d4e5f60718", "rtb-0f1e2d3c4b5a69780"]`. Without this key,
	// flanneld uses the route table of the interface's subnet, else the main route table of the VPC. If the subnets of
	// nodes use different route tables, list all of them
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

// Peer returns no objects: the default route leads to the VPC's router, which has the routes.
func (v *vpc) Peer(subnet.Lease, subnet.Lease) ([]kernel.Object, error) { return nil, nil }

// cleanup notes the node's routes in the VPC. Other nodes delete these routes when the instance and its lease are gone.
func cleanup(_ context.Context, cfg *subnet.Config, env subnet.Env) (backend.Cleanup, error) {
	if cfg == nil || cfg.BackendType != Type {
		return backend.Cleanup{}, nil
	}
	var o options
	_ = backend.Options(cfg, &o) // a configuration that cannot be read names no table
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
			c.Notes = append(c.Notes, fmt.Sprintf("the route to %s in the VPC, until the instance is gone: "+
				"aws ec2 delete-route --route-table-id %s --%s %s", s, table, key, s))
		}
	}
	return c, nil
}
