// Command bench-fleet measures what many nodes do to their store, an etcd of three members: at rest, and at bad
// moments. One process runs the managers of leases of all nodes, the same code as the daemon, as the daemon's main loop
// calls it; the nodes have no kernels. All of that, the store too, is in a network namespace of its own, on loopback
// addresses, and ends with the process. It prints tables, and draws the figures over N.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/test/chart"
	"github.com/flanneld/flanneld/test/lab"
)

// maxNodes is how many nodes there are addresses for.
const maxNodes = 20000

// settings are from the command line.
type settings struct {
	sizes   []int
	moments []string // nil: all
	within  time.Duration
	rest    time.Duration
	patient time.Duration
	out     string
}

func main() {
	var s settings
	flag.Func("n", "how many nodes, `N[,N...]` (default 100,300,1000)", func(text string) error {
		for _, word := range strings.Split(text, ",") {
			n, err := strconv.Atoi(word)
			if err != nil || n < 1 || n > maxNodes-joins {
				return fmt.Errorf("%q is no number from 1 to %d", word, maxNodes-joins)
			}
			s.sizes = append(s.sizes, n)
		}
		return nil
	})
	flag.Func("moments", "which bad moments, `name[,name...]` (default all; none: -)", func(text string) error {
		s.moments = strings.Split(text, ",")
		return nil
	})
	flag.DurationVar(&s.within, "within", time.Second, "in which time all nodes start")
	flag.DurationVar(&s.rest, "rest", 30*time.Second, "for how long nothing happens")
	flag.DurationVar(&s.patient, "patience", 3*time.Minute, "how long a bad moment may take")
	flag.StringVar(&s.out, "o", "", "`directory` for the picture (default build/bench)")
	flag.Parse()
	if s.sizes == nil {
		s.sizes = []int{100, 300, 1000}
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := isolate(ctx, s.run)
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench-fleet: %v\n", err)
		os.Exit(1)
	}
}

// isolate runs f in a process that has a network namespace of its own.
func isolate(ctx context.Context, f func(context.Context) error) error {
	const inside = "BENCH_FLEET_INSIDE"
	if os.Getenv(inside) == "" {
		self, err := os.Executable()
		if err != nil {
			return err
		}
		cmd := exec.CommandContext(ctx, self, os.Args[1:]...)
		cmd.Env = append(os.Environ(), inside+"=1")
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
		cmd.SysProcAttr = &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: unix.SIGTERM}
		return cmd.Run()
	}
	if out, err := exec.CommandContext(ctx, "ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return fmt.Errorf("ip link set lo up: %w: %s", err, out)
	}
	// A node has some sockets, here and in the store. Programs that this one starts get the limit, too.
	var files unix.Rlimit
	err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files)
	files.Cur = files.Max
	if err = errors.Join(err, unix.Setrlimit(unix.RLIMIT_NOFILE, &files)); err != nil {
		return fmt.Errorf("the limit of open files: %w", err)
	}
	return f(ctx)
}

func (s settings) run(ctx context.Context) error {
	program, err := lab.Program("bin/etcd")
	if err != nil {
		return err
	}
	if s.out == "" {
		s.out = filepath.Join(filepath.Dir(filepath.Dir(program)), "bench")
	}
	var results []result
	for _, n := range s.sizes {
		r, err := s.measure(ctx, program, n)
		results = append(results, r)
		r.print()
		if err != nil {
			return fmt.Errorf("%d nodes: %w", n, err)
		}
	}
	if err := os.MkdirAll(s.out, 0o755); err != nil {
		return err
	}
	file := filepath.Join(s.out, "fleet-etcd.svg")
	fmt.Printf("\nThe figures over N are drawn in %s\n", file)
	return os.WriteFile(file, draw(results), 0o644)
}

// A result is what was measured with one size of the fleet.
type result struct {
	nodes    int
	rest     traffic // a second
	peak     float64 // requests in a second, at rest
	cpu      float64 // of the store, in seconds a second, beside what it takes without nodes
	own      float64 // of all nodes, the same
	memory   float64 // of the store, in bytes, likewise
	outcomes []outcome
}

