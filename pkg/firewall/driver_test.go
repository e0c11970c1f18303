package firewall

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/pkg/command"
	"github.com/flanneld/flanneld/pkg/nstest"
)

// These tests run the real programs on the real kernel, each test in a network
// namespace of its own.

var (
	both      = Desired{IPv4: For(networks4, pods4, all), IPv6: For(networks6, pods6, all)}
	ipv4Alone = Desired{IPv4: For(networks4, pods4, all)}
)

// A mode is a way to keep rules on a node: the driver, and the variant that
// plain "iptables" is there.
type mode struct {
	name     string
	nftables bool
	variant  string
}

var (
	legacyMode = mode{name: "iptables-legacy", variant: "legacy"}
	nftMode    = mode{name: "iptables-nft", variant: "nft"}
	tablesMode = mode{name: "nftables", nftables: true, variant: "nft"}
	modes      = []mode{legacyMode, nftMode, tablesMode}
)

// eachMode runs test in every mode, on a node that has all programs.
func eachMode(t *testing.T, modes []mode, test func(*testing.T, mode, *node)) {
	for _, m := range modes {
		t.Run(m.name, func(t *testing.T) { test(t, m, newNode(t, m.variant)) })
	}
}

// A node is a network namespace with programs of its own. They note in a file
// that they were started.
type node struct {
	t   *testing.T
	bin string // where our programs are looked up
}

// newNode makes the namespace and its programs; plain iptables is the given variant.
func newNode(t *testing.T, variant string) *node {
	t.Helper()
	n := &node{t: t, bin: t.TempDir()}
	nstest.Need(t, "nft", "iptables-legacy", "ip6tables-legacy", "iptables-nft", "ip6tables-nft")
	nstest.New(t)
	if out, err := nstest.Try("iptables-legacy -t nat -S"); err != nil {
		t.Skipf("needs a kernel with legacy iptables: %s", out)
	}
	n.install("nft", "nft", "")
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, action := range []string{"", "-save", "-restore"} {
			n.install(family+action, family+"-"+variant+action, "")
			n.install(family+"-legacy"+action, family+"-legacy"+action, "")
			n.install(family+"-nft"+action, family+"-nft"+action, "")
		}
	}
	return n
}

// runner returns a runner that looks programs up on the node.
func (n *node) runner() *command.Runner { return &command.Runner{Path: n.bin} }

// install puts a program on the node that runs the real one after some lines of shell.
func (n *node) install(name, realName, before string) {
	n.t.Helper()
	target, err := exec.LookPath(realName)
	if err != nil {
		n.t.Fatal(err)
	}
	script := fmt.Sprintf("#!/bin/sh\necho \"%s $*\" >>%s\n%s\nexec %s \"$@\"\n", name, n.log(), before, target)
	nstest.WriteProgram(n.t, filepath.Join(n.bin, name), script)
}

// remove takes programs off PATH.
func (n *node) remove(patterns ...string) {
	n.t.Helper()
	for _, p := range patterns {
		files, _ := filepath.Glob(filepath.Join(n.bin, p))
		if len(files) == 0 {
			n.t.Fatalf("no program %s", p)
		}
		for _, f := range files {
			os.Remove(f)
		}
	}
}

func (n *node) log() string { return filepath.Join(n.bin, "started") }

// started returns the programs that f starts, one a line.
func (n *node) started(f func()) []string {
	n.t.Helper()
	os.Remove(n.log())
	f()
	data, err := os.ReadFile(n.log())
	if err != nil && !os.IsNotExist(err) {
		n.t.Fatal(err)
	}
	return strings.FieldsFunc(string(data), func(r rune) bool { return r == '\n' })
}

// env is an environment in which the node's programs are found, and all others.
func (n *node) env() []string { return append(os.Environ(), "PATH="+n.bin+":"+os.Getenv("PATH")) }

