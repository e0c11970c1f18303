package main

import (
	"fmt"
	"net/netip"
	"testing"
)

// vxlan is the first packet of a peer.
var vxlan = packet{
	proto: "udp", port: 8472, in: "eth0", src: netip.MustParseAddr("198.18.0.2"), dst: netip.MustParseAddr("198.18.0.1"),
}

// TestPasses: rules decide as the kernel would. Where a condition is unknown, the packet passes.
func TestPasses(t *testing.T) {
	const accept, drop = ":INPUT ACCEPT [0:0]\n", ":INPUT DROP [0:0]\n"
	for _, c := range []struct {
		rules string
		want  bool
	}{
		{accept, true},
		{drop, false},
		{drop + "-A INPUT -j ACCEPT", true},
		{drop + "-A INPUT -i lo -j ACCEPT", false},
		{drop + "-A INPUT -i eth+ -j ACCEPT", true},
		{drop + "-A INPUT -p tcp -m tcp --dport 8472 -j ACCEPT", false},
		{drop + "-A INPUT -p udp -m udp --dport 8472 -j ACCEPT", true},
		{drop + "-A INPUT -p udp -m udp --dport 8000:9000 -j ACCEPT", true},
		{drop + "-A INPUT -p udp -m multiport --dports 53,8285 -j ACCEPT", false},
		{drop + "-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", false},
		{drop + "-A INPUT -m conntrack --ctstate NEW -j ACCEPT", true},
		{drop + "-A INPUT -s 198.18.0.0/24 -j ACCEPT", true},
		{drop + "-A INPUT -s 198.18.9.0/24 -j ACCEPT", false},
		{drop + "-A INPUT ! -s 198.18.9.0/24 -j ACCEPT", true},
		{drop + "-A INPUT -m set --match-set peers src -j ACCEPT", true},
		{drop + `-A INPUT -m comment --comment "to -j DROP or not" -j ACCEPT`, true},
		{drop + `-A INPUT -m comment --comment "a \" -p tcp" -j ACCEPT`, true},
		{drop + `-A INPUT -p tcp -m comment --comment ssh -j ACCEPT`, false},
		{drop + "-A INPUT -m set ! --match-set peers src -j ACCEPT", true},
		{drop + "-A INPUT -p udp -m udp --sport 8472 -j ACCEPT", true},
		{drop + "-A INPUT -j LOG --log-prefix \"dropped: \"", false},
		{drop + ":OURS - [0:0]\n-A INPUT -j OURS\n-A OURS -p udp -j ACCEPT", true},
		{drop + ":OURS - [0:0]\n-A INPUT -p tcp -j OURS\n-A OURS -j ACCEPT", false},
		{drop + ":OURS - [0:0]\n-A INPUT -j OURS\n-A OURS -j RETURN\n-A OURS -j ACCEPT", false},
		// As ufw has it.
		{drop + ":OURS - [0:0]\n-A INPUT -j OURS\n-A INPUT -p udp -j ACCEPT\n" +
			"-A OURS -m addrtype --dst-type LOCAL -j RETURN\n-A OURS -j DROP", true},
		{drop + ":OURS - [0:0]\n-A INPUT -j OURS\n-A OURS -m addrtype --dst-type LOCAL -j RETURN\n-A OURS -j DROP", false},
		{accept + ":OURS - [0:0]\n-A INPUT -j OURS\n-A OURS -p tcp -j RETURN\n-A OURS -j DROP", false},
		{accept + "-A INPUT -j REJECT --reject-with icmp-host-prohibited", false},
		{accept + "-A INPUT -p udp -j DROP", false},
		{accept + "-A INPUT -p udp -m udp --dport 8472 -j DROP", false},
		{accept + "-A INPUT -p tcp -j DROP", true},
		{accept + "-A INPUT -m conntrack --ctstate INVALID -j DROP", true},
		{accept + "-A INPUT -m limit --limit 5/min -j DROP", true},
		{accept + "-A INPUT -p udp -m udp --dport 8472 -j ACCEPT\n-A INPUT -j DROP", true},
		{accept + "-A INPUT -s 198.18.0.7/32 -j DROP", true},
		{accept + "-A INPUT -s 198.18.0.2/32 -d 198.18.0.1/32 -j DROP", false},
		{accept + ":OURS - [0:0]\n-A INPUT -m limit --limit 5/min -j OURS\n-A OURS -j DROP", true},
		{accept + ":OURS - [0:0]\n-A INPUT -p udp -g OURS\n-A OURS -j DROP", false},
	} {
		r, ok := parseIPTables("# Generated\n*filter\n" + c.rules + "\nCOMMIT\n*nat\n:INPUT DROP [0:0]\nCOMMIT\n")
		if !ok || r.passes("input", vxlan) != c.want {
			t.Errorf("it passes should be %v with\n%s", c.want, c.rules)
		}
	}
}