// An outcome is what a bad moment led to.
type outcome struct {
	what     string
	took     time.Duration
	never    error // why all was not right in time
	peak     float64
	requests float64
	out      float64
	moved    int // nodes that have another subnet
	slow     time.Duration
	failed   int
}

// measure has n nodes start at once, rest, and live through the bad moments.
func (s settings) measure(ctx context.Context, program string, n int) (r result, err error) {
	r.nodes = n
	dir, err := os.MkdirTemp("", "bench-fleet")
	if err != nil {
		return r, err
	}
	defer os.RemoveAll(dir)
	store, err := startStore(ctx, program, dir)
	defer store.close()
	if err != nil {
		return r, err
	}
	m := &meter{store: store}
	f := newFleet(store, m, dir)
	const config = `{"Network": "10.0.0.0/8", "SubnetLen": 24, "Backend": {"Type": "vxlan"}}`
	if err := m.put(ctx, lab.Prefix+"/config", config); err != nil {
		return r, err
	}
	meterCtx, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		m.run(meterCtx)
	}()
	defer func() { stop(); <-done }()
	defer func() { end(f.nodes) }()
	empty, err := f.load(ctx, 5*time.Second)
	if err != nil {
		return r, err
	}
	start := moment{"start", fmt.Sprintf("all start within %v", s.within), func(ctx context.Context, f *fleet) (time.Time, error) {
		since := time.Now()
		f.start(ctx, n, s.within)
		return since, nil
	}}
	first, err := s.live(ctx, f, start)
	r.outcomes = append(r.outcomes, first)
	if err != nil {
		return r, err
	}
	if err := pause(ctx, 2*time.Second); err != nil {
		return r, err
	}
	full, err := f.load(ctx, s.rest)
	if err != nil {
		return r, err
	}
	r.rest, r.peak, r.own = full.traffic, full.peak, full.own
	r.cpu, r.memory = full.cpu-empty.cpu, full.memory-empty.memory
	for _, moment := range moments {
		if s.moments != nil && !slices.Contains(s.moments, moment.name) {
			continue
		}
		o, err := s.live(ctx, f, moment)
		r.outcomes = append(r.outcomes, o)
		if err != nil {
			return r, err
		}
		if err := f.recover(ctx, n); err != nil {
			return r, err
		}
	}
	return r, nil
}

// recover brings the store and the fleet back to what they were before a bad moment.
func (f *fleet) recover(ctx context.Context, n int) error {
	if err := f.startMembers(); err != nil {
		return err
	}
	if err := f.store.awaitAnswer(ctx); err != nil {
		return err
	}
	if err := f.remove(ctx, n); err != nil {
		return err
	}
	limited, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := f.awaitRight(limited); err != nil {
		return fmt.Errorf("the fleet does not recover: %w", err)
	}
	return pause(ctx, 3*time.Second) // for what comes later than it has to
}

// live lives through a bad moment. A moment that does not end in time is no error.
func (s settings) live(ctx context.Context, f *fleet, m moment) (o outcome, err error) {
	o.what = m.what
	before, lost := f.holdings()
	total := f.meter.reset()
	since, err := m.happen(ctx, f)
	if err != nil {
		return o, fmt.Errorf("%s: %w", m.name, err)
	}
	if m.name == "store" { // nobody gets answers from a store that is away
		total = f.meter.reset()
	}
	limited, cancel := context.WithDeadline(ctx, since.Add(s.patient))
	defer cancel()
	o.never = f.awaitRight(limited)
	if ctx.Err() != nil {
		return o, ctx.Err()
	}
	o.took = time.Since(since)
	fmt.Fprintf(os.Stderr, "%d nodes: %s: right after %v, %v\n", len(f.nodes), m.what, o.took.Round(time.Millisecond),
		o.never)
	if err := pause(ctx, 3*time.Second); err != nil { // the meter's next reading
		return o, err
	}
	var now traffic
	now, o.peak, o.slow, o.failed = f.meter.read()
	now.sub(total)
	o.requests, o.out = now.requests, now.out
	after, lostNow := f.holdings()
	o.moved = lostNow - lost
	for i, s := range before {
		if len(s.Each()) > 0 && after[i] != s {
			o.moved++
		}
	}
	return o, nil
}

