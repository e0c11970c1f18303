// Package command runs other programs. No other package of flanneld does: a program may hang, may leave children that
// keep its output open, or may be impossible to kill. None of that may keep the caller waiting without end, or go
// unnoticed. A program also does not get the secrets in this process's environment. Call gives libraries that start
// programs by themselves the same limits.
package command

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

const (
	// DefaultLimit is how long a program may run. iptables-restore waits for seconds while another program has the lock,
	// and needs seconds where other programs have written many thousands of rules.
	DefaultLimit = time.Minute

	// pipeGrace is how long the pipes of a program that has ended stay open for its children.
	pipeGrace = time.Second

	// killGrace is how long a program that was killed may take to end. Only a program that waits in the kernel, for a
	// file system or a driver that hangs, takes longer.
	killGrace = 3 * time.Second

	// killTick is how often that time is counted, and how often the programs of a function are killed again.
	killTick = 50 * time.Millisecond
)

// A Command is a program to run, with its arguments and its input.
type Command struct {
	Path  string   // or a name to look up in PATH
	Args  []string // without the program itself
	Env   []string // "NAME=value", in place of what this process's environment has
	Stdin string

	// Name is how the log and errors name the command. Empty: the path and the arguments.
	Name string

	// Keep is how many bytes of each output are kept; the rest is dropped. 0: all.
	Keep int

	// Stderr receives the standard error in place of Output.
	Stderr *os.File

	// Operators marks a command that the operator has chosen, and that flanneld knows nothing of. Such a command gets the
	// credentials for a cloud that are in the environment (AWS_*), and may leave programs in the background when it ends.
	Operators bool
}

// String returns the name of the command.
func (c Command) String() string { return cmp.Or(c.Name, c.line()) }

// line returns the path and the arguments.
func (c Command) line() string { return strings.Join(append([]string{c.Path}, c.Args...), " ") }

// An Output is what a program has printed.
type Output struct{ Stdout, Stderr []byte }

// Text returns both outputs in one line, for an error.
func (o Output) Text() string {
	var lines []string
	for line := range strings.Lines(string(o.Stdout) + "\n" + string(o.Stderr)) {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, " | ")
}

// A Runner runs commands. It remembers which commands took long, so that the log has each of them once, and not at each
// attempt. The zero value is ready to use, by several goroutines, too. It must not be copied.
type Runner struct {
	Limit time.Duration // how long a command may run; 0: DefaultLimit
	Grace time.Duration // how long a command may go on when its context has ended
	Waits Waits         // logs which commands are waited for
	Path  string        // the folders where Find looks, separated as in PATH; "": PATH

	mu    sync.Mutex
	stuck map[string]error // of processes that were killed and have not ended, by Command.line
}

// Run runs a command and returns what it has printed, also with an error. The error is an *exec.ExitError if the
// command has failed; other errors say that it could not be started, or why it was killed. The text of an error is the
// same each time that the cause is the same.
//
// The command is killed, with all children that have not left its process group, when it takes longer than the limit,
// and when ctx has ended and the grace is over. Then the error wraps the cause of ctx. Run returns a few seconds later
// at most, even if the command cannot be killed. As long as such a process exists, the command is not run again.
//
// The command runs in the calling thread's namespaces.
func (r *Runner) Run(ctx context.Context, c Command) (Output, error) {
	if ctx.Err() != nil {
		return Output{}, context.Cause(ctx)
	}
	if err := r.stuckError(c.line()); err != nil {
		return Output{}, err
	}
	out, errs := &capped{limit: c.Keep}, &capped{limit: c.Keep}
	cmd := c.prepare()
	cmd.Stdin = strings.NewReader(c.Stdin)
	cmd.Stdout, cmd.Stderr = out, errs
	if c.Stderr != nil {
		cmd.Stderr = c.Stderr
	}
	cmd.WaitDelay = pipeGrace
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	p, err := start(cmd)
	if err != nil {
		return Output{}, err
	}
	end := r.Waits.Begin(klog.FromContext(ctx), c.line(), "a program", "program", c.String(),
		"process", p.pid(), "limit", r.limit().String())
	killed := r.await(ctx, p.ended, p.killAndWait)
	if !p.Ended() {
		err := stuckError(p.pid())
		r.keepStuck(c.line(), err, p.ended)
		end(err)
		return Output{}, err // what it prints may still be written
	}
	if !c.Operators {
		p.kill() // a child that was left behind
	}
	err = p.err
	switch {
	case errors.Is(err, exec.ErrWaitDelay):
		err = nil // a child has kept an output open
	case err != nil && killed != nil:
		err = killed
	default:
		killed = nil
	}
	end(killed)
	return Output{out.kept.Bytes(), errs.kept.Bytes()}, err
}

// Find returns the path of a program.
func (r *Runner) Find(program string) (string, error) {
	if r.Path == "" {
		return exec.LookPath(program)
	}
	for _, dir := range filepath.SplitList(r.Path) {
		if path, err := exec.LookPath(filepath.Join(dir, program)); err == nil {
			return path, nil
		}
	}
	return "", &exec.Error{Name: program, Err: exec.ErrNotFound}
}

func (r *Runner) limit() time.Duration { return cmp.Or(r.Limit, DefaultLimit) }

// await waits until ended is closed, and calls killAndWait if that takes too long. Then await returns the reason.
func (r *Runner) await(ctx context.Context, ended <-chan struct{}, killAndWait func()) error {
	limit := time.NewTimer(r.limit())
	defer limit.Stop()
	canceled := ctx.Done()
	var graceOver <-chan time.Time
	for {
		select {
		case <-ended:
			return nil
		case <-limit.C:
			killAndWait()
			return fmt.Errorf("ended, since it took longer than %v", r.limit())
		case <-canceled:
			canceled, graceOver = nil, time.After(r.Grace)
		case <-graceOver:
			killAndWait()
			return fmt.Errorf("ended, since its caller could not wait: %w", context.Cause(ctx))
		}
	}
}

// stuckError is the error of a command whose process cannot be killed.
func stuckError(pid int) error {
	return fmt.Errorf("process %d was killed and does not end: it waits in the kernel, /proc/%[1]d/stack shows for what",
		pid)
}

// stuckError returns the error of a command whose process was killed and has not ended, nil if there is none.
func (r *Runner) stuckError(line string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stuck[line]
}

// keepStuck keeps the error of a command until the command has ended.
func (r *Runner) keepStuck(line string, err error, ended <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stuck == nil {
		r.stuck = map[string]error{}
	}
	r.stuck[line] = err
	go func() {
		<-ended
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.stuck, line)
	}()
}

// prepare returns the command, not started yet.
func (c Command) prepare() *exec.Cmd {
	cmd := exec.Command(c.Path, c.Args...)
	cmd.Env = append(environment(os.Environ(), c.Operators), c.Env...)
	return cmd
}

// capped keeps the first bytes that are written; all, if the limit is 0.
type capped struct {
	limit int
	kept  bytes.Buffer
}

func (c *capped) Write(p []byte) (int, error) {
	keep := p
	if c.limit > 0 {
		keep = p[:min(len(p), c.limit-c.kept.Len())]
	}
	c.kept.Write(keep)
	return len(p), nil
}
