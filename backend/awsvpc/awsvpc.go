// Package awsvpc lets an Amazon VPC route pods' packets unchanged: each node keeps a route to its own subnet in the
// route tables of the VPC. See README.md.
package awsvpc

import (
	"context"
	"fmt"
	"regexp"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/backend/cloudroute"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/subnet"
)

// Type is the backend's name in configurations. Leases carry none.
const Type = "aws-vpc"

func init() {
	backend.Register(backend.Type{Name: Type, New: New, Cleanup: cleanup})
}

// options are the backend's keys in the configuration. make docs writes the comments of the fields into README.md.
type options struct {
	// ID of the route table, or a list of IDs: `["rtb-0a1b2c3d4e5f60718", "rtb-0f1e2d3c4b5a69780"]`. Without this key,
	// flanneld uses the route table of the interface's subnet, else the main route table of the VPC. If the subnets of
	// nodes use different route tables, list all of them
	RouteTableID cloudroute.TableIDs `default:"found"`
}

var tableIDForm = regexp.MustCompile(`^rtb-[0-9a-f]+$`)

// New makes the backend.
func New(cfg *subnet.Config, uplink iface.Uplink) (backend.Backend, error) {
	var o options
	if err := backend.Options(cfg, &o); err != nil {
		return nil, err
	}
	if err := o.RouteTableID.Check(tableIDForm, "rtb-0a1b2c3d4e5f60718"); err != nil {
		return nil, err
	}
	return cloudroute.New(cfg, uplink, o.provider())
}

// provider returns AWS, for these options. EC2 lets an account read route tables some 20 times a second.
func (o options) provider() cloudroute.Provider {
	return cloudroute.Provider{Name: "AWS", Rate: 5, Connect: o.connect, Command: command}
}

func cleanup(ctx context.Context, cfg *subnet.Config, env subnet.Env) (backend.Cleanup, error) {
	if cfg == nil || cfg.BackendType != Type {
		return backend.Cleanup{}, nil
	}
	var o options
	_ = backend.Options(cfg, &o) // a configuration that cannot be read names no table
	tables := o.RouteTableID
	if len(tables) == 0 {
		tables = cloudroute.TableIDs{"rtb-…"}
	}
	return cloudroute.Cleanup(ctx, cfg, env, o.provider(), tables), nil
}

// command returns the command that has the same effect as a step.
func command(s cloudroute.Step) string {
	option := "--destination-cidr-block"
	if s.Route.Destination.Addr().Is6() {
		option = "--destination-ipv6-cidr-block"
	}
	text := fmt.Sprintf("aws ec2 %s-route --route-table-id %s %s %s", s.Verb, plain.Shell(s.Table), option,
		s.Route.Destination)
	if s.Verb != cloudroute.Delete {
		text += " --network-interface-id " + plain.Shell(s.Route.NextHop)
	}
	return text
}
