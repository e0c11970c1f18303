package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/flanneld/flanneld/subnet"
)

// healthz is where the daemon answers, inside its namespace.
const healthzIP, healthzPort = "127.0.0.1", "10255"

// A Daemon is flanneld on a node. Its log is one file over all its lives.
type Daemon struct {
	Env []string // what its environment has besides, as os.Environ has it

	node   *Node
	args   []string
	proc   *Process    // nil before the first Start
	memory memoryFiles // zero: there is no limit
}

// Start starts build/bin/flanneld. Unless args have others, it gets the endpoint of the lab's etcd, the node's subnet
// file and a port for its health.
func (d *Daemon) Start(args ...string) error {
	if d.proc != nil && !d.proc.Exited() {
		return fmt.Errorf("flanneld on %s runs already", d.node.Hostname)
	}
	program, err := d.node.lab.Program("bin/flanneld")
	if err != nil {
		return err
	}
	d.args = args
	full := slices.Clone(args)
	for _, given := range []string{
		"--etcd-endpoints=" + Endpoint,
		"--subnet-file=" + d.SubnetFile(),
		"--healthz-ip=" + healthzIP,
		"--healthz-port=" + healthzPort,
	} {
		name, _, _ := strings.Cut(given, "=")
		if !sets(args, name) {
			full = append(full, given)
		}
	}
	log, err := os.OpenFile(d.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(program, full...)
	if d.memory.root != "" { // memory counts in the control group in which a process was when it allocated the memory
		enter := []string{"-c", `echo $$ >"$0" && exec "$@"`, d.memoryFile("cgroup.procs"), program}
		cmd = exec.Command("sh", append(enter, full...)...)
	}
	cmd.Env = append(os.Environ(),
		"NODE_NAME="+d.node.Hostname, // for Kubernetes
		"WIREGUARD_KEY_FILE="+d.KeyFile())
	cmd.Env = append(cmd.Env, d.Env...)
	cmd.Stdout, cmd.Stderr = log, log
	d.proc, err = d.node.Launch(cmd)
	return err
}

// sets tells whether arguments have a flag, or another flag in its place.
func sets(args []string, flag string) bool {
	return slices.ContainsFunc(args, func(arg string) bool {
		name, _, _ := strings.Cut(arg, "=")
		return name == flag || name == "--discovery-srv" && flag == "--etcd-endpoints"
	})
}

// WaitReady waits until the daemon is Ready.
func (d *Daemon) WaitReady(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	err := Poll(ctx, "flanneld on "+d.node.Hostname+" to be ready", func() error {
		err := d.Ready(ctx)
		if d.proc == nil || d.proc.Exited() {
			cancel() // there is nothing to wait for
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("%w\n%s", err, tail(d.logFile()))
	}
	return nil
}

// Health is where the daemon answers, for node.Dial.
func (d *Daemon) Health() string { return net.JoinHostPort(healthzIP, healthzPort) }

// Ready returns nil when /readyz answers 200 and the subnet file is there.
func (d *Daemon) Ready(ctx context.Context) error {
	if d.proc == nil {
		return errors.New("it was never started")
	}
	if d.proc.Exited() {
		return fmt.Errorf("it has ended: %v", d.proc.cmd.ProcessState)
	}
	ctx, cancel := context.WithTimeout(ctx, Patiently(2*time.Second))
	defer cancel()
	client := &http.Client{Transport: &http.Transport{DialContext: d.node.Dial, DisableKeepAlives: true}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+d.Health()+"/readyz", nil)
	if err != nil {
		return err
	}
	answer, err := client.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		why, _ := io.ReadAll(answer.Body)
		return fmt.Errorf("/readyz: %s: %s", answer.Status, bytes.TrimSpace(why))
	}
	_, err = d.SubnetEnv()
	return err
}

// Stop sends SIGTERM and waits for the end, which may not be a failure. The daemon
// need not run, here and below.
func (d *Daemon) Stop(ctx context.Context) error {
	if d.proc == nil || d.proc.Exited() {
		return nil
	}
	if err := d.proc.Stop(ctx); err != nil {
		return err
	}
	// One that has just been started may end by the signal itself.
	if state := d.proc.cmd.ProcessState; state.ExitCode() > 0 {
		return fmt.Errorf("flanneld on %s, sent SIGTERM: %v\n%s", d.node.Hostname, state, tail(d.logFile()))
	}
	return nil
}

// Signal sends the daemon a signal.
func (d *Daemon) Signal(sig os.Signal) error { return d.proc.cmd.Process.Signal(sig) }

// Wait waits for the daemon's end.
func (d *Daemon) Wait() *os.ProcessState {
	<-d.proc.done
	return d.proc.cmd.ProcessState
}

// Kill sends SIGKILL and waits for the end.
func (d *Daemon) Kill() {
	if d.proc != nil {
		d.proc.Kill()
	}
}

// Restart stops the daemon and starts it again as it was started last.
func (d *Daemon) Restart(ctx context.Context) error {
	if err := d.Stop(ctx); err != nil {
		return err
	}
	return d.Start(d.args...)
}

// Exited reports whether the daemon has been started and has ended.
func (d *Daemon) Exited() bool { return d.proc != nil && d.proc.Exited() }

// Log returns all that the daemon has logged.
func (d *Daemon) Log() string {
	text, err := os.ReadFile(d.logFile())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err.Error()
	}
	return string(text)
}

// SubnetFile is the path of the node's subnet.env.
func (d *Daemon) SubnetFile() string { return filepath.Join(d.node.Dir, "subnet.env") }

// SubnetEnv reads it.
func (d *Daemon) SubnetEnv() (subnet.Env, error) { return subnet.ReadEnv(d.SubnetFile()) }

// KeyFile is where the wireguard backend keeps its private key.
func (d *Daemon) KeyFile() string { return filepath.Join(d.node.Dir, "wgkey") }

func (d *Daemon) logFile() string { return filepath.Join(d.node.Dir, "flanneld.log") }

// tail returns the last lines of a log, for an error.
func tail(file string) string {
	text, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return file + ":\n\t" + strings.Join(lines[max(0, len(lines)-20):], "\n\t")
}