// sh runs a shell script that finds the node's programs and all others.
func (n *node) sh(script string) string {
	n.t.Helper()
	cmd := exec.Command("/bin/sh", "-ec", script)
	cmd.Env = n.env()
	out, err := cmd.Output()
	if err != nil {
		if e, ok := err.(*exec.ExitError); ok {
			out = append(out, e.Stderr...)
		}
		n.t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return string(out)
}

// listing returns all rules on the node, of all programs, wherever they are
// kept. Tables come sorted by name, and without those that hold nothing: their
// order is the order of their making, and nobody removes the built-in ones.
func (n *node) listing() string {
	n.t.Helper()
	var tables []string
	for _, program := range []string{"iptables-legacy", "ip6tables-legacy", "iptables-nft", "ip6tables-nft"} {
		for table := range strings.SplitAfterSeq(n.sh(program+"-save | sed '/^#/d; s/^[*]/"+program+" &/'"), "COMMIT\n") {
			if strings.Contains(table, "\n-A ") || strings.Contains(table, " - [") || strings.Contains(table, " DROP [") {
				tables = append(tables, table)
			}
		}
	}
	for table := range strings.SplitAfterSeq(n.sh("nft --stateless list ruleset"), "\n}\n") {
		name, _, _ := strings.Cut(table, " {")
		switch name {
		case "", "table ip nat", "table ip filter", "table ip6 nat", "table ip6 filter": // iptables-nft has shown them
		default:
			tables = append(tables, "nft "+table)
		}
	}
	slices.Sort(tables)
	return strings.Join(tables, "")
}

func (n *node) driver(m mode) *Driver {
	n.t.Helper()
	d, err := newDriver(context.Background(), n.runner(), "", m.nftables)
	if err != nil {
		n.t.Fatal(err)
	}
	return d
}

func (n *node) apply(d *Driver, want Desired) {
	n.t.Helper()
	if err := d.Apply(context.Background(), want); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) check(d *Driver, want bool) {
	n.t.Helper()
	ok, err := d.Check(context.Background())
	if err != nil {
		n.t.Fatal(err)
	}
	if ok != want {
		n.t.Fatalf("Check says %v, want %v, with\n%s", ok, want, n.listing())
	}
}

// foreign are rules of others, some in the chains that ours hang on.
const foreign = `
	for p in iptables ip6tables; do
		$p -t nat -N KUBE-POSTROUTING
		$p -t nat -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
		$p -t nat -A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
		$p -t nat -A POSTROUTING -o lo -m comment --comment "not flanneld masq, but like it" -j ACCEPT
		$p -N DOCKER-USER
		$p -A FORWARD -j DOCKER-USER
		$p -A FORWARD -m comment --comment "goes -j FLANNEL-FWD in words only" -j ACCEPT
		$p -A INPUT -m comment --comment "flanneld forward" -j ACCEPT
		$p -P FORWARD DROP
		$p -t mangle -N FLANNEL-FWD
		$p -t mangle -A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
		$p -t mangle -A POSTROUTING -m comment --comment "flanneld masq" -j ACCEPT
	done
	nft 'table ip other { chain postrouting { type nat hook postrouting priority 90; ip daddr 198.18.0.1 masquerade; }; }'`

func TestApplyAndRemove(t *testing.T) {
	t.Parallel()
	eachMode(t, modes, func(t *testing.T, m mode, n *node) {
		n.sh(foreign)
		before := n.listing()
		d := n.driver(m)
		n.check(d, false)

		n.apply(d, both)
		n.check(d, true)
		applied := n.listing()
		var want []string
		if m.nftables {
			want = []string{
				"ip saddr 10.5.0.0/16 ip daddr != 224.0.0.0/4 counter masquerade fully-random",
				"ip6 saddr fc00::/48 ip6 daddr != ff00::/8 counter masquerade fully-random",
				"type nat hook postrouting priority srcnat; policy accept;",
				"ip6 saddr fc00::/48 counter accept",
			}
		} else {
			for _, rules := range []Ruleset{both.IPv4, both.IPv6} {
				for _, r := range rules.Postrouting {
					want = append(want, postrouting.render(r)+"\n")
				}
				for _, r := range rules.Forward {
					want = append(want, forward.render(r)+"\n")
				}
				want = append(want, postrouting.jump()+"\n", forward.jump()+"\n")
			}
		}
		rest := applied
		for _, w := range want {
			if !strings.Contains(applied, w) {
				t.Errorf("not there: %s", w)
			}
			rest = strings.Replace(rest, w, "", 1)
		}
		if !m.nftables && strings.Contains(rest, "-A FLANNEL") {
			t.Errorf("there is more than wanted:\n%s", rest)
		}

		for _, p := range n.started(func() { n.apply(d, both) }) {
			if strings.Contains(p, "-restore") || strings.Contains(p, " -f ") {
				t.Errorf("applying the same again ran %s", p)
			}
		}
		same(t, n.listing(), applied)

		n.apply(d, ipv4Alone)
		n.check(d, true)
		if now := n.listing(); strings.Contains(now, "fc00::/48") {
			t.Errorf("IPv6 is off, its rules stay:\n%s", now)
		}

		n.apply(d, Desired{})
		n.check(d, true)
		same(t, n.listing(), before)
	})
}

// A daemon that comes back, upstream's or ours, finds its own rules and leaves
// them standing in iptables mode, packet counters and all.
func TestRestart(t *testing.T) {
	t.Parallel()
	eachMode(t, modes, func(t *testing.T, m mode, n *node) {
		n.apply(n.driver(m), both)
		before := n.listing()
		d := n.driver(m)
		n.check(d, false)
		started := n.started(func() { n.apply(d, both) })
		if all := strings.Join(started, "\n"); !m.nftables && strings.Contains(all, "-restore") {
			t.Errorf("ran\n%s", all)
		}
		n.check(d, true)
		same(t, n.listing(), before)
	})
}

// Pods' own addresses may be known everywhere: 0.0.0.0/0, which iptables-save leaves out of a rule.
func TestEverywhereExcepted(t *testing.T) {
	t.Parallel()
	eachMode(t, modes, func(t *testing.T, m mode, n *node) {
		o := Options{Masquerade: true, Except: prefixes("0.0.0.0/0", "::/0")}
		want := Desired{IPv4: For(networks4, pods4, o), IPv6: For(networks6, pods6, o)}
		n.apply(n.driver(m), want)
		d := n.driver(m)
		started := strings.Join(n.started(func() { n.apply(d, want) }), "\n")
		if !m.nftables && strings.Contains(started, "-restore") {
			t.Errorf("to find the rules again, the driver ran\n%s", started)
		}
		n.check(d, true)
	})
}

// Networks on one host do not touch each other's rules.
func TestNetworks(t *testing.T) {
	t.Parallel()
	eachMode(t, modes, func(t *testing.T, m mode, n *node) {
		first := n.driver(m)
		n.apply(first, both)
		alone := n.listing()
		for _, name := range []string{"blue", "a-long/name of a network"} {
			d, err := newDriver(context.Background(), n.runner(), name, m.nftables)
			if err != nil {
				t.Fatal(err)
			}
			other := prefix("10.6.0.0/16")
			n.apply(d, Desired{IPv4: For([]netip.Prefix{other}, prefix("10.6.1.0/24"), all)})
			n.check(d, true)
			n.check(first, true)
			if now := n.listing(); !strings.Contains(now, other.String()) || strings.Count(now, "10.5.0.0/16") !=
				strings.Count(alone, "10.5.0.0/16") {
				t.Errorf("the rules of both networks must be there:\n%s", now)
			}
			n.apply(d, Desired{})
			same(t, n.listing(), alone)
			n.check(first, true)
		}
	})
}

func TestDrift(t *testing.T) {
	t.Parallel()
	iptables := []string{
		`iptables -t nat -F FLANNEL-POSTRTG`,
		`iptables -t nat -D FLANNEL-POSTRTG 3`,
		`iptables -t nat -A FLANNEL-POSTRTG -j ACCEPT`,
		`iptables -t nat -I FLANNEL-POSTRTG -j RETURN`,
		`iptables -t nat -I FLANNEL-POSTRTG -m comment --comment "flanneld masq" -j RETURN`,
		`iptables -t nat -D FLANNEL-POSTRTG 1 && iptables -t nat -A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN`,
		`iptables -t nat -R FLANNEL-POSTRTG 2 -s 10.6.34.0/24 -d 10.5.0.0/16 -m comment --comment "flanneld masq" -j RETURN`,
		`iptables -t nat -R FLANNEL-POSTRTG 5 -s 10.5.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE`,
		`iptables -t nat -R FLANNEL-POSTRTG 5 -s 10.5.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE --random-fully`,
		`iptables -t nat -D POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG`,
		`iptables -t nat -A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG`,
		`iptables -t nat -A POSTROUTING -j FLANNEL-POSTRTG`,
		`iptables -t nat -R POSTROUTING 1 -s 198.18.0.0/15 -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG`,
		`iptables -t nat -A POSTROUTING -g FLANNEL-POSTRTG`,
		`iptables -t nat -I POSTROUTING -s 10.9.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE`,
		`iptables -t nat -F && iptables -t nat -X`,
		`iptables -t nat -D POSTROUTING 1 && iptables -t nat -F FLANNEL-POSTRTG && iptables -t nat -X FLANNEL-POSTRTG`,
		`iptables -F FORWARD`,
		`iptables -F FLANNEL-FWD`,
		`iptables -D FLANNEL-FWD 2`,
		`iptables -I FORWARD -s 10.9.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT`,
		`ip6tables -t nat -D FLANNEL-POSTRTG 1`,
		`ip6tables -F && ip6tables -X`,
	}
	var halves [2][]string // the variants of iptables print the same: each has one half
	for i, command := range iptables {
		halves[i%2] = append(halves[i%2], command)
	}
	deleteRule := func(chain string) string {
		return `nft delete rule ip flannel-ipv4 ` + chain + ` handle $(nft -a list chain ip flannel-ipv4 ` + chain +
			` | sed -n 's/.*counter.* handle //p' | head -n 1)`
	}
	drift := map[string][]string{
		legacyMode.name: halves[0],
		nftMode.name: append([]string{`nft flush ruleset`, `nft delete table ip nat`, `nft delete table ip6 filter`},
			halves[1]...),
		tablesMode.name: {
			`nft flush ruleset`,
			`nft delete table ip flannel-ipv4`,
			`nft delete table ip6 flannel-ipv6`,
			`nft flush table ip flannel-ipv4`,
			`nft flush chain ip flannel-ipv4 postrouting`,
			`nft delete chain ip6 flannel-ipv6 forward`,
			deleteRule("postrouting"),
			deleteRule("forward"),
			deleteRule("postrouting") + ` && nft 'add rule ip flannel-ipv4 postrouting meta mark & 0x4000 == 0x4000 counter return comment "kube-proxy masquerades these itself"'`,
			`nft add rule ip flannel-ipv4 forward accept`,
			`nft insert rule ip6 flannel-ipv6 postrouting return`,
			`nft add chain ip flannel-ipv4 more`,
			`nft 'add chain ip flannel-ipv4 forward { policy drop; }'`,
			`nft 'add table ip flannel-ipv4 { flags dormant; }'`,
		},
	}
	eachMode(t, modes, func(t *testing.T, m mode, n *node) {
		d := n.driver(m)
		n.apply(d, both)
		want := n.listing()
		for _, command := range drift[m.name] {
			n.sh(command)
			if ok, err := d.Check(context.Background()); ok || err != nil {
				t.Fatalf("not noticed: %s (%v)", command, err)
			}
			n.apply(d, both)
			n.check(d, true)
			if now := n.listing(); now != want {
				t.Errorf("not repaired: %s", command)
				same(t, now, want)
			}
		}
	})
}

// The place of a jump among others' rules is theirs to choose; a missing one goes to the end, of several the first
// place counts. But no jump stays behind rules that end the chain: these are as the chain's policy. A rule that drops
// everything before rules of others is meant to.
func TestJumpKeepsItsPlace(t *testing.T) {
	t.Parallel()
	const first, last = `iptables -A FORWARD -s 198.18.0.1 -j DROP; `, `iptables -A FORWARD -j DROP; `
	const jump = `iptables -A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD; `
	const stale = `iptables -A FORWARD -s 10.9.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT; `
	const empty = `iptables -F FORWARD; iptables -F END 2>/dev/null && iptables -X END || true; `
	const log = `iptables -A FORWARD -m limit --limit 5/min -j LOG; iptables -A FORWARD -j LOG --log-prefix "bad: "; `
	const reject = `iptables -A FORWARD -m comment --comment "all \"else\"" -j REJECT --reject-with icmp-host-prohibited; `
	const chain = `iptables -N END; iptables -A END -m comment --comment "one protocol" -p tcp -j REJECT --reject-with tcp-reset; ` +
		`iptables -A END -j LOG; iptables -A END -j DROP; iptables -A FORWARD -j END; `
	const tcp = `iptables -A FORWARD -p tcp -j REJECT --reject-with tcp-reset; `
	const states = `iptables -A FORWARD -m conntrack --ctstate INVALID,NEW -j DROP; `
	const invalid = `iptables -A FORWARD -m conntrack --ctstate INVALID -j DROP; `
	A, J, B := "-A FORWARD -s 198.18.0.1/32 -j DROP\n", forward.jump()+"\n", "-A FORWARD -j DROP\n"
	L1, L2 := "-A FORWARD -m limit --limit 5/min -j LOG\n", `-A FORWARD -j LOG --log-prefix "bad: "`+"\n"
	R := `-A FORWARD -m comment --comment "all \"else\"" -j REJECT --reject-with icmp-host-prohibited` + "\n"
	C, S, T, I := "-A FORWARD -j END\n", "-A FORWARD -m conntrack --ctstate INVALID,NEW -j DROP\n",
		"-A FORWARD -p tcp -j REJECT --reject-with tcp-reset\n", "-A FORWARD -m conntrack --ctstate INVALID -j DROP\n"
	tests := []struct{ name, given, want string }{
		{"none, a final chain", first + chain, A + J + C},
		{"none, a chain that may return", first + chain + "iptables -I END -s 198.18.0.1 -j RETURN", A + C + J},
		{"none, a final rule for what is new", first + invalid + states, A + I + J + S},
		{"none, a rule for what is invalid", first + invalid, A + I + J},
		{"none, final rules by protocol", first + tcp + reject, A + J + T + R},
		{"none, one protocol alone", first + tcp, A + T + J},
		{"one jump", first + jump + last, A + J + B},
		{"one jump, chain altered", first + jump + last + "iptables -F FLANNEL-FWD", A + J + B},
		{"first of two", first + jump + last + jump, A + J + B},
		{"first of three", jump + first + jump + last + jump, J + A + B},
		{"place of a stale rule", first + stale + stale + last, A + J + B},
		{"stale rule before the jump", stale + first + jump + last, J + A + B},
		{"none", first, A + J},
		{"none, a final rule", first + last, A + J + B},
		{"none, final rules that log", first + log + reject + last, A + L1 + J + L2 + R + B},
		{"none, a log alone", first + log, A + L1 + L2 + J},
		{"jump behind a final rule", first + reject + jump, A + J + R},
		{"jump between final rules", reject + jump + last, J + R + B},
		{"jump before a final rule and others", jump + reject + first, J + R + A},
		{"jump behind a rule that drops before others", last + first + jump, B + A + J},
		{"none, a rule that drops before others", last + first, B + A + J},
	}
	eachMode(t, []mode{legacyMode, nftMode}, func(t *testing.T, m mode, n *node) {
		d := n.driver(m)
		n.apply(d, ipv4Alone)
		for _, test := range tests {
			n.sh(empty + test.given)
			n.apply(d, ipv4Alone)
			n.check(d, true)
			var got strings.Builder
			for line := range strings.Lines(n.sh("iptables-save")) {
				if strings.HasPrefix(line, "-A FORWARD") {
					got.WriteString(line)
				}
			}
			if got.String() != test.want {
				t.Errorf("%s: got\n%swant\n%s", test.name, got.String(), test.want)
			}
		}
	})
}

// A final rule that comes between our reading of the rules and our writing is seen by the next check.
func TestFinalRuleWhileWriting(t *testing.T) {
	t.Parallel()
	eachMode(t, []mode{legacyMode, nftMode}, func(t *testing.T, m mode, n *node) {
		once := filepath.Join(n.bin, "once")
		n.install("iptables-restore", "iptables-"+m.variant+"-restore", fmt.Sprintf(
			`[ -e %s ] || { >%[1]s; PATH=%s iptables-%s -A FORWARD -j REJECT; }`, once, os.Getenv("PATH"), m.variant))
		d := n.driver(m)
		n.apply(d, ipv4Alone)
		n.check(d, false)
		n.apply(d, ipv4Alone)
		n.check(d, true)
		rules := n.sh("iptables -S FORWARD")
		if strings.Index(rules, "REJECT") < strings.Index(rules, forward.name) {
			t.Errorf("the jump must come before the end:\n%s", rules)
		}
	})
}

// What others do around our rules is not our business.
func TestCheckIgnoresOthers(t *testing.T) {
	t.Parallel()
	eachMode(t, modes, func(t *testing.T, m mode, n *node) {
		d := n.driver(m)
		n.apply(d, both)
		n.sh(foreign)
		n.check(d, true)
		n.sh(`iptables -t nat -I POSTROUTING -j ACCEPT; iptables -I FORWARD -j ACCEPT; iptables -N AAA; iptables -t nat -N ZZZ; iptables -A AAA -j FLANNEL-FWD || iptables -A AAA -j ACCEPT`)
		n.check(d, true)
	})
}

func TestCheckStartsLittle(t *testing.T) {
	t.Parallel()
	eachMode(t, modes, func(t *testing.T, m mode, n *node) {
		if _, err := generation(); err != nil {
			t.Fatal(err)
		}
		d := n.driver(m)
		n.apply(d, both)
		quiet := 0
		if m == legacyMode {
			quiet = 2 // iptables-save, ip6tables-save
		}
		check := func(want int) {
			t.Helper()
			if started := n.started(func() { n.check(d, true) }); len(started) != want {
				t.Errorf("Check started %q, want %d", started, want)
			}
		}
		n.check(d, true) // IPv4's sees the change that was IPv6's making
		check(quiet)
		check(quiet)
		n.sh(`nft add table ip other`)
		check(2)
		check(quiet)

		n.apply(d, ipv4Alone)
		n.sh(`nft delete table ip other`)
		check(1)
	})
}

func TestNetworkChange(t *testing.T) {
	t.Parallel()
	other := Desired{
		IPv4: For(prefixes("10.77.0.0/16"), prefix("10.77.1.0/24"), all),
		IPv6: For(prefixes("fc77::/48"), prefix("fc77:0:0:1::/64"), Options{Masquerade: true}),
	}
	eachMode(t, modes, func(t *testing.T, m mode, n *node) {
		d := n.driver(m)
		n.apply(d, other)
		want := n.listing()
		n.apply(d, both)
		n.check(d, true)
		n.apply(d, other) // the same driver: a changed configuration
		n.check(d, true)
		same(t, n.listing(), want)
		n.apply(d, both)
		d = n.driver(m) // another driver: a restart
		n.apply(d, other)
		n.check(d, true)
		same(t, n.listing(), want)
	})
}

// From any mode to any other: what the first left goes.
func TestSwitchingModes(t *testing.T) {
	t.Parallel()
	for _, from := range modes {
		for _, to := range modes {
			if from == to {
				continue
			}
			t.Run(from.name+" to "+to.name, func(t *testing.T) {
				n := newNode(t, from.variant)
				n.apply(n.driver(from), both)
				before := n.listing()

				n.install("iptables", "iptables-"+to.variant, "")
				n.install("iptables-save", "iptables-"+to.variant+"-save", "")
				n.install("iptables-restore", "iptables-"+to.variant+"-restore", "")
				n.install("ip6tables", "ip6tables-"+to.variant, "")
				n.install("ip6tables-save", "ip6tables-"+to.variant+"-save", "")
				n.install("ip6tables-restore", "ip6tables-"+to.variant+"-restore", "")
				d := n.driver(to)
				n.apply(d, both)
				n.check(d, true)
				now := n.listing()
				for mark, m := range map[string]mode{
					"iptables-legacy *nat\n":         legacyMode,
					"iptables-legacy *filter\n":      legacyMode,
					"ip6tables-legacy *nat\n":        legacyMode,
					"ip6tables-legacy *filter\n":     legacyMode,
					"iptables-nft *nat\n":            nftMode,
					"iptables-nft *filter\n":         nftMode,
					"ip6tables-nft *nat\n":           nftMode,
					"ip6tables-nft *filter\n":        nftMode,
					"nft table ip flannel-ipv4 {\n":  tablesMode,
					"nft table ip6 flannel-ipv6 {\n": tablesMode,
				} {
					if got, want := strings.Contains(before, mark), m == from; got != want {
						t.Errorf("before, %q is %v, want %v", mark, got, want)
					}
					if got, want := strings.Contains(now, mark), m == to; got != want {
						t.Errorf("%q is %v, want %v", mark, got, want)
					}
				}
				if started := n.started(func() { n.apply(d, both) }); len(started) > 2 {
					t.Errorf("the other modes are looked for at every Apply: %q", started)
				}
			})
		}
	}
}

// A rule of somebody's that leads to our chain from elsewhere stays, and so the
// chain has to, empty.
func TestForeignUserOfOurChain(t *testing.T) {
	t.Parallel()
	eachMode(t, []mode{legacyMode, nftMode}, func(t *testing.T, m mode, n *node) {
		d := n.driver(m)
		n.apply(d, ipv4Alone)
		n.sh(`iptables -N MINE; iptables -A MINE -j FLANNEL-FWD`)
		for range 2 {
			n.apply(d, Desired{})
			n.check(d, true)
			save := n.sh("iptables-save")
			if !strings.Contains(save, "-A MINE -j FLANNEL-FWD\n") || strings.Contains(save, "-A FLANNEL") ||
				strings.Contains(save, "flanneld") {
				t.Errorf("got\n%s", save)
			}
		}
		n.apply(d, ipv4Alone)
		n.check(d, true)
	})
}

func TestMissingPrograms(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	mentions := func(t *testing.T, err error, words ...string) {
		t.Helper()
		if err == nil {
			t.Fatal("no error")
		}
		for _, w := range words {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%q is not in: %v", w, err)
			}
		}
	}
	t.Run("nothing but nft", func(t *testing.T) {
		n := newNode(t, "nft")
		n.remove("ip*")
		_, err := newDriver(ctx, n.runner(), "", false)
		mentions(t, err, "program iptables", "package iptables", "EnableNFTables")
		d := n.driver(tablesMode)
		n.apply(d, both)
		n.check(d, true)
	})
	t.Run("no plain iptables", func(t *testing.T) {
		n := newNode(t, "legacy")
		n.apply(n.driver(legacyMode), both)
		n.remove("iptables", "ip6tables")
		n.apply(n.driver(tablesMode), both)
		if rules := n.listing(); strings.Contains(rules, "flanneld masq") {
			t.Errorf("not removed:\n%s", rules)
		}
	})
	t.Run("an image without plain iptables", func(t *testing.T) {
		n := newNode(t, "legacy")
		n.remove("iptables", "ip6tables")
		n.apply(n.driver(nftMode), both)
		if rules := n.sh("iptables-nft-save"); !strings.Contains(rules, "flanneld masq") {
			t.Errorf("not in iptables-nft:\n%s", n.listing())
		}
	})
	t.Run("nothing but iptables", func(t *testing.T) {
		n := newNode(t, "legacy")
		n.remove("nft", "*-legacy", "*-nft", "*-legacy-*", "*-nft-*")
		_, err := newDriver(ctx, n.runner(), "", true)
		mentions(t, err, "program nft", "package nftables", "EnableNFTables")
		d := n.driver(legacyMode)
		n.apply(d, both)
		n.check(d, true)
	})
	t.Run("iptables-restore is missing", func(t *testing.T) {
		n := newNode(t, "legacy")
		n.remove("iptables*-restore")
		_, err := newDriver(ctx, n.runner(), "", false)
		mentions(t, err, "program iptables-restore", "package iptables")
	})
	t.Run("ip6tables is missing", func(t *testing.T) {
		n := newNode(t, "legacy")
		n.remove("ip6tables*")
		d := n.driver(legacyMode)
		n.apply(d, ipv4Alone)
		n.check(d, true)
		n.apply(d, Desired{})
		mentions(t, d.Apply(ctx, both), "IPv6 rules", "program ip6tables", "package iptables")
		n.check(d, false)
		if !strings.Contains(n.sh("iptables-save"), "FLANNEL-FWD") {
			t.Error("without ip6tables there are no IPv4 rules either")
		}

		for _, action := range []string{"", "-save", "-restore"} { // in the meantime, somebody installs them
			n.install("ip6tables"+action, "ip6tables-legacy"+action, "")
		}
		n.apply(d, both)
		n.check(d, true)
	})
	t.Run("ip6tables is missing, nftables mode has left rules", func(t *testing.T) {
		n := newNode(t, "nft")
		n.apply(n.driver(tablesMode), both)
		n.remove("ip6tables*")
		n.apply(n.driver(nftMode), ipv4Alone)
		if rules := n.listing(); strings.Contains(rules, "flannel-ipv6") {
			t.Errorf("not removed:\n%s", rules)
		}
	})
	t.Run("nft is too old", func(t *testing.T) {
		n := newNode(t, "legacy")
		n.install("nft", "nft", `[ "$1" = --version ] && echo "nftables v0.9.3 (Topsy)" && exit`)
		_, err := newDriver(ctx, n.runner(), "", true)
		mentions(t, err, "nft 1.0.1", "v0.9.3")
		d := n.driver(legacyMode) // which looks for what nftables mode left
		n.apply(d, both)
		n.check(d, true)
	})
	t.Run("nft does not work for IPv6", func(t *testing.T) {
		n := newNode(t, "nft")
		n.install("nft", "nft", fmt.Sprintf(`PATH=%s
case "$*" in *"-f -") in=$(cat)
	case $in in *ip6*) echo "no such family" >&2; exit 1;; esac
	printf '%%s\n' "$in" | exec %s "$@"; exit;;
esac`, os.Getenv("PATH"), "$(which nft)"))
		d := n.driver(tablesMode)
		n.apply(d, ipv4Alone)
		n.check(d, true)
		mentions(t, d.Apply(ctx, both), "IPv6 rules", "nftables mode needs", "no such family")
		n.check(d, false)
	})
	t.Run("nft does not work at all", func(t *testing.T) {
		for _, before := range []string{"add table ip flannel-ipv4", "list tables"} {
			n := newNode(t, "nft")
			n.sh("nft " + before)
			n.install("nft", "nft", `[ "$1" = --version ] || { echo "no such protocol" >&2; exit 1; }`)
			d := n.driver(tablesMode)
			mentions(t, d.Apply(ctx, ipv4Alone), "IPv4 rules", "nftables mode needs", "no such protocol")
			n.check(d, false)
			_, err := d.Plan(ctx, ipv4Alone)
			mentions(t, err, "nftables mode needs", "no such protocol")
		}
	})
	t.Run("nft does not work, and is not needed", func(t *testing.T) {
		for _, m := range []mode{legacyMode, tablesMode} {
			n := newNode(t, m.variant)
			n.sh("nft add table ip flannel-ipv4; nft add table ip6 flannel-ipv6")
			n.install("nft", "nft", `[ "$1" = --version ] || { echo "no such protocol" >&2; exit 1; }`)
			log := &nstest.Log{}
			logged := log.Context(ctx)
			d := n.driver(m)
			want := Desired{}
			if !m.nftables {
				want = ipv4Alone
			}
			for range 3 {
				if err := d.Apply(logged, want); err != nil {
					t.Error(err)
				}
			}
			text := log.String()
			if strings.Count(text, "Cannot remove") != 2 || strings.Count(text, "no such protocol") != 2 ||
				strings.Contains(text, "EnableNFTables") != m.nftables {
				t.Errorf("%s: want one line for each family, with advice about the node's mode only, got\n%s", m.name, text)
			}
		}
	})
	t.Run("ip6tables does not work", func(t *testing.T) {
		n := newNode(t, "legacy")
		n.install("ip6tables-save", "ip6tables-legacy-save", `echo "no such family" >&2; exit 1`)
		d := n.driver(legacyMode)
		n.apply(d, ipv4Alone)
		n.check(d, true)
		mentions(t, d.Apply(ctx, both), "IPv6 rules", "no such family")
		n.check(d, false)
	})
}

