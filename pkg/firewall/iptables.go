package firewall

import (
	"bytes"
	"context"
	"fmt"
	"hash/fnv"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/command"
	"github.com/flanneld/flanneld/pkg/plain"
)

// A chain is one of ours, and where the jump to it stands. The names and
// comments are upstream's: either daemon takes over the other's rules. A network
// with a name has chains of its own.
type chain struct {
	table   string
	base    string // the chain that jumps to ours
	name    string
	comment string // on the jump and on every rule
}

var (
	postrouting = chain{"nat", "POSTROUTING", "FLANNEL-POSTRTG", "flanneld masq"}
	forward     = chain{"filter", "FORWARD", "FLANNEL-FWD", "flanneld forward"}
)

// of returns the chain of a network on this host.
func (c chain) of(network string) chain {
	if network != "" {
		c.name += tag(network)
		c.comment += " " + tag(network)[1:]
	}
	return c
}

// tagForm matches the names of networks that fit into names of chains: the kernel allows 28 characters
// (XT_EXTENSION_MAXNAMELEN, linux/netfilter/x_tables.h), and FLANNEL-POSTRTG has 15.
var tagForm = regexp.MustCompile(`^[A-Za-z0-9_]{1,12}$`)

// tag returns what distinguishes the chains and tables of a network: "-" and its name or, where the name does not fit,
// a hash of the name.
func tag(network string) string {
	if network == "" {
		return ""
	}
	if !tagForm.MatchString(network) {
		h := fnv.New32a()
		h.Write([]byte(network))
		network = fmt.Sprintf("%08x", h.Sum32())
	}
	return "-" + network
}

// iptables is the tool of one variant of iptables, legacy or nft.
type iptables struct {
	programs      *command.Runner
	protocol      protocol
	network       string // whose rules these are
	name          string // "iptables", "ip6tables-legacy"
	path          string // of that program
	save, restore string // paths
	nft           bool
	known         bool // the program's version could be read
	recent        bool // knows iptables-restore --wait, and MASQUERADE --random-fully
	logged        bool // that the kernel refuses --random-fully

	blocked string // the rule that chainState.blocked had when it was last logged
}

// findIPTables returns the variants of iptables that are installed: first the
// variant that the node uses, then the other if it is there too. The node uses
// the variant in which kubelet made its chain; without such a chain, the variant
// with the plain name, or else nft, the younger. It is an error when there is no
// variant.
func findIPTables(ctx context.Context, programs *command.Runner, network string, p protocol) (found []tool, missing error) {
	var have []*iptables
	has := func(nft bool) bool { return slices.ContainsFunc(have, func(o *iptables) bool { return o.nft == nft }) }
	for _, variant := range []string{"", "-nft", "-legacy"} {
		if variant != "" && has(variant == "-nft") {
			continue
		}
		ipt, err := newIPTables(ctx, programs, network, p, p.iptables+variant)
		switch {
		case err != nil && variant == "":
			missing = err
		case err == nil && !has(ipt.nft):
			have = append(have, ipt)
		}
	}
	if len(have) == 2 && have[0].yieldsTo(ctx, have[1]) {
		slices.Reverse(have)
	}
	for _, ipt := range have {
		found, missing = append(found, ipt), nil
	}
	return found, missing
}

// yieldsTo returns whether the node uses the other variant, and not this one: kubelet does.
func (ipt *iptables) yieldsTo(ctx context.Context, other *iptables) bool {
	return !ipt.marked(ctx) && other.marked(ctx)
}

// marked returns whether kubelet uses this variant: kubelet keeps a chain there
// for programs in containers, whose iptables may differ from the node's
// (KEP-3178; before 1.24, a chain by which kubelet notices flushes).
func (ipt *iptables) marked(ctx context.Context) bool {
	const table = "mangle"
	if ipt.nft {
		return slices.ContainsFunc(kubeletsChains, func(name string) bool { return ipt.protocol.hasChain(table, name) })
	}
	if !ipt.protocol.hasTable(false, table) { // iptables-legacy would make the table
		return false
	}
	out, err := ipt.programs.Run(ctx, command.Command{Path: ipt.save, Args: []string{"-t", table}})
	return err == nil && slices.ContainsFunc(kubeletsChains, func(name string) bool {
		return bytes.Contains(out.Stdout, []byte("\n:"+name+" "))
	})
}

