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

// configure has a new configuration take effect, with the networks that are retired by it.
func (n *node) configure(ctx context.Context, cfg *subnet.Config) error {
	n.blocked = nil
	cfg = cfg.Retain(n.inUse(cfg.Removed(n.target.cfg.Networks())))
	err := n.refreshUplink(ctx, cfg)
	if n.target.cfg == cfg && n.leases != nil { // else it is refused, or releaseRetired will know the nodes
		n.noteRetired(cfg.Retired())
	}
	return err
}

// retainFromFile returns the configuration of a daemon that starts, with the networks that only the subnet file has.
func retainFromFile(cfg *subnet.Config, subnetFile string) *subnet.Config {
	env, err := subnet.ReadEnv(subnetFile)
	if err != nil {
		return cfg
	}
	return cfg.Retain(cfg.Removed(env.Networks))
}

// releaseRetired has the configuration in force follow when no node has a subnet of a retired network any more.
func (n *node) releaseRetired(ctx context.Context) error {
	before := n.target.cfg.Retired()
	if n.own == nil || n.leases == nil || len(before.Each()) == 0 {
		return nil
	}
	now := n.inUse(before)
	n.noteRetired(now)
	if now.Equal(before) {
		return nil
	}
	n.log.Info("No node has a subnet of a network that the configuration no longer has", "network", before, "remaining", now)
	return n.refreshUplink(ctx, n.target.cfg.Retain(now))
}

// inUse returns those of the networks that a lease, or ours, has a subnet of: all, as long as the leases are not known.
func (n *node) inUse(networks subnet.Networks) subnet.Networks {
	if n.leases == nil {
		return networks
	}
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

// noteRetired logs networks that are retired, once, and records the event of them, or that there are none.
func (n *node) noteRetired(networks subnet.Networks) {
	isNew := slices.ContainsFunc(networks.Each(), func(p netip.Prefix) bool { return !slices.Contains(n.retired.Each(), p) })
	if n.retired = networks; isNew {
		n.log.Error(nil, "The configuration no longer has a network that nodes have subnets of. They stay where they are",
			"network", networks, "nodes", n.nodesIn(networks), "fix", "put it back, or move these nodes to the other networks: "+
				"drain and reboot each; in Kubernetes, delete its Node before, so that it gets another podCIDR; "+
				"flannelctl leases shows which nodes")
	}
	text := ""
	if len(networks.Each()) > 0 {
		text = fmt.Sprintf("The configuration no longer has %s, in which nodes have subnets: put it back, or drain these nodes, "+
			"delete their Nodes, and reboot them, so that they get podCIDRs of the other networks", networks)
	}
	n.recordEvent("retired", "NetworkRetired", text)
}