// Rules go where kubelet has its own, whatever plain iptables is: in an image,
// that is not the node's. Rules of others that iptables-nft cannot show do not
// hide kubelet's chain. A driver that is older than the chain notices the chain.
func TestKubeletsVariant(t *testing.T) {
	t.Parallel()
	for _, variants := range [][2]string{{"nft", "legacy"}, {"legacy", "nft"}, {"nft", "nft"}, {"legacy", "legacy"}} {
		t.Run("plain "+variants[0]+", kubelet's "+variants[1], func(t *testing.T) {
			n := newNode(t, variants[0])
			before := n.driver(legacyMode)
			for _, program := range []string{"iptables-", "ip6tables-"} {
				n.sh(program + variants[1] + " -t mangle -N KUBE-IPTABLES-HINT")
			}
			n.sh("for f in ip ip6; do nft \"table $f mangle { chain OTHER { ct mark set numgen inc mod 3; }; }\"; done")
			d := n.driver(legacyMode)
			ctx, differ := context.Background(), variants[0] != variants[1]
			if was, is := before.Outdated(ctx), d.Outdated(ctx); was != differ || is {
				t.Errorf("outdated: before %v, want %v; then %v", was, differ, is)
			}
			n.apply(d, both)
			n.check(d, true)
			for _, program := range []string{"iptables-", "ip6tables-"} {
				if rules := n.sh(program + variants[1] + "-save"); !strings.Contains(rules, "flanneld masq") {
					t.Errorf("got\n%s", n.listing())
				}
			}
		})
	}
}

