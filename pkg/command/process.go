package command

import (
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"
)

// A Process is a program that was started. Its process group consists of the program and its children.
type Process struct {
	cmd   *exec.Cmd
	ended chan struct{} // closed when the program has ended
	err   error         // of its end; valid then
}

// Start starts a program that goes on when this process ends: a session of its own keeps the terminal's signals away.
// The program writes to this process's outputs.
func Start(c Command) (*Process, error) {
	cmd := c.prepare()
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	return start(cmd)
}

// start starts cmd, which must make a process group, and waits for its end in a goroutine.
func start(cmd *exec.Cmd) (*Process, error) {
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &Process{cmd: cmd, ended: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.ended)
	}()
	return p, nil
}

func (p *Process) pid() int { return p.cmd.Process.Pid }

// Path returns the path of the program.
func (p *Process) Path() string { return p.cmd.Path }

// Done returns a channel that is closed when the program has ended.
func (p *Process) Done() <-chan struct{} { return p.ended }

// Ended reports whether the program has ended.
func (p *Process) Ended() bool {
	select {
	case <-p.ended:
		return true
	default:
		return false
	}
}

// Reason returns how the program has ended: "exit status 1". It must have ended.
func (p *Process) Reason() string { return p.cmd.ProcessState.String() }

// Stop ends the program by SIGTERM, and by SIGKILL if it takes longer than patience. Stop returns without the program's
// end if the program waits in the kernel.
func (p *Process) Stop(patience time.Duration) {
	if p.Ended() {
		return
	}
	_ = p.cmd.Process.Signal(unix.SIGTERM)
	select {
	case <-p.ended:
	case <-time.After(patience):
		p.killAndWait()
	}
}

// kill sends SIGKILL to the process group.
func (p *Process) kill() { _ = unix.Kill(-p.pid(), unix.SIGKILL) }

// killAndWait kills the process group, and waits for the end of the program for as long as that can take.
func (p *Process) killAndWait() {
	p.kill()
	graceFor(p.ended, func() {})
}

// graceFor waits until ended is closed, for killGrace at most, and calls f from time to time. A time in which this process
// stands still, as on a machine that is suspended, hardly counts: the program stands still as well.
func graceFor(ended <-chan struct{}, f func()) {
	tick := time.NewTicker(killTick)
	defer tick.Stop()
	last := time.Now()
	for passed := time.Duration(0); passed < killGrace; {
		select {
		case <-ended:
			return
		case <-tick.C:
			f()
		}
		now := time.Now()
		passed += min(now.Sub(last), 10*killTick)
		last = now
	}
}
