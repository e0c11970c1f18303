package firewall

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"k8s.io/klog/v2"
	"sigs.k8s.io/knftables"

	"github.com/flanneld/flanneld/pkg/command"
	"github.com/flanneld/flanneld/pkg/plain"
)

// nftables is the tool of one family's table. knftables checks and writes the
// commands; we run nft ourselves, as knftables would wait for it without limit.
type nftables struct {
	protocol
	programs *command.Runner
	path     string // of nft
	desired  bool   // the rules belong here, and do not only have to be removed
	recent   bool   // nft was found to be recent enough
	works    bool   // nft was found to work
	bare     bool   // the kernel knows no comments on tables and chains, which came with Linux 5.10
}

func findNFT(programs *command.Runner, network string, p protocol) (*nftables, error) {
	path, err := programs.Find("nft")
	if err != nil {
		return nil, fmt.Errorf("nftables mode needs the program nft: install the package nftables (1.0.1 or later), "+
			`or remove "EnableNFTables" from the network configuration: %w`, err)
	}
	p.table += tag(network)
	return &nftables{protocol: p, programs: programs, path: path}, nil
}

// open finds out whether nft is recent enough.
func (n *nftables) open(ctx context.Context) error {
	if n.recent {
		return nil
	}
	out, err := n.run(ctx, "", "--version")
	if v, known := version(string(out.Stdout)); err == nil && known && slices.Compare(v[:], []int{1, 0, 1}) < 0 {
		err = fmt.Errorf("this is %s", bytes.TrimSpace(out.Stdout))
	}
	if err != nil {
		return needs(err)
	}
	n.recent = true
	return nil
}

// try finds out whether nft can make a table, and with a comment. It changes nothing. The kernel takes as long for the
// trial as for the rules themselves: try is for when these were refused.
func (n *nftables) try(ctx context.Context) error {
	if n.works {
		return nil
	}
	check := func() error {
		tx := n.transaction()
		tx.Add(&knftables.Table{Comment: n.comment("test")})
		_, err := n.run(ctx, tx.String(), "--check", "-f", "-")
		return err
	}
	err := check()
	if err != nil && !n.bare {
		n.bare = true
		err = check()
	}
	if err != nil {
		n.bare = false
		return needs(err)
	}
	n.works = true
	return nil
}

// needs is an error that says what nft needs.
func needs(err error) error {
	return fmt.Errorf("nftables mode needs root, a kernel with nf_tables, and nft 1.0.1 or later: provide these, "+
		`or remove "EnableNFTables" from the network configuration: %w`, err)
}

// transaction returns an empty transaction. Of what knftables exports, only its
// fake makes one without running nft.
func (n *nftables) transaction() *knftables.Transaction {
	return knftables.NewFake(knftables.Family(n.nft), n.table).NewTransaction()
}

// comment returns the comment for a table or a chain, if the kernel takes one.
func (n *nftables) comment(text string) *string {
	if n.bare {
		return nil
	}
	return &text
}

// run runs nft.
func (n *nftables) run(ctx context.Context, stdin string, args ...string) (command.Output, error) {
	c := command.Command{Path: n.path, Args: args, Stdin: stdin, Env: []string{"LC_ALL=C"}}
	out, err := n.programs.Run(ctx, c)
	if err != nil {
		err = fmt.Errorf("%s: %w%s", c, err, printed(out.Stderr))
	}
	return out, err
}

// printed returns what a program that failed has printed, as the end of an error.
func printed(output []byte) string {
	if output = bytes.TrimSpace(output); len(output) == 0 {
		return ""
	}
	return ": " + plain.Line(string(output))
}

func (n *nftables) String() string { return "nft" }

func (n *nftables) inNFTables() bool { return true }

func (n *nftables) list(ctx context.Context) (string, error) {
	if !n.hasTable(true, n.table) {
		return "", nil
	}
	out, err := n.run(ctx, "", "--stateless", "list", "table", n.nft, n.table)
	if err != nil {
		if strings.Contains(string(out.Stderr), "No such file or directory") {
			return "", nil // the table was deleted just now
		}
		if n.desired {
			err = cmp.Or(n.try(ctx), err)
		}
		return "", err
	}
	return string(out.Stdout), nil
}