// Another program may make or delete the table between our look at it and our write.
func TestTableComesAndGoes(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ before, meanwhile string }{
		{"", "add table ip flannel-ipv4"},
		{"", "add table ip flannel-ipv4; add chain ip flannel-ipv4 forward"},
		{"add table ip flannel-ipv4", "delete table ip flannel-ipv4"},
		{"add table ip flannel-ipv4", "flush ruleset"},
	} {
		n := newNode(t, "nft")
		n.apply(n.driver(tablesMode), both)
		want := n.listing()
		n.sh("nft flush ruleset; nft '" + c.before + "'")
		n.install("nft", "nft", fmt.Sprintf(`[ "$1" != -f ] || [ -e $0.done ] || { >$0.done; PATH=%s; %s '%s'; }`,
			os.Getenv("PATH"), "$(which nft)", c.meanwhile))
		d := n.driver(tablesMode)
		n.apply(d, both)
		n.check(d, true)
		same(t, n.listing(), want)
	}
}

// On a node without rules, only these programs are started: those that say what they are, the one that writes the
// rules, and the one that shows what was written. newNode has made a table of iptables-legacy, which is looked at, too.
func TestFirstApplyStartsLittle(t *testing.T) {
	t.Parallel()
	const restore = "iptables-restore --noflush --wait=10"
	programs := map[mode][]string{
		legacyMode: {"iptables --version", "iptables-nft --version", "ip6tables --version", "ip6tables-nft --version",
			"iptables-save", restore, "iptables-save"},
		nftMode: {"iptables --version", "iptables-legacy --version", "ip6tables --version", "ip6tables-legacy --version",
			restore, "iptables-save", "iptables-legacy-save"},
		tablesMode: {"iptables --version", "iptables-legacy --version", "nft --version",
			"ip6tables --version", "ip6tables-legacy --version",
			"nft -f -", "nft --stateless list table ip flannel-ipv4", "iptables-legacy-save"},
	}
	eachMode(t, modes, func(t *testing.T, m mode, n *node) {
		started := n.started(func() { n.apply(n.driver(m), ipv4Alone) })
		same(t, strings.ReplaceAll(strings.Join(started, "\n")+"\n", " \n", "\n"), strings.Join(programs[m], "\n")+"\n")
	})
}

