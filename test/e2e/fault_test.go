package e2e

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/flanneld/flanneld/pkg/nstest"
	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// A scenario is a network that faults are tried on: a backend, a firewall, and a number of peers.
type scenario struct {
	name, backend string
	nftables      bool
	legacy        bool     // iptables is iptables-legacy
	devices       []string // of the daemon
	strangers     int      // leases of nodes that do not exist
	long          bool     // left to make test-long
	faults        []fault  // to try
	device        string   // of a type that not every kernel has
	ipv4          bool     // without IPv6
}

var scenarios = []scenario{
	{name: "vxlan", backend: `{"Type": "vxlan"}`, devices: vteps, strangers: 2, faults: everyFault},
	{name: "host-gw", backend: `{"Type": "host-gw"}`, strangers: 2, long: true, faults: everyFault},
	{name: "vxlan direct", backend: `{"Type": "vxlan", "DirectRouting": true}`, nftables: true, devices: vteps,
		strangers: 2, long: true, faults: slices.Concat(routeFaults, uplinkFaults, ruleFaults)},
	{name: "host-gw, iptables-legacy", backend: `{"Type": "host-gw"}`, legacy: true, strangers: 2, faults: ruleFaults},
	// With so many peers, routes go through nexthop objects.
	{name: "vxlan, 300 peers", backend: `{"Type": "vxlan"}`, nftables: true, devices: vteps, strangers: 300, long: true,
		faults: slices.Concat(deviceFaults, routeFaults, neighbourFaults, uplinkFaults)},
	{name: "ipip", backend: `{"Type": "ipip"}`, devices: []string{"flannel.ipip"}, strangers: 2,
		faults: slices.Concat(deviceFaults, routeFaults, uplinkFaults,
			daemonFaults), device: "ipip local 198.18.0.1", ipv4: true},
}

var vteps = []string{"flannel.1", "flannel-v6.1"}

// A testbed is a scenario with two nodes, a pod on each, and probes between the pods, both ways, and to the outside,
// in both families. Faults happen to the first node.
type testbed struct {
	*lab.Lab
	scenario
	node, peer *lab.Node
	pods       []*lab.Pod // one of each node
	probes     []*lab.Probe
	underlay   []*lab.Probe  // between the nodes' own addresses
	key        string        // of the node's lease
	theirs     subnet.Lease  // the peer's lease
	interval   time.Duration // of a probe
	want       string        // the state without a fault
	others     []string      // routes of other programs, while the routes are gone
	unlimit    func() error  // ends a limit of the daemon
	memory     error         // why the daemon's memory has no limit; nil: it has
}

// memoryLimit is the limit of the daemon's memory during all faults, in bytes: what Documentation/kube-flannel.yml
// requests. The manifest sets no limit.
const memoryLimit = 30 << 20

// newTestbed starts a testbed whose probes send a packet in each interval.
func newTestbed(ctx context.Context, t testing.TB, g scenario, interval time.Duration) *testbed {
	t.Helper()
	labtest.NeedDevice(t, g.device)
	// The nodes take their subnets from the first hundred. Strangers have others.
	ipv6 := ipv6Network
	if g.ipv4 {
		ipv6 = `"EnableIPv6": false`
	}
	config := fmt.Sprintf(`{"Network": "10.4.0.0/14", %s, "EnableNFTables": %v, "Backend": %s}`, ipv6,
		g.nftables, g.backend)
	l := labtest.New(ctx, t, config, lab.NodeOptions{}, lab.NodeOptions{})
	s := &testbed{Lab: l, scenario: g, node: l.Nodes()[0], peer: l.Nodes()[1], interval: interval}
	labtest.Do(t, joinAll(ctx, s))
	s.memory = s.node.LimitMemory(memoryLimit)
	s.startDaemons(ctx, t)
	s.startProbes(ctx, t)
	labtest.Do(t, s.waitTraffic(ctx, time.Now()))
	last := ""
	labtest.Do(t, lab.Poll(ctx, "the state to settle", func() (err error) {
		last, s.want = s.want, ""
		if s.want, err = s.state(ctx); err == nil && s.want != last {
			err = errors.New("it changes")
		}
		return err
	}))
	return s
}

