package alivpc

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/flanneld/flanneld/backend/cloudroute"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/pkg/retry"
)

const (
	// tableInterval is the interval of checks whether the vSwitch of the uplink still uses the same route table.
	tableInterval = 10 * time.Minute

	// changeInterval is the time between two changes of this node. The VPC makes one change at a time, and takes some
	// seconds.
	changeInterval = 5 * time.Second

	// busyTime is for how long a change waits for the changes of others, before the table is read again.
	busyTime = 30 * time.Second

	// stuckTime is for how long a change may be refused for a reason that should have passed, before this is an error.
	stuckTime = 15 * time.Minute

	// pageSize is how many routes, and maxIDs how many instances, one call is about: as many as the API allows.
	pageSize = 100
	maxIDs   = 50
)

// A cloud is Alibaba Cloud for this node: the metadata of its instance, and the API of its region.
type cloud struct {
	options
	metadata *metadata
	api      *api

	eni     string // the network interface of the next hop
	table   string // the route table of the vSwitch, if none is configured
	tableAt time.Time

	changed time.Time                // when this node's last change was
	refused map[netip.Prefix]refusal // changes that are refused for reasons that should pass
}

// A refusal is when a change was refused for the first time, and for the last.
type refusal struct{ first, last time.Time }

var _ cloudroute.HopChecker = (*cloud)(nil)

// connect finds the region and credentials.
func (o options) connect(ctx context.Context, h Host) (cloudroute.Cloud, error) {
	m := newMetadata(h)
	region, err := m.get(ctx, "region-id")
	if err != nil {
		return nil, noMetadata(err)
	}
	c := &cloud{options: o, metadata: m, refused: map[netip.Prefix]refusal{}}
	c.api = newAPI(h, region, &login{Host: h, configured: keys{id: o.AccessKeyID, secret: o.AccessKeySecret}, metadata: m})
	if _, err := c.api.login.keys(ctx); err != nil {
		return nil, noCredentials(err)
	}
	return c, nil
}

// NextHop implements cloudroute.Cloud: it is the instance, if the uplink's address is that of its first network
// interface, else the network interface that has the address.
func (c *cloud) NextHop(ctx context.Context, uplink iface.Uplink) (cloudroute.NextHop, error) {
	var none cloudroute.NextHop
	const path = "network/interfaces/macs/"
	macs, err := c.metadata.lines(ctx, path)
	if err != nil {
		return none, noMetadata(err)
	}
	var others []string
	for _, mac := range macs {
		mac = strings.TrimSuffix(mac, "/")
		addresses, err := c.addresses(ctx, path+mac)
		if err != nil {
			return none, noMetadata(err)
		}
		if !slices.Contains(addresses, uplink.IPv4.Addr) && !slices.Contains(addresses, uplink.IPv6.Addr) {
			for _, a := range addresses {
				others = append(others, a.String())
			}
			continue
		}
		var found cloudroute.NextHop
		var first string
		for _, f := range []struct {
			path string
			into *string
		}{
			{path + mac + "/network-interface-id", &c.eni}, {path + mac + "/vswitch-id", &found.Subnet},
			{path + mac + "/vpc-id", &found.VPC}, {"instance-id", &found.ID}, {"mac", &first},
		} {
			if *f.into, err = c.metadata.get(ctx, f.path); err != nil {
				return none, noMetadata(err)
			}
		}
		if mac != first {
			found.ID = c.eni
		}
		return found, nil
	}
	return none, fmt.Errorf("no network interface of this instance has the address of the uplink %s; they have %s: "+
		"have --iface name one that has, or restart flanneld once it is attached", uplink, strings.Join(others, ", "))
}

// addresses returns the addresses of a network interface. The service writes them as ["198.18.0.1","198.18.0.2"] or
// [fd18::1,fd18::2].
func (c *cloud) addresses(ctx context.Context, path string) ([]netip.Addr, error) {
	var all []netip.Addr
	for _, key := range []string{"/private-ipv4s", "/ipv6s"} {
		lines, err := c.metadata.lines(ctx, path+key)
		if err != nil {
			return nil, err
		}
		mark := func(r rune) bool { return strings.ContainsRune(`[]", `, r) }
		for _, text := range strings.FieldsFunc(strings.Join(lines, ","), mark) {
			if a, err := netip.ParseAddr(text); err == nil {
				all = append(all, a)
			}
		}
	}
	return all, nil
}

