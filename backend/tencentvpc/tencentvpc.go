// Package tencentvpc lets a VPC of Tencent Cloud route pods' packets unchanged: each node adds a route to its own subnet
// to the route tables of the VPC. See README.md.
package tencentvpc

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"regexp"
	"strconv"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/backend/cloudroute"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/subnet"
)

// Type is the backend's name in configurations. Leases carry none.
const Type = "tencent-vpc"

func init() {
	backend.Register(backend.Type{Name: Type, New: New, Cleanup: cleanup})
}

// options are the backend's keys in the configuration. make docs writes the comments of the fields into README.md.
type options struct {
	// ID of the route table, or a list of IDs: `["rtb-l2h8d7c2", "rtb-n0yejvje"]`. Without this key, flanneld uses the
	// route table of the interface's subnet. If the subnets of nodes use different route tables, list all of them
	RouteTableID cloudroute.TableIDs `default:"found"`
	// Publish the route of each node to the Cloud Connect Network (CCN) of the VPC, so that the other networks of the CCN
	// reach pods
	PublishToCCN bool
	// `SecretId` of an API key, as configurations for upstream's flannel have it. Prefer a role or the environment: all
	// who can read the configuration can read the key
	AccessKeyID string
	// `SecretKey` of this API key
	AccessKeySecret string
}

var tableID = regexp.MustCompile(`^rtb-[0-9a-z]+$`)

func read(cfg *subnet.Config) (options, error) {
	var o options
	if err := backend.Options(cfg, &o); err != nil {
		return o, err
	}
	if (o.AccessKeyID == "") != (o.AccessKeySecret == "") {
		return o, errors.New("AccessKeyID and AccessKeySecret belong together: set both, or neither")
	}
	return o, o.RouteTableID.Check(tableID, "rtb-l2h8d7c2")
}

// New makes the backend.
func New(cfg *subnet.Config, uplink iface.Uplink) (backend.Backend, error) {
	o, err := read(cfg)
	if err != nil {
		return nil, err
	}
	if cfg.IPv6.Enabled() {
		return nil, errors.New("it routes IPv4 only: Tencent Cloud documents no IPv6 route to an instance; " +
			"set EnableIPv6 to false, or use another backend")
	}
	return cloudroute.New(cfg, uplink, o.provider(cfg))
}

// provider returns Tencent Cloud, for these options. An account may call DescribeVpcPrivateIpAddresses 20 times a second,
// and the other actions 50 times or more.
func (o options) provider(cfg *subnet.Config) cloudroute.Provider {
	networks := cfg.Networks().Each()
	return cloudroute.Provider{Name: "Tencent Cloud", Rate: 10, Command: command,
		Connect: func(ctx context.Context) (cloudroute.Cloud, error) { return o.connect(ctx, networks) }}
}

func cleanup(ctx context.Context, cfg *subnet.Config, env subnet.Env) (backend.Cleanup, error) {
	if cfg == nil || cfg.BackendType != Type {
		return backend.Cleanup{}, nil
	}
	o, err := read(cfg)
	if err != nil {
		o = options{} // a configuration that cannot be read names no table
	}
	tables := o.RouteTableID
	if len(tables) == 0 {
		tables = cloudroute.TableIDs{"rtb-…"}
	}
	return cloudroute.Cleanup(ctx, cfg, env, o.provider(cfg), tables), nil
}

const (
	// gatewayType is the type of next hops that are instances. The next hop itself is a private address of the instance.
	gatewayType = "NORMAL_CVM"
	// description is what the console shows beside the routes of nodes.
	description = "flanneld"
)

// What follows the address in the next hop of a route that leads to this node, and yet needs a change.
const (
	disabled    = " disabled"
	unpublished = " unpublished"
)

// A route is the API's object Route.
type route struct {
	ItemID      string `json:"RouteItemId,omitempty"`
	ID          uint64 `json:"RouteId,omitempty"` // where there is no RouteItemId
	Destination string `json:"DestinationCidrBlock,omitempty"`
	GatewayType string `json:",omitempty"`
	GatewayID   string `json:"GatewayId,omitempty"`
	Description string `json:"RouteDescription,omitempty"`
	Enabled     *bool  `json:",omitempty"` // nil in an answer: true
	Type        string `json:"RouteType,omitempty"`
	Published   bool   `json:"PublishedToVbc,omitempty"`
}

// name returns the name of a route for cloudroute.
func (r route) name() string {
	if r.ItemID == "" {
		return strconv.FormatUint(r.ID, 10)
	}
	return r.ItemID
}

// named returns a route that has nothing but the ID.
func named(name string) route {
	if id, err := strconv.ParseUint(name, 10, 64); err == nil {
		return route{ID: id}
	}
	return route{ItemID: name}
}

// change is the parameters of the actions that change a route table.
type change struct {
	RouteTableID string   `json:"RouteTableId"`
	Routes       []route  `json:",omitempty"`
	RouteIDs     []uint64 `json:"RouteIds,omitempty"`
	RouteItemIDs []string `json:"RouteItemIds,omitempty"`
}

// changeOf returns the action of the API, and its parameters, that a step takes.
func changeOf(s cloudroute.Step) (action string, c change) {
	c.RouteTableID = s.Table
	on := true
	wanted := route{Destination: s.Route.Destination.String(), GatewayType: gatewayType, GatewayID: s.Route.NextHop,
		Description: description, Enabled: &on}
	old := named(s.Old.Name)
	switch {
	case s.Verb == cloudroute.Create:
		action, c.Routes = "CreateRoutes", []route{wanted}
	case s.Verb == cloudroute.Delete:
		action, c.Routes = "DeleteRoutes", []route{named(s.Route.Name)}
	case s.Old.NextHop == s.Route.NextHop+disabled:
		action = "EnableRoutes"
		if old.ItemID == "" {
			c.RouteIDs = []uint64{old.ID}
		} else {
			c.RouteItemIDs = []string{old.ItemID}
		}
	case s.Old.NextHop == s.Route.NextHop+unpublished:
		action, c.RouteItemIDs = "NotifyRoutes", []string{old.ItemID}
	default:
		wanted.ItemID, wanted.ID = old.ItemID, old.ID
		action, c.Routes = "ReplaceRoutes", []route{wanted}
	}
	return action, c
}

// command returns the command of tccli that has the effect of a step. Where the route to delete could not be read, the
// operator has to fill in its ID.
func command(s cloudroute.Step) string {
	s.Route.Name = cmp.Or(s.Route.Name, "rti-…")
	action, c := changeOf(s)
	text := "tccli vpc " + action + " --RouteTableId " + plain.Shell(c.RouteTableID)
	if len(c.Routes) > 0 {
		text += " --Routes " + words(c.Routes)
	}
	if len(c.RouteIDs) > 0 {
		text += " --RouteIds " + words(c.RouteIDs)
	}
	if len(c.RouteItemIDs) > 0 {
		text += " --RouteItemIds " + words(c.RouteItemIDs)
	}
	return text
}

// words returns a value as JSON, for a shell.
func words(v any) string {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err) // these types have no value without JSON
	}
	return plain.Shell(string(text))
}