// startDaemons prepares the nodes, and starts the daemons on them.
func (s *testbed) startDaemons(ctx context.Context, t testing.TB) {
	t.Helper()
	run := func(lines ...string) {
		t.Helper()
		for _, n := range s.Nodes() {
			for _, line := range lines {
				labtest.Must(n.Run(ctx, line))(t)
			}
		}
	}
	// Duplicate address detection would delay the uplink's return by two seconds.
	run("sysctl -qw net.ipv6.conf.default.accept_dad=0 net.ipv6.conf.eth0.accept_dad=0")
	// Faults that follow each other are taken for a fight, and then only the regular checks restore the rules.
	resync := "--iptables-resync=1"
	if s.legacy {
		// As kubelet marks the variant that a host uses.
		run("iptables-legacy -t mangle -N KUBE-IPTABLES-HINT", "ip6tables-legacy -t mangle -N KUBE-IPTABLES-HINT")
		resync = "--iptables-resync=600" // there are no notifications, and faults are found nevertheless
	}
	labtest.Start(ctx, t, s.Lab, "--ip-masq", resync)
	for key, lease := range labtest.Must(s.Etcd.Leases(ctx))(t) {
		switch lease.Attrs.PublicIP {
		case s.node.IPv4:
			s.key = key
		case s.peer.IPv4:
			s.theirs = lease
		}
	}
	if !s.nftables {
		// Docker sets this policy: what the daemon does not accept is dropped.
		for _, program := range s.iptables() {
			run(program + " -P FORWARD DROP")
		}
	}
}

// startProbes adds a pod to each node, and starts the probes.
func (s *testbed) startProbes(ctx context.Context, t testing.TB) {
	t.Helper()
	var pods []*lab.Pod
	for _, n := range s.Nodes() {
		p := labtest.Must(n.AddPod(ctx, "pod"))(t)
		labtest.Do(t, p.Mirror())
		pods = append(pods, p)
	}
	s.pods = pods
	labtest.Do(t, s.Outside.Mirror())
	for i, from := range pods {
		for j, as := range from.Addrs() {
			s.probes = append(s.probes, from.StartProbe(pods[1-i].Addrs()[j], from.MTU, as, s.interval))
		}
	}
	for _, dst := range []netip.Addr{lab.Outside, lab.OutsideV6}[:len(pods[0].Addrs())] {
		s.probes = append(s.probes, pods[0].StartProbe(dst, pods[0].MTU, netip.Addr{}, s.interval))
	}
	labtest.Do(t, s.peer.Mirror())
	for _, dst := range s.peer.Addrs() {
		s.underlay = append(s.underlay, s.node.StartProbe(dst, 1400, netip.Addr{}, s.interval))
	}
	t.Cleanup(func() {
		for _, p := range slices.Concat(s.probes, s.underlay) {
			p.Stop()
		}
	})
}

// state returns all that the daemons maintain: in the nodes' kernels, in etcd, in files.
func (s *testbed) state(ctx context.Context) (string, error) {
	var b strings.Builder
	for _, n := range s.Nodes() {
		held, err := n.Holds(ctx)
		if err != nil {
			return "", err
		}
		env, err := n.SubnetEnv()
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&b, "# %s: %+v\n%s\n", n.Hostname, env, held)
	}
	records, err := s.Etcd.List(ctx, lab.Prefix+"/subnets/")
	for _, key := range slices.Sorted(maps.Keys(records)) {
		fmt.Fprintf(&b, "%s %s\n", key, records[key])
	}
	return b.String(), err
}

// stateAndRoutes returns the state and all routes of the node, some of which may hide the daemon's.
func (s *testbed) stateAndRoutes(ctx context.Context) (string, error) {
	state, err := s.state(ctx)
	if err != nil {
		return "", err
	}
	routes, err := s.node.Run(ctx, "ip route")
	return state + routes, err
}