// AllowForwarding implements cloudroute.Cloud: it turns the check of sources and destinations off, in case that someone
// has turned it on.
func (c *cloud) AllowForwarding(ctx context.Context, _ cloudroute.NextHop) error {
	interfaces, err := c.interfaces(ctx, []string{c.eni})
	if err == nil && !slices.ContainsFunc(interfaces, func(i networkInterface) bool { return i.SourceDestCheck }) {
		return nil
	}
	action := "DescribeNetworkInterfaces"
	if err == nil {
		action = "ModifyNetworkInterfaceAttribute"
		err = c.api.call(ctx, ecs, action, map[string]any{"NetworkInterfaceId": c.eni, "SourceDestCheck": false}, nil)
	}
	explained := c.explain(ecs, action, err)
	if isForbidden(err) {
		return &cloudroute.CannotForward{Err: explained, Fix: "aliyun ecs ModifyNetworkInterfaceAttribute " +
			"--SourceDestCheck false --NetworkInterfaceId " + plain.Shell(c.eni)}
	}
	return explained
}

// A networkInterface is what an answer has of one.
type networkInterface struct {
	NetworkInterfaceId string
	Status             string
	SourceDestCheck    bool
}

func (c *cloud) interfaces(ctx context.Context, ids []string) ([]networkInterface, error) {
	var answer struct {
		NetworkInterfaceSets struct{ NetworkInterfaceSet []networkInterface }
	}
	parameters := map[string]any{"NetworkInterfaceId": ids, "MaxResults": pageSize}
	err := c.api.call(ctx, ecs, "DescribeNetworkInterfaces", parameters, &answer)
	return answer.NetworkInterfaceSets.NetworkInterfaceSet, err
}

// Gone implements cloudroute.HopChecker. A route table does not show it, and ECS does not release an instance to which
// routes lead: routes to instances that are stopped have to go first.
func (c *cloud) Gone(ctx context.Context, hops []string) ([]string, error) {
	for ids := range slices.Chunk(hops, maxIDs) {
		var instances, interfaces []string
		for _, id := range ids {
			if hopType(id) == instanceType {
				instances = append(instances, id)
			} else {
				interfaces = append(interfaces, id)
			}
		}
		alive, err := c.alive(ctx, instances, interfaces)
		if err != nil {
			return nil, err
		}
		hops = slices.DeleteFunc(slices.Clone(hops), func(id string) bool { return slices.Contains(alive, id) })
	}
	return hops, nil
}

// alive returns those that receive packets, or will.
func (c *cloud) alive(ctx context.Context, instances, interfaces []string) (alive []string, err error) {
	if len(instances) > 0 {
		var answer struct {
			InstanceStatuses struct {
				InstanceStatus []struct{ InstanceId, Status string }
			}
		}
		const action = "DescribeInstanceStatus"
		err := c.api.call(ctx, ecs, action, map[string]any{"InstanceId": instances, "PageSize": maxIDs}, &answer)
		if err != nil {
			return nil, c.explain(ecs, action, err)
		}
		for _, i := range answer.InstanceStatuses.InstanceStatus {
			if i.Status != "Stopped" {
				alive = append(alive, i.InstanceId)
			}
		}
	}
	if len(interfaces) > 0 {
		found, err := c.interfaces(ctx, interfaces)
		if err != nil {
			return nil, c.explain(ecs, "DescribeNetworkInterfaces", err)
		}
		for _, i := range found {
			if i.Status != "Available" { // which is said of one that no instance has
				alive = append(alive, i.NetworkInterfaceId)
			}
		}
	}
	return alive, nil
}

// Tables implements cloudroute.Cloud.
func (c *cloud) Tables(ctx context.Context, hop cloudroute.NextHop) ([]cloudroute.Table, error) {
	ids := c.RouteTableID
	if len(ids) == 0 {
		if err := c.findTable(ctx, hop); err != nil {
			return nil, err
		}
		ids = cloudroute.TableIDs{c.table}
	}
	var tables []cloudroute.Table
	for _, id := range ids {
		table, err := c.read(ctx, id)
		switch {
		case isNoTable(err):
			c.table = ""
			table.Err = c.explain(vpc, "DescribeRouteEntryList", err)
		case err != nil:
			return nil, c.explain(vpc, "DescribeRouteEntryList", err)
		}
		tables = append(tables, table)
	}
	return tables, nil
}

// findTable finds the route table of the vSwitch, or the system route table of the VPC.
func (c *cloud) findTable(ctx context.Context, hop cloudroute.NextHop) error {
	if c.table != "" && time.Since(c.tableAt) < tableInterval {
		return nil
	}
	type routeTable struct {
		RouteTableId, RouteTableType string
		VSwitchIds                   struct{ VSwitchId []string }
	}
	var system string
	for page, seen := 1, 0; ; page++ {
		var answer struct {
			TotalCount      int
			RouterTableList struct{ RouterTableListType []routeTable }
		}
		const action = "DescribeRouteTableList"
		err := c.api.call(ctx, vpc, action, map[string]any{"VpcId": hop.VPC, "PageNumber": page, "PageSize": 50}, &answer)
		if err != nil {
			if c.table != "" {
				return nil // the last one found
			}
			return c.explain(vpc, action, err)
		}
		found := answer.RouterTableList.RouterTableListType
		for _, t := range found {
			if slices.Contains(t.VSwitchIds.VSwitchId, hop.Subnet) {
				c.table, c.tableAt = t.RouteTableId, time.Now()
				return nil
			}
			if t.RouteTableType == "System" {
				system = t.RouteTableId
			}
		}
		if seen += len(found); len(found) == 0 || seen >= answer.TotalCount {
			break
		}
	}
	if system == "" {
		return errors.New("neither the vSwitch " + plain.Text(hop.Subnet) + " nor the VPC " + plain.Text(hop.VPC) +
			" shows a route table: is the vSwitch shared by another account? Only the owner of the VPC can change its routes")
	}
	c.table, c.tableAt = system, time.Now()
	return nil
}

