package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A Namespace is a named network namespace (`ip netns exec NAME …` enters it)
// and one OS thread that lives in it for as long as the lab does. Everything
// that happens inside starts on that thread: a child gets the thread's
// namespaces, and its parent-death signal is tied to it; a socket belongs to
// the namespace of the thread that opens it.
type Namespace struct {
	Name string

	keep  bool // children outlive this process
	calls chan func()
	quit  chan struct{}

	mu    sync.Mutex
	owned []io.Closer // listeners
}

// path is where `ip netns add` keeps the namespace.
func (ns *Namespace) path() string { return "/run/netns/" + ns.Name }

// newNamespace makes a namespace with lo up. settle, if not nil, runs first of
// all on the thread that lives in it.
func newNamespace(ctx context.Context, name string, keep bool, settle func() error) (*Namespace, error) {
	if err := ip(ctx, "netns add "+name); err != nil {
		return nil, err
	}
	ns, err := inhabit(name, keep, settle)
	if err != nil {
		return nil, err
	}
	return ns, ns.Script(ctx, "link set lo up")
}

// inhabit starts the thread that lives in a namespace.
func inhabit(name string, keep bool, settle func() error) (*Namespace, error) {
	ns := &Namespace{Name: name, keep: keep, calls: make(chan func()), quit: make(chan struct{})}
	ready := make(chan error, 1)
	ownThread(func() {
		err := enter(ns.path())
		if err == nil && settle != nil {
			err = settle()
		}
		ready <- err
		for err == nil {
			select {
			case call := <-ns.calls:
				call()
			case <-ns.quit:
				return
			}
		}
	})
	if err := <-ready; err != nil {
		return nil, fmt.Errorf("namespace %s: %w", name, err)
	}
	return ns, nil
}

// ownThread runs f on a thread that nothing else ever runs on: it ends when f
// returns. It is never the process's first thread, whose namespaces are those
// of the whole process in /proc.
func ownThread(f func()) {
	go func() {
		runtime.LockOSThread() // for good, unless this is the first thread
		if unix.Gettid() != unix.Getpid() {
			f()
			return
		}
		defer runtime.UnlockOSThread()
		elsewhere := make(chan struct{})
		go func() {
			runtime.LockOSThread()
			close(elsewhere)
			f()
		}()
		<-elsewhere
	}()
}

// enter moves the calling thread into the network namespace.
func enter(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("entering %s: %w", path, err)
	}
	return nil
}

// Do runs f on the namespace's thread. Calls run one at a time: f opens a
// socket or starts a program, what takes longer is done by the caller.
func (ns *Namespace) Do(f func() error) error {
	done := make(chan error, 1)
	select {
	case ns.calls <- func() { done <- f() }:
		return <-done
	case <-ns.quit:
		return fmt.Errorf("namespace %s is gone", ns.Name)
	}
}

