package firewall

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/flanneld/flanneld/pkg/command"
	"github.com/flanneld/flanneld/pkg/nstest"
)

var (
	prefix = netip.MustParsePrefix

	networks4, pods4 = prefixes("10.5.0.0/16"), prefix("10.5.34.0/24")
	networks6, pods6 = prefixes("fc00::/48"), prefix("fc00:0:0:22::/64")

	all = Options{Masquerade: true, RandomFully: true, Forward: true}
)

// The rules, in each program's own words. They are the contract with the nodes
// that run upstream's daemon, and with the people who read them on a node.
func TestRendering(t *testing.T) {
	tests := []struct {
		name          string
		networks      []netip.Prefix
		pods          netip.Prefix
		options       Options
		iptables, nft string
	}{
		{"IPv4", networks4, pods4, all, `
*nat
:FLANNEL-POSTRTG - [0:0]
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.34.0/24 -d 10.5.0.0/16 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 -d 10.5.34.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.34.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
COMMIT
*filter
:FLANNEL-FWD - [0:0]
-A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
COMMIT
`, `
add table ip flannel-ipv4
delete table ip flannel-ipv4
add table ip flannel-ipv4 { comment "flanneld's: replaced as a whole when changed" ; }
add chain ip flannel-ipv4 postrouting { type nat hook postrouting priority 100 ; policy accept ; comment "masquerade traffic that crosses the border of the overlay" ; }
add rule ip flannel-ipv4 postrouting meta mark & 0x4000 == 0x4000 counter return comment "kube-proxy masquerades these itself"
add rule ip flannel-ipv4 postrouting ip saddr 10.5.34.0/24 ip daddr 10.5.0.0/16 counter return comment "pods of this node to the overlay"
add rule ip flannel-ipv4 postrouting ip saddr 10.5.0.0/16 ip daddr 10.5.34.0/24 counter return comment "overlay to pods of this node"
add rule ip flannel-ipv4 postrouting ip saddr != 10.5.0.0/16 ip daddr 10.5.34.0/24 counter return comment "outside to pods of this node"
add rule ip flannel-ipv4 postrouting ip saddr 10.5.0.0/16 ip daddr != 224.0.0.0/4 counter masquerade fully-random comment "overlay to outside"
add rule ip flannel-ipv4 postrouting ip saddr != 10.5.0.0/16 ip daddr 10.5.0.0/16 counter masquerade fully-random comment "this node, or outside through it, to the overlay"
add chain ip flannel-ipv4 forward { type filter hook forward priority 0 ; policy accept ; comment "forward the overlay's traffic; cannot overrule a drop in another table" ; }
add rule ip flannel-ipv4 forward ip saddr 10.5.0.0/16 counter accept comment "from the overlay"
add rule ip flannel-ipv4 forward ip daddr 10.5.0.0/16 counter accept comment "to the overlay"
`},
		{"IPv6", networks6, pods6, all, `
*nat
:FLANNEL-POSTRTG - [0:0]
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s fc00:0:0:22::/64 -d fc00::/48 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s fc00::/48 -d fc00:0:0:22::/64 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG ! -s fc00::/48 -d fc00:0:0:22::/64 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s fc00::/48 ! -d ff00::/8 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s fc00::/48 -d fc00::/48 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
COMMIT
*filter
:FLANNEL-FWD - [0:0]
-A FLANNEL-FWD -s fc00::/48 -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d fc00::/48 -m comment --comment "flanneld forward" -j ACCEPT
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
COMMIT
`, `
add table ip6 flannel-ipv6
delete table ip6 flannel-ipv6
add table ip6 flannel-ipv6 { comment "flanneld's: replaced as a whole when changed" ; }
add chain ip6 flannel-ipv6 postrouting { type nat hook postrouting priority 100 ; policy accept ; comment "masquerade traffic that crosses the border of the overlay" ; }
add rule ip6 flannel-ipv6 postrouting meta mark & 0x4000 == 0x4000 counter return comment "kube-proxy masquerades these itself"
add rule ip6 flannel-ipv6 postrouting ip6 saddr fc00:0:0:22::/64 ip6 daddr fc00::/48 counter return comment "pods of this node to the overlay"
add rule ip6 flannel-ipv6 postrouting ip6 saddr fc00::/48 ip6 daddr fc00:0:0:22::/64 counter return comment "overlay to pods of this node"
add rule ip6 flannel-ipv6 postrouting ip6 saddr != fc00::/48 ip6 daddr fc00:0:0:22::/64 counter return comment "outside to pods of this node"
add rule ip6 flannel-ipv6 postrouting ip6 saddr fc00::/48 ip6 daddr != ff00::/8 counter masquerade fully-random comment "overlay to outside"
add rule ip6 flannel-ipv6 postrouting ip6 saddr != fc00::/48 ip6 daddr fc00::/48 counter masquerade fully-random comment "this node, or outside through it, to the overlay"
add chain ip6 flannel-ipv6 forward { type filter hook forward priority 0 ; policy accept ; comment "forward the overlay's traffic; cannot overrule a drop in another table" ; }
add rule ip6 flannel-ipv6 forward ip6 saddr fc00::/48 counter accept comment "from the overlay"
add rule ip6 flannel-ipv6 forward ip6 daddr fc00::/48 counter accept comment "to the overlay"
`},
		{"masquerading alone, ports not at random", networks4, pods4, Options{Masquerade: true}, `
*nat
:FLANNEL-POSTRTG - [0:0]
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.34.0/24 -d 10.5.0.0/16 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 -d 10.5.34.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.34.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
COMMIT
`, `
add table ip flannel-ipv4
delete table ip flannel-ipv4
add table ip flannel-ipv4 { comment "flanneld's: replaced as a whole when changed" ; }
add chain ip flannel-ipv4 postrouting { type nat hook postrouting priority 100 ; policy accept ; comment "masquerade traffic that crosses the border of the overlay" ; }
add rule ip flannel-ipv4 postrouting meta mark & 0x4000 == 0x4000 counter return comment "kube-proxy masquerades these itself"
add rule ip flannel-ipv4 postrouting ip saddr 10.5.34.0/24 ip daddr 10.5.0.0/16 counter return comment "pods of this node to the overlay"
add rule ip flannel-ipv4 postrouting ip saddr 10.5.0.0/16 ip daddr 10.5.34.0/24 counter return comment "overlay to pods of this node"
add rule ip flannel-ipv4 postrouting ip saddr != 10.5.0.0/16 ip daddr 10.5.34.0/24 counter return comment "outside to pods of this node"
add rule ip flannel-ipv4 postrouting ip saddr 10.5.0.0/16 ip daddr != 224.0.0.0/4 counter masquerade comment "overlay to outside"
add rule ip flannel-ipv4 postrouting ip saddr != 10.5.0.0/16 ip daddr 10.5.0.0/16 counter masquerade comment "this node, or outside through it, to the overlay"
`},
		{"forwarding alone", networks4, pods4, Options{Forward: true, RandomFully: true}, `
*filter
:FLANNEL-FWD - [0:0]
-A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
COMMIT
`, `
add table ip flannel-ipv4
delete table ip flannel-ipv4
add table ip flannel-ipv4 { comment "flanneld's: replaced as a whole when changed" ; }
add chain ip flannel-ipv4 forward { type filter hook forward priority 0 ; policy accept ; comment "forward the overlay's traffic; cannot overrule a drop in another table" ; }
add rule ip flannel-ipv4 forward ip saddr 10.5.0.0/16 counter accept comment "from the overlay"
add rule ip flannel-ipv4 forward ip daddr 10.5.0.0/16 counter accept comment "to the overlay"
`},
		{"two networks, and destinations that see pods", prefixes("10.5.0.0/16", "10.7.0.0/20"), prefix("10.7.3.0/24"),
			Options{Masquerade: true, Forward: true, Except: prefixes("172.16.0.0/12", "fd00::/8")}, `
*nat
:FLANNEL-POSTRTG - [0:0]
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.7.3.0/24 -d 10.5.0.0/16 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.7.3.0/24 -d 10.7.0.0/20 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 -d 10.7.3.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.7.0.0/20 -d 10.7.3.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.7.3.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 -d 172.16.0.0/12 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.7.0.0/20 -d 172.16.0.0/12 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.5.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE
-A FLANNEL-POSTRTG -s 10.7.0.0/20 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE
-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.7.0.0/20 -m comment --comment "flanneld masq" -j MASQUERADE
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
COMMIT
*filter
:FLANNEL-FWD - [0:0]
-A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -s 10.7.0.0/20 -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d 10.7.0.0/20 -m comment --comment "flanneld forward" -j ACCEPT
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
COMMIT
`, `
add table ip flannel-ipv4
delete table ip flannel-ipv4
add table ip flannel-ipv4 { comment "flanneld's: replaced as a whole when changed" ; }
add chain ip flannel-ipv4 postrouting { type nat hook postrouting priority 100 ; policy accept ; comment "masquerade traffic that crosses the border of the overlay" ; }
add rule ip flannel-ipv4 postrouting meta mark & 0x4000 == 0x4000 counter return comment "kube-proxy masquerades these itself"
add rule ip flannel-ipv4 postrouting ip saddr 10.7.3.0/24 ip daddr 10.5.0.0/16 counter return comment "pods of this node to the overlay"
add rule ip flannel-ipv4 postrouting ip saddr 10.7.3.0/24 ip daddr 10.7.0.0/20 counter return comment "pods of this node to the overlay"
add rule ip flannel-ipv4 postrouting ip saddr 10.5.0.0/16 ip daddr 10.7.3.0/24 counter return comment "overlay to pods of this node"
add rule ip flannel-ipv4 postrouting ip saddr 10.7.0.0/20 ip daddr 10.7.3.0/24 counter return comment "overlay to pods of this node"
add rule ip flannel-ipv4 postrouting ip saddr != 10.5.0.0/16 ip daddr 10.7.3.0/24 counter return comment "outside to pods of this node"
add rule ip flannel-ipv4 postrouting ip saddr 10.5.0.0/16 ip daddr 172.16.0.0/12 counter return comment "overlay to where pods' addresses are known"
add rule ip flannel-ipv4 postrouting ip saddr 10.7.0.0/20 ip daddr 172.16.0.0/12 counter return comment "overlay to where pods' addresses are known"
add rule ip flannel-ipv4 postrouting ip saddr 10.5.0.0/16 ip daddr != 224.0.0.0/4 counter masquerade comment "overlay to outside"
add rule ip flannel-ipv4 postrouting ip saddr 10.7.0.0/20 ip daddr != 224.0.0.0/4 counter masquerade comment "overlay to outside"
add rule ip flannel-ipv4 postrouting ip saddr != 10.5.0.0/16 ip daddr 10.5.0.0/16 counter masquerade comment "this node, or outside through it, to the overlay"
add rule ip flannel-ipv4 postrouting ip saddr != 10.5.0.0/16 ip daddr 10.7.0.0/20 counter masquerade comment "this node, or outside through it, to the overlay"
add chain ip flannel-ipv4 forward { type filter hook forward priority 0 ; policy accept ; comment "forward the overlay's traffic; cannot overrule a drop in another table" ; }
add rule ip flannel-ipv4 forward ip saddr 10.5.0.0/16 counter accept comment "from the overlay"
add rule ip flannel-ipv4 forward ip saddr 10.7.0.0/20 counter accept comment "from the overlay"
add rule ip flannel-ipv4 forward ip daddr 10.5.0.0/16 counter accept comment "to the overlay"
add rule ip flannel-ipv4 forward ip daddr 10.7.0.0/20 counter accept comment "to the overlay"
`},
		{"no rules", networks4, pods4, Options{RandomFully: true}, "\n", `
add table ip flannel-ipv4
delete table ip flannel-ipv4
`},
		{"family off", nil, netip.Prefix{}, all, "\n", `
add table ip flannel-ipv4
delete table ip flannel-ipv4
`},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			rules := For(test.networks, test.pods, test.options)

			script, count := new(iptables).script("", rules, true)
			same(t, script, test.iptables[1:])
			if want := strings.Count(script, "-A "); count != want {
				t.Errorf("script says %d rules, writes %d", count, want)
			}

			p := protocols.IPv4
			if test.pods.Addr().Is6() {
				p = protocols.IPv6
			}
			same(t, (&nftables{protocol: p}).script(true, rules), test.nft[1:])
			if _, made, some := strings.Cut(test.nft, " {"); some {
				fresh, _, _ := strings.Cut(test.nft[len("\nadd"):], "\n")
				same(t, (&nftables{protocol: p}).script(false, rules), "create"+fresh+" {"+made)
			}
		})
	}
}