// An entry is a route entry.
type entry struct {
	DestinationCidrBlock string
	Status               string
	ServiceType          string // what manages the entry; empty: persons and programs
	NextHops             struct {
		NextHop []struct{ NextHopType, NextHopId string }
	}
}

// read returns a table with the entries that were created by calls of the API. Others come and go with a gateway.
func (c *cloud) read(ctx context.Context, id string) (cloudroute.Table, error) {
	table := cloudroute.Table{ID: id}
	for token := ""; ; {
		var answer struct {
			NextToken   string
			RouteEntrys struct{ RouteEntry []entry }
		}
		parameters := map[string]any{"RouteTableId": id, "RouteEntryType": "Custom", "MaxResult": pageSize}
		if token != "" {
			parameters["NextToken"] = token
		}
		if err := c.api.call(ctx, vpc, "DescribeRouteEntryList", parameters, &answer); err != nil {
			return table, err
		}
		for _, e := range answer.RouteEntrys.RouteEntry {
			if r, ok := e.route(); ok {
				table.Routes = append(table.Routes, r)
			}
		}
		if token = answer.NextToken; token == "" {
			return table, nil
		}
	}
}

// route returns the route of an entry. An entry that is being deleted is none: a create waits for its end.
func (e entry) route() (r cloudroute.Route, ok bool) {
	dst, err := netip.ParsePrefix(e.DestinationCidrBlock)
	if err != nil || e.ServiceType != "" || e.Status == "Deleting" { // or a prefix list
		return r, false
	}
	r.Destination = dst.Masked()
	hops := e.NextHops.NextHop
	if len(hops) == 1 && slices.Contains([]string{instanceType, interfaceType}, hops[0].NextHopType) {
		r.NextHop = hops[0].NextHopId
	}
	return r, true
}

// Apply implements cloudroute.Cloud. A VPC makes one change at a time, and refuses others meanwhile.
func (c *cloud) Apply(ctx context.Context, s cloudroute.Step) (done bool, err error) {
	if err := retry.Sleep(ctx, time.Until(c.changed.Add(changeInterval))); err != nil {
		return false, nil // the next reconciliation
	}
	parameters := map[string]any{"RouteTableId": s.Table, "DestinationCidrBlock": s.Route.Destination.String()}
	switch s.Verb {
	case cloudroute.Create:
		parameters["NextHopType"], parameters["NextHopId"] = hopType(s.Route.NextHop), s.Route.NextHop
	case cloudroute.Replace:
		parameters["NewNextHopType"], parameters["NewNextHopId"] = hopType(s.Route.NextHop), s.Route.NextHop
	case cloudroute.Delete: // not the route of a node that has the subnet by now
		parameters["NextHopId"] = s.Route.NextHop
	}
	pause := retry.Backoff{First: 2 * time.Second, Most: 10 * time.Second, Jitter: true}
	for start := time.Now(); ; {
		err = c.api.call(ctx, vpc, actions[s.Verb], parameters, nil)
		if !isBusy(err) || time.Since(start) > busyTime || pause.Sleep(ctx) != nil {
			break
		}
	}
	switch {
	case err == nil:
		c.changed = time.Now()
		delete(c.refused, s.Route.Destination)
		return true, nil
	case isBusy(err) || isOutdated(err):
		return false, c.stuck(s.Route.Destination, err)
	}
	return false, c.explain(vpc, actions[s.Verb], err)
}

// stuck returns an error if a change is refused again and again, although the reason should have passed.
func (c *cloud) stuck(dst netip.Prefix, err error) error {
	now := time.Now()
	r := c.refused[dst]
	if now.Sub(r.last) > stuckTime {
		r.first = now
	}
	r.last = now
	c.refused[dst] = r
	if now.Sub(r.first) < stuckTime {
		return nil
	}
	return fmt.Errorf("the VPC has refused to change a route for a long time (%s): look for changes of the VPC that do "+
		"not end, and for a route of the system to the same destination; it is tried again; Alibaba Cloud says: %s",
		plain.Text(code(err)), plain.Text(message(err)))
}