// Launch starts a program in the namespace. It is killed when this process
// ends, however that comes about, unless the lab is to be kept.
func (ns *Namespace) Launch(cmd *exec.Cmd) (*Process, error) {
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true} // ^C on a terminal is for us alone
	if !ns.keep {
		cmd.SysProcAttr.Pdeathsig = unix.SIGKILL
	}
	if err := ns.Do(cmd.Start); err != nil {
		return nil, fmt.Errorf("%s: %w", ns.Name, err)
	}
	p := &Process{cmd: cmd, done: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// Run runs a command, split at spaces, and returns what it prints, without the
// last newline.
func (ns *Namespace) Run(ctx context.Context, line string) (string, error) {
	return ns.run(ctx, "", strings.Fields(line)...)
}

// Script runs lines of `ip -batch`, of which the first that fails is named.
func (ns *Namespace) Script(ctx context.Context, lines ...string) error {
	_, err := ns.run(ctx, strings.Join(lines, "\n"), "ip", "-batch", "-")
	if err != nil {
		return fmt.Errorf("%w\n%s", err, strings.Join(lines, "\n"))
	}
	return nil
}

func (ns *Namespace) run(ctx context.Context, stdin string, args ...string) (string, error) {
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stdin = strings.NewReader(stdin)
	cmd.Stdout, cmd.Stderr = &out, &out
	p, err := ns.Launch(cmd)
	if err == nil {
		err = p.Wait()
	}
	text := strings.TrimRight(out.String(), "\n")
	if err != nil {
		return text, fmt.Errorf("%s: %s: %w\n%s", ns.Name, strings.Join(args, " "), err, text)
	}
	return text, nil
}

// own has a listener closed with the namespace.
func (ns *Namespace) own(c io.Closer) {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	ns.owned = append(ns.owned, c)
}

// close ends everything that runs in the namespace and removes it.
func (ns *Namespace) close(ctx context.Context) error {
	ns.mu.Lock()
	for _, c := range ns.owned {
		c.Close()
	}
	ns.owned = nil
	ns.mu.Unlock()
	select {
	case <-ns.quit:
		return nil
	default:
		close(ns.quit)
	}
	return removeNamespace(ctx, ns.Name)
}

// removeNamespace kills the processes of a namespace, its own or a dead lab's,
// and removes it.
func removeNamespace(ctx context.Context, name string) error {
	return Poll(ctx, "namespace "+name+" to end", func() error {
		out, err := exec.CommandContext(ctx, "ip", "netns", "pids", name).Output()
		if _, gone := os.Stat("/run/netns/" + name); errors.Is(gone, os.ErrNotExist) {
			return nil // another process may have been faster
		}
		if err != nil {
			return fmt.Errorf("ip netns pids %s: %w", name, err)
		}
		pids := strings.Fields(string(out))
		for _, text := range pids {
			if pid, err := strconv.Atoi(text); err == nil && pid != os.Getpid() {
				unix.Kill(pid, unix.SIGKILL)
			}
		}
		if len(pids) > 0 {
			return fmt.Errorf("still there: %s", strings.Join(pids, ", "))
		}
		return ip(ctx, "netns del "+name)
	})
}

// ip runs an ip command outside of all namespaces: only `ip netns …`.
func ip(ctx context.Context, line string) error {
	if out, err := exec.CommandContext(ctx, "ip", strings.Fields(line)...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", line, err, bytes.TrimSpace(out))
	}
	return nil
}

// A Process is a program that was started in a namespace.
type Process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	err  error         // how; for reading after done
}

// Wait waits for the end, and returns nil for exit status 0.
func (p *Process) Wait() error {
	<-p.done
	return p.err
}

// Exited reports whether the program has ended.
func (p *Process) Exited() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// Stop sends SIGTERM and waits for the end.
func (p *Process) Stop(ctx context.Context) error {
	p.cmd.Process.Signal(unix.SIGTERM) // fails only when it has ended
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s did not end on SIGTERM: %w", p.cmd.Path, context.Cause(ctx))
	}
}

// Kill sends SIGKILL and waits for the end.
func (p *Process) Kill() {
	p.cmd.Process.Kill() // fails only when it has ended
	<-p.done
}

// Patience is how long Poll waits where the context sets no closer deadline. It is long, since several tests run at a
// time: some start a whole control plane.
const Patience = 3 * time.Minute

// Patiently multiplies a time by LAB_SLOWNESS, for machines that are slower by that factor.
func Patiently(d time.Duration) time.Duration {
	if factor, err := strconv.Atoi(os.Getenv("LAB_SLOWNESS")); err == nil && factor > 0 {
		d *= time.Duration(factor)
	}
	return d
}

// Poll calls try until it returns nil, at most fifty times a second. Between calls that start programs the pauses are
// longer, so that the processors are free for what is waited for. When ctx or Patience ends first, the error names what was waited for, and
// wraps the last error of try.
func Poll(ctx context.Context, what string, try func() error) error {
	ctx, cancel := context.WithTimeout(ctx, Patiently(Patience))
	defer cancel()
	start := time.Now()
	for {
		began := time.Now()
		err := try()
		if err == nil {
			return nil
		}
		took := time.Since(began)
		select {
		case <-ctx.Done():
			return fmt.Errorf("waited %v for %s: %w", time.Since(start).Round(time.Second), what, err)
		case <-time.After(max(20*time.Millisecond-took, min(4*took, 200*time.Millisecond), took)):
		}
	}
}