var kubeletsChains = []string{"KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"}

func newIPTables(ctx context.Context, programs *command.Runner, network string, p protocol, name string) (*iptables, error) {
	var paths []string
	for _, program := range []string{name, name + "-save", name + "-restore"} {
		path, err := programs.Find(program)
		if err != nil {
			return nil, fmt.Errorf("iptables mode needs the program %s: install the package iptables "+
				`(iptables-nft on Fedora and RHEL), or set "EnableNFTables": true in the network configuration: %w`, program, err)
		}
		paths = append(paths, path)
	}
	out, err := programs.Run(ctx, command.Command{Path: paths[0], Args: []string{"--version"}})
	if err != nil {
		return nil, fmt.Errorf("%s --version: %w%s", paths[0], err, printed(out.Stderr))
	}
	ipt := &iptables{
		protocol: p, programs: programs, network: network, name: name, path: paths[0], save: paths[1], restore: paths[2],
		nft: strings.Contains(string(out.Stdout), "(nf_tables)"),
	}
	v, known := version(string(out.Stdout))
	ipt.known, ipt.recent = known, slices.Compare(v[:], []int{1, 6, 2}) >= 0
	return ipt, nil
}

var versionForm = regexp.MustCompile(`v(\d+)\.(\d+)\.(\d+)`)

// version reads the output of --version: "iptables v1.8.9 (nf_tables)",
// "nftables v1.0.6 (Lester Gooch #5)".
func version(text string) (v [3]int, known bool) {
	m := versionForm.FindStringSubmatch(text)
	for i := range v {
		if m != nil {
			v[i], _ = strconv.Atoi(m[i+1])
		}
	}
	return v, m != nil
}

func (ipt *iptables) String() string { return ipt.name }

func (ipt *iptables) inNFTables() bool { return ipt.nft }

// A chainState is what the kernel holds for one of our chains. Rules are as
// iptables-save prints them, "-A CHAIN ...".
type chainState struct {
	exists bool     // the chain
	rules  []string // in the chain
	jumps  []string // rules of the base chain that lead to the chain, or carry its comment
	at     int      // the number that the first jump has, or would have without the others; 0: there is none
	place  int      // the number that the jump must have; 0: the last
	users  int      // rules elsewhere that lead to the chain: not ours

	// blocked is a rule of the base chain that drops everything before the jump, although other rules stand behind
	// it: somebody put it there on purpose. "": there is none.
	blocked string
}

// A kindOfRule says what a rule does to all that comes to it.
type kindOfRule int

const (
	selects kindOfRule = iota // something else
	ends                      // drops or rejects all, or all that is new
	leadsTo                   // belongs to a rule that ends and comes later: logs, or drops or rejects one protocol
)

// endForm matches a rule without other matches than a protocol and states of connections, as iptables-save prints it.
// The groups are the protocol, the states, and the target.
var endForm = regexp.MustCompile(`^-A \S+( -p \S+)?` +
	`(?: -m comment --comment (?:"(?:\\.|[^"\\])*"|\S+)| -m (?:conntrack --ctstate|state --state) (\S+))*` +
	` -[jg] (\S+)(?: --.*)?$`)

// kindOf returns the kind of a rule. A chain among dead ends all that comes to it.
func kindOf(rule string, dead []string) kindOfRule {
	m := endForm.FindStringSubmatch(rule)
	if m == nil || m[2] != "" && !strings.Contains(m[2], "NEW") {
		return selects
	}
	switch target := m[3]; {
	case target == "LOG" || target == "NFLOG":
		return leadsTo
	case target != "REJECT" && target != "DROP" && !slices.Contains(dead, target):
		return selects
	case m[1] != "":
		return leadsTo
	}
	return ends
}

