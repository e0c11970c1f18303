package firewall

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Plan returns the commands that Apply would run to have the kernel hold the
// desired rules and nothing else of ours. It changes nothing. A family that
// does not work on this node is no error when no rules are desired of it.
func (d *Driver) Plan(ctx context.Context, want Desired) ([]string, error) {
	var commands []string
	var errs []error
	for f, s := range d.families.Each() {
		rules := want.Of(f)
		if s.tool == nil && !rules.IsZero() {
			errs = append(errs, s.missing)
			continue
		}
		for j, o := range append([]tool{s.tool}, s.others...) {
			if o == nil {
				continue
			}
			var target Ruleset
			if j == 0 {
				target = rules
			}
			command, err := o.plan(ctx, target)
			switch {
			case err != nil && !target.IsZero():
				errs = append(errs, fmt.Errorf("%s rules: %w", s.family, err))
			case err == nil && command != "":
				commands = append(commands, command)
			}
		}
	}
	return commands, errors.Join(errs...)
}

func (ipt *iptables) plan(ctx context.Context, want Ruleset) (string, error) {
	save, err := ipt.list(ctx)
	if err != nil {
		return "", err
	}
	script, _ := ipt.script(save, want, ipt.recent)
	if without, _ := ipt.script(save, want, false); script == "" || without == "" {
		return "", nil // the rules may lack --random-fully: not every kernel knows it
	}
	return ipt.heredoc(ipt.args(), script), nil
}

func (n *nftables) plan(ctx context.Context, want Ruleset) (string, error) {
	listing, err := n.list(ctx)
	if err != nil || listing == "" && want.IsZero() {
		return "", err
	}
	if want.IsZero() {
		return fmt.Sprintf("nft delete table %s %s", n.nft, n.table), nil
	}
	var rules []string
	for _, r := range slices.Concat(want.Postrouting, want.Forward) {
		rules = append(rules, fmt.Sprintf("%s comment %q", n.render(r), r.Why))
	}
	if slices.Equal(rules, listed(listing)) {
		return "", nil
	}
	err = n.open(ctx)
	if err == nil {
		err = n.try(ctx)
	}
	if err != nil {
		return "", err
	}
	return heredoc(n.script(true, want)), nil
}

// marks matches the numbers that nft pads with zeros in its output.
var marks = regexp.MustCompile(`0x0+([1-9a-f])`)

// listed returns the rules of a table as we write them, in their order by chain:
// postrouting's first. They include rules of others.
func listed(table string) []string {
	rules := map[string][]string{}
	chain := ""
	for line := range strings.Lines(table) {
		line = strings.TrimSpace(line)
		name, isChain := strings.CutPrefix(line, "chain ")
		switch {
		case isChain:
			chain = strings.TrimSuffix(name, " {")
		case line == "}":
			chain = ""
		case chain == "" || line == "" || strings.HasPrefix(line, "type ") || strings.HasPrefix(line, "comment "):
		default:
			rules[chain] = append(rules[chain], marks.ReplaceAllString(line, "0x$1"))
		}
	}
	return slices.Concat(rules["postrouting"], rules["forward"])
}