// TestPassesNFT: the same, with rules as nft prints them.
func TestPassesNFT(t *testing.T) {
	match := func(op, left, right, verdict string) string {
		return fmt.Sprintf(`{"match": {"op": %q, "left": %s, "right": %s}}, %s`, op, left, right, verdict)
	}
	const (
		port, state   = `{"payload": {"protocol": "udp", "field": "dport"}}`, `{"ct": {"key": "state"}}`
		source        = `{"payload": {"protocol": "ip", "field": "saddr"}}`
		in, icmp      = `{"meta": {"key": "iifname"}}`, `{"payload": {"protocol": "icmp", "field": "type"}}`
		accept, drops = `{"accept": null}`, `{"drop": null}`
	)
	for _, c := range []struct {
		policy, rule string
		want         bool
	}{
		{"drop", accept, true},
		{"accept", `{"counter": {"packets": 0, "bytes": 0}}, {"reject": null}`, false},
		{"drop", match("==", port, `8472`, accept), true},
		{"drop", match("==", port, `{"set": [53, {"range": [8000, 9000]}]}`, accept), true},
		{"drop", match("==", port, `{"set": [53, {"range": [8000, 8471]}]}`, accept), false},
		{"drop", match("==", port, `"@ports"`, accept), true},
		{"accept", match("==", port, `"@ports"`, drops), true},
		{"accept", match("!=", port, `8472`, drops), true},
		{"drop", match("in", state, `["established", "related"]`, accept), false},
		{"drop", match("in", state, `["established", "new"]`, accept), true},
		{"drop", match("==", source, `{"prefix": {"addr": "198.18.0.0", "len": 24}}`, accept), true},
		{"drop", match("==", source, `{"prefix": {"addr": "198.18.9.0", "len": 24}}`, accept), false},
		{"drop", match("==", source, `"198.18.0.2"`, accept), true},
		{"accept", match("==", source, `"198.18.0.2"`, drops), false},
		{"drop", match("==", in, `{"set": ["lo", "eth*"]}`, accept), true},
		{"drop", match("==", in, `"lo"`, accept), false},
		{"drop", match("==", in, `"@devices"`, accept), true},
		{"drop", match("==", icmp, `"echo-request"`, accept), false},
		{"drop", match("==", port, `8472`, `{"jump": {"target": "ours"}}`), true},
		{"drop", match("==", port, `53`, `{"jump": {"target": "ours"}}`), false},
		{"accept", `{"limit": {"rate": 5, "per": "minute"}}, {"drop": null}`, true},
		{"drop", `{"vmap": {"key": ` + state + `, "data": {"set": [["new", {"accept": null}]]}}}`, true},
	} {
		all := parseNFT([]byte(`{"nftables": [
			{"chain": {"family": "inet", "table": "fw", "name": "in", "hook": "input", "policy": "` + c.policy + `"}},
			{"chain": {"family": "inet", "table": "fw", "name": "ours"}},
			{"rule": {"family": "inet", "table": "fw", "chain": "ours", "expr": [{"accept": null}]}},
			{"rule": {"family": "inet", "table": "fw", "chain": "in", "expr": [` + c.rule + `]}}]}`))
		if len(all) != 1 || all[0].passes("input", vxlan) != c.want {
			t.Errorf("it passes should be %v with policy %s and\n%s", c.want, c.policy, c.rule)
		}
	}
}

// TestPassesProtocols: protocols other than UDP have a name, a number, and another name in /etc/protocols.
func TestPassesProtocols(t *testing.T) {
	at := packet{in: "eth0", src: netip.MustParseAddr("198.18.0.2"), dst: netip.MustParseAddr("198.18.0.1")}
	for _, c := range []struct {
		proto, rules string
		want         bool
	}{
		{"4", "-p ipencap", true},
		{"4", "-p 4", true},
		{"4", "-p ipv6", false},
		{"4", "-p udp -m udp --dport 8472", false},
		{"4", "-p all", true},
		{"esp", "-p esp", true},
		{"esp", "-p 50", true},
		{"esp", "-p esp -m esp --espspi 1:100", true},
		{"esp", "-p ah", false},
		{"udp", "-p 17", true},
	} {
		p := at
		p.proto = c.proto
		r, ok := parseIPTables("*filter\n:INPUT DROP [0:0]\n-A INPUT " + c.rules + " -j ACCEPT\nCOMMIT\n")
		if !ok || r.passes("input", p) != c.want {
			t.Errorf("IP protocol %s passes should be %v with %s", c.proto, c.want, c.rules)
		}
	}
	for _, right := range []string{`"ipencap"`, `4`, `{"set": ["tcp", 4]}`} {
		for _, left := range []string{`{"payload": {"protocol": "ip", "field": "protocol"}}`,
			`{"meta": {"key": "l4proto"}}`} {
			all := parseNFT([]byte(`{"nftables": [
				{"chain": {"family": "inet", "table": "fw", "name": "in", "hook": "input", "policy": "drop"}},
				{"rule": {"family": "inet", "table": "fw", "chain": "in", "expr": [
					{"match": {"op": "==", "left": ` + left + `, "right": ` + right + `}}, {"accept": null}]}}]}`))
			p := at
			p.proto = "4"
			if len(all) != 1 || !all[0].passes("input", p) {
				t.Errorf("%s %s does not let IP protocol 4 pass", left, right)
			}
			if p.proto = "esp"; len(all) != 1 || all[0].passes("input", p) {
				t.Errorf("%s %s lets ESP pass", left, right)
			}
		}
	}
}
