// Command bench-kube measures the daemon in a big Kubernetes cluster: a real
// kube-apiserver holds thousands of Nodes as kubelet writes them, and the daemon
// starts on a node that has just booted. Next to each figure stands that of a
// floor: a program that asks the API server for the same and throws it away.
// The environment has the settings:
//
//	NODES=5000      how many peers
//	RUNS=5          how many starts, of which the median is printed
//	FLANNELD=path   another program than build/bin/flanneld
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/flanneld/flanneld/test/kubelet"
	"github.com/flanneld/flanneld/test/lab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	var err error
	if len(os.Args) == 3 && os.Args[1] == floorArg {
		err = floor(ctx, os.Args[2])
	} else {
		err = run(ctx)
	}
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench-kube: %v\n", err)
		os.Exit(1)
	}
}

// settings are from the environment.
type settings struct {
	nodes, runs int
	program     string // "": build/bin/flanneld
}

func readSettings() (settings, error) {
	s := settings{nodes: 5000, runs: 5, program: os.Getenv("FLANNELD")}
	for name, n := range map[string]*int{"NODES": &s.nodes, "RUNS": &s.runs} {
		if text := os.Getenv(name); text != "" {
			var err error
			if *n, err = strconv.Atoi(text); err != nil || *n < 1 || *n > maxPeers {
				return s, fmt.Errorf("%s=%s: it takes a number from 1 to %d", name, text, maxPeers)
			}
		}
	}
	return s, nil
}

// bench is a control plane, and one node for the daemon.
type bench struct {
	settings
	*lab.Lab
	kube *lab.Kube
	node *lab.Node
	api  *kubelet.Client
	args []string // the daemon's

	daemons, floors []result
}