// isDead tells whether all rules of a chain up to one that ends everything only lead to that one.
func isDead(rules []string) bool {
	for _, rule := range rules {
		if kind := kindOf(rule, nil); kind != leadsTo {
			return kind == ends
		}
	}
	return false
}

// placeJump decides where in the base chain the jump stands, of which others are the rules without ours. A jump that
// is there stays where it is, a new jump goes to the end. Rules at the end that end everything are as a policy of the
// chain, with those that lead to them: the jump goes before them.
func (f *chainState) placeJump(others, dead []string) {
	ending := func(rule string) bool { return kindOf(rule, dead) == ends }
	end := len(others) // of the rules that the jump stays behind
	for end > 0 && kindOf(others[end-1], dead) != selects {
		end--
	}
	if !slices.ContainsFunc(others[end:], ending) {
		end = len(others)
	}
	switch {
	case f.at > 0:
		end = min(end, f.at-1)
		f.place = end + 1
	case end < len(others):
		f.place = end + 1
	}
	if i := slices.IndexFunc(others[:end], ending); i >= 0 {
		f.blocked = others[i]
	}
}

// parse picks c out of what iptables-save prints.
func (c chain) parse(save string) chainState {
	var f chainState
	var others []string             // rules of the base chain that are not ours
	chains := map[string][]string{} // rules of the table's other chains
	table := ""
	for line := range strings.Lines(save) {
		line = strings.TrimRight(line, "\n ")
		if name, ok := strings.CutPrefix(line, "*"); ok {
			table = name
		}
		if table != c.table {
			continue
		}
		leads := strings.HasSuffix(line, " -j "+c.name) || strings.HasSuffix(line, " -g "+c.name)
		switch {
		case strings.HasPrefix(line, ":"+c.name+" "):
			f.exists = true
		case strings.HasPrefix(line, "-A "+c.name+" "):
			f.rules = append(f.rules, line)
		case strings.HasPrefix(line, "-A "+c.base+" "):
			if leads || strings.Contains(line, c.match()) {
				f.jumps = append(f.jumps, line)
				if f.at == 0 {
					f.at = len(others) + 1
				}
			} else {
				others = append(others, line)
			}
		case leads:
			f.users++
		}
		if words := strings.SplitN(line, " ", 3); words[0] == "-A" && words[1] != c.base {
			chains[words[1]] = append(chains[words[1]], line)
		}
	}
	maps.DeleteFunc(chains, func(_ string, rules []string) bool { return !isDead(rules) })
	f.placeJump(others, slices.Collect(maps.Keys(chains)))
	return f
}

// match returns the comment of our rules as iptables-save prints it.
func (c chain) match() string { return `-m comment --comment "` + c.comment + `"` }

// jump is the rule that leads to our chain.
func (c chain) jump() string { return "-A " + c.base + " " + c.match() + " -j " + c.name }

// plan returns the lines for iptables-restore that take c from its state to the
// desired rules; none when they are there. Lines that delete name the whole
// rule, not its number: another program may insert a rule in between, which
// would be deleted instead.
func (c chain) plan(f chainState, rules []string) []string {
	var lines []string
	var jumps []string
	if len(rules) > 0 {
		jumps = []string{c.jump()}
		if !f.exists || !slices.Equal(f.rules, rules) {
			lines = append(lines, ":"+c.name+" - [0:0]") // makes the chain, or empties it
			lines = append(lines, rules...)
		}
	}
	if !slices.Equal(f.jumps, jumps) || len(jumps) > 0 && f.at != f.place {
		for _, j := range f.jumps {
			lines = append(lines, "-D"+strings.TrimPrefix(j, "-A"))
		}
		for _, j := range jumps {
			if f.place > 0 {
				j = fmt.Sprintf("-I %s %d%s", c.base, f.place, strings.TrimPrefix(j, "-A "+c.base))
			}
			lines = append(lines, j)
		}
	}
	if len(rules) == 0 && f.exists {
		if len(f.rules) > 0 {
			lines = append(lines, "-F "+c.name)
		}
		if f.users == 0 {
			lines = append(lines, "-X "+c.name)
		}
	}
	return lines
}

