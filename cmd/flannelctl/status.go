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
	"github.com/flanneld/flanneld/pkg/probe"
	"github.com/flanneld/flanneld/subnet"
)

// A result is the output of a command.
type result struct {
	value any    // for programs
	print func() // prints the value as text
	found bool   // there is a problem or a difference
}

// withSource returns the function of a command, which opens the source, collects the result from it, and prints the
// result.
func (t *tool) withSource(collect func(context.Context, source) (result, error)) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, _ []string) error {
		src, daemonErr, err := t.open(cmd.Context())
		if err != nil {
			return err
		}
		defer src.Close()
		r, err := collect(cmd.Context(), src)
		if err != nil {
			return err
		}
		if t.output == "json" {
			if err := t.printJSON(r.value); err != nil {
				return err
			}
		} else {
			t.noteInspection(daemonErr)
			r.print()
		}
		if r.found {
			return errFound
		}
		return nil
	}
}

func (t *tool) statusCommand() *cobra.Command {
	return t.outputFlag(&cobra.Command{
		Use:   "status",
		Short: "Show the state of this node's network",
		Args:  cobra.NoArgs,
		RunE: t.withSource(func(ctx context.Context, src source) (result, error) {
			s, err := src.Status(ctx)
			return result{s, func() { t.status(s) }, !s.Ready && !t.direct || len(s.Errors) > 0}, err
		}),
	})
}

// status prints the status as text.
func (t *tool) status(s network.Status) {
	var rows [][]cell
	line := func(key, text string, colour func(string) styled) {
		if text != "" {
			rows = append(rows, []cell{{key, t.bold}, {text, colour}})
		}
	}
	version := "" // that a program with flannel in it may leave out
	if s.Version != "" {
		version = s.Version + ", "
	}
	switch {
	case !s.Daemon && t.direct:
		line("flanneld", "not used (--direct)", nil)
	case !s.Daemon:
		line("flanneld", "does not reply", t.bad)
	case s.Ready:
		line("flanneld", "ready, "+version+"running for "+ago(s.Started), t.ok)
	default:
		line("flanneld", strings.TrimSuffix("not ready, "+version, ", "), t.warn)
	}
	if !s.Ready {
		line("waiting for", s.Waiting, t.warn)
	}
	line("network", join(s.Network), nil)
	if len(s.Retired) > 0 {
		line("", "no longer in the configuration: "+join(s.Retired)+"; reboot the nodes that have subnets there", t.warn)
	}
	line("backend", s.Backend, nil)
	for _, u := range s.Uplinks {
		text := fmt.Sprintf("%s %s, mtu %d", u.Name, join(u.Addresses), u.MTU)
		if !slices.Equal(u.Addresses, u.PublicIPs) {
			text += ", known to peers as " + join(u.PublicIPs)
		}
		line("uplink", text, nil)
	}
	if l := s.Lease; l != nil {
		line("lease", join(l.Subnets)+", "+expiry(l.Expires), nil)
	} else if env, err := subnet.ReadEnv(s.SubnetFile.Path); err == nil {
		line("lease", env.Subnets.String()+", from the subnet file", t.warn)
	} else if s.Network != nil {
		line("lease", "none", t.warn)
	}
	for _, d := range s.Devices {
		line("device", fmt.Sprintf("%s, %s, mtu %d", d.Name, d.Type, d.MTU), nil)
	}
	if s.Lease != nil {
		line("peers", fmt.Sprint(s.Peers), nil)
	}
	line("probes", probed(s.Reached), t.warnUnless(len(s.Unreached) == 0))
	for i, l := range s.Unreached {
		if i == maxUnreached {
			line("", fmt.Sprintf("and %d more: flannelctl leases lists them", len(s.Unreached)-i), t.warn)
			break
		}
		for _, r := range l.Reachability {
			if r.Problem != "" {
				line("", fmt.Sprintf("%s, for %s: %s", join(l.Subnets), ago(r.Since), r.Problem), t.warn)
			}
		}
	}
	for _, l := range s.LeftOut {
		line("", join(l.Subnets)+": "+l.Problem, t.warn)
	}
	for _, text := range s.Overlaps {
		line("overlap", text, t.warn)
	}
	if s.MTU > 0 {
		line("mtu for pods", fmt.Sprint(s.MTU), nil)
	}
	state := func(ok bool, yes, no string) (string, func(string) styled) {
		if ok {
			return yes, t.ok
		}
		return no, t.warn
	}
	if s.Rules.Mode != "" {
		text, colour := state(s.Rules.InPlace, s.Rules.Mode+", in place", s.Rules.Mode+", not in place")
		line("rules", text, colour)
	}
	text, colour := state(s.SubnetFile.Written, s.SubnetFile.Path, s.SubnetFile.Path+", missing or wrong")
	line("subnet file", text, colour)
	if s.Store.Name != "" {
		text, colour := state(s.Store.Trouble == "", s.Store.Name, s.Store.Name+": "+s.Store.Trouble)
		line("leases from", text, colour)
	}
	for _, duty := range slices.Sorted(maps.Keys(s.Errors)) {
		line("error", duty+": "+s.Errors[duty], t.bad)
	}
	t.table(nil, rows)
}

