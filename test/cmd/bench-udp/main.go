// Command bench-udp measures what pods on two nodes can send each other: through
// the udp backend's proxy and, side by side in the same run, the kernel's VXLAN,
// no tunnel at all, WireGuard (the kernel's or, where it has none, our own), and
// the plainest relay in user space that there can be. One TCP stream, four of
// them, small UDP packets, ping; taken in turns, medians printed, and their
// ratios, since the machine may be busy with other things too. With -soak, one run
// of the proxy at full load for so long, with the memory that the daemons take.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/flanneld/flanneld/test/lab"
)

func main() {
	var s settings
	flag.IntVar(&s.runs, "runs", 5, "how often each is measured: the median counts")
	flag.DurationVar(&s.each, "each", 3*time.Second, "how long each measurement takes")
	flag.IntVar(&s.size, "size", 64, "bytes in a small packet, without headers")
	flag.StringVar(&s.backends, "backends", "udp,vxlan,host-gw,wireguard,plain",
		"which, the first being compared with the others")
	flag.BoolVar(&s.six, "6", false, "over IPv6")
	flag.DurationVar(&s.soak, "soak", 0, "load the first one for so long instead")
	flag.StringVar(&s.profile, "profile", "", "with -soak: where to write CPU profiles of the daemons meanwhile, FILE.n1 and FILE.n2")
	ends := flag.String("relay", "", "be a plain relay between two addresses, of this host and of the other: for the benchmark itself")
	flag.Parse()
	if from, to, ok := strings.Cut(*ends, ","); ok {
		err := relay(netip.MustParseAddr(from), netip.MustParseAddr(to))
		fmt.Fprintf(os.Stderr, "bench-udp: relay: %v\n", err)
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := run(ctx, s)
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench-udp: %v\n", err)
		os.Exit(1)
	}
}

// settings are from the command line.
type settings struct {
	runs, size int
	each, soak time.Duration
	backends   string
	profile    string
	six        bool
}

// A track is two nodes and a pod on each, the second one with an iperf3 server.
type track struct {
	*lab.Lab
	name     string
	from, to *lab.Pod
	target   string
}

