package network

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"github.com/flanneld/flanneld/subnet"
)

// A configuration may no longer have one of several networks. Nodes that have a subnet of it stay where they are, and
// stay peers, as long as they have it: the network is retired. Only a daemon that knows the earlier configuration knows
// that: it ran before, or its subnet file has the network. Where a family has none of its networks any more, the networks
// were replaced: each node takes a subnet of the new ones.

// retain returns a new configuration with the networks that are retired by it.
func (n *node) retain(cfg *subnet.Config) *subnet.Config {
	retired := n.inUse(retired(n.target.cfg.Networks(), cfg.Networks()))
	if len(retired.Each()) > 0 {
		n.log.Error(nil, "The configuration no longer has a network that nodes have subnets of. They stay where they are",
			"network", retired, "nodes", n.nodesIn(retired),
			"fix", "put it back, or reboot these nodes, which then take subnets of the other networks; "+
				"flannelctl leases shows which nodes")
	}
	n.recordRetired(retired)
	return cfg.Retain(retired)
}

// retainFromFile returns the configuration of a daemon that starts, with the networks that only the subnet file has.
func retainFromFile(cfg *subnet.Config, subnetFile string) *subnet.Config {
	env, err := subnet.ReadEnv(subnetFile)
	if err != nil {
		return cfg
	}
	return cfg.Retain(retired(env.Networks, cfg.Networks()))
}

// releaseRetired has the configuration in force follow when no node has a subnet of a retired network any more.
func (n *node) releaseRetired(ctx context.Context) error {
	before := n.target.cfg.Retired()
	if n.own == nil || n.leases == nil || len(before.Each()) == 0 {
		return nil
	}
	now := n.inUse(before)
	n.recordRetired(now)
	if now.Equal(before) {
		return nil
	}
	n.log.Info("No node has a subnet of a network that the configuration no longer has", "network", before, "remaining", now)
	return n.refreshUplink(ctx, n.target.cfg.Retain(now))
}

// retired returns the networks of before that are not in now, of families that have kept another one.
func retired(before, now subnet.Networks) subnet.Networks {
	var all []netip.Prefix
	for _, f := range [][2][]netip.Prefix{{before.IPv4, now.IPv4}, {before.IPv6, now.IPv6}} {
		stays := func(p netip.Prefix) bool { return slices.Contains(f[1], p) }
		if slices.ContainsFunc(f[0], stays) {
			all = append(all, slices.DeleteFunc(slices.Clone(f[0]), stays)...)
		}
	}
	return subnet.NetworksOf(all...)
}

// inUse returns those of the networks that a lease, or ours, has a subnet of.
func (n *node) inUse(networks subnet.Networks) subnet.Networks {
	var all []netip.Prefix
	for _, p := range networks.Each() {
		if n.nodesIn(subnet.NetworksOf(p)) > 0 {
			all = append(all, p)
		}
	}
	return subnet.NetworksOf(all...)
}

// nodesIn returns how many nodes have a subnet of one of the networks.
func (n *node) nodesIn(networks subnet.Networks) (count int) {
	inside := func(s subnet.Subnets) bool {
		return slices.ContainsFunc(s.Each(), func(p netip.Prefix) bool { return networks.Network(p).IsValid() })
	}
	for s := range n.leases {
		if (n.own == nil || s != n.own.Subnets) && inside(s) {
			count++
		}
	}
	if n.own != nil && inside(n.own.Subnets) {
		count++
	}
	return count
}

// recordRetired records the event of networks that are retired, or that there are none.
func (n *node) recordRetired(networks subnet.Networks) {
	text := ""
	if len(networks.Each()) > 0 {
		text = fmt.Sprintf("The configuration no longer has %s, in which nodes have subnets: put it back, or reboot these nodes",
			networks)
	}
	n.recordEvent("retired", "NetworkRetired", text)
}