// render writes a rule in the way iptables-save prints it.
func (c chain) render(r Rule) string {
	words := []string{"-A", c.name}
	for _, m := range []struct {
		flag string
		Match
	}{{"-s", r.Src}, {"-d", r.Dst}} {
		if !m.Prefix.IsValid() || m.Prefix.Bits() == 0 && !m.Not { // iptables-save does not print what matches everything
			continue
		}
		if m.Not {
			words = append(words, "!")
		}
		words = append(words, m.flag, m.Prefix.String())
	}
	if r.Mark != 0 {
		words = append(words, fmt.Sprintf("-m mark --mark %#x/%#x", r.Mark, r.Mark))
	}
	words = append(words, c.match(), "-j", map[Verdict]string{
		Return:           "RETURN",
		Accept:           "ACCEPT",
		Masquerade:       "MASQUERADE",
		MasqueradeRandom: "MASQUERADE --random-fully",
	}[r.Verdict])
	return strings.Join(words, " ")
}

func (ipt *iptables) find(ctx context.Context, save string) found {
	var b strings.Builder
	var now found
	for _, c := range []chain{postrouting.of(ipt.network), forward.of(ipt.network)} {
		f := c.parse(save)
		if f.exists {
			fmt.Fprintf(&b, "%s %s\n", c.table, c.name)
		}
		for _, line := range slices.Concat(f.jumps, f.rules) {
			fmt.Fprintf(&b, "%s %s\n", c.table, line)
		}
		if len(f.jumps) > 0 {
			now.misplaced = now.misplaced || f.at != f.place
			ipt.logBlocked(ctx, c, f.blocked)
		}
		now.rules += len(f.jumps) + len(f.rules)
	}
	now.text = b.String()
	return now
}

// logBlocked logs once that a rule drops everything before the jump to c. The rule stays: the one who put it before
// other rules wants to forward nothing.
func (ipt *iptables) logBlocked(ctx context.Context, c chain, rule string) {
	if c.base != forward.base || rule == ipt.blocked {
		return
	}
	if ipt.blocked = rule; rule == "" {
		return
	}
	klog.FromContext(ctx).Error(nil, "A rule of another program drops all forwarded packets before flannel's rules: "+
		"pods reach only pods of their own node; behind all other rules, it would let pods communicate",
		"tool", ipt.name, "rule", rule,
		"fix", fmt.Sprintf("%s -D%s && %s %s", ipt.name, strings.TrimPrefix(rule, "-A"), ipt.name, rule))
}

func (ipt *iptables) write(ctx context.Context, save string, want Ruleset) (rules int, wrote bool, err error) {
	script, rules := ipt.script(save, want, ipt.recent)
	switch {
	case script == "":
		return rules, false, nil
	case want.IsZero() && ipt.known:
		return 0, true, ipt.remove(ctx, save, script)
	}
	err = ipt.run(ctx, script)
	if err == nil || !strings.Contains(script, "--random-fully") {
		return rules, true, err
	}
	// The program is recent enough for --random-fully; the kernel may not be.
	script, rules = ipt.script(save, want, false)
	if script != "" && ipt.run(ctx, script) != nil {
		return 0, true, err // it was something else
	}
	if !ipt.logged {
		klog.FromContext(ctx).Error(err, "Masquerading without --random-fully, which the kernel refuses", "tool", ipt.name)
		ipt.logged = true
	}
	return rules, true, nil
}

