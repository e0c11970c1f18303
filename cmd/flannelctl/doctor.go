package main

import (
	"context"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/network"
	"github.com/flanneld/flanneld/subnet"
)

// A check finds one kind of problem. Documentation/troubleshooting.md describes the checks by their names.
type check struct {
	name  string
	about string // what is true if there is no problem
	run   func(*diagnosis) []problem
}

// A problem is a result of a check.
type problem struct {
	text string
	fix  []string // commands
}

// A finding is a problem and the name of its check.
type finding struct {
	Check string   `json:"check"`
	Text  string   `json:"text"`
	Fix   []string `json:"fix,omitempty"`
}

var checks = []check{
	{"daemon-down", "flanneld runs, and replies", daemonDown},
	{"daemon-waiting", "flanneld is ready", daemonWaiting},
	{"daemon-error", "flanneld has no errors", daemonError},
	{"store-unreachable", "etcd, or the API server, can be used", storeUnreachable},
	{"lease-missing", "this node has a lease", leaseMissing},
	{"lease-expired", "the lease is renewed", leaseExpired},
	{"peer-left-out", "this node uses the leases of all peers", peerLeftOut},
	{"peer-blocked", "packets arrive at all peers, as the daemon's probes find", peerBlocked},
	{"network-overlap", "the network does not overlap what this host uses", networkOverlap},
	{"out-of-sync", "devices, routes and rules are in the desired state", outOfSync},
	{"subnet-file", "the subnet file is right", subnetFile},
	{"bridge-subnet", "no bridge has an address of the network, but of no subnet of this node", bridgeSubnet},
	{"ip-forward", "the kernel forwards", ipForward},
	{"br-netfilter", "iptables sees bridged packets", brNetfilter},
	{"rp-filter", "no strict reverse path filter drops packets", rpFilter},
	{"forward-drop", "the firewall forwards packets of pods", forwardDrop},
	{"port-blocked", "the firewall accepts packets of peers", portBlocked},
	{"port-taken", "no other program uses the UDP port", portTaken},
	{"mtu-uplink", "the uplink carries the largest packets of pods", mtuUplink},
	{"mtu-bridge", "the MTU of the pods' devices is not too large", mtuBridge},
	{"checksum-offload", "the kernel computes checksums in tunnels correctly", checksumOffload},
	{"clock-skew", "this host's clock is right", clockSkew},
	{"peer-unreachable", "the hosts of peers can be reached", peerUnreachable},
}

// A diagnosis is the state of the node, as the checks need it.
type diagnosis struct {
	*tool
	ctx       context.Context
	source    source
	daemonErr error // why the daemon is not the source; nil: it is
	status    network.Status
	env       subnet.Env // contents of subnet.env
	envErr    error
	leases    []network.Lease
	rulesets  []ruleset
}

// checksOf returns the general checks and those of the backend type; for "", those of all backends.
func checksOf(backendType string) []check {
	all := slices.Clone(checks)
	for _, t := range backend.Types() {
		if backendType != "" && t.Name != backendType {
			continue
		}
		for _, c := range t.Checks {
			about := c.About + ", with the " + t.Name + " backend"
			all = append(all, check{c.Name, about, func(d *diagnosis) []problem { return d.runBackendCheck(c) }})
		}
	}
	return all
}

// runBackendCheck runs a check of the backend.
func (d *diagnosis) runBackendCheck(c backend.Check) []problem {
	if d.status.Lease == nil {
		return nil
	}
	n := backend.Node{Networks: subnet.NetworksOf(d.status.Network...), Devices: d.devices()}
	for _, l := range d.leases {
		if !l.Own && l.Problem == "" {
			n.Peers = append(n.Peers, l.Lease())
		}
	}
	var found []problem
	for _, f := range c.Run(d.ctx, n) {
		found = append(found, problem{f.Text, f.Fix})
	}
	return found
}

func (t *tool) doctorCommand() *cobra.Command {
	list := false
	cmd := t.outputFlag(&cobra.Command{
		Use:   "doctor",
		Short: "Find problems, and show how to fix them",
		Long: `doctor finds reasons why pods cannot communicate, and prints each problem with the commands that fix it.
It changes nothing. Exit status 1: problems were found. Documentation/troubleshooting.md explains each finding.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if list {
				var rows [][]cell
				for _, c := range checksOf("") {
					rows = append(rows, []cell{{c.name, t.bold}, {c.about, nil}})
				}
				t.table(nil, rows)
				return nil
			}
			return t.doctor(cmd.Context())
		},
	})
	cmd.Flags().BoolVar(&list, "list", false, "list the checks, and exit")
	return cmd
}

func (t *tool) doctor(ctx context.Context) error {
	src, daemonErr, err := t.open(ctx)
	if err != nil {
		return err
	}
	defer src.Close()
	d := &diagnosis{tool: t, ctx: ctx, source: src, daemonErr: daemonErr}
	if d.status, err = src.Status(ctx); err != nil {
		return err
	}
	d.env, d.envErr = subnet.ReadEnv(t.options.SubnetFile)
	d.leases, _ = src.Leases(ctx) // on errors, other checks report the reason
	d.rulesets = rulesets(ctx)
	found := []finding{}
	all := checksOf(d.status.Backend)
	for _, c := range all {
		for _, f := range c.run(d) {
			found = append(found, finding{c.name, f.text, f.fix})
		}
	}
	if t.output == "json" {
		err = t.printJSON(found)
	} else {
		t.findings(found, len(all))
	}
	if err == nil && len(found) > 0 {
		return errFound
	}
	return err
}

// findings prints the findings as text.
func (t *tool) findings(found []finding, checks int) {
	if len(found) == 0 {
		t.printf("%s\n", t.ok(fmt.Sprintf("No problems found: %d checks passed.", checks)))
		return
	}
	for _, f := range found {
		t.printf("%s %s\n", t.bad(f.Check+":"), f.Text)
		t.commands("    ", f.Fix)
	}
}