// Networks may be written with the host's bits set; rules are not.
func TestForMasks(t *testing.T) {
	sloppy := For(prefixes("10.5.0.1/16"), prefix("10.5.34.1/24"), all)
	if exact := For(networks4, pods4, all); !sloppy.Equal(exact) {
		t.Errorf("got %v\nwant %v", sloppy, exact)
	}
}

// What a program can do follows from its version. A program with a version that cannot be read is taken for an old one.
func TestAbilities(t *testing.T) {
	t.Parallel()
	for version, want := range map[string][2]bool{ // nft, recent
		"iptables v1.8.9 (nf_tables)":   {true, true},
		"iptables v1.8.9 (legacy)":      {false, true},
		"ip6tables v1.10.0 (nf_tables)": {true, true},
		"iptables v2.0.0 (nf_tables)":   {true, true},
		"iptables v1.6.2":               {false, true},
		"iptables v1.6.1":               {false, false},
		"iptables v1.4.21":              {false, false},
		"iptables v1.4.19":              {false, false},
		"something else":                {false, false},
	} {
		dir := t.TempDir()
		for _, program := range []string{"iptables", "iptables-save", "iptables-restore"} {
			script := fmt.Sprintf("#!/bin/sh\necho %q\n", version)
			nstest.WriteProgram(t, filepath.Join(dir, program), script)
		}
		ipt, err := newIPTables(t.Context(), &command.Runner{Path: dir}, "", protocols.IPv4, "iptables")
		if err != nil {
			t.Errorf("%q: %v", version, err)
		} else if got := [2]bool{ipt.nft, ipt.recent}; got != want {
			t.Errorf("%q: nft, recent %v, want %v", version, got, want)
		}
	}
}

func TestWords(t *testing.T) {
	got := words(`! -s 10.9.0.0/16 -m comment --comment "flanneld masq" -m comment --comment "a \"b\" \\ c\'s" -j MASQUERADE`)
	want := []string{"!", "-s", "10.9.0.0/16", "-m", "comment", "--comment", "flanneld masq",
		"-m", "comment", "--comment", `a "b" \ c's`, "-j", "MASQUERADE"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// same compares texts line by line, so that a failure shows the first line
// that differs rather than two pages.
func same(t *testing.T, got, want string) {
	t.Helper()
	if got == want {
		return
	}
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	for i := range max(len(g), len(w)) {
		var a, b string
		if i < len(g) {
			a = g[i]
		}
		if i < len(w) {
			b = w[i]
		}
		if a != b {
			t.Fatalf("line %d\n got %s\nwant %s\nall of it:\n%s", i+1, a, b, got)
		}
	}
}