// waitTraffic waits until all probes are answered that were sent since that time.
func (s *testbed) waitTraffic(ctx context.Context, since time.Time) error {
	return lab.Poll(ctx, "pods to talk", func() error {
		var silent []string
		for _, p := range s.probes {
			if !p.Steady(since) {
				silent = append(silent, p.What)
			}
		}
		if len(silent) > 0 {
			return fmt.Errorf("silence from %s", strings.Join(silent, ", "))
		}
		return nil
	})
}

// waitRestored waits until the state is as it was without a fault.
func (s *testbed) waitRestored(ctx context.Context) error {
	return lab.Poll(ctx, "the state to be restored", func() error {
		now, err := s.state(ctx)
		if err == nil && now != s.want {
			err = errors.New(difference(s.want, now))
		}
		return err
	})
}

// difference lists the lines that one of two texts has more often.
func difference(want, have string) string {
	surplus := map[string]int{}
	for line := range strings.Lines(have) {
		surplus[line]++
	}
	for line := range strings.Lines(want) {
		surplus[line]--
	}
	var b strings.Builder
	for _, line := range slices.Sorted(maps.Keys(surplus)) {
		switch n := surplus[line]; {
		case n > 0:
			fmt.Fprintf(&b, "\n+ %s", strings.TrimSpace(line))
		case n < 0:
			fmt.Fprintf(&b, "\n- %s", strings.TrimSpace(line))
		}
	}
	return b.String()
}

// faultPause is the time between faults when recovery is measured.
const faultPause = 1500 * time.Millisecond

// recoveryLimit is how long recovery from a fault may take before the test fails. Other tests run at the same time:
// BenchmarkFaults measures how long recovery takes.
const recoveryLimit = 30 * time.Second

// A recovery is how long a fault had an effect.
type recovery struct {
	silence  time.Duration // until all pods talked again
	last     string        // the probe that was answered last
	underlay time.Duration // until the nodes themselves talked again
	state    time.Duration // until the state was as before, at the latest
}

// recoverFrom injects a fault and waits until everything is as before.
func (s *testbed) recoverFrom(ctx context.Context, f fault, now daemonState) (r recovery, err error) {
	before := ""
	if now == frozen {
		// A frozen daemon repairs nothing, so that the fault must be visible.
		if before, err = s.stateAndRoutes(ctx); err != nil {
			return r, err
		}
		if err := s.node.Freeze(ctx); err != nil {
			return r, err
		}
		defer s.node.Thaw()
	}
	start := time.Now()
	if err := f.inject(ctx, s); err != nil {
		return r, fmt.Errorf("injecting the fault: %w", err)
	}
	if now == frozen && f.undo == nil {
		if after, err := s.stateAndRoutes(ctx); err == nil && after == before {
			return r, errors.New("the fault changes nothing")
		}
	}
	if f.undo != nil {
		start = time.Now()
		if err := f.undo(ctx, s); err != nil {
			return r, fmt.Errorf("undoing the fault: %w", err)
		}
	}
	if now == frozen {
		start = time.Now()
		if err := s.node.Thaw(); err != nil {
			return r, err
		}
	}
	done := time.Now()
	ctx, cancel := context.WithTimeout(ctx, lab.Patiently(recoveryLimit))
	defer cancel()
	if err := s.waitTraffic(ctx, done); err != nil {
		return r, err
	}
	if f.restore == nil {
		err = s.waitRestored(ctx)
		r.state = time.Since(start)
	}
	if err := s.waitTraffic(ctx, done); err != nil { // still, or again
		return r, err
	}
	for _, p := range s.probes {
		silence, err := p.Silence(ctx, start)
		if err != nil {
			return r, err
		}
		if silence > r.silence {
			r.silence, r.last = silence, p.What
		}
	}
	for _, p := range s.underlay {
		silence, err := p.Silence(ctx, start)
		if err != nil {
			return r, err
		}
		r.underlay = max(r.underlay, silence)
	}
	if f.restore != nil {
		if err := f.restore(ctx, s); err != nil {
			return r, fmt.Errorf("restoring the state: %w", err)
		}
		err = s.waitRestored(ctx)
		err = errors.Join(err, s.waitTraffic(ctx, time.Now()))
	}
	return r, err
}

