package cloudroute

import (
	"net/netip"
	"slices"
)

// desired is what every route table must hold for this node.
type desired struct {
	hop      string         // the ID of this node's next hop
	own      []netip.Prefix // the subnets that must be routed to it
	networks []netip.Prefix // the networks that contain the subnets of all nodes
	peers    []netip.Prefix // the subnets of the other nodes
	known    bool           // whether the peers are known
}

// plan returns the steps from a route table to the desired routes: deletions that make room for new routes, the routes of
// this node, and other deletions. plan reports whether routes may have to be deleted once the peers are known.
//
// Besides the routes of this node, plan changes two kinds of routes, inside the networks and never to the subnet of a
// peer: routes to a next hop that no longer exists, and routes to this node that an earlier lease left.
func plan(table Table, w desired) (steps []Step, waits bool) {
	var deletions []Step
	for _, r := range table.Routes {
		switch {
		case !w.leftover(r), !r.Blackhole && r.NextHop != w.hop:
		case !w.known:
			waits = true
		default:
			deletions = append(deletions, Step{Verb: Delete, Table: table.ID, Route: r})
		}
	}
	var changes []Step
	for _, dst := range w.own {
		deleted, changed := w.route(table, dst)
		steps, changes = append(steps, deleted...), append(changes, changed...)
	}
	// A change may take seconds, and there may be hundreds of deletions.
	room := 0
	for _, s := range changes {
		if s.Verb == Create && room < len(deletions) {
			room++
		}
	}
	return slices.Concat(steps, deletions[:room], changes, deletions[room:]), waits
}

// leftover reports whether a route is to no subnet of a node. Routes that are not inside the networks, or lead to what is
// no node's next hop, are other programs' routes.
func (w desired) leftover(r Route) bool {
	return r.NextHop != "" && inside(r.Destination, w.networks) && !overlaps(r.Destination, w.own) &&
		!overlaps(r.Destination, w.peers)
}

// route returns the steps to exactly one route to a subnet of this node, where a table may have several to the same.
func (w desired) route(table Table, dst netip.Prefix) (deletions, changes []Step) {
	want := Route{Destination: dst, NextHop: w.hop}
	var wrong []Route
	there := false
	for _, r := range table.Routes {
		switch {
		case r.Destination != dst:
		case r.NextHop == w.hop && !there:
			there = true
		default:
			wrong = append(wrong, r)
		}
	}
	switch {
	case there:
	case len(wrong) > 0:
		changes = append(changes, Step{Replace, table.ID, want, wrong[0]})
		wrong = wrong[1:]
	default:
		changes = append(changes, Step{Verb: Create, Table: table.ID, Route: want})
	}
	for _, r := range wrong {
		deletions = append(deletions, Step{Verb: Delete, Table: table.ID, Route: r})
	}
	return deletions, changes
}

// inside reports whether a prefix is a part of one of the networks.
func inside(p netip.Prefix, networks []netip.Prefix) bool {
	return slices.ContainsFunc(networks, func(n netip.Prefix) bool { return n.Bits() < p.Bits() && n.Contains(p.Addr()) })
}

func overlaps(p netip.Prefix, with []netip.Prefix) bool {
	return slices.ContainsFunc(with, p.Overlaps)
}
