package network

import (
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/backend/backendtest"
	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/pkg/probe"
	"github.com/flanneld/flanneld/subnet"
)

// TestPlans runs the scenarios of testdata/*.txt: events in, plans out. A scenario is a
// list of steps with an empty line between them. A step is lines of input, a line
// "----", and the plan that follows, which "go test ./network -run TestPlans -update"
// writes. The lines of input are
//
//	options  words of: masquerade random forward blackhole probe
//	config   the network's configuration
//	uplink   name, MTU, addresses with prefix lengths, "public" and the addresses peers use
//	own      our lease: the last element of its etcd key, and its value
//	lease    a new or changed lease, likewise; new leases are younger than those before them
//	gone     the last element of the etcd key of a lease that was removed
//	snapshot the leases of this step are all there are
//	foreign  a route of the kernel or another program, see parseForeign; those of a step replace the earlier ones
//	store    the addresses of the store
//	result   what is known of a path: its address, a state, and words of: asks arrives heard
//	host     replace routes and store by what this step has, which may be nothing
//	#        a remark
func TestPlans(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenarios in testdata: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var s scenario
			var out []string
			for i, step := range strings.Split(strings.TrimSpace(string(text)), "\n\n") {
				input, _, _ := strings.Cut(step, "\n----")
				plan, err := s.step(input)
				if err != nil {
					t.Fatalf("step %d: %v", i+1, err)
				}
				out = append(out, strings.TrimRight(input+"\n----\n"+plan, "\n"))
			}
			got := strings.Join(out, "\n\n") + "\n"
			if *backendtest.Update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			} else if got != string(text) {
				t.Errorf("want\n%s\ngot\n%s", text, got)
			}
		})
	}
}

type scenario struct {
	state
	options  Options
	youngest int64 // lease
	probe    bool  // the paths to peers are told, too
}

// step takes one step's events and returns the plan as text.
func (s *scenario) step(input string) (string, error) {
	var u subnet.Update
	var setUp, updated, hosted bool
	var h host
	var results []string
	for line := range strings.Lines(input) {
		word, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		var err error
		switch word {
		case "#", "":
		case "options":
			on := func(word string) bool { return slices.Contains(strings.Fields(rest), word) }
			s.probe = on("probe")
			s.options = Options{RandomFully: on("random"), Forward: on("forward"), Blackhole: on("blackhole"),
				IPMasq: family.Pair[bool]{
					IPv4: on("masquerade") || on("masquerade4"), IPv6: on("masquerade") || on("masquerade6"),
				}}
			if on("table") {
				s.table, s.options.RulePriority = 7070, 1000
			}
		case "config":
			s.cfg, err = subnet.ParseConfig([]byte(rest))
			setUp = true
		case "divide": // as etcd's manager does, and Kubernetes' does not
			err = s.cfg.Divide()
			setUp = true
		case "uplink":
			s.uplink, err = backendtest.ParseUplink(rest)
			setUp = true
		case "own":
			var l subnet.Lease
			l, err = backendtest.ParseLease(rest)
			s.own, setUp = &l, true
		case "lease":
			var l subnet.Lease
			l, err = backendtest.ParseLease(rest)
			if stored := s.leases[l.Subnets]; stored != nil {
				l.Created = stored.Created
			} else {
				s.youngest++
				l.Created = s.youngest
			}
			u.Put(&l)
			updated = true
		case "gone":
			var gone subnet.Subnets
			gone, err = subnet.ParseKey(rest)
			u.Delete(gone)
			updated = true
		case "snapshot":
			u.Snapshot, updated = true, true
		case "foreign":
			var r kernel.ForeignRoute
			r, err = parseForeign(rest)
			h.routes, hosted = append(h.routes, r), true
		case "store":
			h.store, h.stores = storeOf(subnet.State{Kind: "etcd", Endpoints: strings.Fields(rest)})
			hosted = true
		case "result":
			results = append(results, rest)
		case "host":
			hosted = true
		default:
			err = fmt.Errorf("unknown word %q", word)
		}
		if err != nil {
			return "", err
		}
	}
	var out strings.Builder
	var concerned subnet.Update
	if hosted {
		if setUp {
			s.host = h
		} else {
			concerned = s.setHost(h)
		}
	}
	if setUp {
		var err error
		if s.backend, err = backend.New(s.cfg, s.uplink); err != nil {
			return fmt.Sprintf("error: %v\n", err), nil
		}
		if s.own != nil {
			writeNodePlan(&out, s.planNode(s.options))
			if s.leases != nil {
				writePeersPlan(&out, s.planAllPeers())
			}
		}
	}
	if hosted {
		for _, o := range s.setup.obstacles(h) {
			fmt.Fprintf(&out, "obstacle: %s\n", o.Name)
		}
		for _, text := range s.setup.overlaps(h, s.own) {
			fmt.Fprintf(&out, "warning: %s\n", text)
		}
	}
	if len(concerned.Leases) > 0 {
		writePeersPlan(&out, s.applyUpdate(concerned))
	}
	for _, text := range results {
		said, err := s.describeResult(text)
		if err != nil {
			return "", err
		}
		fmt.Fprintln(&out, said)
	}
	if updated {
		p := s.applyUpdate(u)
		writePeersPlan(&out, p)
		if s.probe {
			writePaths(&out, p.paths)
		}
		fmt.Fprintf(&out, "other leases: %d\n", s.others())
	}
	return out.String(), nil
}

