package main

import (
	"net/netip"
	"testing"
)

// TestPasses: rules decide as the kernel would, and where they ask for what is
// not understood, the packet may pass.
func TestPasses(t *testing.T) {
	vxlan := packet{proto: "udp", port: 8472, in: "eth0", src: netip.MustParseAddr("198.18.0.2"), dst: netip.MustParseAddr("198.18.0.1")}
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
		{drop + ":OURS - [0:0]\n-A INPUT -j OURS\n-A OURS -p udp -j ACCEPT", true},
		{drop + ":OURS - [0:0]\n-A INPUT -p tcp -j OURS\n-A OURS -j ACCEPT", false},
		{drop + ":OURS - [0:0]\n-A INPUT -j OURS\n-A OURS -j RETURN\n-A OURS -j ACCEPT", false},
		{accept + "-A INPUT -j REJECT --reject-with icmp-host-prohibited", false},
		{accept + "-A INPUT -p udp -j DROP", false},
		{accept + "-A INPUT -p tcp -j DROP", true},
		{accept + "-A INPUT -m conntrack --ctstate INVALID -j DROP", true},
		{accept + "-A INPUT -m limit --limit 5/min -j DROP", true},
		{accept + "-A INPUT -p udp -m udp --dport 8472 -j ACCEPT\n-A INPUT -j DROP", true},
		{accept + "-A INPUT -s 198.18.0.7/32 -j DROP", true},
	} {
		r, ok := parseIPTables("# Generated\n*filter\n" + c.rules + "\nCOMMIT\n*nat\n:INPUT DROP [0:0]\nCOMMIT\n")
		if !ok || r.passes("input", vxlan) != c.want {
			t.Errorf("it passes should be %v with\n%s", c.want, c.rules)
		}
	}
}

// TestPassesProtocols: what is not UDP is told apart by name, number, and what
// /etc/protocols calls it.
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
		for _, left := range []string{`{"payload": {"protocol": "ip", "field": "protocol"}}`, `{"meta": {"key": "l4proto"}}`} {
			all := parseNFT([]byte(`{"nftables": [{"chain": {"family": "inet", "table": "fw", "name": "in", "hook": "input", "policy": "drop"}},
				{"rule": {"family": "inet", "table": "fw", "chain": "in", "expr": [{"match": {"op": "==", "left": ` + left + `, "right": ` + right + `}}, {"accept": null}]}}]}`))
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
