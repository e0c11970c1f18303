package gce

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"
	"time"

	"cloud.google.com/go/auth"
	"cloud.google.com/go/auth/credentials"
	"cloud.google.com/go/compute/metadata"
	compute "google.golang.org/api/compute/v1"
	"google.golang.org/api/option"

	"github.com/flanneld/flanneld/backend/cloudroute"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/pkg/retry"
)

// A cloud is Google Cloud for this node: the metadata of its instance, and Compute Engine's API.
type cloud struct {
	api    *compute.Service
	login  *auth.Credentials
	number string // of the instance's project

	self      string       // the path of the instance: projects/p/zones/z/instances/i
	addresses []netip.Addr // of its interface
	shared    network
}

// A network is a VPC network.
type network struct {
	key  string // as the metadata have it: projects/123456789/networks/n
	path string // as the API has it: projects/p/global/networks/n
}

// connect finds the project and credentials. The metadata come first: while they cannot be read, Google's library
// concludes that this is no instance, and never asks again.
func (h Host) connect(ctx context.Context) (cloudroute.Cloud, error) {
	number, err := value(ctx, "project/numeric-project-id")
	if err != nil {
		return nil, err
	}
	c := &cloud{number: number}
	c.login, err = credentials.DetectDefault(&credentials.DetectOptions{Scopes: []string{compute.ComputeScope},
		DisableAsyncRefresh: true})
	if err != nil {
		return nil, noCredentials(err)
	}
	if _, err := c.login.Token(ctx); err != nil {
		return nil, noCredentials(err)
	}
	options := []option.ClientOption{option.WithAuthCredentials(c.login)}
	if h.Endpoint != "" {
		options = append(options, option.WithEndpoint(h.Endpoint))
	}
	if c.api, err = compute.NewService(ctx, options...); err != nil {
		return nil, fmt.Errorf("Google Cloud's library refuses its configuration: %s", cloudroute.Cause(err))
	}
	return c, nil
}

// lines returns the lines of the metadata under a key; none, if the key does not exist.
func lines(ctx context.Context, key string) ([]string, error) {
	text, err := metadata.GetWithContext(ctx, key)
	var undefined metadata.NotDefinedError
	if err != nil && !errors.As(err, &undefined) {
		return nil, noMetadata(err)
	}
	return strings.Fields(text), nil
}

// value returns the metadata under a key.
func value(ctx context.Context, key string) (string, error) {
	found, err := lines(ctx, key)
	if err == nil && len(found) != 1 {
		err = fmt.Errorf("the metadata of this instance have no %s", key)
	}
	if err != nil {
		return "", err
	}
	return found[0], nil
}

// findSelf finds the path of the instance.
func (c *cloud) findSelf(ctx context.Context) error {
	var values []any
	for _, key := range []string{"project/project-id", "instance/zone", "instance/name"} {
		v, err := value(ctx, key)
		if err != nil {
			return err
		}
		values = append(values, path.Base(v))
	}
	c.self = fmt.Sprintf("projects/%s/zones/%s/instances/%s", values...)
	return nil
}

// NextHop implements cloudroute.Cloud: it is the instance. A route must be in the project of its network, and can lead
// to an instance of that project only. Where the network is shared by another project, the next hop is the addresses of
// the interface.
func (c *cloud) NextHop(ctx context.Context, uplink iface.Uplink) (cloudroute.NextHop, error) {
	const interfaces = "instance/network-interfaces/"
	var none cloudroute.NextHop
	if err := c.findSelf(ctx); err != nil {
		return none, err
	}
	indexes, err := lines(ctx, interfaces)
	if err != nil {
		return none, err
	}
	var others []string
	for _, index := range indexes {
		key := interfaces + strings.TrimSuffix(index, "/")
		found, err := addresses(ctx, key)
		if err != nil {
			return none, err
		}
		if !slices.Contains(found, uplink.IPv4.Addr) && !slices.Contains(found, uplink.IPv6.Addr) {
			others = append(others, join(found))
			continue
		}
		c.addresses = found
		n, err := value(ctx, key+"/network")
		if err != nil {
			return none, err
		}
		if element(n, "projects") == c.number {
			return cloudroute.NextHop{ID: c.self, VPC: fmt.Sprintf("projects/%s/global/networks/%s",
				element(c.self, "projects"), element(n, "networks"))}, nil
		}
		shared, err := c.sharedNetwork(ctx, n)
		if err != nil {
			return none, err
		}
		return cloudroute.NextHop{ID: join(found), VPC: shared}, nil
	}
	return none, fmt.Errorf("no network interface of this instance has the address of the uplink %s; they have %s: "+
		"have --iface name one that has, or restart flanneld once it is attached", uplink, strings.Join(others, ","))
}