// describeResult returns what is said of the result of probes: see TestPlans.
func (s *scenario) describeResult(text string) (string, error) {
	words := strings.Fields(text)
	is := func(word string) bool { return slices.Contains(words[2:], word) }
	for _, l := range s.leases {
		for _, p := range s.pathsTo(s.working(), *l, s.overlayAddrs()) {
			if p.Overlay.String() == words[0] {
				r := probe.Result{Path: p, State: probe.State(words[1]), Asks: is("asks"), Arrives: is("arrives"), Heard: is("heard")}
				if is("denied") {
					r.Err = unix.EPERM
				}
				return fmt.Sprintf("%s: %q", text, s.describe(*l, r)), nil
			}
		}
	}
	return "", fmt.Errorf("there is no path to %s", words[0])
}

func writePaths(out *strings.Builder, paths map[string][]probe.Path) {
	for _, peer := range slices.Sorted(maps.Keys(paths)) {
		for _, p := range paths[peer] {
			fmt.Fprintf(out, "path to %s from %s, host %s from %s", p.Overlay, p.Source, p.Public, p.Local)
			if p.Optional {
				out.WriteString(", optional")
			}
			fmt.Fprintln(out)
		}
	}
}

// parseForeign reads a route as kernel.ForeignRoute.Text has it. The word "bridge" after it says that it is of a bridge
// with the first address.
func parseForeign(text string) (r kernel.ForeignRoute, err error) {
	r.Text, r.Bridge = strings.CutSuffix(text, " bridge")
	words := strings.Fields(r.Text)
	if r.Dst, err = netip.ParsePrefix(words[0]); err != nil {
		return r, err
	}
	for i, word := range words[1:] {
		switch word {
		case "via":
			r.Via, err = netip.ParseAddr(words[i+2])
		case "dev":
			r.Dev = words[i+2]
		case "proto":
			r.Kernel = words[i+2] == "kernel"
		case "metric":
			r.Beside = true
		}
	}
	r.Connected = r.Dev != "" && !r.Via.IsValid()
	return r, err
}

func writeNodePlan(out *strings.Builder, p nodePlan) {
	fmt.Fprintf(out, "routes of an earlier daemon are inside: %v\n", p.networks)
	for _, o := range p.objects {
		fmt.Fprintln(out, o)
	}
	mode := "iptables"
	if p.nftables {
		mode = "nftables"
	}
	for f, rules := range p.rules.Each() {
		if f == family.IPv6 {
			mode += ", IPv6"
		}
		for _, r := range rules.Postrouting {
			fmt.Fprintf(out, "%s postrouting: %s: %s\n", mode, r.Verdict, r.Why)
		}
		for _, r := range rules.Forward {
			fmt.Fprintf(out, "%s forward: %s: %s\n", mode, r.Verdict, r.Why)
		}
	}
	fmt.Fprintf(out, "subnet file: network %s, subnet %s, mtu %d, masquerade %t\n", p.env.Networks, p.env.Subnets,
		p.env.MTU, p.env.IPMasq)
}

func writePeersPlan(out *strings.Builder, p peersPlan) {
	for _, owner := range slices.Sorted(maps.Keys(p.objects)) {
		fmt.Fprintf(out, "peer %s\n", owner)
		for _, o := range p.objects[owner] {
			fmt.Fprintf(out, "  %s\n", o)
		}
	}
	slices.SortFunc(p.problems, func(a, b problem) int { return strings.Compare(a.lease.Key(), b.lease.Key()) })
	for _, problem := range p.problems {
		fmt.Fprintf(out, "problem of %s: %s\n", problem.lease.Subnets, problem.text)
	}
	var is, gone []string
	for s := range p.update.Leases {
		is = append(is, s.String())
	}
	for s := range p.update.Gone {
		gone = append(gone, s.String())
	}
	slices.Sort(is)
	slices.Sort(gone)
	fmt.Fprintf(out, "worker: snapshot %t, peers %v, gone %v\n", p.update.Snapshot, is, gone)
}
