package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/flanneld/flanneld/test/lab"
)

// A result is what the daemon took for one thing.
type result struct {
	took         time.Duration
	cpu          time.Duration
	set, removed int // routes
	memory

	// While idle:
	children time.Duration // CPU of the programs it ran
	forks    int
	wakeups  int
}

// A daemon is one that runs.
type daemon struct {
	*lab.Process
	pid   int
	began time.Time
}

// start starts the daemon, on its own so that nothing asks for its health.
func (b *bench) start(args ...string) (*daemon, error) {
	log, err := os.OpenFile(b.log(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(b.program, append(args, "--etcd-endpoints="+lab.Endpoint, "--subnet-file="+b.node.SubnetFile())...)
	cmd.Stdout, cmd.Stderr = log, log
	d := &daemon{began: time.Now()}
	if d.Process, err = b.node.Launch(cmd); err != nil {
		return nil, err
	}
	d.pid = cmd.Process.Pid
	return d, nil
}

func (b *bench) log() string { return filepath.Join(b.node.Dir, "bench.log") }

// coldStart starts the daemon and waits until the kernel holds all that n
// peers call for.
func (b *bench) coldStart(ctx context.Context, backend backend, n int) (r result, err error) {
	w, err := b.watch()
	if err != nil {
		return r, err
	}
	defer w.Close()
	d, err := b.start()
	if err != nil {
		return r, err
	}
	defer d.Kill()
	if err := w.routes(ctx, n); err != nil {
		return r, b.explain(err)
	}
	r.took = time.Since(d.began)
	if err := b.holds(ctx, backend, n); err != nil {
		return r, b.explain(err)
	}
	if r.cpu, err = lab.AtRest(ctx, d.pid); err != nil {
		return r, err
	}
	r.memory, err = memoryOf(d.pid)
	return r, err
}

// explain adds the daemon's last words to an error.
func (b *bench) explain(err error) error {
	text, readErr := os.ReadFile(b.log())
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return errors.Join(fmt.Errorf("%w\n%s", err, strings.Join(lines[max(0, len(lines)-5):], "\n")), readErr)
}

// holds returns an error unless the kernel holds what n peers call for, and no
// more.
func (b *bench) holds(ctx context.Context, backend backend, n int) error {
	lines := []string{"ip -4 route show proto 70"}
	if backend == vxlan {
		lines = append(lines, "ip -4 neigh show nud permanent dev flannel.1", "bridge fdb show dev flannel.1")
	}
	for _, line := range lines {
		out, err := b.node.Run(ctx, line)
		if err != nil {
			return err
		}
		if got := strings.Count(out+"\n", "\n"); got != n {
			return fmt.Errorf("%s: %d lines, and there should be %d", line, got, n)
		}
	}
	return nil
}

// bursts returns what it takes that many join, that they leave, and to restart
// the daemon, in a cluster of some size.
func (b *bench) bursts(ctx context.Context, backend backend) (results [3]result, err error) {
	w, err := b.watch()
	if err != nil {
		return results, err
	}
	defer w.Close()
	d, err := b.start()
	if err != nil {
		return results, err
	}
	defer func() { d.Kill() }()
	if err := w.routes(ctx, b.base); err != nil {
		return results, b.explain(err)
	}
	before, err := lab.AtRest(ctx, d.pid)
	if err != nil {
		return results, err
	}
	for i, step := range []struct {
		write func(peer) error
		left  int
	}{
		{func(p peer) error { return b.Etcd.Put(ctx, p.key(), p.value(backend)) }, b.base + b.burst},
		{func(p peer) error { return b.Etcd.Delete(ctx, p.key()) }, b.base},
	} {
		r := &results[i]
		w.restart()
		written := make(chan error, 1)
		var last time.Time
		go func() {
			err := each(b.base, b.base+b.burst, step.write)
			last = time.Now()
			written <- err
		}()
		err := w.routes(ctx, step.left)
		if err := errors.Join(err, <-written); err != nil {
			return results, b.explain(err)
		}
		r.took, r.set, r.removed = max(0, w.when.Sub(last)), w.set, w.removed
		if err := b.holds(ctx, backend, step.left); err != nil {
			return results, b.explain(err)
		}
		now, err := lab.AtRest(ctx, d.pid)
		if err != nil {
			return results, err
		}
		r.cpu, before = now-before, now
	}

	r := &results[2]
	if err := d.Stop(ctx); err != nil {
		return results, err
	}
	w.restart()
	if err := os.Remove(b.node.SubnetFile()); err != nil { // the sign that it is ready
		return results, err
	}
	if d, err = b.start(); err != nil {
		return results, err
	}
	err = lab.Poll(ctx, "the daemon to be ready", func() error {
		_, err := os.Stat(b.node.SubnetFile())
		return err
	})
	if err != nil {
		return results, b.explain(err)
	}
	r.took = time.Since(d.began)
	if r.cpu, err = lab.AtRest(ctx, d.pid); err != nil {
		return results, err
	}
	if err := w.soFar(); err != nil {
		return results, err
	}
	r.set, r.removed = w.set, w.removed
	return results, b.holds(ctx, backend, b.base)
}

// rest returns what the daemon takes while nothing happens.
func (b *bench) rest(ctx context.Context) (r result, err error) {
	w, err := b.watch()
	if err != nil {
		return r, err
	}
	defer w.Close()
	d, err := b.start("--ip-masq")
	if err != nil {
		return r, err
	}
	defer d.Kill()
	if err := w.routes(ctx, b.idlers); err != nil {
		return r, b.explain(err)
	}
	// The first check of the rules after they were set belongs to the start.
	const settle = 12 * time.Second // the default of --iptables-resync, twice and more
	if err := pause(ctx, settle); err != nil {
		return r, err
	}
	forks, err := countForks(d.pid)
	if err != nil {
		return r, err
	}
	defer forks.Close()
	before, err := activityOf(d.pid)
	if err != nil {
		return r, err
	}
	began := time.Now()
	if err := pause(ctx, b.idle); err != nil {
		return r, err
	}
	after, err := activityOf(d.pid)
	if err != nil {
		return r, err
	}
	r.took = time.Since(began)
	r.cpu, r.children, r.wakeups = after.cpu-before.cpu, after.children-before.children, after.wakeups-before.wakeups
	if r.forks, err = forks.soFar(); err != nil {
		return r, err
	}
	r.memory, err = memoryOf(d.pid)
	return r, err
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
