package awsvpc

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"

	"github.com/flanneld/flanneld/pkg/plain"
)

// desired is what every route table must hold for this node.
type desired struct {
	eni      string         // this node's network interface
	own      []netip.Prefix // the subnets that must be routed to the interface
	networks []netip.Prefix // the networks that contain the subnets of all nodes
	peers    []netip.Prefix // the subnets of the other nodes
	known    bool           // whether the peers are known
}

// A step is one change to a route table.
type step struct {
	verb  verb
	table string
	dst   netip.Prefix
	eni   string // empty where a route is deleted
}

type verb string

const (
	createRoute  verb = "create-route"
	replaceRoute verb = "replace-route"
	deleteRoute  verb = "delete-route"
)

// String returns the command that has the same effect.
func (s step) String() string {
	option := "--destination-cidr-block"
	if s.dst.Addr().Is6() {
		option = "--destination-ipv6-cidr-block"
	}
	text := fmt.Sprintf("aws ec2 %s --route-table-id %s %s %s", s.verb, plain.Shell(s.table), option, s.dst)
	if s.eni != "" {
		text += " --network-interface-id " + plain.Shell(s.eni)
	}
	return text
}

// plan returns the steps from a route table to the desired routes. Deletions come first: they make room. plan reports
// whether routes may have to be deleted once the peers are known.
//
// Besides the routes of this node, plan changes two kinds of routes, inside the networks and never to the subnet of a
// peer: routes to an interface that no longer exists, and routes to the interface of this node that an earlier lease
// left.
func plan(table types.RouteTable, w desired) (steps []step, waits bool) {
	id := aws.ToString(table.RouteTableId)
	missing := slices.Clone(w.own)
	var changes []step
	for _, route := range table.Routes {
		dst, ok := destination(route)
		if !ok {
			continue
		}
		target := aws.ToString(route.NetworkInterfaceId)
		blackhole := route.State == types.RouteStateBlackhole
		switch {
		case slices.Contains(w.own, dst):
			missing = slices.DeleteFunc(missing, func(p netip.Prefix) bool { return p == dst })
			if target != w.eni {
				changes = append(changes, step{replaceRoute, id, dst, w.eni})
			}
		case !blackhole && target != w.eni, !inside(dst, w.networks), overlaps(dst, w.own), overlaps(dst, w.peers):
		case target == "" && aws.ToString(route.InstanceId) == "":
			// The route of a gateway, for instance: no node has created it.
		case !w.known:
			waits = true
		default:
			steps = append(steps, step{verb: deleteRoute, table: id, dst: dst})
		}
	}
	for _, dst := range missing {
		changes = append(changes, step{createRoute, id, dst, w.eni})
	}
	return append(steps, changes...), waits
}

// destination returns the destination of a route that was created by a call of the API. Routes that a gateway
// propagates come and go with the gateway.
func destination(route types.Route) (netip.Prefix, bool) {
	if route.Origin != types.RouteOriginCreateRoute && route.Origin != "" {
		return netip.Prefix{}, false
	}
	text := aws.ToString(route.DestinationCidrBlock)
	if text == "" {
		text = aws.ToString(route.DestinationIpv6CidrBlock)
	}
	dst, err := netip.ParsePrefix(text) // fails for a prefix list
	return dst.Masked(), err == nil
}

// inside reports whether a prefix is a part of one of the networks.
func inside(p netip.Prefix, networks []netip.Prefix) bool {
	return slices.ContainsFunc(networks, func(n netip.Prefix) bool { return n.Bits() < p.Bits() && n.Contains(p.Addr()) })
}

func overlaps(p netip.Prefix, with []netip.Prefix) bool {
	return slices.ContainsFunc(with, p.Overlaps)
}