// needs skips the test of a fault if the machine cannot do it.
func (s *testbed) needs(t testing.TB, f fault) {
	t.Helper()
	switch {
	case !f.memory || s.memory == nil:
	case errors.Is(s.memory, errors.ErrUnsupported):
		t.Skip(s.memory)
	default:
		nstest.Missing(t, "%v", s.memory)
	}
}

// timedState is the state of the daemon for a fault whose recovery is measured.
func (f fault) timedState() daemonState {
	if f.daemon == either {
		return running
	}
	return f.daemon
}

// reset repairs the testbed after a fault from which the daemon did not recover, so that the next one can be tried.
func (s *testbed) reset(ctx context.Context) error {
	for _, n := range s.Nodes() {
		n.Thaw()
		n.Kill()
		for _, flush := range []string{"ip route flush proto static", "ip -6 route flush proto static"} {
			if _, err := n.Run(ctx, flush); err != nil {
				return err
			}
		}
		if err := errors.Join(n.ConfigureUplink(ctx, n.IPv4), n.Restart(ctx), n.WaitReady(ctx)); err != nil {
			return err
		}
	}
	return errors.Join(s.waitTraffic(ctx, time.Now()), s.waitRestored(ctx))
}

// others are objects of other programs, of each kind that the daemon sets too. Some are inside the network.
var others = []string{
	"link add other0 type veth peer name other9",
	// Their link-local addresses would come later than what is compared.
	"link set other0 addrgenmode none", "link set other9 addrgenmode none",
	"link set other0 up", "link set other9 up",
	"link add other1 type bridge", "link add other2 type vxlan id 77 dstport 4790 dev other0",
	"addr add 198.18.9.1/24 dev other0", "addr add fd18:9::1/64 dev other0 nodad", "addr add 10.7.251.1/32 dev lo",
	"neigh add 198.18.9.2 lladdr 02:00:00:00:09:02 dev other0 nud permanent",
	"neigh add fd18:9::2 lladdr 02:00:00:00:09:02 dev other0 nud permanent",
	"route add 10.7.250.0/24 via 198.18.9.2 proto static", "route add 10.7.252.0/24 dev other0 proto 99 metric 50",
	"route add blackhole 203.0.113.0/24", "route add 10.4.0.0/14 via 198.18.9.2 table 77",
	"route add fd00:5:0:f::/64 via fd18:9::2 proto static", "route add fd00:5::/48 via fd18:9::2 table 77",
	"rule add pref 100 to 198.51.100.0/24 lookup 77", "rule add pref 101 fwmark 7 lookup 77",
	"nexthop add id 777 via 198.18.9.2 dev other0 proto static",
}

// otherObjects returns what is not the daemon's on the node, except for the uplink, which faults take away.
func (s *testbed) otherObjects(ctx context.Context, t testing.TB) string {
	t.Helper()
	var b strings.Builder
	for line := range strings.Lines(labtest.Must(s.node.OtherObjects(ctx))(t)) {
		if !strings.Contains(line, "eth0") && !strings.Contains(line, "fe80::/64") { // flushRoutes does not restore these
			b.WriteString(line)
		}
	}
	return b.String()
}

