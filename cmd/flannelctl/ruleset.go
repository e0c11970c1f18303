package main

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/flanneld/flanneld/pkg/command"
	"github.com/flanneld/flanneld/pkg/plain"
)

// A ruleset is one table of a firewall, read to decide whether a packet would pass. Nothing is ever changed.
type ruleset struct {
	program string // "iptables", "ip6tables-legacy", "nft": the program that an operator would use
	family  string // "ip", "ip6", "inet"
	table   string // of nft; "" for the table filter of iptables
	chains  map[string]*chain
}

type chain struct {
	hook   string // "input", "forward"; "" for a chain that other chains jump to
	policy string // "drop" or "accept"
	rules  []rule
}

// A rule applies to a packet that meets all conditions.
type rule struct {
	conditions []condition
	verdict    string // "accept", "drop", "return"; "": none
	jump       string // or else the name of a chain
}

// A condition is met by a packet that has one of the values.
type condition struct {
	field  string // "protocol", "port", "source", …: see packet.has; any other field is unknown
	values []string
}

// A packet is the first packet of a connection, on its way through the firewall.
type packet struct {
	proto    string
	port     int // the destination's
	in, out  string
	src, dst netip.Addr
}

// passes reports whether the chains of a hook let the packet pass. If the result depends on a condition that
// is unknown here, the packet passes.
func (r ruleset) passes(hook string, p packet) bool {
	for _, c := range r.chains {
		if c.hook != hook {
			continue
		}
		if verdict := r.decide(c, p, 0); verdict == "drop" || verdict == "" && c.policy == "drop" {
			return false
		}
	}
	return true
}

// decide returns "accept" if the chain may accept the packet, "drop" if the chain is sure to drop the packet, and ""
// if the packet comes to the end of the chain.
func (r ruleset) decide(c *chain, p packet, depth int) string {
	if depth > 20 {
		return "accept"
	}
	returned := false // a rule may have ended the chain
	for _, rule := range c.rules {
		may, must := rule.matches(p)
		verdict := rule.verdict
		if to := r.chains[rule.jump]; may && to != nil {
			verdict = r.decide(to, p, depth+1)
		}
		switch {
		case may && verdict == "accept":
			return verdict
		case must && verdict == "return", must && verdict == "drop" && returned:
			return ""
		case must && verdict == "drop":
			return verdict
		case may && verdict == "return":
			returned = true
		}
	}
	return ""
}

// matches reports whether the packet may meet all conditions, and whether the packet is sure to.
func (r rule) matches(p packet) (may, must bool) {
	may, must = true, true
	for _, c := range r.conditions {
		has, unsure := false, len(c.values) == 0
		for _, v := range c.values {
			yes, known := p.has(c.field, v)
			has, unsure = has || known && yes, unsure || !known
		}
		may, must = may && (has || unsure), must && has
	}
	return may, must
}

// has reports whether a field of the packet has the value, and whether field and value are known at all.
func (p packet) has(field, value string) (yes, known bool) {
	if strings.HasPrefix(value, "@") { // a named set of nft
		return false, false
	}
	device := func(name string) bool {
		prefix := strings.TrimRight(value, "+*") // wildcards of iptables and nft
		return name == value || prefix != value && strings.HasPrefix(name, prefix)
	}
	switch field {
	case "protocol":
		n := protocolNumber(value)
		return n == "0" || n == protocolNumber(p.proto), true
	case "port":
		low, high, isRange := strings.Cut(value, ":")
		if !isRange {
			high = low
		}
		l, err1 := strconv.Atoi(low)
		h, err2 := strconv.Atoi(high)
		return l <= p.port && p.port <= h, err1 == nil && err2 == nil
	case "source", "destination":
		address := p.src
		if field == "destination" {
			address = p.dst
		}
		if single, err := netip.ParseAddr(value); err == nil {
			return single == address, true
		}
		prefix, err := netip.ParsePrefix(value)
		return prefix.Contains(address), err == nil
	case "in":
		return device(p.in), true
	case "out":
		return device(p.out), true
	case "state":
		return strings.EqualFold(value, "new"), true
	}
	return false, false
}

// protocols are the numbers of IP protocols, by the names that programs print (/etc/protocols).
var protocols = map[string]string{
	"all": "0", "ip": "0", "icmp": "1", "ipencap": "4", "ipv4": "4", "ipip": "4", "tcp": "6", "udp": "17",
	"esp": "50", "ah": "51", "icmpv6": "58", "ipv6-icmp": "58",
}

// protocolNumber returns the number of an IP protocol, or an unknown name as it is.
func protocolNumber(name string) string {
	if n, ok := protocols[name]; ok {
		return n
	}
	return name
}

// filters reports whether the ruleset filters packets of the address's family.
func (r ruleset) filters(a netip.Addr) bool {
	return r.family == "inet" || (r.family == "ip") == a.Is4()
}

func (r ruleset) String() string {
	if r.program == "nft" {
		return fmt.Sprintf("the table %s %s of nftables", r.family, r.table)
	}
	return r.program
}

// insertAccept returns the command that has a hook accept packets; which ones is given for iptables and for nft.
func (r ruleset) insertAccept(hook, iptables, nft string) string {
	if r.program != "nft" {
		return fmt.Sprintf("%s -I %s %s -j ACCEPT", r.program, strings.ToUpper(hook), iptables)
	}
	for _, name := range slices.Sorted(maps.Keys(r.chains)) {
		if r.chains[name].hook == hook {
			return fmt.Sprintf("nft insert rule %s %s %s %s accept", r.family, plain.Shell(r.table), plain.Shell(name), nft)
		}
	}
	return ""
}

// rulesetLimit is how long a program may take to print its rules. A user waits for all of the programs.
const rulesetLimit = 10 * time.Second

// rulesets reads the rules from all programs that are installed and work.
func rulesets(ctx context.Context) []ruleset {
	programs := &command.Runner{Limit: rulesetLimit}
	var all []ruleset
	for _, f := range []struct{ family, program string }{{"ip", "iptables"}, {"ip6", "ip6tables"}} {
		read := false
		for _, variant := range []string{"-nft", "-legacy", ""} {
			if variant == "" && read {
				break // the plain name is one of the two
			}
			out, err := programs.Run(ctx, command.Command{Path: f.program + variant + "-save"})
			if err != nil {
				continue
			}
			read = true
			if r, ok := parseIPTables(string(out.Stdout)); ok {
				r.program, r.family = f.program+variant, f.family
				all = append(all, r)
			}
		}
	}
	list := command.Command{Path: "nft", Args: []string{"-j", "list", "ruleset"}}
	if out, err := programs.Run(ctx, list); err == nil {
		all = append(all, parseNFT(out.Stdout)...)
	}
	return all
}