// remove removes all our rules with the library, as script would in one step. No packet needs the rules any more: it does
// not matter that they go one by one.
func (ipt *iptables) remove(ctx context.Context, save, script string) error {
	heredoc := ipt.heredoc(ipt.args(), script)
	library, err := openLibrary(ctx, ipt.programs, ipt.path)
	if err != nil {
		return &commandError{err, heredoc}
	}
	for _, c := range []chain{postrouting.of(ipt.network), forward.of(ipt.network)} {
		f := c.parse(save)
		for _, rule := range f.jumps {
			if err := library.deleteRule(ctx, c, rule); err != nil {
				return &commandError{err, heredoc}
			}
		}
		if f.exists {
			if err := library.deleteChain(ctx, c, f.users > 0); err != nil {
				return &commandError{err, heredoc}
			}
		}
	}
	klog.FromContext(ctx).Info("Applied", "command", plain.Block(heredoc))
	return nil
}

// script returns the input of iptables-restore that leads from what
// iptables-save printed to the desired rules, and how many rules these are.
func (ipt *iptables) script(save string, want Ruleset, randomFully bool) (script string, rules int) {
	var b strings.Builder
	for _, part := range []struct {
		chain
		rules []Rule
	}{{postrouting.of(ipt.network), want.Postrouting}, {forward.of(ipt.network), want.Forward}} {
		var lines []string
		for _, r := range part.rules {
			if r.Verdict == MasqueradeRandom && !randomFully {
				r.Verdict = Masquerade
			}
			lines = append(lines, part.render(r))
		}
		if n := len(lines); n > 0 {
			rules += n + 1 // and the jump
		}
		if plan := part.plan(part.parse(save), lines); len(plan) > 0 {
			fmt.Fprintf(&b, "*%s\n%s\nCOMMIT\n", part.table, strings.Join(plan, "\n"))
		}
	}
	return b.String(), rules
}

// list returns what iptables-save prints, of all tables at once.
func (ipt *iptables) list(ctx context.Context) (string, error) {
	if !ipt.protocol.hasTable(ipt.nft, postrouting.table) && !ipt.protocol.hasTable(ipt.nft, forward.table) {
		return "", nil
	}
	out, err := ipt.programs.Run(ctx, command.Command{Path: ipt.save})
	if err != nil {
		return "", fmt.Errorf("%s: %w%s", ipt.save, err, printed(out.Stderr))
	}
	// Without this check, a table with our rules could pass for a table without.
	for _, c := range []chain{postrouting, forward} {
		if bytes.Contains(out.Stdout, []byte("# Table `"+c.table+"' is incompatible")) {
			return "", fmt.Errorf("%s cannot read table %s, "+
				"in which another program has put rules that iptables does not know: find them with `nft list table %s` and move them to a table of their own", ipt.save, c.table, c.table)
		}
	}
	return string(out.Stdout), nil
}

// lockSeconds is how long iptables-restore waits while another program holds
// the lock of iptables, which kube-proxy does for seconds on large clusters.
const lockSeconds = 10

// run gives script to iptables-restore. All lines of a table take effect together.
func (ipt *iptables) run(ctx context.Context, script string) error {
	args := ipt.args()
	out, err := ipt.programs.Run(ctx, command.Command{Path: ipt.restore, Args: args, Stdin: script})
	heredoc := ipt.heredoc(args, script)
	if err != nil {
		return &commandError{fmt.Errorf("%w%s", err, printed(out.Stderr)), heredoc}
	}
	klog.FromContext(ctx).Info("Applied", "command", plain.Block(heredoc))
	return nil
}

// A commandError is the error of a command, which the log shows in a block of its own: see plain.Logger.
type commandError struct {
	error
	command string
}

// Unwrap returns the error without the command.
func (e *commandError) Unwrap() error { return e.error }

// Command returns the command.
func (e *commandError) Command() string { return e.command }

// args returns the arguments of iptables-restore.
func (ipt *iptables) args() []string {
	args := []string{"--noflush"}
	if ipt.recent {
		args = append(args, fmt.Sprintf("--wait=%d", lockSeconds))
	}
	return args
}

// heredoc returns the shell command that runs a script. "<<-" ignores the tabs
// that klog puts before each line.
func (ipt *iptables) heredoc(args []string, script string) string {
	return fmt.Sprintf("%s-restore %s <<-'END'\n%sEND", ipt.name, strings.Join(args, " "), script)
}
