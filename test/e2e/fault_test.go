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

	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// A ground is a network that faults are tried on: a backend, a firewall, and
// how many peers there are besides.
type ground struct {
	name, backend string
	nftables      bool
	legacy        bool     // iptables is iptables-legacy
	devices       []string // of the daemon
	strangers     int      // leases of nodes that are not there
	faults        []fault  // what is tried
	device        string   // of a type that not every kernel has
	ipv4          bool     // no more than that
}

var grounds = []ground{
	{name: "vxlan", backend: `{"Type": "vxlan"}`, devices: vteps, strangers: 2, faults: everyFault},
	{name: "host-gw", backend: `{"Type": "host-gw"}`, strangers: 2, faults: everyFault},
	{name: "vxlan direct", backend: `{"Type": "vxlan", "DirectRouting": true}`, nftables: true, devices: vteps, strangers: 2,
		faults: slices.Concat(routeFaults, uplinkFaults, ruleFaults)},
	{name: "host-gw, iptables-legacy", backend: `{"Type": "host-gw"}`, legacy: true, strangers: 2, faults: ruleFaults},
	// So many that routes go through nexthop objects.
	{name: "vxlan, 300 peers", backend: `{"Type": "vxlan"}`, nftables: true, devices: vteps, strangers: 300,
		faults: slices.Concat(deviceFaults, routeFaults, neighbourFaults, uplinkFaults)},
	{name: "ipip", backend: `{"Type": "ipip"}`, devices: []string{"flannel.ipip"}, strangers: 2,
		faults: slices.Concat(deviceFaults, routeFaults, uplinkFaults, daemonFaults), device: "ipip local 198.18.0.1", ipv4: true},
}

var vteps = []string{"flannel.1", "flannel-v6.1"}

// A scene is a ground with two nodes, a pod on each, and probes both ways and
// to the outside, in both families. Faults happen to the first node.
type scene struct {
	*lab.Lab
	ground
	node, peer *lab.Node
	probes     []*lab.Probe
	underlay   []*lab.Probe // of the nodes themselves, past the daemon
	key        string       // of the node's lease
	theirs     subnet.Lease // the peer's lease
	whole      string       // state as it should be
	others     []string     // routes of others, while they are gone
}

func setScene(ctx context.Context, t testing.TB, g ground) *scene {
	t.Helper()
	// The nodes take their subnets from the first hundred, strangers have others.
	labtest.NeedDevice(t, g.device)
	ipv6 := ipv6Network
	if g.ipv4 {
		ipv6 = `"EnableIPv6": false`
	}
	config := fmt.Sprintf(`{"Network": "10.4.0.0/14", %s, "EnableNFTables": %v, "Backend": %s}`, ipv6, g.nftables, g.backend)
	l := labtest.New(ctx, t, config, lab.NodeOptions{}, lab.NodeOptions{})
	s := &scene{Lab: l, ground: g, node: l.Nodes()[0], peer: l.Nodes()[1]}
	labtest.Do(t, joinAll(ctx, s))
	for _, n := range l.Nodes() {
		// Else the uplink itself takes two seconds to come back.
		labtest.Must(n.Run(ctx, "sysctl -qw net.ipv6.conf.default.accept_dad=0 net.ipv6.conf.eth0.accept_dad=0"))(t)
	}
	if g.legacy {
		// As kubelet marks the variant that a host uses.
		for _, n := range l.Nodes() {
			labtest.Must(n.Run(ctx, "iptables-legacy -t mangle -N KUBE-IPTABLES-HINT"))(t)
			labtest.Must(n.Run(ctx, "ip6tables-legacy -t mangle -N KUBE-IPTABLES-HINT"))(t)
		}
	}
	// One fault of rules after another is taken for a quarrel, and then set right
	// by the regular checks alone.
	resync := "--iptables-resync=1"
	if g.legacy {
		resync = "--iptables-resync=600" // what nobody tells of is seen nevertheless
	}
	labtest.Start(ctx, t, l, "--ip-masq", resync)
	for key, lease := range labtest.Must(l.Etcd.Leases(ctx))(t) {
		switch lease.Attrs.PublicIP {
		case s.node.IPv4:
			s.key = key
		case s.peer.IPv4:
			s.theirs = lease
		}
	}
	if !g.nftables {
		// As Docker sets it: what the daemon does not accept is dropped.
		for _, n := range l.Nodes() {
			for _, program := range s.iptables() {
				labtest.Must(n.Run(ctx, program+" -P FORWARD DROP"))(t)
			}
		}
	}
	var pods []*lab.Pod
	for _, n := range l.Nodes() {
		p := labtest.Must(n.AddPod(ctx, "pod"))(t)
		labtest.Do(t, p.Mirror())
		pods = append(pods, p)
	}
	labtest.Do(t, l.Outside.Mirror())
	for i, from := range pods {
		for j, as := range from.Addrs() {
			s.probes = append(s.probes, from.StartProbe(pods[1-i].Addrs()[j], from.MTU, as))
		}
	}
	for _, dst := range []netip.Addr{lab.Outside, lab.OutsideV6}[:len(pods[0].Addrs())] {
		s.probes = append(s.probes, pods[0].StartProbe(dst, pods[0].MTU, netip.Addr{}))
	}
	labtest.Do(t, s.peer.Mirror())
	for _, dst := range s.peer.Addrs() {
		s.underlay = append(s.underlay, s.node.StartProbe(dst, 1400, netip.Addr{}))
	}
	t.Cleanup(func() {
		for _, p := range slices.Concat(s.probes, s.underlay) {
			p.Stop()
		}
	})
	labtest.Do(t, s.healed(ctx, time.Now()))
	last := ""
	labtest.Do(t, lab.Poll(ctx, "the state to settle", func() (err error) {
		last, s.whole = s.whole, ""
		if s.whole, err = s.state(ctx); err == nil && s.whole != last {
			err = errors.New("it changes")
		}
		return err
	}))
	return s
}

