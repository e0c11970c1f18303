package firewall

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"k8s.io/klog/v2"
	"sigs.k8s.io/knftables"

	"github.com/flanneld/flanneld/pkg/plain"
)

// nftables is the tool of one family's table.
type nftables struct {
	protocol
	path string              // of the program
	kn   knftables.Interface // nil until first needed: making one starts nft
}

func findNFT(p protocol) (*nftables, error) {
	path, err := exec.LookPath("nft")
	if err != nil {
		return nil, fmt.Errorf("nftables mode needs the program nft: install the package nftables (1.0.1 or later), "+
			`or remove "EnableNFTables" from the network configuration: %w`, err)
	}
	return &nftables{protocol: p, path: path}, nil
}

// open finds out whether nft works here. It runs nft without changing anything.
func (n *nftables) open() (err error) {
	if n.kn == nil {
		n.kn, err = knftables.New(knftables.Family(n.nft), n.table)
	}
	if err != nil {
		return fmt.Errorf("nftables mode needs root, a kernel with nf_tables, and nft 1.0.1 or later: provide these, "+
			`or remove "EnableNFTables" from the network configuration: %w`, err)
	}
	return nil
}

func (n *nftables) String() string { return "nft" }

func (n *nftables) inNFTables() bool { return true }

func (n *nftables) read(ctx context.Context) (text string, rules int, err error) {
	var errput strings.Builder
	cmd := exec.CommandContext(ctx, n.path, "--stateless", "list", "table", n.nft, n.table)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.Stderr = &errput
	out, err := cmd.Output()
	if err != nil {
		if strings.Contains(errput.String(), "No such file or directory") {
			return "", 0, nil // there is no such table
		}
		return "", 0, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, plain.Line(errput.String()))
	}
	// Each rule ends in its comment. Comments of the table and chains have a
	// line of their own.
	return string(out), strings.Count(string(out), ` comment "`), nil
}

func (n *nftables) write(ctx context.Context, want Ruleset) (rules int, err error) {
	if err := n.open(); err != nil {
		return 0, err
	}
	tx := n.kn.NewTransaction()
	n.fill(tx, want)
	if err := n.kn.Run(ctx, tx); err != nil {
		return 0, &commandError{err, heredoc(tx)}
	}
	klog.FromContext(ctx).Info("Applied", "command", plain.Block(heredoc(tx)))
	return len(want.Postrouting) + len(want.Forward), nil
}

// fill adds to tx the commands that replace the whole table.
func (n *nftables) fill(tx *knftables.Transaction, want Ruleset) {
	tx.Add(&knftables.Table{}) // a table that does not exist cannot be deleted
	tx.Delete(&knftables.Table{})
	if want.IsZero() {
		return
	}
	tx.Add(&knftables.Table{Comment: knftables.PtrTo("flanneld's: replaced as a whole when changed")})
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
			Comment:  knftables.PtrTo("masquerade traffic that crosses the border of the overlay"),
		}, want.Postrouting},
		{knftables.Chain{
			Name:     "forward",
			Type:     knftables.PtrTo(knftables.FilterType),
			Hook:     knftables.PtrTo(knftables.ForwardHook),
			Priority: knftables.PtrTo(knftables.FilterPriority),
			Policy:   knftables.PtrTo(knftables.AcceptPolicy),
			Comment:  knftables.PtrTo("forward the overlay's traffic; cannot overrule a drop in another table"),
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

// heredoc returns the shell command that runs tx. "<<-" ignores the tabs that
// klog puts before each line.
func heredoc(tx *knftables.Transaction) string { return fmt.Sprintf("nft -f - <<-'END'\n%sEND", tx) }
