// Command bench measures the daemon in big clusters: how long one that starts
// takes until the kernel holds what N peers call for, and what that costs; next
// to it, in the same run, the floor: the same objects loaded by `ip -batch` and
// `bridge -batch`. Then a burst of nodes that join and leave, a restart, and a
// minute of idling. First of all, it measures how soon a node without peers is
// ready. It prints tables and draws the times over N.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/flanneld/flanneld/test/chart"
	"github.com/flanneld/flanneld/test/lab"
)

func main() {
	s := settings{sizes: sizes{100, 1000, 5000, 20000}}
	flag.Var(&s.sizes, "n", "how many peers, `N[,N...]`")
	flag.IntVar(&s.runs, "runs", 3, "how often each size is measured: the median counts")
	flag.IntVar(&s.starts, "starts", 15, "how often a daemon starts without peers; with -runs 0, there is no more")
	flag.IntVar(&s.base, "base", 5000, "how many peers there are when others join, and at the restart")
	flag.IntVar(&s.burst, "burst", 500, "how many join and leave")
	flag.IntVar(&s.idlers, "idle-peers", 100, "how many peers there are when nothing happens")
	flag.DurationVar(&s.idle, "idle", time.Minute, "for how long nothing happens")
	flag.StringVar(&s.program, "flanneld", "", "another `program` than build/bin/flanneld")
	flag.StringVar(&s.out, "o", "", "`directory` for the picture (default build/bench)")
	flag.Parse()
	if err := s.check(flag.Args()); err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v; -h lists the flags\n", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := run(ctx, s)
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("interrupted: %w", err)
	}
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

// settings are from the command line.
type settings struct {
	sizes               sizes
	runs, starts        int
	base, burst, idlers int
	idle                time.Duration
	out                 string
	program             string
}

// sizes is a flag.Value.
type sizes []int

func (s sizes) String() string {
	return strings.Trim(strings.ReplaceAll(fmt.Sprint([]int(s)), " ", ","), "[]")
}

func (s *sizes) Set(text string) error {
	*s = nil
	for _, word := range strings.Split(text, ",") {
		n, err := strconv.Atoi(word)
		if err != nil || n < 1 || n > maxPeers {
			return fmt.Errorf("%q is no number from 1 to %d", word, maxPeers)
		}
		*s = append(*s, n)
	}
	return nil
}

// check returns what makes no sense in the command line. Arguments are what follows the flags.
func (s settings) check(arguments []string) error {
	switch {
	case len(arguments) > 0:
		return fmt.Errorf("unexpected arguments %q", arguments)
	case s.runs < 0 || s.starts < 0:
		return errors.New("-runs and -starts are 0 or more")
	case s.base < 1 || s.burst < 1 || s.base+s.burst > maxPeers:
		return fmt.Errorf("-base and -burst are 1 or more, together %d at most", maxPeers)
	case s.idlers < 0 || s.idlers > maxPeers:
		return fmt.Errorf("-idle-peers is a number from 0 to %d, but got %d", maxPeers, s.idlers)
	case s.idle < time.Second:
		return fmt.Errorf("-idle is 1s or more, but got %v", s.idle)
	}
	return nil
}

// bench is a lab with etcd and one node for the daemon.
type bench struct {
	settings
	*lab.Lab
	node *lab.Node
}