// TestFaults: after each fault pods talk again, and the state is as before. A fault in the kernel happens while the
// daemon runs in one scenario, and while the daemon is frozen in the next. After all faults, what belongs to other
// programs is as it was before.
func TestFaults(t *testing.T) {
	t.Parallel()
	for i, g := range scenarios {
		if !labtest.Selected(!g.long) {
			continue
		}
		t.Run(g.name, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t, 10*time.Minute)
			s := newTestbed(ctx, t, g, 60*time.Millisecond) // more packets would keep the processors busy
			labtest.Do(t, s.node.Script(ctx, others...))
			// The kernel completes IPv6 of a device when it has noticed the carrier, and on a busy machine that takes a while.
			waitTraces(ctx, t, s.node, []trace{
				{"ip link show other0", " state UP "}, {"ip link show other9", " state UP "},
				{"ip -6 route show table local", "local fd18:9::1 dev other0 "},
			}, true)
			before := s.otherObjects(ctx, t)
			for j, f := range g.faults {
				if f.on != nil && !f.on(g) {
					continue
				}
				now := f.daemon
				if now == either {
					now = []daemonState{running, frozen}[(i+j)%2]
				}
				name := f.name
				if now == frozen {
					name += ", frozen"
				}
				t.Run(name, func(t *testing.T) {
					s.needs(t, f)
					r, err := s.recoverFrom(ctx, f, now)
					if err != nil {
						t.Error(err)
						labtest.Do(t, s.reset(ctx))
						return
					}
					t.Logf("pods talk again after %v (nodes after %v), all is as before after %v; last: %s",
						r.silence.Round(time.Millisecond), r.underlay.Round(time.Millisecond), r.state.Round(time.Millisecond), r.last)
				})
			}
			for _, n := range s.Nodes() {
				labtest.Do(t, waitDiff(ctx, n, "")) // the daemon agrees
			}
			if s.memory == nil {
				t.Logf("flanneld and its programs have used %d MiB at most", labtest.Must(s.node.MemoryPeak())(t)>>20)
			}
			if after := s.otherObjects(ctx, t); after != before {
				t.Errorf("of what belongs to other programs, this has changed:%s", difference(before, after))
			}
		})
	}
}

// BenchmarkFaults measures how long pods are silent after each fault, in each scenario, and prints a table: with
// -benchtime=3x, medians of three.
func BenchmarkFaults(b *testing.B) {
	medians := map[[2]string]recovery{} // by fault and scenario
	for _, g := range scenarios {
		b.Run(g.name, func(b *testing.B) {
			ctx := labtest.Context(b, 30*time.Minute)
			s := newTestbed(ctx, b, g, 20*time.Millisecond)
			for _, f := range g.faults {
				if f.on != nil && !f.on(g) {
					continue
				}
				b.Run(f.name, func(b *testing.B) {
					s.needs(b, f)
					var all []recovery
					for range b.N {
						// Faults in quick succession are taken for a fight, and not repaired at once.
						time.Sleep(faultPause)
						r, err := s.recoverFrom(ctx, f, f.timedState())
						if err != nil {
							b.Error(err)
							labtest.Do(b, s.reset(ctx))
							return
						}
						all = append(all, r)
					}
					slices.SortFunc(all, func(a, b recovery) int { return cmp.Compare(a.silence, b.silence) })
					median := all[len(all)/2]
					medians[[2]string{f.name, g.name}] = median
					b.ReportMetric(0, "ns/op")
					b.ReportMetric(float64(median.silence.Milliseconds()), "ms-of-silence")
				})
			}
		})
	}
	printFaults(medians)
}

// printFaults prints milliseconds of silence, one line for each fault; in brackets the silence of the nodes
// themselves, unless that is zero.
func printFaults(medians map[[2]string]recovery) {
	if len(medians) == 0 {
		return
	}
	var columns []string
	for _, g := range scenarios {
		for cell := range medians {
			if cell[1] == g.name {
				columns = append(columns, g.name)
				break
			}
		}
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "\nms until pods talk again, 0: within 20 (nodes)\t%s\t\n", strings.Join(columns, "\t"))
	var all []time.Duration
	for _, f := range everyFault {
		line, any := f.name, false
		for _, column := range columns {
			line += "\t"
			if r, ok := medians[[2]string{f.name, column}]; ok {
				any = true
				all = append(all, r.silence)
				line += fmt.Sprint(r.silence.Milliseconds())
				if r.underlay > 0 {
					line += fmt.Sprintf(" (%d)", r.underlay.Milliseconds())
				}
			}
		}
		if any {
			fmt.Fprintln(w, line+"\t")
		}
	}
	w.Flush()
	slices.Sort(all)
	fmt.Printf("\nof %d: median %v, worst %v\n", len(all), all[len(all)/2].Round(time.Millisecond),
		all[len(all)-1].Round(time.Millisecond))
}
