package network

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/flanneld/flanneld/pkg/bridge"
	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/subnet"
)

// lostSubnets returns the subnets that the node had before and has no longer. Pods that hold addresses of these are cut
// off.
func lostSubnets(before, now subnet.Subnets) (lost []netip.Prefix) {
	for _, f := range family.All {
		if p := before.Of(f); p.IsValid() && p != now.Of(f) {
			lost = append(lost, p)
		}
	}
	return lost
}

// announceSubnets logs the subnets that the node leased, and what it means if it had other subnets before.
func (n *node) announceSubnets(before, now subnet.Subnets) {
	lost := lostSubnets(before, now)
	if len(lost) == 0 {
		n.log.Info("Subnet leased", "subnet", now)
		return
	}
	n.lost = lost
	const fix = "restart the pods that hold addresses of the old one; flannelctl doctor prints the commands"
	pods, known := podsOf(lost)
	details := []any{"subnet", now, "old", before}
	count := ""
	if known {
		details = append(details, "podsCutOff", pods)
		count = fmt.Sprintf(", which cuts off up to %d pods", pods)
	}
	n.log.Error(nil, "This node's subnet changed: "+fix, details...)
	n.recordEvent("subnet", "SubnetChanged",
		fmt.Sprintf("This node's subnet changed from %s to %s%s: %s", before, now, count, fix))
}

// checkLost ends the event of a changed subnet when no pod is left in the old one.
func (n *node) checkLost() {
	if len(n.lost) == 0 {
		return
	}
	if pods, _ := podsOf(n.lost); pods == 0 {
		n.lost = nil
		n.recordEvent("subnet", "", "")
	}
}

// podsOf returns how many containers the bridges have whose addresses are in one of the subnets. It is not known if
// there is no such bridge: other plugins than bridge attach pods without one.
func podsOf(subnets []netip.Prefix) (pods int, known bool) {
	bridges, err := bridge.All()
	if err != nil {
		return 0, false
	}
	for _, b := range bridges {
		inside := func(a netip.Prefix) bool {
			return slices.ContainsFunc(subnets, func(s netip.Prefix) bool { return s.Contains(a.Addr()) })
		}
		if slices.ContainsFunc(b.Addrs, inside) {
			pods, known = pods+b.Ports, true
		}
	}
	return pods, known
}