// addresses returns the addresses of an interface.
func addresses(ctx context.Context, key string) (all []netip.Addr, err error) {
	for _, kind := range []string{"/ip", "/ipv6s"} {
		texts, err := lines(ctx, key+kind)
		if err != nil {
			return nil, err
		}
		for _, text := range texts {
			if a, err := netip.ParseAddr(text); err == nil {
				all = append(all, a)
			}
		}
	}
	return all, nil
}

// join returns the ID of a next hop that is addresses.
func join(addresses []netip.Addr) string {
	var texts []string
	for _, a := range addresses {
		texts = append(texts, a.String())
	}
	return strings.Join(texts, ",")
}

// sharedNetwork returns the path of a network of another project. The metadata have only the number of the project.
func (c *cloud) sharedNetwork(ctx context.Context, key string) (string, error) {
	if c.shared.key == key {
		return c.shared.path, nil
	}
	i, err := c.api.Instances.Get(element(c.self, "projects"), element(c.self, "zones"), element(c.self, "instances")).
		Fields("networkInterfaces/network").Context(ctx).Do()
	if err != nil {
		return "", c.explain(ctx, "instances.get", err)
	}
	for _, n := range i.NetworkInterfaces {
		if path := pathOf(n.Network); element(path, "networks") == element(key, "networks") &&
			element(path, "projects") != element(c.self, "projects") {
			c.shared = network{key, path}
			return path, nil
		}
	}
	return "", fmt.Errorf("Compute Engine shows no interface of this instance in the network %s, which the metadata have",
		plain.Quote(key))
}

// pathOf returns the end of a URL, from projects/ on.
func pathOf(url string) string {
	if i := strings.Index(url, "projects/"); i >= 0 {
		return url[i:]
	}
	return ""
}

// AllowForwarding implements cloudroute.Cloud: it checks that the instance may forward packets. A change of this
// property takes a change of the whole instance, which the role of a node must not permit.
func (c *cloud) AllowForwarding(ctx context.Context, _ cloudroute.NextHop) error {
	project, zone, name := element(c.self, "projects"), element(c.self, "zones"), element(c.self, "instances")
	place := fmt.Sprintf("%s --zone %s --project %s", plain.Shell(name), plain.Shell(zone), plain.Shell(project))
	fix := fmt.Sprintf("gcloud compute instances export %s | sed '/^canIpForward:/d; $a canIpForward: true' | "+
		"gcloud compute instances update-from-file %s --most-disruptive-allowed-action REFRESH", place, place)
	i, err := c.api.Instances.Get(project, zone, name).Fields("canIpForward").Context(ctx).Do()
	if err == nil && !i.CanIpForward {
		err := fmt.Errorf("IP forwarding is off for the instance %s: Google Cloud drops the packets of its pods",
			plain.Text(c.self))
		return &cloudroute.CannotForward{Err: err, Fix: fix}
	}
	explained := c.explain(ctx, "instances.get", err)
	if reason, _, _ := refusal(err); reason == "forbidden" {
		return &cloudroute.CannotForward{Err: explained, Fix: fix}
	}
	return explained
}

// priority is that of all routes of nodes. It is the default.
const priority = 1000

// Tables implements cloudroute.Cloud: there is one table, the network.
func (c *cloud) Tables(ctx context.Context, hop cloudroute.NextHop) ([]cloudroute.Table, error) {
	table := cloudroute.Table{ID: hop.VPC}
	call := c.api.Routes.List(element(hop.VPC, "projects")).Context(ctx).
		Filter(`network eq ".*/networks/`+element(hop.VPC, "networks")+`"`).
		Fields("items(name,destRange,nextHopInstance,nextHopIp,priority,tags,warnings/code)", "nextPageToken")
	for {
		page, err := call.Do()
		if err != nil {
			return nil, c.explain(ctx, "routes.list", err)
		}
		for _, r := range page.Items {
			if route, ok := routeOf(r, hop); ok {
				table.Routes = append(table.Routes, route)
			}
		}
		if page.NextPageToken == "" {
			return []cloudroute.Table{table}, nil
		}
		call.PageToken(page.NextPageToken)
	}
}

