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

// silent returns the address of a server that accepts connections and sends nothing, and a channel that is closed when
// the server accepts its first connection.
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

// refusing returns an address that no program listens on.
func refusing(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	return l.Addr().String()
}

// TestEndWhileStarting: flanneld logs no error if a signal ends it while it starts. test/e2e has the same for the steps
// that need a real store or a network namespace.
func TestEndWhileStarting(t *testing.T) {
	network := filepath.Join(t.TempDir(), "net-conf.json")
	if err := os.WriteFile(network, []byte(`{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}`),
		0o644); err != nil {
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
		silent bool   // the server accepts connections; otherwise connections are refused
		until  string // what is logged before the signal; empty: a connection is accepted
	}{
		{name: "etcd refuses connections", store: etcd, until: "read the network's configuration"},
		{name: "etcd is silent", store: etcd, silent: true},
		{name: "etcd is silent, with a password", store: etcd, silent: true,
			env: []string{"FLANNELD_ETCD_USERNAME=u", "FLANNELD_ETCD_PASSWORD=p"}},
		{name: "the API server refuses connections", env: []string{"NODE_NAME=n1"}, store: kube, until: "API server"},
		{name: "the API server is silent", env: []string{"NODE_NAME=n1"}, store: kube, silent: true},
		{name: "the API server is silent about the pod's Node", env: []string{"POD_NAME=p", "POD_NAMESPACE=n"},
			store: kube, silent: true},
	} {
		for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
			t.Run(fmt.Sprintf("%s, %v", c.name, sig), func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				address, accepted := refusing(t), make(<-chan struct{})
				if c.silent {
					address, accepted = silent(t)
				}
				cmd, lines := start(ctx, t, c.env, c.store(address)...)
				if c.silent {
					go func() {
						select {
						case <-accepted:
							cmd.Process.Signal(sig)
						case <-ctx.Done():
						}
					}()
				}
				var logged strings.Builder
				for lines.Scan() {
					logged.WriteString(lines.Text() + "\n")
					if c.until != "" && strings.Contains(lines.Text(), c.until) {
						cmd.Process.Signal(sig)
					}
				}
				if err := cmd.Wait(); err != nil {
					t.Errorf("flanneld: %v", err)
				}
				// Errors before the signal are expected, as the store cannot be reached.
				_, ending, _ := strings.Cut(logged.String(), c.until)
				for line := range strings.Lines(ending) {
					if strings.HasPrefix(line, "E") || strings.Contains(line, "cannot continue") {
						t.Errorf("flanneld logged: %s", line)
					}
				}
				if t.Failed() || !strings.Contains(ending, "flanneld ends") {
					t.Errorf("the whole log:\n%s", &logged)
				}
			})
		}
	}
}

// TestEndAtOnce: until flanneld handles signals, a signal ends it as any other program. Later, flanneld ends by itself.
func TestEndAtOnce(t *testing.T) {
	for _, ms := range []time.Duration{0, 1, 5, 20, 50} {
		pause := ms * time.Millisecond
		t.Run(pause.String(), func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			cmd, lines := start(ctx, t, nil, "--etcd-endpoints=http://"+refusing(t))
			time.Sleep(pause) // flanneld may be at any step by then
			cmd.Process.Signal(syscall.SIGTERM)
			logged := ""
			for lines.Scan() {
				logged += lines.Text() + "\n"
			}
			err := cmd.Wait()
			status := cmd.ProcessState.Sys().(syscall.WaitStatus)
			bySignal := status.Signaled() && status.Signal() == syscall.SIGTERM
			if err != nil && !bySignal || strings.Contains(logged, "cannot continue") {
				t.Errorf("flanneld: %v\n%s", err, logged)
			}
			t.Logf("%v", cmd.ProcessState)
		})
	}
}

// TestHangUp: flanneld does not handle SIGHUP, which ends it as any other program.
func TestHangUp(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	address, accepted := silent(t)
	cmd, lines := start(ctx, t, nil, "--etcd-endpoints=http://"+address)
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