func run(ctx context.Context, s settings) (err error) {
	l, err := lab.New(ctx, lab.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	b := &bench{settings: s, Lab: l}
	if b.node, err = l.AddNode(ctx, lab.NodeOptions{}); err != nil {
		return err
	}
	if b.out == "" {
		b.out = filepath.Join(l.Build, "bench")
	}
	if b.program == "" {
		if b.program, err = b.Program("bin/flanneld"); err != nil {
			return err
		}
	}
	if b.starts > 0 {
		if err := b.ready(ctx); err != nil {
			return err
		}
	}
	if b.runs == 0 {
		return nil
	}
	var curves []chart.Curve
	for _, backend := range []backend{vxlan, hostgw} {
		times, floors, err := b.fromNothing(ctx, backend)
		if err != nil {
			return fmt.Errorf("%s: %w", backend, err)
		}
		curves = append(curves, chart.Curve{Name: string(backend), Points: times},
			chart.Curve{Name: string(backend) + ", ip and bridge -batch", Points: floors})
		if err := b.changes(ctx, backend); err != nil {
			return fmt.Errorf("%s: %w", backend, err)
		}
	}
	if err := b.idling(ctx); err != nil {
		return err
	}
	if err := os.MkdirAll(b.out, 0o755); err != nil {
		return err
	}
	file := filepath.Join(b.out, "peers.svg")
	fmt.Printf("\nThe times over N are drawn in %s\n", file)
	picture := chart.Draw("Time until the kernel holds what N peers call for", "peers", " s", curves)
	return os.WriteFile(file, picture, 0o644)
}

// fromNothing has the daemon start on a node that has just booted, with ever
// more peers, and returns the median times, its own and the floor's.
func (b *bench) fromNothing(ctx context.Context, backend backend) (times, floors []chart.Point, err error) {
	if err := b.empty(ctx, backend, false); err != nil {
		return nil, nil, err
	}
	w := newTable("\n"+string(backend)+", from nothing", "all there after", "batch", "ratio", "CPU", "per peer more",
		"RSS", "peak")
	there, before := 0, result{}
	for _, n := range b.sizes {
		if err := b.join(ctx, backend, there, n); err != nil {
			return nil, nil, err
		}
		there = max(n, there)
		var runs []result
		var batches []time.Duration
		for range b.runs {
			if err := b.boot(ctx, backend); err != nil {
				return nil, nil, err
			}
			took, err := b.floor(ctx, backend, n)
			if err != nil {
				return nil, nil, err
			}
			batches = append(batches, took)
			if err := b.boot(ctx, backend); err != nil {
				return nil, nil, err
			}
			r, err := b.coldStart(ctx, backend, n)
			if err != nil {
				return nil, nil, err
			}
			runs = append(runs, r)
		}
		took, batch, cpu := median(runs, func(r result) time.Duration { return r.took }), middle(batches), median(runs,
			func(r result) time.Duration { return r.cpu })
		times = append(times, chart.Point{N: n, Value: took.Seconds()})
		floors = append(floors, chart.Point{N: n, Value: batch.Seconds()})
		more := "" // than the smaller cluster took: without what the start itself takes
		if before.set > 0 && n > before.set {
			more = fmt.Sprintf("%.1f µs", float64((cpu-before.cpu).Microseconds())/float64(n-before.set))
		}
		before = result{cpu: cpu, set: n}
		fmt.Fprintf(w, "%d peers\t%s\t%s\t%.2f\t%s\t%s\t%s\t%s\t\n", n, show(took), show(batch),
			float64(took)/float64(batch), show(cpu), more,
			mib(median(runs, func(r result) int { return r.resident })), mib(median(runs, func(r result) int { return r.peak })))
	}
	return times, floors, w.Flush()
}

// changes has many nodes join and leave at once, and restarts the daemon.
func (b *bench) changes(ctx context.Context, backend backend) error {
	w := newTable(fmt.Sprintf("\n%s, with %d peers in place", backend, b.base), "all done after", "CPU",
		"routes set", "removed")
	rows := []struct {
		name string
		of   []result
	}{{name: fmt.Sprintf("%d join", b.burst)}, {name: fmt.Sprintf("%d leave", b.burst)}, {name: "restart"}}
	for range b.runs {
		if err := b.empty(ctx, backend, false); err != nil {
			return err
		}
		if err := b.join(ctx, backend, 0, b.base); err != nil {
			return err
		}
		if err := b.boot(ctx, backend); err != nil {
			return err
		}
		results, err := b.bursts(ctx, backend)
		if err != nil {
			return err
		}
		for i, r := range results {
			rows[i].of = append(rows[i].of, r)
		}
	}
	for _, r := range rows {
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%d\t\n", r.name,
			show(median(r.of, func(r result) time.Duration { return r.took })), show(median(r.of,
				func(r result) time.Duration { return r.cpu })),
			median(r.of, func(r result) int { return r.set }), median(r.of, func(r result) int { return r.removed }))
	}
	return w.Flush()
}

// idling has the daemon do nothing, with rules to keep.
func (b *bench) idling(ctx context.Context) error {
	w := newTable(fmt.Sprintf("\nIdle for %v with --ip-masq, %d peers", b.idle, b.idlers), "of a core", "its programs'",
		"forks a minute", "wake-ups a second", "RSS", "no file's")
	for _, nftables := range []bool{false, true} {
		name := map[bool]string{false: "iptables", true: "nftables"}[nftables]
		if err := b.empty(ctx, vxlan, nftables); err != nil {
			return err
		}
		if err := b.join(ctx, vxlan, 0, b.idlers); err != nil {
			return err
		}
		if err := b.boot(ctx, vxlan); err != nil {
			return err
		}
		r, err := b.rest(ctx)
		if err != nil {
			return fmt.Errorf("idle with %s: %w", name, err)
		}
		fmt.Fprintf(w, "%s\t%.3f %%\t%.3f %%\t%.1f\t%.2f\t%s\t%s\t\n", name, 100*r.cpu.Seconds()/r.took.Seconds(),
			100*r.children.Seconds()/r.took.Seconds(),
			float64(r.forks)/r.took.Minutes(), float64(r.wakeups)/r.took.Seconds(), mib(r.resident), mib(r.anonymous))
	}
	return w.Flush()
}

// newTable returns a writer that aligns columns; Flush ends it.
func newTable(heads ...string) *tabwriter.Writer {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', tabwriter.AlignRight)
	if rest, ok := strings.CutPrefix(heads[0], "\n"); ok {
		fmt.Println()
		heads[0] = rest
	}
	fmt.Fprintln(w, strings.Join(heads, "\t")+"\t")
	return w
}

func show(d time.Duration) string { return fmt.Sprintf("%.3f s", d.Seconds()) }
func mib(kib int) string          { return fmt.Sprintf("%.1f MiB", float64(kib)/1024) }

func median[R any, T int | time.Duration](runs []R, of func(R) T) T {
	var all []T
	for _, r := range runs {
		all = append(all, of(r))
	}
	return middle(all)
}

// middle returns the median, of an even number the lower one.
func middle[T int | time.Duration](all []T) T {
	all = slices.Sorted(slices.Values(all))
	return all[(len(all)-1)/2]
}