// Writing rules disturbs ebtables where both are in nftables.
func TestDisturbs(t *testing.T) {
	t.Parallel()
	eachMode(t, modes, func(t *testing.T, m mode, n *node) {
		d := n.driver(m)
		if d.Disturbs() {
			t.Error("without a table of ebtables")
		}
		n.sh("nft add table bridge other")
		if d.Disturbs() {
			t.Error("with a table of another program")
		}
		n.sh("nft add table bridge nat")
		if got, want := d.Disturbs(), m != legacyMode; got != want {
			t.Errorf("with a table of ebtables: %v, want %v", got, want)
		}
	})
}

// Looking for kubelet's chain makes no table.
func TestNewMakesNoTable(t *testing.T) {
	t.Parallel()
	eachMode(t, []mode{legacyMode, nftMode}, func(t *testing.T, m mode, n *node) {
		n.driver(m)
		if tables := n.sh("nft list tables; cat /proc/self/net/ip_tables_names /proc/self/net/ip6_tables_names"); strings.TrimSpace(tables) != "nat" {
			t.Errorf("got\n%s", tables) // nat: newNode
		}
	})
}

// When no rules are desired, also those go that another flanneld has put beside the chains, whatever is in them.
func TestRemoveStaleRules(t *testing.T) {
	t.Parallel()
	eachMode(t, []mode{legacyMode, nftMode}, func(t *testing.T, m mode, n *node) {
		before := n.listing()
		n.apply(n.driver(m), both)
		n.sh(`iptables -t nat -I POSTROUTING -s 10.9.0.0/16 ! -d 10.9.0.0/16 -m comment --comment "flanneld masq" -m comment \
				--comment 'the "first" \ it'"'"'s' -j MASQUERADE
			for i in 1 2; do iptables -A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD; done
			ip6tables -A FORWARD -d fc09::/48 -m comment --comment "flanneld forward" -j ACCEPT`)
		d := n.driver(m)
		started := n.started(func() { n.apply(d, Desired{}) })
		same(t, n.listing(), before)
		if slices.ContainsFunc(started, func(s string) bool { return strings.Contains(s, "-restore") }) {
			t.Errorf("got %q", started)
		}
	})
}