func run(ctx context.Context, s settings) (err error) {
	if s.runs < 1 || s.size < 16 || s.each < time.Second {
		return errors.New("-runs takes 1 and more, -size 16 and more, -each a second and more")
	}
	var tracks []*track
	defer func() {
		for _, t := range tracks {
			err = errors.Join(err, t.Close())
		}
	}()
	for _, name := range strings.Split(s.backends, ",") {
		t, err := lay(ctx, name, s)
		if t != nil {
			tracks = append(tracks, t)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	if s.soak > 0 {
		return tracks[0].soak(ctx, s.soak, s.profile)
	}
	return compare(ctx, s, tracks)
}

// lay makes a track.
func lay(ctx context.Context, backend string, s settings) (*track, error) {
	l, err := lab.New(ctx, lab.Options{})
	if err != nil {
		return nil, err
	}
	t := &track{Lab: l, name: backend}
	kind := backend
	if backend == plain {
		kind = "alloc" // a lease and nothing else
	}
	config := fmt.Sprintf(`{"Network": "10.5.0.0/16", "EnableIPv6": %v, "IPv6Network": "fd00:5::/48", "Backend": {"Type": %q}}`, s.six, kind)
	if err := l.Etcd.Configure(ctx, config); err != nil {
		return t, err
	}
	var pods []*lab.Pod
	for range 2 {
		n, err := l.AddNode(ctx, lab.NodeOptions{})
		if err == nil {
			err = n.Start(fmt.Sprintf("--pprof=%v", s.profile != ""))
		}
		if err == nil {
			err = n.WaitReady(ctx)
		}
		if err != nil {
			return t, err
		}
		p, err := n.AddPod(ctx, "pod")
		if err != nil {
			return t, err
		}
		pods = append(pods, p)
	}
	t.from, t.to = pods[0], pods[1]
	if backend == plain {
		if err := connect(ctx, l.Nodes()[0], l.Nodes()[1]); err != nil {
			return t, err
		}
	}
	addrs := t.to.Addrs()
	dst := addrs[len(addrs)-1]
	t.target = dst.String()
	if err := t.from.WaitPing(ctx, dst); err != nil {
		return t, err
	}
	_, err = t.to.Launch(exec.Command("iperf3", "--server"))
	return t, err
}

// A measure is one thing to measure.
type measure struct {
	name, unit string
	take       func(context.Context, *track) (float64, error)
}

func compare(ctx context.Context, s settings, tracks []*track) error {
	duration := fmt.Sprint(s.each.Seconds())
	tcp := func(streams string) func(context.Context, *track) (float64, error) {
		return func(ctx context.Context, t *track) (float64, error) {
			r, err := t.iperf(ctx, "--time", duration, "--parallel", streams)
			return r.End.Received.BitsPerSecond / 1e9, err
		}
	}
	flood := func(burst int) func(context.Context, *track) (float64, error) {
		return func(ctx context.Context, t *track) (float64, error) {
			perSecond, err := t.flood(ctx, s.size, burst, s.each)
			return perSecond / 1e3, err
		}
	}
	ping := func(args string) func(context.Context, *track) (float64, error) {
		return func(ctx context.Context, t *track) (float64, error) { return t.ping(ctx, args) }
	}
	measures := []measure{
		{"one TCP stream", "Gbit/s", tcp("1")},
		{"four TCP streams", "Gbit/s", tcp("4")},
		{fmt.Sprintf("UDP, %d bytes each", s.size), "thousand/s", flood(1)},
		{fmt.Sprintf("the same, sent %d at once", floodBatch), "thousand/s", flood(floodBatch)},
		{"ping, one a second", "µs", ping("-c 8")},
		{"ping, 200 a second", "µs", ping("-c 200 -i 0.005")},
		{"ping, each at once", "µs", func(ctx context.Context, t *track) (float64, error) { return t.pingOnEnd(ctx) }},
	}
	got := map[string]map[string][]float64{}
	for range s.runs {
		for _, m := range measures {
			for _, t := range tracks {
				v, err := m.take(ctx, t)
				if err != nil {
					return fmt.Errorf("%s: %s: %w", t.name, m.name, err)
				}
				if got[m.name] == nil {
					got[m.name] = map[string][]float64{}
				}
				got[m.name][t.name] = append(got[m.name][t.name], v)
			}
		}
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "medians of %d\t\t", s.runs)
	for i, t := range tracks {
		fmt.Fprintf(w, "%s\tfrom-to\t", t.name)
		if i > 0 {
			fmt.Fprintf(w, "%s is\t", tracks[0].name)
		}
	}
	fmt.Fprintln(w)
	for _, m := range measures {
		fmt.Fprintf(w, "%s\t%s\t", m.name, m.unit)
		first := middle(got[m.name][tracks[0].name])
		for i, t := range tracks {
			all := got[m.name][t.name]
			fmt.Fprintf(w, "%.3g\t%.3g-%.3g\t", middle(all), slices.Min(all), slices.Max(all))
			if i > 0 {
				fmt.Fprintf(w, "×%.2f\t", first/middle(all))
			}
		}
		fmt.Fprintln(w)
	}
	return w.Flush()
}

// results is what counts of what iperf3 --json prints.
type results struct {
	Error string
	End   struct {
		Received struct {
			BitsPerSecond float64 `json:"bits_per_second"`
		} `json:"sum_received"`
	}
}

// iperf runs the client against the server, which may still be busy with the
// client before.
func (t *track) iperf(ctx context.Context, args ...string) (r results, err error) {
	line := "iperf3 --json --connect-timeout 5000 --client " + t.target + " " + strings.Join(args, " ")
	err = lab.Poll(ctx, "iperf3", func() error {
		out, err := t.from.Run(ctx, line)
		r = results{}
		if text := json.Unmarshal([]byte(out), &r); err == nil {
			err = text
		}
		if r.Error != "" {
			err = errors.New(r.Error)
		}
		return err
	})
	return r, err
}

// ping returns the median round trip, in microseconds. Between packets,
// processors fall asleep.
func (t *track) ping(ctx context.Context, args string) (float64, error) {
	out, err := t.from.Run(ctx, "ping "+args+" "+t.target)
	if err != nil {
		return 0, err
	}
	var all []float64
	for _, line := range strings.Split(out, "\n") {
		if _, rest, ok := strings.Cut(line, "time="); ok {
			var ms float64
			if _, err := fmt.Sscan(rest, &ms); err == nil {
				all = append(all, ms*1000)
			}
		}
	}
	if len(all) == 0 {
		return 0, fmt.Errorf("no answers: %s", out)
	}
	return middle(all), nil
}

// pingOnEnd returns the mean round trip, in microseconds, of packets that are sent
// as the answer to the one before arrives.
func (t *track) pingOnEnd(ctx context.Context) (float64, error) {
	out, err := t.from.Run(ctx, "ping -q -f -c 3000 "+t.target)
	if err != nil {
		return 0, err
	}
	var least, mean float64
	_, rest, _ := strings.Cut(out, "min/avg/max/mdev = ")
	if _, err := fmt.Sscanf(rest, "%f/%f", &least, &mean); err != nil {
		return 0, fmt.Errorf("ping: %w: %s", err, out)
	}
	return mean * 1000, nil
}

// middle returns the median, of an even number the lower one.
func middle[T cmp.Ordered](all []T) T {
	all = slices.Sorted(slices.Values(all))
	return all[(len(all)-1)/2]
}