// routeOf returns a route as cloudroute has it, if a node may have made it: several routes can have the same
// destination, and those that others have made for special purposes stay.
func routeOf(r *compute.Route, hop cloudroute.NextHop) (cloudroute.Route, bool) {
	dst, err := netip.ParsePrefix(r.DestRange)
	if err != nil || !strings.HasPrefix(r.Name, namePrefix) || r.Priority != priority || len(r.Tags) > 0 {
		return cloudroute.Route{}, false
	}
	route := cloudroute.Route{Name: r.Name, Destination: dst.Masked(), NextHop: pathOf(r.NextHopInstance)}
	if a, err := netip.ParseAddr(r.NextHopIp); err == nil {
		route.NextHop = a.String()
		if a == addressOf(cloudroute.Route{Destination: dst, NextHop: hop.ID}) {
			route.NextHop = hop.ID
		}
	}
	for _, w := range r.Warnings {
		switch w.Code {
		case "NEXT_HOP_INSTANCE_NOT_FOUND", "NEXT_HOP_INSTANCE_NOT_ON_NETWORK", "NEXT_HOP_ADDRESS_NOT_ASSIGNED",
			"NEXT_HOP_NOT_RUNNING":
			route.Blackhole = true
		}
	}
	return route, route.NextHop != ""
}

// Apply implements cloudroute.Cloud. A route cannot be changed: to replace it is to delete it first, because the new
// one has the same name.
func (c *cloud) Apply(ctx context.Context, s cloudroute.Step) (done bool, err error) {
	if s.Verb == cloudroute.Delete {
		return c.delete(ctx, s.Table, s.Route)
	}
	if s.Verb == cloudroute.Replace {
		if _, err := c.delete(ctx, s.Table, s.Old); err != nil {
			return false, err
		}
	}
	return c.insert(ctx, s.Table, s.Route)
}

func (c *cloud) delete(ctx context.Context, table string, r cloudroute.Route) (done bool, err error) {
	o, err := c.api.Routes.Delete(element(table, "projects"), r.Name).Context(ctx).Do()
	if err == nil {
		err = c.wait(ctx, element(table, "projects"), o)
	}
	switch reason, _, _ := refusal(err); reason {
	case "notFound", "RESOURCE_NOT_FOUND", "resourceNotReady", "RESOURCE_NOT_READY":
		return false, nil // another node has deleted the route, or is about to
	}
	return err == nil, c.explain(ctx, "routes.delete", err)
}

func (c *cloud) insert(ctx context.Context, table string, r cloudroute.Route) (done bool, err error) {
	project := element(table, "projects")
	route := &compute.Route{Name: routeName(table, r.Destination), DestRange: r.Destination.String(), Network: table,
		Priority: priority, Description: "made by flanneld"}
	if !slices.ContainsFunc(c.addresses, func(a netip.Addr) bool { return a.Is4() == r.Destination.Addr().Is4() }) {
		return false, fmt.Errorf("the interface of this instance has no address of the family of %s: give its subnet and "+
			"the interface the stack type IPV4_IPV6", r.Destination)
	}
	if a := addressOf(r); a.IsValid() {
		route.NextHopIp = a.String()
	} else {
		route.NextHopInstance = r.NextHop
	}
	o, err := c.api.Routes.Insert(project, route).Context(ctx).Do()
	if err == nil {
		err = c.wait(ctx, project, o)
	}
	if reason, _, _ := refusal(err); reason == "alreadyExists" || reason == "RESOURCE_ALREADY_EXISTS" {
		return false, c.taken(ctx, table, route)
	}
	return err == nil, c.explain(ctx, "routes.insert", err)
}

// taken returns why a name is not free: nil, if another program has created the same route meanwhile, which the next
// look at the network shows.
func (c *cloud) taken(ctx context.Context, table string, want *compute.Route) error {
	r, err := c.api.Routes.Get(element(table, "projects"), want.Name).Fields("name", "destRange", "network",
		"nextHopInstance", "nextHopIp", "priority", "tags").Context(ctx).Do()
	if reason, _, _ := refusal(err); reason == "notFound" {
		return nil
	}
	if err != nil {
		return c.explain(ctx, "routes.get", err)
	}
	if _, ok := routeOf(r, cloudroute.NextHop{}); ok && r.DestRange == want.DestRange && pathOf(r.Network) == table {
		return nil
	}
	return fmt.Errorf("the name %s is taken by a route to %s in %s, which no node of this network has made: delete that "+
		"route, or give it another name", want.Name, plain.Quote(r.DestRange), plain.Quote(pathOf(r.Network)))
}

// waitPause is the time between requests to wait for an operation: a server that is overloaded answers at once.
const waitPause = time.Second

// wait waits for the end of an operation.
func (c *cloud) wait(ctx context.Context, project string, o *compute.Operation) (err error) {
	for o.Status != "DONE" {
		if o, err = c.api.GlobalOperations.Wait(project, o.Name).Context(ctx).Do(); err != nil {
			return err
		}
		if o.Status != "DONE" {
			if err := retry.Sleep(ctx, waitPause); err != nil {
				return err
			}
		}
	}
	if o.Error != nil && len(o.Error.Errors) > 0 {
		return operationError{o.Error.Errors[0].Code, o.Error.Errors[0].Message}
	}
	return nil
}