func TestRandomFullyRefused(t *testing.T) {
	t.Parallel()
	// A kernel that refuses is played by a program that does.
	const refuse = `in=$(/bin/cat); case $in in *--random-fully*) echo refused >&2; exit 1;; esac; printf '%s\n' "$in" | `
	n := newNode(t, "legacy")
	n.install("iptables-restore", "iptables-legacy-restore", refuse+`\`)
	d := n.driver(legacyMode)
	for range 2 {
		n.apply(d, both)
		n.check(d, true)
		if save := n.sh("iptables-save"); strings.Count(save, `-j MASQUERADE`+"\n") != 2 || strings.Contains(save, "random") {
			t.Errorf("got\n%s", save)
		}
		if save := n.sh("ip6tables-save"); strings.Count(save, `-j MASQUERADE --random-fully`+"\n") != 2 {
			t.Errorf("nobody refused it for IPv6, got\n%s", save)
		}
		n.sh("iptables -t nat -F")
		n.check(d, false)
	}
}

func TestFailure(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	t.Run("refused", func(t *testing.T) {
		n := newNode(t, "legacy")
		n.install("iptables-restore", "iptables-legacy-restore", `echo "the kernel says no" >&2; exit 1`)
		d := n.driver(legacyMode)
		err := d.Apply(ctx, both)
		for _, w := range []string{"IPv4 rules", "the kernel says no"} {
			if err == nil || !strings.Contains(err.Error(), w) {
				t.Errorf("%q is not in: %v", w, err)
			}
		}
		var failed *commandError
		if w := "iptables-restore --noflush --wait=10 <<-'END'\n*nat\n:FLANNEL"; !errors.As(err, &failed) ||
			!strings.HasPrefix(failed.Command(), w) {
			t.Errorf("the command of %v is %v", err, failed)
		}
		n.check(d, false)
		n.install("iptables-restore", "iptables-legacy-restore", "")
		n.apply(d, both)
		n.check(d, true)
	})
	t.Run("undone at once", func(t *testing.T) {
		n := newNode(t, "legacy")
		n.install("iptables-restore", "iptables-legacy-restore", `/bin/cat >/dev/null; exit 0`)
		d := n.driver(legacyMode)
		if err := d.Apply(ctx, ipv4Alone); err == nil || !strings.Contains(err.Error(), "another program") {
			t.Errorf("got %v", err)
		}
		n.check(d, false)
	})
	t.Run("cancelled", func(t *testing.T) {
		n := newNode(t, "nft")
		for _, m := range []mode{nftMode, tablesMode} {
			d := n.driver(m)
			gone, cancel := context.WithCancel(ctx)
			cancel()
			if err := d.Apply(gone, both); err == nil {
				t.Errorf("%s: no error", d)
			}
			n.check(d, false)
		}
	})
	t.Run("table with rules that iptables does not know", func(t *testing.T) {
		n := newNode(t, "nft")
		n.sh("iptables-nft -t nat -N MINE")
		n.install("iptables-save", "iptables-nft-save", "echo \"# Table \\`nat' is incompatible, use 'nft' tool.\"")
		err := n.driver(nftMode).Apply(ctx, both)
		if err == nil || !strings.Contains(err.Error(), "nft list table nat") {
			t.Errorf("got %v", err)
		}
	})
}