func run(ctx context.Context) (err error) {
	s, err := readSettings()
	if err != nil {
		return err
	}
	l, err := lab.New(ctx, lab.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	b := &bench{settings: s, Lab: l}
	if err := b.prepare(ctx); err != nil {
		return err
	}
	for i := range s.runs {
		if err := b.measure(ctx, i); err != nil {
			return fmt.Errorf("run %d: %w", i+1, err)
		}
	}
	return b.print()
}

// prepare fills the control plane.
func (b *bench) prepare(ctx context.Context) (err error) {
	if b.program == "" {
		if b.program, err = b.Program("bin/flanneld"); err != nil {
			return err
		}
	}
	if b.kube, err = b.NewKube(ctx, ""); err != nil {
		return err
	}
	manifest, err := os.ReadFile(filepath.Join(filepath.Dir(b.Build), "Documentation", "kube-flannel.yml"))
	if err != nil {
		return err
	}
	if err := b.kube.Install(ctx, string(manifest)); err != nil {
		return err
	}
	if b.node, err = b.AddNode(ctx, lab.NodeOptions{}); err != nil {
		return err
	}
	if b.api, err = kubelet.New(b.kube.Kubeconfig("admin"), b.Outside.Dial); err != nil {
		return err
	}
	if b.args, err = b.kube.DaemonArgs(`{"Network": "10.0.0.0/8", "Backend": {"Type": "vxlan"}}`); err != nil {
		return err
	}
	b.args = append(b.args, "--subnet-file="+b.node.SubnetFile())

	started := time.Now()
	if err := b.api.Create(ctx, ownNode(b.node)); err != nil {
		return err
	}
	if err := kubelet.Each(ctx, b.nodes, func(ctx context.Context, i int) error {
		return b.api.Register(ctx, peer(i))
	}); err != nil {
		return err
	}
	size, err := b.api.Size(ctx, peer(0).Name)
	if err != nil {
		return err
	}
	fmt.Printf("%d Nodes of %.1f KB, as the API server sends them, written in %v\n", b.nodes, float64(size)/1e3,
		time.Since(started).Round(time.Second))
	return nil
}

// A result is what one program took in one run.
type result struct {
	pid        int
	start      time.Duration // until it has all
	startCPU   time.Duration
	heartbeats time.Duration // of CPU
	resident   int           // KiB, at rest
	anonymous  int           // of that: what is no file's
	peak       int           // KiB
}

// measure boots the node, and starts the floor and then the daemon on it.
func (b *bench) measure(ctx context.Context, run int) error {
	if err := b.node.Reboot(ctx); err != nil {
		return err
	}
	watch, err := watchKernel(b.node)
	if err != nil {
		return err
	}
	defer watch.Close()
	log, err := os.Create(filepath.Join(b.node.Dir, fmt.Sprintf("run%d.log", run+1)))
	if err != nil {
		return err
	}
	defer log.Close()

	var floor, daemon result
	stream, err := b.startFloor(ctx, &floor, log)
	if err != nil {
		return err
	}
	defer stream.Kill()

	flanneld := exec.Command(b.program, b.args...)
	flanneld.Env = append(os.Environ(), "NODE_NAME="+b.node.Hostname)
	flanneld.Stdout, flanneld.Stderr = log, log
	began := time.Now()
	running, err := b.node.Launch(flanneld)
	if err != nil {
		return err
	}
	defer running.Kill()
	until, err := watch.programmed(ctx, peers(0, b.nodes)...)
	if err != nil {
		return fmt.Errorf("%w; see %s", err, log.Name())
	}
	daemon.start, daemon.pid = until.Sub(began), flanneld.Process.Pid
	if err := daemon.started(ctx); err != nil {
		return err
	}
	if err := b.heartbeats(ctx, watch, peer(b.nodes+run), &floor, &daemon); err != nil {
		return fmt.Errorf("%w; see %s", err, log.Name())
	}
	b.floors, b.daemons = append(b.floors, floor), append(b.daemons, daemon)
	fmt.Printf("run %d: all programmed after %v (floor %v), %v of CPU; heartbeats %v of CPU; resident %.1f MiB, peak %.1f MiB\n", run+1,
		daemon.start.Round(time.Millisecond), floor.start.Round(time.Millisecond), daemon.startCPU.Round(time.Millisecond),
		daemon.heartbeats.Round(time.Millisecond), float64(daemon.resident)/1024, float64(daemon.peak)/1024)
	return nil
}

// startFloor starts the floor, and measures until it has seen all Nodes and is at rest.
func (b *bench) startFloor(ctx context.Context, floor *result, log *os.File) (*lab.Process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	stream := exec.Command(self, floorArg, b.kube.Kubeconfig("flannel"))
	stream.Stderr = log
	output, err := stream.StdoutPipe()
	if err != nil {
		return nil, err
	}
	began := time.Now()
	p, err := b.node.Launch(stream)
	if err != nil {
		return nil, err
	}
	var count int
	if err := json.NewDecoder(output).Decode(&count); err != nil || count < b.nodes {
		p.Kill()
		return nil, fmt.Errorf("the floor saw %d Nodes: %w, see %s", count, err, log.Name())
	}
	floor.start, floor.pid = time.Since(began), stream.Process.Pid
	if err := floor.started(ctx); err != nil {
		p.Kill()
		return nil, err
	}
	return p, nil
}

// heartbeats measures what one heartbeat of each Node takes. The last Node is registered after the heartbeats: the
// watch keeps the order, so that a program that knows the last Node has seen all of them.
func (b *bench) heartbeats(ctx context.Context, w *watch, last kubelet.Node, programs ...*result) error {
	for _, p := range programs {
		cpu, err := lab.CPU(p.pid)
		if err != nil {
			return err
		}
		p.heartbeats = -cpu
	}
	if err := kubelet.Each(ctx, b.nodes, func(ctx context.Context, i int) error {
		return b.api.Heartbeat(ctx, peer(i))
	}); err != nil {
		return err
	}
	if err := b.api.Register(ctx, last); err != nil {
		return err
	}
	if _, err := w.programmed(ctx, last); err != nil {
		return err
	}
	for _, p := range programs {
		cpu, err := lab.AtRest(ctx, p.pid)
		if err != nil {
			return err
		}
		p.heartbeats += cpu
		if err := p.readMemory(p.pid); err != nil {
			return err
		}
	}
	return b.kube.DeleteNode(ctx, last.Name)
}

// started records what a program has taken once it is at rest.
func (r *result) started(ctx context.Context) (err error) {
	r.startCPU, err = lab.AtRest(ctx, r.pid)
	return err
}

func (b *bench) print() error {
	const second, mib = float64(time.Second), 1024.0
	fmt.Println()
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "%d Nodes, median of %d\tflanneld\tlimit\tleast\tmost\tfloor\tratio\t\n", b.nodes, b.runs)
	for _, row := range []struct {
		name  string
		limit string // for 5000 Nodes
		of    func(result) float64
	}{
		{"start to all programmed, s", "1.5", func(r result) float64 { return float64(r.start) / second }},
		{"CPU of that, s", "", func(r result) float64 { return float64(r.startCPU) / second }},
		{"CPU for one heartbeat of each, s", "2 x floor", func(r result) float64 { return float64(r.heartbeats) / second }},
		{"resident, MiB", "45", func(r result) float64 { return float64(r.resident) / mib }},
		{"of that not files, MiB", "", func(r result) float64 { return float64(r.anonymous) / mib }},
		{"peak, MiB", "60", func(r result) float64 { return float64(r.peak) / mib }},
	} {
		all, floor := values(b.daemons, row.of), values(b.floors, row.of)
		median, least := middle(all), middle(floor)
		fmt.Fprintf(w, "%s\t%.2f\t%s\t%.2f\t%.2f\t%.2f\t%.1f\t\n", row.name, median, row.limit, all[0], all[len(all)-1],
			least, median/least)
	}
	return w.Flush()
}

// values returns the values of all results, sorted.
func values(results []result, of func(result) float64) []float64 {
	var all []float64
	for _, r := range results {
		all = append(all, of(r))
	}
	slices.Sort(all)
	return all
}

// middle returns the median of what is sorted.
func middle(sorted []float64) float64 {
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}
