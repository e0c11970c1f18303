// Package alivpc lets a VPC of Alibaba Cloud route pods' packets unchanged: each node keeps a route to its own subnet
// in the route tables of the VPC. See README.md.
package alivpc

import (
	"context"
	"fmt"
	"regexp"
	"strings"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/backend/cloudroute"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/subnet"
)

// Type is the backend's name in configurations. Leases carry none.
const Type = "ali-vpc"

// A Host is what the environment of the process says about Alibaba Cloud. The SDK reads variables of its own.
type Host struct {
	AccessKeyID, AccessKeySecret string // credentials, in place of those for which the SDK has variables, and of a role
	Role                         string // the name of the RAM role of the instance; "": the instance tells

	Public                   bool   // call the APIs through the internet, rather than inside the VPC
	VPCEndpoint, ECSEndpoint string // other addresses of the APIs, which may begin with "http://"

	Metadata  string // the URL of the metadata service; "": http://100.100.100.200
	NeedToken bool   // do not ask for metadata without a token
}

func init() { backend.Register(Host{}.Type()) }

// Type returns the type of backend on the host. It is for backend.Register, in place of the type for the zero Host.
func (h Host) Type() backend.Type {
	return backend.Type{Name: Type, New: h.new, Cleanup: h.cleanup}
}

// options are the backend's keys in the configuration. make docs writes the comments of the fields into README.md.
type options struct {
	// ID of the route table, or a list of IDs: `["vtb-bp145q7glnuzd0example", "vtb-bp1r9pvl4xen80example"]`. Without this
	// key, flanneld uses the route table of the interface's vSwitch, which is the system route table of the VPC unless you
	// have associated another one. If the vSwitches of nodes use different route tables, list all of them
	RouteTableID cloudroute.TableIDs `default:"found"`

	// ID of an AccessKey. Who can read the configuration can read the key: prefer the role of the instance, or the
	// environment variable `ACCESS_KEY_ID`
	AccessKeyID string `default:"found"`

	// Secret of the AccessKey
	AccessKeySecret string `default:"found"`
}

var tableIDForm = regexp.MustCompile(`^vtb-[0-9a-z]+$`)

func (h Host) new(cfg *subnet.Config, uplink iface.Uplink) (backend.Backend, error) {
	var o options
	if err := backend.Options(cfg, &o); err != nil {
		return nil, err
	}
	if err := o.RouteTableID.Check(tableIDForm, "vtb-bp145q7glnuzd0example"); err != nil {
		return nil, err
	}
	if (o.AccessKeyID == "") != (o.AccessKeySecret == "") {
		cfg.Warnings = append(cfg.Warnings, "of AccessKeyID and AccessKeySecret, one is not set: the other is ignored")
	}
	return cloudroute.New(cfg, uplink, o.provider(h))
}

// provider returns Alibaba Cloud, for these options on a host. Its VPC API lets an account make some 10 calls of one kind
// a second in a region, others use it, too, and a table of more than 100 routes takes several calls.
func (o options) provider(h Host) cloudroute.Provider {
	connect := func(ctx context.Context) (cloudroute.Cloud, error) { return o.connect(ctx, h) }
	return cloudroute.Provider{Name: "Alibaba Cloud", Rate: 2, Connect: connect, Command: command}
}

func (h Host) cleanup(ctx context.Context, cfg *subnet.Config, env subnet.Env) (backend.Cleanup, error) {
	if cfg == nil || cfg.BackendType != Type {
		return backend.Cleanup{}, nil
	}
	var o options
	_ = backend.Options(cfg, &o) // a configuration that cannot be read names no table
	tables := o.RouteTableID
	if len(tables) == 0 {
		tables = cloudroute.TableIDs{"vtb-…"}
	}
	return cloudroute.Cleanup(ctx, cfg, env, o.provider(h), tables), nil
}

// command returns the command that has the same effect as a step.
func command(s cloudroute.Step) string {
	text := fmt.Sprintf("aliyun vpc %s --RouteTableId %s --DestinationCidrBlock %s", actions[s.Verb], plain.Shell(s.Table),
		s.Route.Destination)
	switch hop := plain.Shell(s.Route.NextHop); s.Verb {
	case cloudroute.Create:
		text += fmt.Sprintf(" --NextHopType %s --NextHopId %s", hopType(s.Route.NextHop), hop)
	case cloudroute.Replace:
		text += fmt.Sprintf(" --NewNextHopType %s --NewNextHopId %s", hopType(s.Route.NextHop), hop)
	case cloudroute.Delete:
		if s.Route.NextHop != "" {
			text += " --NextHopId " + hop
		}
	}
	return text
}

// actions are the API's for steps.
var actions = map[cloudroute.Verb]string{
	cloudroute.Create: "CreateRouteEntry", cloudroute.Replace: "ModifyRouteEntry", cloudroute.Delete: "DeleteRouteEntry",
}

// The types of next hops that a node has: routes to its first network interface lead to the instance, as flannel has
// always made them.
const (
	instanceType  = "Instance"
	interfaceType = "NetworkInterface"
)

// hopType returns the type of a node's next hop.
func hopType(id string) string {
	if strings.HasPrefix(id, "eni-") {
		return interfaceType
	}
	return instanceType
}
