package network

import (
	"fmt"

	"github.com/flanneld/flanneld/pkg/firewall"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/subnet"
)

// recordEvent records a problem that a person should act on, where the store has a
// place for events. An empty message ends the problem.
func (n *node) recordEvent(subject, reason, message string) {
	if r, ok := n.Manager.(subnet.EventRecorder); ok {
		r.RecordEvent(subject, reason, message)
	}
}

// setRulesState takes a new state of the firewall rules.
func (n *node) setRulesState(s firewall.State) {
	n.rulesSet = s.InPlace
	if s.Err != nil {
		n.metrics.failed("Rules")
	}
	if s.Fight == n.fight {
		return
	}
	n.fight = s.Fight
	message := ""
	if n.fight != "" {
		message = fmt.Sprintf("Another program changes flannel's rules in %s again and again. "+
			"`nft monitor` shows each change. The program is usually another firewall manager on the host: "+
			"configure it to leave flannel's chains alone", n.fight)
	}
	n.recordEvent("rules", "FirewallFight", message)
}

// recordRival records that another lease claims what is this node's own.
func (n *node) recordRival() {
	if n.own == nil || n.claims == nil {
		return
	}
	var first *claimant // always the same one of several
	var what claim
	for rival, common := range n.claims.rivals(n.claims.leases.Get(n.own.Subnets), all) {
		if first == nil || rival.olderThan(first) {
			first, what = rival, common
		}
	}
	message := ""
	if first != nil {
		message = fmt.Sprintf("The node at %v, with the lease of %s, claims this node's %s, and is left out here. "+
			"If it is the older one, the other nodes leave this node out. Find out which node published the copy, "+
			"and delete its lease", firstAddress(first.Attrs), first.Subnets, n.claims.describe(n.backend, *n.own, what))
	}
	if message != n.rival {
		n.rival = message
		n.recordEvent("identity", "DuplicateIdentity", message)
	}
}

// recordKernelFight records the object that another program undoes; nil: none.
func (n *node) recordKernelFight(object kernel.Object) {
	message := ""
	if object != nil {
		message = fmt.Sprintf("Another program undoes flanneld's changes again and again: %s. "+
			"`ip monitor all` shows each change. The program is usually another network manager on the host: "+
			"configure it to leave this object alone", object)
	}
	n.recordEvent("kernel", "KernelFight", message)
}