// While rules are replaced, a reader sees the old ones or the new ones, all
// of them. So do packets: a listing shows what the kernel has committed.
func TestNoMomentWithoutRules(t *testing.T) {
	t.Parallel()
	other := Desired{IPv4: For(prefixes("10.77.0.0/16"), prefix("10.77.1.0/24"), all)}
	eachMode(t, modes, func(t *testing.T, m mode, n *node) {
		list := "iptables-save | grep -c flanneld"
		if m.nftables {
			list = "nft list table ip flannel-ipv4 | grep -c counter"
		}
		d := n.driver(m)
		n.apply(d, ipv4Alone)
		want := n.sh(list)

		done := filepath.Join(n.bin, "done")
		watch := exec.Command("/bin/sh", "-c", fmt.Sprintf("while [ ! -e %s ]; do %s; done", done, list))
		watch.Env = n.env()
		out, err := os.Create(filepath.Join(n.bin, "seen"))
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		watch.Stdout = out
		if err := watch.Start(); err != nil {
			t.Fatal(err)
		}
		seen := func() string {
			text, err := os.ReadFile(out.Name())
			if err != nil {
				t.Fatal(err)
			}
			return string(text)
		}
		for end := time.Now().Add(time.Minute); seen() == ""; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("nobody is looking")
			}
		}
		for range 5 {
			n.apply(d, other)
			n.apply(d, ipv4Alone)
		}
		if err := os.WriteFile(done, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := watch.Wait(); err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(seen()) {
			if line != want {
				t.Errorf("saw %s rules, want %s", strings.TrimSpace(line), strings.TrimSpace(want))
			}
		}
	})
}

func prefixes(texts ...string) []netip.Prefix {
	var all []netip.Prefix
	for _, text := range texts {
		all = append(all, prefix(text))
	}
	return all
}
