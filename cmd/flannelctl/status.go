package main

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/flanneld/flanneld/network"
	"github.com/flanneld/flanneld/subnet"
)

// An answer is what a command has found out.
type answer struct {
	value any    // for programs
	print func() // the same for people
	found bool   // something that is not as it should be
}

// ask returns a command's work: to put a question to the daemon, or else to
// what we find out without it, and to print the answer.
func (t *tool) ask(question func(context.Context, source) (answer, error)) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, _ []string) error {
		src, daemonless, err := t.open(cmd.Context())
		if err != nil {
			return err
		}
		defer src.Close()
		a, err := question(cmd.Context(), src)
		if err != nil {
			return err
		}
		if t.output == "json" {
			if err := printJSON(a.value); err != nil {
				return err
			}
		} else {
			t.remark(daemonless)
			a.print()
		}
		if a.found {
			return errFound
		}
		return nil
	}
}

func (t *tool) statusCommand() *cobra.Command {
	return t.outputFlag(&cobra.Command{
		Use:   "status",
		Short: "What this node's network is, and how it does",
		Args:  cobra.NoArgs,
		RunE: t.ask(func(ctx context.Context, src source) (answer, error) {
			s, err := src.Status(ctx)
			return answer{s, func() { t.status(s) }, !s.Ready && !t.direct || len(s.Errors) > 0}, err
		}),
	})
}

// status prints it for people.
func (t *tool) status(s network.Status) {
	var rows [][]cell
	line := func(key, text string, shown func(string) string) {
		if text != "" {
			rows = append(rows, []cell{{key, t.bold}, {text, shown}})
		}
	}
	switch {
	case !s.Daemon && t.direct:
		line("flanneld", "was not asked", nil)
	case !s.Daemon:
		line("flanneld", "does not answer", t.bad)
	case s.Ready:
		line("flanneld", fmt.Sprintf("ready, %s, running for %s", s.Version, ago(s.Started)), t.ok)
	default:
		line("flanneld", "not ready, "+s.Version, t.warn)
	}
	if !s.Ready {
		line("waiting for", s.Waiting, t.warn)
	}
	line("network", join(s.Network), nil)
	line("backend", s.Backend, nil)
	if u := s.Uplink; u != nil {
		text := fmt.Sprintf("%s %s, mtu %d", u.Name, join(u.Addresses), u.MTU)
		if !slices.Equal(u.Addresses, u.PublicIPs) {
			text += ", known to peers as " + join(u.PublicIPs)
		}
		line("uplink", text, nil)
	}
	if l := s.Lease; l != nil {
		line("lease", join(l.Subnets)+", "+expiry(l.Expires), nil)
	} else if env, err := subnet.ReadEnv(s.SubnetFile.Path); err == nil {
		line("lease", env.Subnets.String()+", as the subnet file says", t.warn)
	} else if s.Network != nil {
		line("lease", "none", t.warn)
	}
	for _, d := range s.Devices {
		line("device", fmt.Sprintf("%s, %s, mtu %d", d.Name, d.Type, d.MTU), nil)
	}
	if s.Lease != nil {
		line("peers", fmt.Sprint(s.Peers), nil)
	}
	for _, l := range s.LeftOut {
		line("", join(l.Subnets)+": "+l.Problem, t.warn)
	}
	if s.MTU > 0 {
		line("mtu for pods", fmt.Sprint(s.MTU), nil)
	}
	state := func(ok bool, yes, no string) (string, func(string) string) {
		if ok {
			return yes, t.ok
		}
		return no, t.warn
	}
	if s.Rules.Mode != "" {
		text, shown := state(s.Rules.InPlace, s.Rules.Mode+", in place", s.Rules.Mode+", not in place")
		line("rules", text, shown)
	}
	text, shown := state(s.SubnetFile.Written, s.SubnetFile.Path, s.SubnetFile.Path+", not as it should be")
	line("subnet file", text, shown)
	if s.Store.Name != "" {
		text, shown := state(s.Store.Trouble == "", s.Store.Name, s.Store.Name+": "+s.Store.Trouble)
		line("leases from", text, shown)
	}
	for _, duty := range slices.Sorted(maps.Keys(s.Errors)) {
		line("error", duty+": "+s.Errors[duty], t.bad)
	}
	t.table(nil, rows)
}

func join[T fmt.Stringer](all []T) string {
	var parts []string
	for _, v := range all {
		parts = append(parts, v.String())
	}
	return strings.Join(parts, ", ")
}

func ago(at time.Time) string { return time.Since(at).Round(time.Second).String() }

// expiry words when a lease ends.
func expiry(at time.Time) string {
	switch left := time.Until(at).Round(time.Second); {
	case at.IsZero():
		return "never expires"
	case left <= 0:
		return "expired"
	default:
		return fmt.Sprintf("expires in %v", left)
	}
}

func (t *tool) leasesCommand() *cobra.Command {
	return t.outputFlag(&cobra.Command{
		Use:   "leases",
		Short: "All nodes' leases",
		Args:  cobra.NoArgs,
		RunE: t.ask(func(ctx context.Context, src source) (answer, error) {
			leases, err := src.Leases(ctx)
			if err != nil {
				return answer{}, fmt.Errorf("no leases: waiting for %w", err)
			}
			return answer{leases, func() { t.leases(leases) }, false}, nil
		}),
	})
}

// leases prints them for people: a column for each family that is there.
func (t *tool) leases(leases []network.Lease) {
	var rows [][]cell
	for _, l := range leases {
		var shown func(string) string
		note := l.Problem
		if l.Own {
			shown, note = t.ok, "this node"
		}
		expires := ""
		if !l.Expires.IsZero() {
			expires = time.Until(l.Expires).Round(time.Second).String()
		}
		rows = append(rows, []cell{
			{of(l.Subnets, netip.Prefix.Addr, netip.Addr.Is4), shown}, {of(l.Subnets, netip.Prefix.Addr, netip.Addr.Is6), shown},
			{of(l.PublicIPs, itself, netip.Addr.Is4), nil}, {of(l.PublicIPs, itself, netip.Addr.Is6), nil},
			{l.Backend, nil}, {expires, nil}, {note, t.warnUnless(l.Own)},
		})
	}
	t.table([]string{"SUBNET", "IPV6 SUBNET", "PUBLIC IP", "PUBLIC IPV6", "BACKEND", "EXPIRES IN", "NOTE"}, rows)
}

func (t *tool) warnUnless(fine bool) func(string) string {
	if fine {
		return t.ok
	}
	return t.warn
}

func itself(a netip.Addr) netip.Addr { return a }

// of returns the first of a family as text.
func of[T fmt.Stringer](all []T, addr func(T) netip.Addr, family func(netip.Addr) bool) string {
	for _, v := range all {
		if family(addr(v)) {
			return v.String()
		}
	}
	return ""
}

func (t *tool) diffCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "diff",
		Short: "What the host lacks, or has too much, as the commands that would mend it",
		Long: `diff compares the host with what is wanted, and prints the commands that would make it so: of ip, bridge, iptables-restore
and nft. It changes nothing; a daemon that runs mends what it finds in the course of it. Exit status 1 says that there are differences.`,
		Args: cobra.NoArgs,
		RunE: t.ask(func(ctx context.Context, src source) (answer, error) {
			commands, err := src.Diff(ctx)
			list := func() {
				for _, c := range commands {
					fmt.Fprintln(t.out, c)
				}
			}
			return answer{commands, list, len(commands) > 0}, err
		}),
	}
}
