package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/network"
	"github.com/flanneld/flanneld/subnet"
)

// A check looks for one kind of fault. Its name is what the documentation calls
// it (Documentation/troubleshooting.md).
type check struct {
	name  string
	about string // what is looked for
	look  func(*patient) []problem
}

// A problem is what a check has found.
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
	{"daemon-down", "flanneld runs, and answers", daemonDown},
	{"daemon-waiting", "flanneld is ready", daemonWaiting},
	{"daemon-error", "flanneld can do all that it wants to", daemonError},
	{"store-unreachable", "etcd, or the API server, answers", storeUnreachable},
	{"lease-missing", "this node has a lease", leaseMissing},
	{"lease-expired", "the lease is renewed", leaseExpired},
	{"peer-left-out", "all leases are those of peers that can be reached", peerLeftOut},
	{"out-of-sync", "the host has the devices, routes and rules that it should", outOfSync},
	{"subnet-file", "subnet.env is there and says what it should", subnetFile},
	{"ip-forward", "the kernel forwards", ipForward},
	{"br-netfilter", "iptables sees what crosses a bridge", brNetfilter},
	{"rp-filter", "the kernel does not drop what comes in by another way than it would send", rpFilter},
	{"forward-drop", "the firewall forwards pods' packets", forwardDrop},
	{"port-blocked", "the firewall lets peers' packets in", portBlocked},
	{"port-taken", "nobody else uses the UDP port", portTaken},
	{"mtu-uplink", "the uplink carries what pods send", mtuUplink},
	{"mtu-bridge", "pods' devices send no more than that", mtuBridge},
	{"checksum-offload", "the kernel gets checksums in tunnels right", checksumOffload},
	{"clock-skew", "this host's clock is right", clockSkew},
	{"peer-unreachable", "peers' hosts can be reached", peerUnreachable},
}

// A patient is the node, and what is known of it.
type patient struct {
	*tool
	ctx        context.Context
	source     source
	daemonless error // why the daemon was not asked; nil: it was
	status     network.Status
	env        subnet.Env // what subnet.env says
	envErr     error
	leases     []network.Lease
	rulesets   []ruleset
}

// checksOf returns the checks of a node with a backend, the backend's own among
// them; of all backends, for "".
func checksOf(backendType string) []check {
	all := slices.Clone(checks)
	for _, t := range backend.Types() {
		if backendType != "" && t.Name != backendType {
			continue
		}
		for _, c := range t.Checks {
			all = append(all, check{c.Name, c.About + ", with the " + t.Name + " backend", func(p *patient) []problem { return p.run(c) }})
		}
	}
	return all
}

// run runs a backend's check.
func (p *patient) run(c backend.Check) []problem {
	if p.status.Lease == nil {
		return nil
	}
	n := backend.Node{Networks: p.env.Networks, Devices: p.devices()}
	for _, l := range p.leases {
		if !l.Own && l.Problem == "" {
			n.Peers = append(n.Peers, l.Lease())
		}
	}
	var found []problem
	for _, f := range c.Run(p.ctx, n) {
		found = append(found, problem{f.Text, f.Fix})
	}
	return found
}

func (t *tool) doctorCommand() *cobra.Command {
	list := false
	cmd := t.outputFlag(&cobra.Command{
		Use:   "doctor",
		Short: "Look for what is wrong, and say how to mend it",
		Long: `doctor looks for what keeps pods from talking, and prints what it finds with the commands that mend it. It changes nothing.
Exit status 1 says that something was found. Documentation/troubleshooting.md tells more of each finding.`,
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
	cmd.Flags().BoolVar(&list, "list", false, "list the checks, and do nothing")
	return cmd
}

func (t *tool) doctor(ctx context.Context) error {
	src, daemonless, err := t.open(ctx)
	if err != nil {
		return err
	}
	defer src.Close()
	p := &patient{tool: t, ctx: ctx, source: src, daemonless: daemonless}
	if p.status, err = src.Status(ctx); err != nil {
		return err
	}
	p.env, p.envErr = subnet.ReadEnv(t.options.SubnetFile)
	p.leases, _ = src.Leases(ctx) // none: other checks say why
	p.rulesets = rulesets(ctx)
	found := []finding{}
	all := checksOf(p.status.Backend)
	for _, c := range all {
		for _, f := range c.look(p) {
			found = append(found, finding{c.name, f.text, f.fix})
		}
	}
	if t.output == "json" {
		err = printJSON(found)
	} else {
		t.findings(found, len(all))
	}
	if err == nil && len(found) > 0 {
		return errFound
	}
	return err
}

// findings prints them for people.
func (t *tool) findings(found []finding, checks int) {
	if len(found) == 0 {
		fmt.Fprintln(t.out, t.ok(fmt.Sprintf("All is well: %d checks found nothing.", checks)))
		return
	}
	for _, f := range found {
		fmt.Fprintf(t.out, "%s %s\n", t.bad(f.Check+":"), f.Text)
		for _, command := range f.Fix {
			for line := range strings.Lines(command) {
				fmt.Fprintf(t.out, "    %s\n", strings.TrimRight(line, "\n"))
			}
		}
	}
}