func (n *nftables) find(_ context.Context, listing string) found {
	// Each rule ends in its comment. Comments of the table and chains have a
	// line of their own.
	return found{text: listing, rules: strings.Count(listing, ` comment "`)}
}

func (n *nftables) write(ctx context.Context, listing string, want Ruleset) (rules int, wrote bool, err error) {
	if listing == "" && want.IsZero() {
		return 0, false, nil
	}
	if err := n.open(ctx); err != nil {
		return 0, false, err
	}
	apply := func() (script string, err error) {
		script = n.script(listing != "", want)
		_, err = n.run(ctx, script, "-f", "-")
		return script, err
	}
	script, err := apply()
	if err != nil {
		if why := n.try(ctx); why != nil {
			return 0, false, why
		}
		// The kernel may take no comment, which try has found out, or another program may have made the table just now.
		if now, failed := n.list(ctx); failed == nil {
			listing = now
		}
		script, err = apply()
	}
	if err != nil {
		return 0, false, &commandError{err, heredoc(script)}
	}
	n.works = true
	klog.FromContext(ctx).Info("Applied", "command", plain.Block(heredoc(script)))
	return len(want.Postrouting) + len(want.Forward), true, nil
}

// script returns the commands of nft that make the table, or replace all of it. A transaction that deletes a table keeps
// the kernel busy for twice as long, even if the table is its own.
func (n *nftables) script(replace bool, want Ruleset) string {
	tx := n.transaction()
	table := &knftables.Table{Comment: n.comment("flanneld's: replaced as a whole when changed")}
	if replace {
		tx.Add(&knftables.Table{}) // a table that was deleted just now cannot be deleted
		tx.Delete(&knftables.Table{})
		if want.IsZero() {
			return tx.String()
		}
		tx.Add(table)
	} else {
		tx.Create(table)
	}
	for _, part := range []struct {
		chain knftables.Chain
		rules []Rule
	}{
		{knftables.Chain{
			Name:     "postrouting",
			Type:     knftables.PtrTo(knftables.NATType),
			Hook:     knftables.PtrTo(knftables.PostroutingHook),
			Priority: knftables.PtrTo(knftables.SNATPriority),
			Policy:   knftables.PtrTo(knftables.AcceptPolicy),
			Comment:  n.comment("masquerade traffic that crosses the border of the overlay"),
		}, want.Postrouting},
		{knftables.Chain{
			Name:     "forward",
			Type:     knftables.PtrTo(knftables.FilterType),
			Hook:     knftables.PtrTo(knftables.ForwardHook),
			Priority: knftables.PtrTo(knftables.FilterPriority),
			Policy:   knftables.PtrTo(knftables.AcceptPolicy),
			Comment:  n.comment("forward the overlay's traffic; cannot overrule a drop in another table"),
		}, want.Forward},
	} {
		if len(part.rules) == 0 {
			continue
		}
		tx.Add(&part.chain)
		for _, r := range part.rules {
			tx.Add(&knftables.Rule{Chain: part.chain.Name, Rule: n.render(r), Comment: knftables.PtrTo(r.Why)})
		}
	}
	return tx.String()
}

// render writes a rule in the language of nft.
func (n *nftables) render(r Rule) string {
	var words []string
	for _, m := range []struct {
		field string
		Match
	}{{"saddr", r.Src}, {"daddr", r.Dst}} {
		if !m.Prefix.IsValid() {
			continue
		}
		words = append(words, n.nft, m.field)
		if m.Not {
			words = append(words, "!=")
		}
		words = append(words, m.Prefix.String())
	}
	if r.Mark != 0 {
		words = append(words, fmt.Sprintf("meta mark & %#x == %#x", r.Mark, r.Mark))
	}
	words = append(words, "counter", map[Verdict]string{
		Return:           "return",
		Accept:           "accept",
		Masquerade:       "masquerade",
		MasqueradeRandom: "masquerade fully-random",
	}[r.Verdict])
	return strings.Join(words, " ")
}

// heredoc returns the shell command that runs a script. "<<-" ignores the tabs
// that klog puts before each line.
func heredoc(script string) string { return fmt.Sprintf("nft -f - <<-'END'\n%sEND", script) }
