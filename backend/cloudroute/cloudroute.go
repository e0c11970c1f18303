// Package cloudroute lets the router of a cloud forward pods' packets unchanged: each node keeps a route to its own
// subnet in the cloud's route tables. What is particular to a cloud is a Provider; each has a backend of its own, in a
// folder beside this one.
package cloudroute

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/subnet"
)

// A Provider is a cloud.
type Provider struct {
	Name string // as logs have it: "AWS"

	// Rate is how many reconciliations all nodes of a network together may make, a second: what the cloud's API takes
	// of one account, and others use, too.
	Rate float64

	// Connect finds the node's identity and credentials. It is called again until it succeeds.
	Connect func(context.Context) (Cloud, error)

	// Command returns the command of the cloud's own tool that has the effect of a step.
	Command func(Step) string
}

// A Cloud is what one node may see and change of a cloud: its metadata, and the API. The methods are called one at a
// time. Their errors say in one line what to do, and have the same text while the cause is the same.
type Cloud interface {
	// NextHop finds what routes to this node lead to.
	NextHop(context.Context, iface.Uplink) (NextHop, error)

	// AllowForwarding makes the cloud accept packets to and from pods at the next hop, or checks that it does. The error
	// may be a *CannotForward.
	AllowForwarding(context.Context, NextHop) error

	// Tables returns the route tables that need a route to the node's subnets.
	Tables(context.Context, NextHop) ([]Table, error)

	// Apply changes a table. Where another program has changed the same route meanwhile, done is false, without an error.
	Apply(context.Context, Step) (done bool, err error)
}

// A HopChecker is a Cloud whose tables do not show that a next hop is gone.
type HopChecker interface {
	// Gone returns those of some next hops that are gone, or stopped: no packets arrive there.
	Gone(ctx context.Context, hops []string) ([]string, error)
}

// CannotForward is the error of AllowForwarding that only the operator can correct: it is logged once, and not tried again.
type CannotForward struct {
	Err error
	Fix string // a command
}

func (e *CannotForward) Error() string { return e.Err.Error() }

// Unwrap returns why.
func (e *CannotForward) Unwrap() error { return e.Err }

// A NextHop is what routes to a node lead to: its instance, its network interface or its address.
type NextHop struct {
	ID     string
	Subnet string // the ID of the cloud's subnet that it is in; may be empty
	VPC    string // the ID of the cloud's network that it is in; may be empty
}

// A Table is a route table.
type Table struct {
	ID     string
	Routes []Route // in no order: those that someone has created, rather than the cloud itself or a gateway
	Err    error   // why the table cannot be used, or nil
}

// A Route is a route of a table.
type Route struct {
	Name        string // name or ID, where the cloud gives routes one
	Destination netip.Prefix
	NextHop     string // the ID of a node's next hop; "": the route leads to something that is no node's
	Blackhole   bool   // the next hop is gone
}

// A Step is one change to a table.
type Step struct {
	Verb  Verb
	Table string
	Route Route // Delete: as it is in the table; else as it must be, without a name
	Old   Route // the one that Replace replaces; its destination is the same
}

// A Verb is what a Step does.
type Verb string

// The verbs are those of AWS's commands.
const (
	Create  Verb = "create"
	Replace Verb = "replace"
	Delete  Verb = "delete"
)

// Backend implements backend.Backend.
type Backend struct {
	provider Provider
	uplink   iface.Uplink
	networks []netip.Prefix
}

var (
	_ backend.Worker = (*Backend)(nil)
	_ backend.Differ = (*Backend)(nil)
)

// New makes a backend.
func New(cfg *subnet.Config, uplink iface.Uplink, p Provider) (backend.Backend, error) {
	if uplink.Apart() {
		return nil, fmt.Errorf("the routes of both families lead to one network interface, and the uplink has two, %s: leave "+
			"out --iface-v6, --iface-regex-v6 and --iface-can-reach-v6, or use the vxlan backend", uplink.Names())
	}
	return newBackend(cfg, uplink, p), nil
}

func newBackend(cfg *subnet.Config, uplink iface.Uplink, p Provider) *Backend {
	return &Backend{provider: p, uplink: uplink, networks: cfg.Networks().Each()}
}

// Info implements backend.Backend.
func (b *Backend) Info() backend.Info { return backend.Info{MTU: b.uplink.MTU()} }

// Attrs implements backend.Backend. Leases carry none.
func (b *Backend) Attrs(context.Context, subnet.Attrs) (subnet.Attrs, error) {
	return subnet.Attrs{}, nil
}

// Local implements backend.Backend.
func (b *Backend) Local(subnet.Lease) []kernel.Object { return nil }

// Peer implements backend.Backend. There are no objects: the default route leads to the cloud's router, which has the
// routes.
func (b *Backend) Peer(subnet.Lease, subnet.Lease) ([]kernel.Object, error) { return nil, nil }

// TableIDs are the IDs of route tables, in JSON one string or a list of strings.
type TableIDs []string

// UnmarshalJSON implements json.Unmarshaler.
func (t *TableIDs) UnmarshalJSON(data []byte) error {
	var one string
	var all []string
	if json.Unmarshal(data, &one) == nil {
		if one != "" {
			all = []string{one}
		}
	} else if json.Unmarshal(data, &all) != nil {
		return errors.New("RouteTableID: want the ID of a route table in quotes, or a list of such IDs")
	}
	slices.Sort(all)
	*t = slices.Compact(all)
	return nil
}

// Check returns an error if an ID has not the form that IDs of a cloud have.
func (t TableIDs) Check(form *regexp.Regexp, example string) error {
	for _, id := range t {
		if !form.MatchString(id) {
			return fmt.Errorf("RouteTableID %s is not the ID of a route table, such as %s", plain.Quote(id), example)
		}
	}
	return nil
}
