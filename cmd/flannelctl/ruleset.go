package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net/netip"
	"os/exec"
	"slices"
	"strconv"
	"strings"
)

// A ruleset is what one program shows of the firewall, as far as it takes to
// tell whether a packet may pass. It is for reading alone.
type ruleset struct {
	program string // "iptables", "ip6tables-legacy", "nft": what an operator would use
	family  string // "ip", "ip6", "inet"
	table   string // of nft; "" for iptables' filter
	chains  map[string]*chain
}

type chain struct {
	hook   string // "input", "forward"; "" for one that is jumped to
	policy string // "drop" or "accept"
	rules  []rule
}

// A rule's fields are what it asks of a packet; empty ones ask for nothing.
type rule struct {
	protos   []string
	ports    []portRange // of the destination
	in, out  string      // devices
	states   []string    // of connections
	src, dst []netip.Prefix
	unsure   bool   // it asks for something else besides
	verdict  string // "accept", "drop", "return", "" none
	jump     string // or else a chain
}

type portRange struct{ low, high int }

// A packet is one that is on its way. What is not set may be anything.
type packet struct {
	proto    string
	port     int
	in, out  string
	src, dst netip.Addr
}

// passes tells whether the chains of a hook may let the packet pass. It is wrong
// about rules that it does not understand in one direction alone: it says yes.
func (r ruleset) passes(hook string, p packet) bool {
	for _, c := range r.chains {
		if c.hook != hook {
			continue
		}
		if accepted, stopped := r.walk(c, p, 0); stopped || !accepted && c.policy == "drop" {
			return false
		}
	}
	return true
}

// walk tells whether a chain may accept the packet, or surely does not let it go
// on.
func (r ruleset) walk(c *chain, p packet, depth int) (accepted, stopped bool) {
	if depth > 20 {
		return true, false
	}
	for _, rule := range c.rules {
		if !rule.may(p) {
			continue
		}
		switch {
		case rule.jump != "":
			if to := r.chains[rule.jump]; to != nil {
				if a, s := r.walk(to, p, depth+1); a || s && !rule.unsure {
					return a, s
				}
			}
		case rule.verdict == "accept":
			return true, false
		case rule.unsure:
		case rule.verdict == "drop":
			return false, true
		case rule.verdict == "return":
			return false, false
		}
	}
	return false, false
}

// may tells whether the rule may match the packet.
func (r rule) may(p packet) bool {
	within := func(prefixes []netip.Prefix, a netip.Addr) bool {
		return len(prefixes) == 0 || a.IsValid() && slices.ContainsFunc(prefixes, func(x netip.Prefix) bool { return x.Contains(a) })
	}
	device := func(name, at string) bool {
		prefix, open := strings.CutSuffix(name, "+")
		return name == "" || at == name || open && strings.HasPrefix(at, prefix)
	}
	proto := func(name string) bool { return protocol(name) == protocol(p.proto) || protocol(name) == "0" }
	return (len(r.protos) == 0 || slices.ContainsFunc(r.protos, proto)) &&
		(len(r.ports) == 0 || slices.ContainsFunc(r.ports, func(x portRange) bool { return x.low <= p.port && p.port <= x.high })) &&
		device(r.in, p.in) && device(r.out, p.out) &&
		(len(r.states) == 0 || slices.Contains(r.states, "new")) &&
		within(r.src, p.src) && within(r.dst, p.dst)
}

// protocol returns the number of an IP protocol, which programs show by the name
// that /etc/protocols has; one that is not known as it is.
func protocol(name string) string {
	switch name {
	case "all", "ip":
		return "0"
	case "icmp":
		return "1"
	case "ipencap", "ipv4", "ipip":
		return "4"
	case "tcp":
		return "6"
	case "udp":
		return "17"
	case "esp":
		return "50"
	}
	return name
}

// rulesets reads what all of the programs show that are there.
func rulesets(ctx context.Context) []ruleset {
	var all []ruleset
	for family, name := range map[string]string{"ip": "iptables", "ip6": "ip6tables"} {
		read := false
		for _, variant := range []string{"-nft", "-legacy", ""} {
			if variant == "" && read {
				break // the plain name is one of the two
			}
			out, err := exec.CommandContext(ctx, name+variant+"-save").Output()
			if err != nil {
				continue
			}
			read = true
			if r, ok := parseIPTables(string(out)); ok {
				r.program, r.family = name+variant, family
				all = append(all, r)
			}
		}
	}
	if out, err := exec.CommandContext(ctx, "nft", "-j", "list", "ruleset").Output(); err == nil {
		all = append(all, parseNFT(out)...)
	}
	return all
}