// state is all that the daemons keep: in the nodes' kernels, in etcd, in files.
func (s *scene) state(ctx context.Context) (string, error) {
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

// shown is the state, and what may be in the way of it.
func (s *scene) shown(ctx context.Context) (string, error) {
	state, err := s.state(ctx)
	if err != nil {
		return "", err
	}
	routes, err := s.node.Run(ctx, "ip route")
	return state + routes, err
}

// healed waits until all probes that were sent since then are answered.
func (s *scene) healed(ctx context.Context, since time.Time) error {
	return lab.Poll(ctx, "pods to talk", func() error {
		var mute []string
		for _, p := range s.probes {
			if !p.Steady(since) {
				mute = append(mute, p.What)
			}
		}
		if len(mute) > 0 {
			return fmt.Errorf("silence from %s", strings.Join(mute, ", "))
		}
		return nil
	})
}

// restored waits until the state is as it was at first, but for what is moved
// on purpose.
func (s *scene) restored(ctx context.Context) error {
	return lab.Poll(ctx, "the state to be whole again", func() error {
		now, err := s.state(ctx)
		if err == nil && now != s.whole {
			err = errors.New(difference(s.whole, now))
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

// faultPause is how far faults are apart when their time is measured.
const faultPause = 1500 * time.Millisecond

// faultPatience is how long a fault may take to heal before the test fails.
const faultPatience = 15 * time.Second

// A recovery is how long a fault was felt.
type recovery struct {
	silence  time.Duration // until pods talked again, all of them
	last     string        // who was the last to talk
	underlay time.Duration // until the nodes themselves talked again
	whole    time.Duration // until the state was as before, at the latest
}

// suffer has a fault happen and waits until everything is as before.
func (s *scene) suffer(ctx context.Context, f fault, now moment) (r recovery, err error) {
	ctx, cancel := context.WithTimeout(ctx, lab.Patiently(faultPatience))
	defer cancel()
	before := ""
	if now == asleep {
		// What a daemon that stands still cannot mend must show.
		if before, err = s.shown(ctx); err != nil {
			return r, err
		}
		if err := s.node.Freeze(ctx); err != nil {
			return r, err
		}
		defer s.node.Thaw()
	}
	start := time.Now()
	if err := f.harm(ctx, s); err != nil {
		return r, fmt.Errorf("doing harm: %w", err)
	}
	if now == asleep && f.undo == nil {
		if after, err := s.shown(ctx); err == nil && after == before {
			return r, errors.New("the fault changes nothing: it is none")
		}
	}
	if f.undo != nil {
		start = time.Now()
		if err := f.undo(ctx, s); err != nil {
			return r, fmt.Errorf("undoing the harm: %w", err)
		}
	}
	if now == asleep {
		start = time.Now()
		if err := s.node.Thaw(); err != nil {
			return r, err
		}
	}
	done := time.Now()
	if err := s.healed(ctx, done); err != nil {
		return r, err
	}
	if f.tidy == nil {
		err = s.restored(ctx)
		r.whole = time.Since(start)
	}
	if err := s.healed(ctx, done); err != nil { // still, or again
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
	if f.tidy != nil {
		if err := f.tidy(ctx, s); err != nil {
			return r, fmt.Errorf("tidying up: %w", err)
		}
		err = s.restored(ctx)
		err = errors.Join(err, s.healed(ctx, time.Now()))
	}
	return r, err
}

// whenTimed is when the fault happens if its time is measured.
func (f fault) whenTimed() moment {
	if f.while == both {
		return awake
	}
	return f.while
}

// rescue brings the scene back to life after a fault that did not heal, so
// that the next can be tried.
func (s *scene) rescue(ctx context.Context) error {
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
	return errors.Join(s.healed(ctx, time.Now()), s.restored(ctx))
}

// TestFaults: whatever befalls a node, its pods talk again, and the state is
// as before. What happens in the kernel does so on one ground as the daemon looks
// on, and on the next while it stands still.
func TestFaults(t *testing.T) {
	for i, g := range grounds {
		t.Run(g.name, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t, 10*time.Minute)
			s := setScene(ctx, t, g)
			for j, f := range g.faults {
				if f.on != nil && !f.on(g) {
					continue
				}
				now := f.while
				if now == both {
					now = []moment{awake, asleep}[(i+j)%2]
				}
				name := f.name
				if now == asleep {
					name += ", asleep"
				}
				t.Run(name, func(t *testing.T) {
					r, err := s.suffer(ctx, f, now)
					if err != nil {
						t.Error(err)
						labtest.Do(t, s.rescue(ctx))
						return
					}
					t.Logf("pods talk again after %v (nodes after %v), all is as before after %v; last: %s",
						r.silence.Round(time.Millisecond), r.underlay.Round(time.Millisecond), r.whole.Round(time.Millisecond), r.last)
				})
			}
			for _, n := range s.Nodes() {
				labtest.Do(t, waitDiff(ctx, n, "")) // the daemon thinks so, too
			}
		})
	}
}

// BenchmarkFaults measures how long pods are silent after each fault, on each
// ground, and prints a table: with -benchtime=3x, medians of three.
func BenchmarkFaults(b *testing.B) {
	medians := map[[2]string]recovery{} // by fault and ground
	for _, g := range grounds {
		b.Run(g.name, func(b *testing.B) {
			ctx := labtest.Context(b, 30*time.Minute)
			s := setScene(ctx, b, g)
			for _, f := range g.faults {
				if f.on != nil && !f.on(g) {
					continue
				}
				b.Run(f.name, func(b *testing.B) {
					var all []recovery
					for range b.N {
						// Faults on end are taken for a fight, and not mended at once.
						time.Sleep(faultPause)
						r, err := s.suffer(ctx, f, f.whenTimed())
						if err != nil {
							b.Error(err)
							labtest.Do(b, s.rescue(ctx))
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

// printFaults prints milliseconds of silence, a line a fault; in brackets, where
// it is not zero, those of the nodes themselves.
func printFaults(medians map[[2]string]recovery) {
	if len(medians) == 0 {
		return
	}
	var columns []string
	for _, g := range grounds {
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
	fmt.Printf("\nof %d: median %v, worst %v\n", len(all), all[len(all)/2].Round(time.Millisecond), all[len(all)-1].Round(time.Millisecond))
}
