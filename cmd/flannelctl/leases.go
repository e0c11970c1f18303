package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/flanneld/flanneld/network"
	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/subnet/etcd"
)

func (t *tool) leasesCommand() *cobra.Command {
	cmd := t.outputFlag(&cobra.Command{
		Use:   "leases",
		Short: "List the leases of all nodes, or reserve and release subnets",
		Long: `leases lists the leases of all nodes as this node knows them. Its commands act on the store, and need no daemon and
no node: they take the same flags and variables for etcd, or Kubernetes, as flanneld.`,
		Args: cobra.NoArgs,
		RunE: t.withSource(func(ctx context.Context, src source) (result, error) {
			leases, err := src.Leases(ctx)
			if err != nil {
				return result{}, fmt.Errorf("no leases: waiting for %w", err)
			}
			return result{leases, func() { t.leases(leases) }, false}, nil
		}),
	})
	cmd.AddCommand(t.listCommand(), t.reserveCommand(), t.releaseCommand())
	return cmd
}

// openStore returns the subnet manager, and a context with the limit for requests to its store.
func (t *tool) openStore(ctx context.Context) (context.Context, subnet.Manager, func(), error) {
	if err := t.complete(); err != nil {
		return nil, nil, nil, err
	}
	if t.storeIsKubernetes(ctx) {
		t.options.KubeSubnetMgr = true
	}
	m, err := t.manager(ctx)
	if err != nil {
		return nil, nil, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	return ctx, m, func() { cancel(); m.Close() }, nil
}

// storeIsKubernetes reports whether a daemon on this host has its leases from Kubernetes: in a pod, the flags of
// flanneld are not those of flannelctl.
func (t *tool) storeIsKubernetes(ctx context.Context) bool {
	if t.direct || t.options.StatusSocket == "" || t.flags.Changed("etcd-endpoints") ||
		t.flags.Changed("discovery-srv") {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, daemonTimeout)
	defer cancel()
	s, err := network.NewClient(t.options.StatusSocket).Status(ctx)
	return err == nil && s.Store.Kind == "kubernetes"
}

// storeError replaces the error of a request that had no success in time by the store's reason.
func storeError(m subnet.Manager, err error) error {
	if s := m.State(); errors.Is(err, context.DeadlineExceeded) && s.Problem != "" {
		return fmt.Errorf("%s: %s", s.Store, s.Problem)
	}
	return err
}

// A holder is a subnet manager that lists what its store has.
type holder interface {
	Holdings(context.Context) ([]subnet.Holding, error)
}

func (t *tool) listCommand() *cobra.Command {
	return t.outputFlag(&cobra.Command{
		Use:   "list",
		Short: "List which node has which subnet, and until when, as the store has it",
		Long: `list shows the leases and the reservations in the store. With etcd, NODE is the host name of a node on which flanneld
is alive; for a node with flannel's own daemon, it is not known.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, m, done, err := t.openStore(cmd.Context())
			if err != nil {
				return err
			}
			defer done()
			all, err := m.(holder).Holdings(ctx)
			if err != nil {
				return storeError(m, err)
			}
			if t.output == "json" {
				return t.printJSON(holdings(all))
			}
			if len(all) == 0 {
				t.printf("There are no leases.\n")
			} else {
				t.holdings(holdings(all), m.State().Kind)
			}
			return nil
		},
	})
}

// A holding is a subnet.Holding in JSON.
type holding struct {
	Subnets   []netip.Prefix `json:"subnets"`
	Node      string         `json:"node,omitempty"`
	PublicIPs []netip.Addr   `json:"publicIPs"`
	Backend   string         `json:"backend,omitempty"`
	Reserved  bool           `json:"reserved"`
	Expires   time.Time      `json:"expires,omitzero"` // zero: never
	Note      string         `json:"note,omitempty"`
}

func holdings(all []subnet.Holding) []holding {
	list := make([]holding, 0, len(all))
	for _, h := range all {
		list = append(list, holding{h.Each(), h.Node, h.Attrs.PublicIPs(), h.Attrs.BackendType, h.Reserved,
			h.Expires.Round(time.Second), h.Note})
	}
	return list
}

// holdings prints a table, with columns for each family in use.
func (t *tool) holdings(all []holding, store string) {
	var rows [][]cell
	for _, h := range all {
		expires, note := "", h.Note
		switch {
		case h.Reserved:
			expires, note = "never", strings.TrimSuffix("reserved, "+note, ", ")
		case !h.Expires.IsZero():
			expires = time.Until(h.Expires).Round(time.Second).String()
		case store == "kubernetes":
			expires = "never"
		}
		rows = append(rows, []cell{
			{of(h.Subnets, netip.Prefix.Addr, netip.Addr.Is4), nil}, {of(h.Subnets, netip.Prefix.Addr, netip.Addr.Is6), nil},
			{h.Node, nil}, {of(h.PublicIPs, itself, netip.Addr.Is4), nil}, {of(h.PublicIPs, itself, netip.Addr.Is6), nil},
			{h.Backend, nil}, {expires, nil}, {note, nil},
		})
	}
	t.table([]string{"SUBNET", "IPV6 SUBNET", "NODE", "PUBLIC IP", "PUBLIC IPV6", "BACKEND", "EXPIRES IN", "NOTE"}, rows)
}

func (t *tool) reserveCommand() *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:   "reserve SUBNET[,SUBNET] PUBLIC-IP[,PUBLIC-IP]",
		Short: "Reserve a subnet for a node, for good",
		Long: `reserve reserves a subnet in etcd for the node with a public address: no other node gets the subnet, and the node takes
it when flanneld starts there the next time. A lease that the node has already becomes the reservation, and nothing
else changes. With IPv4 and IPv6, give the subnets of both families, and at least the IPv4 address of the node.

If the reservation cuts pods off, reserve says so, and waits for your confirmation.`,
		Example: `  flannelctl leases reserve 10.5.34.0/24 192.0.2.7
  flannelctl leases reserve 10.5.34.0/24,fd05:0:0:22::/64 192.0.2.7,2001:db8::7`,
		Args: exactly(2, "a subnet, and the public address of a node"),
		RunE: func(cmd *cobra.Command, args []string) error {
			subnets, err := parseSubnets(args[0])
			if err != nil {
				return err
			}
			node, err := parseAddresses(args[1])
			if err != nil {
				return err
			}
			return t.change(cmd.Context(), yes, func(ctx context.Context, m *etcd.Manager) (*etcd.Change, error) {
				return m.Reserve(ctx, subnets, node)
			})
		},
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not wait for confirmation")
	return cmd
}

func (t *tool) releaseCommand() *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:   "release SUBNET[,SUBNET]",
		Short: "Release a reservation, or the lease of a node that is gone",
		Long: `release deletes a reservation from etcd, or the lease of a node that is gone for good. If the node works with the
reservation, it keeps the subnet as an ordinary lease. A lease of a node on which flanneld runs is not released:
flanneld would write it again at once. One of the subnets of both families is enough.

If the node may be alive, release says so, and waits for your confirmation.`,
		Args: exactly(1, "a subnet"),
		RunE: func(cmd *cobra.Command, args []string) error {
			subnets, err := parseSubnets(args[0])
			if err != nil {
				return err
			}
			return t.change(cmd.Context(), yes, func(ctx context.Context, m *etcd.Manager) (*etcd.Change, error) {
				return m.Release(ctx, subnets)
			})
		},
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not wait for confirmation")
	return cmd
}

// exactly checks the number of arguments.
func exactly(n int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != n {
			return fmt.Errorf("%s needs %s: %s", cmd.Name(), what, cmd.UseLine())
		}
		return nil
	}
}

// change makes a change in etcd that plan decides. If it cuts a node off, change waits for a confirmation.
func (t *tool) change(ctx context.Context, yes bool, plan func(context.Context, *etcd.Manager) (*etcd.Change, error)) error {
	limited, m, done, err := t.openStore(ctx)
	if err != nil {
		return err
	}
	defer done()
	manager, ok := m.(*etcd.Manager)
	if !ok {
		return errors.New("in Kubernetes, a Node has its podCIDR for good: there is nothing to reserve or to release")
	}
	c, err := plan(limited, manager)
	if err != nil {
		return storeError(m, err)
	}
	if len(c.Cuts) > 0 && !yes {
		if !isTerminal(os.Stdin) {
			return fmt.Errorf("nothing was changed, as there is no terminal for the confirmation (use --yes): %s",
				strings.Join(c.Cuts, "; "))
		}
		for _, text := range c.Cuts {
			t.printf("%s %s.\n", t.warn("warning:"), text)
		}
		if !confirm("Continue?") {
			return errors.New("nothing was changed")
		}
	}
	limited, cancel := context.WithTimeout(ctx, storeTimeout) // people take their time
	defer cancel()
	if err := manager.Make(limited, c); err != nil {
		return storeError(m, err)
	}
	t.printf("%s\n", t.ok(c.Effect))
	return nil
}

// parseSubnets reads a subnet, or one of each family.
func parseSubnets(text string) (s subnet.Subnets, err error) {
	for part := range strings.SplitSeq(text, ",") {
		p, err := netip.ParsePrefix(part)
		switch {
		case err != nil || p.Addr().Is4In6():
			return s, fmt.Errorf("%q is not a subnet such as 10.5.34.0/24", part)
		case p != p.Masked():
			return s, fmt.Errorf("%s has host bits set: should it be %s?", p, p.Masked())
		}
		into := (*family.Pair[netip.Prefix])(&s).At(family.Of(p.Addr()))
		if into.IsValid() {
			return s, fmt.Errorf("%s and %s are of one family: give one subnet of each", into, p)
		}
		*into = p
	}
	return s, nil
}

// parseAddresses reads a public address, or one of each family.
func parseAddresses(text string) (subnet.Attrs, error) {
	var ips family.Pair[netip.Addr]
	for part := range strings.SplitSeq(text, ",") {
		ip, err := netip.ParseAddr(part)
		if err != nil || ip.Zone() != "" || ip.Is4In6() || ip.IsUnspecified() {
			return subnet.Attrs{}, fmt.Errorf("%q is not the public address of a node, such as 192.0.2.7", part)
		}
		into := ips.At(family.Of(ip))
		if into.IsValid() {
			return subnet.Attrs{}, fmt.Errorf("%s and %s are of one family: give one address of each", into, ip)
		}
		*into = ip
	}
	return subnet.Attrs{PublicIP: ips.IPv4, PublicIPv6: ips.IPv6}, nil
}