// parseIPTables reads the table filter of what iptables-save prints.
func parseIPTables(save string) (ruleset, bool) {
	r := ruleset{chains: map[string]*chain{}}
	filter := false
	for line := range strings.Lines(save) {
		line = strings.TrimSpace(line)
		if name, ok := strings.CutPrefix(line, "*"); ok {
			filter = name == "filter"
		}
		words := strings.Fields(line)
		switch {
		case !filter || len(words) < 2:
		case line[0] == ':':
			c := &chain{policy: strings.ToLower(words[1])}
			switch words[0] {
			case ":INPUT":
				c.hook = "input"
			case ":FORWARD":
				c.hook = "forward"
			}
			r.chains[words[0][1:]] = c
		case words[0] == "-A":
			if c := r.chains[words[1]]; c != nil {
				c.rules = append(c.rules, parseRule(words[2:]))
			}
		}
	}
	return r, len(r.chains) > 0
}

// parseRule reads a rule as iptables-save prints it, behind the chain's name.
func parseRule(words []string) rule {
	var r rule
	not := false
	for i := 0; i < len(words); i++ {
		value := ""
		if i+1 < len(words) {
			value = words[i+1]
		}
		if not && strings.HasPrefix(words[i], "-") {
			not, r.unsure = false, true
			i++
			continue
		}
		switch words[i] {
		case "!":
			not = true
			continue
		case "-p":
			r.protos = []string{value}
		case "-i":
			r.in = value
		case "-o":
			r.out = value
		case "-s", "-d":
			p, err := netip.ParsePrefix(value)
			if err != nil {
				r.unsure = true
			} else if words[i] == "-s" {
				r.src = append(r.src, p)
			} else {
				r.dst = append(r.dst, p)
			}
		case "--dport", "--dports":
			r.ports = ports(value)
		case "--ctstate", "--state":
			r.states = strings.Split(strings.ToLower(value), ",")
		case "-m":
			r.unsure = r.unsure || !slices.Contains([]string{"udp", "tcp", "multiport", "conntrack", "state", "comment"}, value)
		case "--comment":
			for quoted := strings.HasPrefix(value, `"`); quoted && i+1 < len(words) && !(strings.HasSuffix(words[i+1], `"`) && words[i+1] != `"`); {
				i++
			}
		case "-j", "-g":
			switch value {
			case "ACCEPT":
				r.verdict = "accept"
			case "DROP", "REJECT":
				r.verdict = "drop"
			case "RETURN":
				r.verdict = "return"
			default:
				r.jump = value
			}
		default:
			if strings.HasPrefix(words[i], "-") {
				r.unsure = r.unsure || words[i] != "--reject-with"
			} else {
				continue
			}
		}
		i++
	}
	return r
}

// ports reads 8472, 8000:9000 and lists of these.
func ports(text string) []portRange {
	var all []portRange
	for part := range strings.SplitSeq(text, ",") {
		low, high, isRange := strings.Cut(part, ":")
		if !isRange {
			high = low
		}
		l, err1 := strconv.Atoi(low)
		h, err2 := strconv.Atoi(high)
		if err1 == nil && err2 == nil {
			all = append(all, portRange{l, h})
		}
	}
	return all
}

// parseNFT reads what `nft -j list ruleset` prints, but for the tables of
// iptables-nft, which iptables-save shows better.
func parseNFT(text []byte) []ruleset {
	var doc struct {
		Nftables []struct {
			Chain *struct{ Family, Table, Name, Hook, Policy string }
			Rule  *struct {
				Family, Table, Chain string
				Expr                 []map[string]json.RawMessage
			}
		}
	}
	if json.Unmarshal(text, &doc) != nil {
		return nil
	}
	var all []ruleset
	of := func(family, table string) *ruleset {
		for i := range all {
			if all[i].family == family && all[i].table == table {
				return &all[i]
			}
		}
		all = append(all, ruleset{program: "nft", family: family, table: table, chains: map[string]*chain{}})
		return &all[len(all)-1]
	}
	for _, o := range doc.Nftables {
		switch {
		case o.Chain != nil:
			of(o.Chain.Family, o.Chain.Table).chains[o.Chain.Name] = &chain{hook: o.Chain.Hook, policy: o.Chain.Policy}
		case o.Rule != nil:
			if c := of(o.Rule.Family, o.Rule.Table).chains[o.Rule.Chain]; c != nil {
				c.rules = append(c.rules, parseExpr(o.Rule.Expr))
			}
		}
	}
	return slices.DeleteFunc(all, func(r ruleset) bool {
		iptables := r.table == "filter" && r.family != "inet" && (r.chains["INPUT"] != nil || r.chains["FORWARD"] != nil || r.chains["OUTPUT"] != nil)
		return iptables || r.family != "ip" && r.family != "ip6" && r.family != "inet"
	})
}

