// Command bench-fleet measures what many nodes do to their store, at rest and at bad moments. The store is an etcd of
// three members, which nodes may reach by way of proxies, or an API server of Kubernetes, which keeps its state in
// such an etcd or in kine. One process runs the managers of leases of all nodes, the same code as the daemon, as the
// daemon's main loop calls it; the nodes have no kernels. All of that, the store too, is in a network namespace of
// its own, on loopback addresses, and ends with the process. It prints tables, and draws the figures over N.
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
	"time"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/test/lab"
)

// maxNodes is how many nodes there are addresses for.
const maxNodes = 20000

// newestAPI is the program of the API server that -apiserver replaces.
const newestAPI = "kube/kube-apiserver"

// network is its configuration.
const network = `{"Network": "10.0.0.0/8", "SubnetLen": 24, "Backend": {"Type": "vxlan"}}`

// settings are from the command line.
type settings struct {
	store   string
	proxies int    // between nodes and etcd
	api     string // the program
	sizes   []int
	moments []string // nil: all
	within  time.Duration
	rest    time.Duration
	patient time.Duration
	out     string
}

func main() {
	s := settings{store: "etcd"}
	flag.Func("store", "which `store` the nodes share: etcd, kubernetes, or kine (Kubernetes on kine) (default etcd)",
		func(text string) error {
			if !slices.Contains([]string{"etcd", "kubernetes", "kine"}, text) {
				return errors.New("it is etcd, kubernetes or kine")
			}
			s.store = text
			return nil
		})
	flag.IntVar(&s.proxies, "proxies", 0, "how many `processes` of etcd grpc-proxy are between the nodes and etcd; "+
		"0: the nodes reach its members directly")
	flag.StringVar(&s.api, "apiserver", newestAPI, "`program` of the API server, in build")
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
	flag.Func("moments", "which bad moments, `name[,name...]`, such as joins,restart (default all; - is none; a wrong name "+
		"lists those of the store)", func(text string) error {
		s.moments = strings.Split(text, ",")
		return nil
	})
	flag.DurationVar(&s.within, "within", time.Second, "in which time all nodes start")
	flag.DurationVar(&s.rest, "rest", 30*time.Second, "for how long nothing happens")
	flag.DurationVar(&s.patient, "patience", 3*time.Minute, "how long a bad moment may take")
	flag.StringVar(&s.out, "o", "", "`directory` for the picture (default build/bench)")
	flag.Parse()
	if err := s.check(flag.Args()); err != nil {
		fmt.Fprintf(os.Stderr, "bench-fleet: %v; -h lists the flags\n", err)
		os.Exit(2)
	}
	if s.sizes == nil {
		s.sizes = []int{100, 300, 1000}
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := isolate(ctx, s.run)
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("interrupted: %w", err)
	}
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench-fleet: %v\n", err)
		os.Exit(1)
	}
}

// check returns what makes no sense in the command line. Arguments are what follows the flags.
func (s settings) check(arguments []string) error {
	switch {
	case len(arguments) > 0:
		return fmt.Errorf("unexpected arguments %q", arguments)
	case s.proxies < 0 || s.proxies > maxProxies:
		return fmt.Errorf("-proxies is a number from 0 to %d, but got %d", maxProxies, s.proxies)
	case s.proxies > 0 && s.store != "etcd":
		return fmt.Errorf("-proxies is for -store etcd, but got -store %s", s.store)
	case s.api != newestAPI && s.store == "etcd":
		return errors.New("-apiserver is for -store kubernetes and -store kine, but got -store etcd")
	case s.within < 0:
		return fmt.Errorf("-within is 0 or more, but got %v", s.within)
	case s.rest < time.Second: // the meter reads the counters once a second
		return fmt.Errorf("-rest is 1s or more, but got %v", s.rest)
	case s.patient < time.Second:
		return fmt.Errorf("-patience is 1s or more, but got %v", s.patient)
	}
	return nil
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
		err = cmd.Run()
		if code := cmd.ProcessState.ExitCode(); code > 0 {
			os.Exit(code) // the process inside has said why
		}
		if errors.Is(err, os.ErrPermission) {
			return fmt.Errorf("only root can make a network namespace: %w", err)
		}
		return err
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
	if err := os.MkdirAll(s.out, 0o755); err != nil {
		return fmt.Errorf("-o: %w", err)
	}
	var results []result
	for _, n := range s.sizes {
		r, err := s.measure(ctx, n)
		results = append(results, r)
		if len(r.outcomes) > 0 {
			r.print()
		}
		if err != nil {
			return fmt.Errorf("%d nodes: %w", n, err)
		}
	}
	file := filepath.Join(s.out, "fleet-"+s.store+".svg")
	fmt.Printf("\nThe figures over N are drawn in %s\n", file)
	return os.WriteFile(file, draw(s.store, results), 0o644)
}

// open starts the store in an empty directory. The store is to be closed also when there is an error.
func (s settings) open(ctx context.Context, dir string) (store, error) {
	program := "bin/etcd"
	if s.store == "kine" {
		program = "stores/kine"
	}
	program, err := lab.Program(program)
	if err != nil {
		return nil, err
	}
	if s.store == "etcd" {
		return newEtcdStore(ctx, program, dir, s.proxies)
	}
	api, err := lab.Program(s.api)
	if err != nil {
		return nil, err
	}
	start := startEtcd
	if s.store == "kine" {
		start = startKine
	}
	behind, err := start(program, dir)
	if err != nil {
		behind.close()
		return nil, err
	}
	return newKubeStore(ctx, behind, api, dir)
}
