// Package firewall keeps the node's masquerading and forwarding rules. Desired
// rules are data; a Driver sets them in one of two modes, iptables or nftables;
// a Reconciler keeps them in place. It is the only code that writes firewall
// rules. Ours are a pair of iptables chains and the jumps to them, or a table
// of nftables a family, for each network on this host; nothing else is ever touched.
package firewall

import (
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/family"
)

// A Verdict is what becomes of a packet that a rule matches.
type Verdict string

// The verdicts. The masquerading ones give the packet the address of the
// interface that it leaves by.
const (
	Return           Verdict = "return"            // our other rules are skipped
	Accept           Verdict = "accept"            // may be forwarded
	Masquerade       Verdict = "masquerade"        // keeps its source port if that is free
	MasqueradeRandom Verdict = "masquerade random" // takes a port fully at random: no races for the same one
)

// A Match is a set of addresses: those of Prefix or, with Not, all others.
// The zero Match is every address.
type Match struct {
	Prefix netip.Prefix
	Not    bool
}

// A Rule is one line of a list of rules, in no program's language. It matches
// a packet when all of Mark, Src and Dst do.
type Rule struct {
	Mark     uint32 // bits that the packet's mark must carry; 0: any mark
	Src, Dst Match
	Verdict  Verdict
	Why      string // the comment in nftables; plain words, no quotes
}

// A Ruleset is what one address family holds. The zero Ruleset is nothing at
// all: no rule of ours, no chain, no table.
type Ruleset struct {
	Postrouting []Rule // for packets that are about to leave the node; may masquerade
	Forward     []Rule // for packets on their way through the node
}

// IsZero returns whether there is no rule.
func (r Ruleset) IsZero() bool { return len(r.Postrouting) == 0 && len(r.Forward) == 0 }

// Equal returns whether both hold the same rules in the same order.
func (r Ruleset) Equal(o Ruleset) bool {
	return slices.Equal(r.Postrouting, o.Postrouting) && slices.Equal(r.Forward, o.Forward)
}

// Desired is the rules that the node must hold. Of a family whose Ruleset is
// zero, all our rules are removed.
type Desired = family.Pair[Ruleset]

// Options choose among the rules of an overlay network.
type Options struct {
	Masquerade  bool           // masquerade traffic that leaves the overlay, or enters it from this node
	Except      []netip.Prefix // destinations, of any family, that see pods' own addresses all the same
	RandomFully bool           // with ports fully at random, where the node can do so
	Forward     bool           // accept forwarding to and from the overlay
}

// kubeMark is the bit of a packet's mark by which kube-proxy claims it for its
// own masquerading: the default of kube-proxy's --iptables-masquerade-bit, 14.
const kubeMark = 1 << 14

// For returns the rules of one family: networks are the overlay, podCIDR the
// part of it that is this node's. Without networks, the family is off: there
// are no rules.
//
// Pods see each other's own addresses, and a pod here sees the addresses of its
// clients outside (a client whose packets came in through another node would
// otherwise get answers from an address it never sent to). All other traffic
// that crosses the overlay's border takes the node's address: without it, no
// answer finds its way back.
func For(networks []netip.Prefix, podCIDR netip.Prefix, o Options) Ruleset {
	var rules Ruleset
	if len(networks) == 0 {
		return rules
	}
	f := family.Of(networks[0].Addr())
	// Packets from the other networks of the overlay have met a rule of their own before they meet one for outside.
	outside := Match{Prefix: networks[0].Masked(), Not: true}
	pods := Match{Prefix: podCIDR.Masked()}
	unicast := Match{Prefix: protocols.Of(f).multicast, Not: true}
	verdict := Masquerade
	if o.RandomFully {
		verdict = MasqueradeRandom
	}
	// each adds a rule for each network of the overlay.
	each := func(to *[]Rule, rule func(overlay Match) Rule) {
		for _, n := range networks {
			*to = append(*to, rule(Match{Prefix: n.Masked()}))
		}
	}
	if o.Masquerade {
		to := &rules.Postrouting
		*to = []Rule{{Mark: kubeMark, Verdict: Return, Why: "kube-proxy masquerades these itself"}}
		each(to, func(overlay Match) Rule {
			return Rule{Src: pods, Dst: overlay, Verdict: Return, Why: "pods of this node to the overlay"}
		})
		each(to, func(overlay Match) Rule {
			return Rule{Src: overlay, Dst: pods, Verdict: Return, Why: "overlay to pods of this node"}
		})
		*to = append(*to, Rule{Src: outside, Dst: pods, Verdict: Return, Why: "outside to pods of this node"})
		for _, p := range o.Except {
			if f == family.Of(p.Addr()) {
				each(to, func(overlay Match) Rule {
					return Rule{Src: overlay, Dst: Match{Prefix: p.Masked()}, Verdict: Return, Why: "overlay to where pods' addresses are known"}
				})
			}
		}
		each(to, func(overlay Match) Rule {
			return Rule{Src: overlay, Dst: unicast, Verdict: verdict, Why: "overlay to outside"}
		})
		each(to, func(overlay Match) Rule {
			return Rule{Src: outside, Dst: overlay, Verdict: verdict, Why: "this node, or outside through it, to the overlay"}
		})
	}
	if o.Forward {
		each(&rules.Forward, func(overlay Match) Rule { return Rule{Src: overlay, Verdict: Accept, Why: "from the overlay"} })
		each(&rules.Forward, func(overlay Match) Rule { return Rule{Dst: overlay, Verdict: Accept, Why: "to the overlay"} })
	}
	return rules
}

// A protocol is an address family, and what programs call things in it.
type protocol struct {
	family    family.Family
	iptables  string // how the iptables programs' names begin
	nft       string // nft's word for it, in tables and in rules
	nfproto   uint8  // the kernel's number for it
	table     string // our own table in nftables
	multicast netip.Prefix
}

var protocols = family.Pair[protocol]{
	IPv4: protocol{family.IPv4, "iptables", "ip", unix.NFPROTO_IPV4, "flannel-ipv4", netip.MustParsePrefix("224.0.0.0/4")},
	IPv6: protocol{family.IPv6, "ip6tables", "ip6", unix.NFPROTO_IPV6, "flannel-ipv6", netip.MustParsePrefix("ff00::/8")},
}