// maxUnreached is how many peers at which packets do not arrive status shows.
const maxUnreached = 10

// stateText says what the probes of a peer have found.
var stateText = map[probe.State]string{
	probe.Reachable: "reachable", probe.HostOnly: "not reachable, but the host is", probe.Silent: "silent",
	probe.NoReply: "without a reply, ever (a firewall may drop ICMP)", probe.NoAddress: "without a pod yet",
	probe.Unknown: "not probed yet",
}

// probed counts what the probes of peers have found.
func probed(count map[probe.State]int) string {
	var parts []string
	for _, state := range probe.States {
		if n := count[state]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, stateText[state]))
		}
	}
	return strings.Join(parts, ", ")
}

func join[T fmt.Stringer](all []T) string {
	var parts []string
	for _, v := range all {
		parts = append(parts, v.String())
	}
	return strings.Join(parts, ", ")
}

func ago(at time.Time) string { return time.Since(at).Round(time.Second).String() }

// expiry returns a text for the end of a lease.
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

// leases prints the leases as a table, with columns for each family in use.
func (t *tool) leases(leases []network.Lease) {
	var rows [][]cell
	for _, l := range leases {
		var colour func(string) styled
		note := l.Problem
		if l.Own {
			colour, note = t.ok, "this node"
		}
		expires := ""
		if !l.Expires.IsZero() {
			expires = time.Until(l.Expires).Round(time.Second).String()
		}
		keys := ""
		if !l.Keys.IsZero() {
			keys = ago(l.Keys) + " old"
		}
		rows = append(rows, []cell{
			{of(l.Subnets, netip.Prefix.Addr, netip.Addr.Is4), colour}, {of(l.Subnets, netip.Prefix.Addr, netip.Addr.Is6),
				colour},
			{of(l.PublicIPs, itself, netip.Addr.Is4), nil}, {of(l.PublicIPs, itself, netip.Addr.Is6), nil},
			{l.Backend, nil}, {expires, nil}, {keys, nil}, t.reachable(l), {note, t.warnUnless(l.Own)},
		})
	}
	t.table([]string{"SUBNET", "IPV6 SUBNET", "PUBLIC IP", "PUBLIC IPV6", "BACKEND", "EXPIRES IN", "KEYS", "REACHABLE", "NOTE"}, rows)
}

// reachable returns what the probes know of a peer: of the family in which it is reached the worst.
func (t *tool) reachable(l network.Lease) cell {
	texts := map[probe.State]string{
		probe.HostOnly: "no, only its host", probe.Silent: "no", probe.NoReply: "no reply yet", probe.NoAddress: "no pod yet",
	}
	for _, state := range []probe.State{probe.Silent, probe.HostOnly, probe.NoReply, probe.NoAddress, probe.Reachable} {
		for _, r := range l.Reachability {
			switch {
			case r.State != state:
			case state == probe.Reachable && r.RTT > 0:
				rtt := time.Duration(r.RTT * float64(time.Second)).Round(10 * time.Microsecond)
				return cell{fmt.Sprintf("for %s, %s", ago(r.Since), rtt), t.ok}
			case state == probe.Reachable:
				return cell{"for " + ago(r.Since), t.ok}
			default:
				return cell{fmt.Sprintf("%s, for %s", texts[state], ago(r.Since)), t.warnUnless(r.Problem == "")}
			}
		}
	}
	return cell{}
}

func (t *tool) warnUnless(fine bool) func(string) styled {
	if fine {
		return t.ok
	}
	return t.warn
}

func itself(a netip.Addr) netip.Addr { return a }

// of returns the first value of a family as text.
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
		Short: "Show the difference between actual and desired state, as commands that repair it",
		Long: `diff compares the actual state of the host with the desired state, and prints the commands that repair the
differences: ip, bridge, iptables-restore and nft. It changes nothing by itself, but a running daemon repairs a
difference as soon as it learns of the difference. Exit status 1: there are differences.`,
		Args: cobra.NoArgs,
		RunE: t.withSource(func(ctx context.Context, src source) (result, error) {
			commands, err := src.Diff(ctx)
			return result{commands, func() { t.commands("", commands) }, len(commands) > 0}, err
		}),
	}
}