// parseExpr reads a rule (libnftables-json(5)).
func parseExpr(exprs []map[string]json.RawMessage) rule {
	var r rule
	for _, e := range exprs {
		for kind, body := range e {
			switch kind {
			case "match":
				r.match(body)
			case "accept", "drop", "return":
				r.verdict = kind
			case "reject":
				r.verdict = "drop"
			case "jump", "goto":
				var to struct{ Target string }
				_ = json.Unmarshal(body, &to) // none: to nowhere
				r.jump = to.Target
			case "counter", "log":
			default:
				r.unsure = true
			}
		}
	}
	return r
}

func (r *rule) match(body json.RawMessage) {
	var m struct {
		Op   string
		Left struct {
			Payload *struct{ Protocol, Field string }
			Meta    *struct{ Key string }
			Ct      *struct{ Key string }
		}
		Right json.RawMessage
	}
	if json.Unmarshal(body, &m) != nil || m.Op != "==" && m.Op != "in" {
		r.unsure = true
		return
	}
	values := flatten(m.Right)
	switch p := m.Left.Payload; {
	case p != nil && (p.Protocol == "tcp" || p.Protocol == "udp"):
		r.protos = []string{p.Protocol}
		if p.Field != "dport" {
			r.unsure = true
			return
		}
		for _, v := range values {
			r.ports = append(r.ports, ports(v)...)
		}
		if r.ports == nil {
			r.ports = []portRange{{-1, -1}} // the name of a service
		}
	case p != nil && (p.Protocol == "ip" && p.Field == "protocol" || p.Protocol == "ip6" && p.Field == "nexthdr"):
		r.protos = values
	case p != nil && (p.Field == "saddr" || p.Field == "daddr"):
		for _, v := range values {
			prefix, err := netip.ParsePrefix(v)
			if a, notPrefix := netip.ParseAddr(v); notPrefix == nil {
				prefix, err = netip.PrefixFrom(a, a.BitLen()), nil
			}
			switch {
			case err != nil:
				r.unsure = true
			case p.Field == "saddr":
				r.src = append(r.src, prefix)
			default:
				r.dst = append(r.dst, prefix)
			}
		}
	case m.Left.Ct != nil && m.Left.Ct.Key == "state":
		r.states = values
	case m.Left.Meta != nil && (m.Left.Meta.Key == "iifname" || m.Left.Meta.Key == "iif") && len(values) == 1:
		r.in = strings.Replace(values[0], "*", "+", 1)
	case m.Left.Meta != nil && (m.Left.Meta.Key == "oifname" || m.Left.Meta.Key == "oif") && len(values) == 1:
		r.out = values[0]
	case m.Left.Meta != nil && m.Left.Meta.Key == "l4proto":
		r.protos = values
	default:
		r.unsure = true
	}
}

// flatten returns the values of an expression: one, a list, a set, ranges as
// LOW:HIGH, prefixes as ADDRESS/LENGTH.
func flatten(body json.RawMessage) []string {
	var list []json.RawMessage
	var object struct {
		Set    json.RawMessage
		Range  []json.RawMessage
		Prefix *struct {
			Addr string
			Len  int
		}
	}
	switch {
	case json.Unmarshal(body, &list) == nil:
		var all []string
		for _, v := range list {
			all = append(all, flatten(v)...)
		}
		return all
	case json.Unmarshal(body, &object) == nil:
		switch {
		case object.Set != nil:
			return flatten(object.Set)
		case object.Prefix != nil:
			return []string{object.Prefix.Addr + "/" + strconv.Itoa(object.Prefix.Len)}
		case len(object.Range) == 2:
			return []string{string(object.Range[0]) + ":" + string(object.Range[1])}
		}
		return nil
	}
	return []string{string(bytes.Trim(body, `"`))}
}
