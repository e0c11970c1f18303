package main

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// parseIPTables reads the table filter of the output of iptables-save.
func parseIPTables(save string) (ruleset, bool) {
	r := ruleset{chains: map[string]*chain{}}
	hooks := map[string]string{"INPUT": "input", "FORWARD": "forward"}
	table := ""
	for line := range strings.Lines(save) {
		line = strings.TrimSpace(line)
		if name, ok := strings.CutPrefix(line, "*"); ok {
			table = name
		}
		if table != "filter" {
			continue
		}
		if head, ok := strings.CutPrefix(line, ":"); ok { // ":INPUT ACCEPT [0:0]"
			name, rest, _ := strings.Cut(head, " ")
			policy, _, _ := strings.Cut(rest, " ")
			r.chains[name] = &chain{hook: hooks[name], policy: strings.ToLower(policy)}
		} else if added, ok := strings.CutPrefix(line, "-A "); ok {
			name, options, _ := strings.Cut(added, " ")
			if c := r.chains[name]; c != nil {
				c.rules = append(c.rules, parseIPTablesRule(options))
			}
		}
	}
	return r, len(r.chains) > 0
}

// iptablesOption matches an option and its values, which may be quoted: "! -s 10.0.0.0/8", "--comment "two words"".
var iptablesOption = regexp.MustCompile(`(! )?(--?[a-z][\w-]*)((?: (?:"(?:\\.|[^"\\])*"|[^-" ]\S*))*)`)

// iptablesFields are the fields that options match; "": none.
var iptablesFields = map[string]string{
	"-p": "protocol", "--dport": "port", "--dports": "port", "-s": "source", "-d": "destination", "-i": "in", "-o": "out",
	"--ctstate": "state", "--state": "state", "--comment": "", "--reject-with": "",
	"-m udp": "", "-m tcp": "", "-m multiport": "", "-m conntrack": "", "-m state": "", "-m comment": "",
}

var iptablesVerdicts = map[string]string{"ACCEPT": "accept", "DROP": "drop", "REJECT": "drop", "RETURN": "return"}

// parseIPTablesRule reads a rule as iptables-save prints it behind the name of the chain.
func parseIPTablesRule(options string) rule {
	var r rule
	for _, m := range iptablesOption.FindAllStringSubmatch(options, -1) {
		option, value := m[1]+m[2], strings.TrimSpace(m[3])
		if option == "-j" || option == "-g" {
			if r.verdict = iptablesVerdicts[value]; r.verdict == "" {
				r.jump = value
			}
			continue
		}
		if option == "-m" {
			option += " " + value
		}
		if field, known := iptablesFields[option]; !known {
			r.conditions = append(r.conditions, condition{field: option})
		} else if field != "" {
			r.conditions = append(r.conditions, condition{field, strings.Split(value, ",")})
		}
	}
	return r
}

// parseNFT reads the output of `nft -j list ruleset` (libnftables-json(5)), except for the tables of iptables-nft:
// iptables-save shows more of them.
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
	chains := func(family, table string) map[string]*chain {
		for _, r := range all {
			if r.family == family && r.table == table {
				return r.chains
			}
		}
		all = append(all, ruleset{program: "nft", family: family, table: table, chains: map[string]*chain{}})
		return all[len(all)-1].chains
	}
	for _, o := range doc.Nftables {
		if c := o.Chain; c != nil {
			chains(c.Family, c.Table)[c.Name] = &chain{hook: c.Hook, policy: c.Policy}
		} else if o.Rule != nil {
			if c := chains(o.Rule.Family, o.Rule.Table)[o.Rule.Chain]; c != nil {
				c.rules = append(c.rules, parseNFTRule(o.Rule.Expr))
			}
		}
	}
	return slices.DeleteFunc(all, func(r ruleset) bool {
		iptables := r.table == "filter" && r.family != "inet" &&
			(r.chains["INPUT"] != nil || r.chains["FORWARD"] != nil || r.chains["OUTPUT"] != nil)
		return iptables || !slices.Contains([]string{"ip", "ip6", "inet"}, r.family)
	})
}

func parseNFTRule(statements []map[string]json.RawMessage) rule {
	var r rule
	for _, s := range statements {
		for kind, body := range s {
			switch kind {
			case "match":
				r.conditions = append(r.conditions, parseNFTMatch(body)...)
			case "accept", "drop", "return":
				r.verdict = kind
			case "reject":
				r.verdict = "drop"
			case "jump", "goto":
				var to struct{ Target string }
				_ = json.Unmarshal(body, &to) // on failure, the jump leads nowhere
				r.jump = to.Target
			case "vmap": // may accept, by a condition that is unknown here
				r.verdict = "accept"
				r.conditions = append(r.conditions, condition{field: kind})
			case "counter", "log":
			default:
				r.conditions = append(r.conditions, condition{field: kind})
			}
		}
	}
	return r
}

// nftFields are the fields that matches of nft compare.
var nftFields = map[string]string{
	"udp dport": "port", "tcp dport": "port",
	"ip protocol": "protocol", "ip6 nexthdr": "protocol", "meta l4proto": "protocol",
	"ip saddr": "source", "ip6 saddr": "source", "ip daddr": "destination", "ip6 daddr": "destination",
	"meta iifname": "in", "meta iif": "in", "meta oifname": "out", "meta oif": "out", "ct state": "state",
}

// parseNFTMatch returns the conditions of a match; a field of TCP also matches the protocol TCP.
func parseNFTMatch(body json.RawMessage) []condition {
	var m struct {
		Op   string
		Left struct {
			Payload  struct{ Protocol, Field string }
			Meta, Ct struct{ Key string }
		}
		Right any
	}
	if json.Unmarshal(body, &m) != nil {
		return []condition{{}}
	}
	var all []condition
	field := ""
	switch l := m.Left; {
	case l.Payload.Field != "":
		field = nftFields[l.Payload.Protocol+" "+l.Payload.Field]
		if protocols[l.Payload.Protocol] > "0" {
			all = append(all, condition{"protocol", []string{l.Payload.Protocol}})
		}
	case l.Meta.Key != "":
		field = nftFields["meta "+l.Meta.Key]
	case l.Ct.Key != "":
		field = nftFields["ct "+l.Ct.Key]
	}
	if m.Op != "==" && m.Op != "in" {
		field = ""
	}
	return append(all, condition{field, nftValues(m.Right)})
}

// nftValues returns the values of an expression: a single value, a list, a set, a range as LOW:HIGH, a prefix as
// ADDRESS/LENGTH.
func nftValues(expression any) []string {
	switch e := expression.(type) {
	case []any:
		var all []string
		for _, v := range e {
			all = append(all, nftValues(v)...)
		}
		return all
	case map[string]any:
		if set, ok := e["set"]; ok {
			return nftValues(set)
		}
		if p, ok := e["prefix"].(map[string]any); ok {
			return []string{fmt.Sprint(p["addr"], "/", p["len"])}
		}
		if r, ok := e["range"].([]any); ok && len(r) == 2 {
			return []string{fmt.Sprint(r[0], ":", r[1])}
		}
	}
	return []string{fmt.Sprint(expression)}
}