// A load is what the store and the nodes take.
type load struct {
	traffic  // a second
	peak     float64
	cpu, own float64 // seconds a second
	memory   float64
}

// load measures for a while.
func (f *fleet) load(ctx context.Context, d time.Duration) (l load, err error) {
	var own [2]unix.Rusage
	before := f.meter.reset()
	began := time.Now()
	cpu, _, err := f.store.usage()
	if err = errors.Join(err, unix.Getrusage(unix.RUSAGE_SELF, &own[0])); err != nil {
		return l, err
	}
	if err := pause(ctx, d); err != nil {
		return l, err
	}
	after, resident, err := f.store.usage()
	if err = errors.Join(err, unix.Getrusage(unix.RUSAGE_SELF, &own[1])); err != nil {
		return l, err
	}
	total, peak, _, _ := f.meter.read()
	total.sub(before)
	elapsed := time.Since(began).Seconds()
	total.each(total, func(mine *float64, _ float64) { *mine /= elapsed })
	seconds := func(r unix.Rusage) float64 {
		return time.Duration(r.Utime.Nano() + r.Stime.Nano()).Seconds()
	}
	return load{total, peak, (after - cpu).Seconds() / elapsed, (seconds(own[1]) - seconds(own[0])) / elapsed,
		float64(resident)}, nil
}

func (r result) print() {
	thousands := float64(r.nodes) / 1000
	fmt.Printf("\n%d nodes at rest: %.1f requests (%.0f in one second), %.1f messages to watches, %.1f events, "+
		"%.1f KB in and %.1f KB out a second\n", r.nodes, r.rest.requests, r.peak, r.rest.messages,
		r.rest.events, r.rest.in/1000, r.rest.out/1000)
	fmt.Printf("  for a thousand nodes, the store takes %.1f %% of a core and %.0f MiB; the nodes %.1f %%\n\n",
		100*r.cpu/thousands, r.memory/(1<<20)/thousands, 100*r.own/thousands)
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "bad moment\tall right after\tpeak requests/s\trequests\tMB out\tother subnet\t"+
		"probe's slowest\tfailed\t")
	for _, o := range r.outcomes {
		took := fmt.Sprintf("%.1f s", o.took.Seconds())
		if o.never != nil {
			took = "not in " + took
		}
		fmt.Fprintf(w, "%s\t%s\t%.0f\t%.0f\t%.1f\t%d\t%.2f s\t%d\t\n", o.what, took, o.peak, o.requests, o.out/1e6,
			o.moved, o.slow.Seconds(), o.failed)
	}
	w.Flush()
	for _, o := range r.outcomes {
		if o.never != nil {
			fmt.Printf("%s: %v\n", o.what, o.never)
		}
	}
}

// draw draws the figures over N.
func draw(results []result) []byte {
	curves := []chart.Curve{
		{Name: "requests a second at rest"}, {Name: "the store's memory, MiB"},
	}
	times := map[string]int{}
	for _, r := range results {
		add := func(i int, value float64) {
			if value > 0 {
				curves[i].Points = append(curves[i].Points, chart.Point{N: r.nodes, Value: value})
			}
		}
		add(0, r.rest.requests)
		add(1, r.memory/(1<<20))
		for _, o := range r.outcomes {
			if o.never != nil {
				continue
			}
			if _, known := times[o.what]; !known && len(times) < 4 {
				times[o.what] = len(curves)
				curves = append(curves, chart.Curve{Name: o.what + ": seconds until all is right"})
			}
			if i, drawn := times[o.what]; drawn {
				add(i, o.took.Seconds())
			}
		}
	}
	return chart.Draw("etcd, three members, with N nodes", "nodes", "", curves)
}
