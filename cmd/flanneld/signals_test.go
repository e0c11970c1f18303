package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// silent returns the address of a server that accepts connections and never
// answers, and a channel that is closed at the first of them.
func silent(t *testing.T) (address string, accepted <-chan struct{}) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	first := make(chan struct{})
	go func() {
		var conns []net.Conn
		for {
			c, err := l.Accept()
			if err != nil {
				break
			}
			if conns = append(conns, c); len(conns) == 1 {
				close(first)
			}
		}
		for _, c := range conns {
			c.Close()
		}
	}()
	return l.Addr().String(), first
}

// refusing returns an address that nobody listens on.
func refusing(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	return l.Addr().String()
}

// An operator who ends flanneld while it starts is not told of an error. test/e2e has the
// points that take a real store or a network namespace.
func TestEndWhileStarting(t *testing.T) {
	network := filepath.Join(t.TempDir(), "net-conf.json")
	if err := os.WriteFile(network, []byte(`{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}`), 0o644); err != nil {
		t.Fatal(err)
	}
	kube := func(address string) []string {
		return []string{"--kube-subnet-mgr", "--net-config-path=" + network, "--kube-api-url=http://" + address}
	}
	etcd := func(address string) []string { return []string{"--etcd-endpoints=http://" + address} }
	for _, c := range []struct {
		name   string
		env    []string
		store  func(address string) []string
		silent bool   // it accepts connections; otherwise nobody is there
		until  string // what is logged before the signal; empty: a connection is accepted
	}{
		{name: "nobody is where etcd should be", store: etcd, until: "read the network's configuration"},
		{name: "etcd never answers", store: etcd, silent: true},
		{name: "etcd never answers, with a password", store: etcd, silent: true, env: []string{"FLANNELD_ETCD_USERNAME=u", "FLANNELD_ETCD_PASSWORD=p"}},
		{name: "nobody is where the API server should be", env: []string{"NODE_NAME=n1"}, store: kube, until: "API server"},
		{name: "the API server never answers", env: []string{"NODE_NAME=n1"}, store: kube, silent: true},
		{name: "the API server never says which Node the pod is on", env: []string{"POD_NAME=p", "POD_NAMESPACE=n"}, store: kube, silent: true},
	} {
		for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
			t.Run(fmt.Sprintf("%s, %v", c.name, sig), func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				address, accepted := refusing(t), make(<-chan struct{})
				if c.silent {
					address, accepted = silent(t)
				}
				args := append(c.store(address), "--subnet-file="+filepath.Join(t.TempDir(), "subnet.env"))
				cmd, lines := start(ctx, t, c.env, args...)
				if c.silent {
					go func() {
						select {
						case <-accepted:
							cmd.Process.Signal(sig)
						case <-ctx.Done():
						}
					}()
				}
				var said strings.Builder
				for lines.Scan() {
					said.WriteString(lines.Text() + "\n")
					if c.until != "" && strings.Contains(lines.Text(), c.until) {
						cmd.Process.Signal(sig)
					}
				}
				if err := cmd.Wait(); err != nil {
					t.Errorf("flanneld: %v", err)
				}
				// After the signal nothing is an error; that nobody is there was one.
				_, ending, _ := strings.Cut(said.String(), c.until)
				for line := range strings.Lines(ending) {
					if strings.HasPrefix(line, "E") || strings.Contains(line, "cannot go on") {
						t.Errorf("flanneld said: %s", line)
					}
				}
				if t.Failed() || !strings.Contains(ending, "flanneld ends") {
					t.Errorf("all that it said:\n%s", &said)
				}
			})
		}
	}
}

// Before flanneld has come so far as to wait for signals, one of them ends it as
// it does any program. There is no third way.
func TestEndAtOnce(t *testing.T) {
	for _, pause := range []time.Duration{0, time.Millisecond, 5 * time.Millisecond, 20 * time.Millisecond, 50 * time.Millisecond} {
		t.Run(pause.String(), func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			cmd, lines := start(ctx, t, nil, "--etcd-endpoints=http://"+refusing(t), "--subnet-file="+filepath.Join(t.TempDir(), "subnet.env"))
			time.Sleep(pause) // what it has come to by then differs: any of it will do
			cmd.Process.Signal(syscall.SIGTERM)
			said := ""
			for lines.Scan() {
				said += lines.Text() + "\n"
			}
			err := cmd.Wait()
			status := cmd.ProcessState.Sys().(syscall.WaitStatus)
			if by := status.Signaled() && status.Signal() == syscall.SIGTERM; err != nil && !by || strings.Contains(said, "cannot go on") {
				t.Errorf("flanneld: %v\n%s", err, said)
			}
			t.Logf("%v", cmd.ProcessState)
		})
	}
}

// SIGHUP asks for nothing that flanneld could do, and ends it as it does any
// program.
func TestHangUp(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	address, accepted := silent(t)
	cmd, lines := start(ctx, t, nil, "--etcd-endpoints=http://"+address, "--subnet-file="+filepath.Join(t.TempDir(), "subnet.env"))
	go func() {
		select {
		case <-accepted:
			cmd.Process.Signal(syscall.SIGHUP)
		case <-ctx.Done():
		}
	}()
	for lines.Scan() {
	}
	cmd.Wait()
	if status := cmd.ProcessState.Sys().(syscall.WaitStatus); !status.Signaled() || status.Signal() != syscall.SIGHUP {
		t.Errorf("flanneld: %v", cmd.ProcessState)
	}
}
