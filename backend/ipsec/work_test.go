package ipsec

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/nstest"
	"github.com/flanneld/flanneld/subnet"
)

// A node is where a backend works, whose charon is a script of the test.
type node struct {
	t       *testing.T
	dir     string
	backend *ipsec
	log     nstest.Log
	cancel  context.CancelCauseFunc
	done    chan error
}

func newNode(t *testing.T, charon string) *node {
	n := &node{t: t, dir: t.TempDir(), done: make(chan error, 1)}
	nstest.WriteProgram(t, filepath.Join(n.dir, "charon"), fmt.Sprintf("#!/bin/sh\ncd %s\n%s\n", n.dir, charon))
	t.Setenv("PATH", n.dir+":"+os.Getenv("PATH"))
	cfg, err := subnet.ParseConfig(fmt.Appendf(nil, `{"Network": "10.5.0.0/16", "Backend": {"Type": "ipsec", "PSK": %q}}`,
		strings.Repeat("s3cret", 16)))
	if err != nil {
		t.Fatal(err)
	}
	ip := netip.MustParseAddr("198.18.0.1")
	b, err := New(cfg, iface.Uplink{IPv4: iface.Link{Name: "eth0", MTU: 1500, Addr: ip, PublicIP: ip}})
	if err != nil {
		t.Fatal(err)
	}
	n.backend = b.(*ipsec)
	n.backend.socket = filepath.Join(n.dir, "charon.vici")
	return n
}

// start has the backend work without peers.
func (n *node) start() {
	ctx, cancel := context.WithCancelCause(n.log.Context(n.t.Context()))
	n.cancel = cancel
	peers := make(chan subnet.Update, 1)
	peers <- subnet.Update{Snapshot: true}
	go func() { n.done <- n.backend.Work(ctx, subnet.Lease{}, peers) }()
	n.t.Cleanup(func() { cancel(nil) })
}

// end ends the backend as flanneld does when it stops, and returns what it has logged.
func (n *node) end(cause error) string {
	n.t.Helper()
	n.cancel(cause)
	select {
	case err := <-n.done:
		if err != nil {
			n.t.Errorf("Work returned %v", err)
		}
	case <-time.After(30 * time.Second):
		n.t.Fatal("Work does not end")
	}
	return n.log.String()
}

// pid waits for a charon to write its process id, and has it killed when the test ends.
func (n *node) pid() (pid int) {
	n.t.Helper()
	n.eventually("charon to run", func() bool {
		text, _ := os.ReadFile(filepath.Join(n.dir, "pid"))
		var err error
		pid, err = strconv.Atoi(strings.TrimSuffix(string(text), "\n"))
		return err == nil
	})
	n.t.Cleanup(func() { _ = unix.Kill(pid, unix.SIGKILL) })
	return pid
}

func (n *node) eventually(what string, is func() bool) {
	n.t.Helper()
	for end := time.Now().Add(30 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			n.t.Fatalf("waited for %s in vain; logged:\n%s", what, n.log.String())
		}
	}
}

const running = "echo $$ >new; mv new pid; exec sleep 1000"

// charon gets no secrets of flanneld's environment, and goes on when flanneld stops.
func TestCharon(t *testing.T) {
	t.Setenv("FLANNELD_ETCD_PASSWORD", "hunter2")
	t.Setenv("AWS_SESSION_TOKEN", "hunter2")
	t.Setenv("STRONGSWAN_CONF", "as it is")
	n := newNode(t, "export -p >environment; "+running)
	n.start()
	pid := n.pid()
	n.end(backend.ErrStopping)
	text, err := os.ReadFile(filepath.Join(n.dir, "environment"))
	if err != nil || strings.Contains(string(text), "hunter2") || !strings.Contains(string(text), "STRONGSWAN_CONF") ||
		!strings.Contains(string(text), "STARTED_BY") {
		t.Errorf("%v\n%s", err, text)
	}
	if err := unix.Kill(pid, 0); err != nil {
		t.Errorf("charon has ended: %v", err)
	}
}

// A charon that never listens is logged once, and ended after a time.
func TestCharonNeverListens(t *testing.T) {
	n := newNode(t, running)
	n.backend.startLimit, n.backend.startTimeout = 200*time.Millisecond, 400*time.Millisecond
	n.start()
	first := n.pid()
	second := 0
	n.eventually("another charon", func() bool { second = n.pid(); return second != first })
	third := 0
	n.eventually("one more", func() bool { third = n.pid(); return third != second })
	log := n.end(nil)
	n.eventually("the end of all", func() bool {
		return unix.Kill(first, 0) != nil && unix.Kill(second, 0) != nil && unix.Kill(third, 0) != nil
	})
	if n := strings.Count(log, `"Failed; retrying" err="charon was started, and does not listen at `); n != 1 {
		t.Errorf("logged %d times:\n%s", n, log)
	}
	if strings.Contains(log, "charon has ended") {
		t.Errorf("it has not ended by itself:\n%s", log)
	}
}

// While charon does not answer, the log says that it is waited for, and the backend ends at once. No other charon is
// started, even when the one that hangs accepts no more connections.
func TestCharonHangs(t *testing.T) {
	for _, full := range []bool{false, true} {
		t.Run(fmt.Sprintf("full %v", full), func(t *testing.T) {
			n := newNode(t, running)
			n.backend.waits.Notice = 10 * time.Millisecond
			listen(t, n.backend.socket, full)
			n.start()
			want := `"Waiting for charon" socket=`
			if full {
				want = `"Failed; retrying" err="charon hangs: it accepts no connection at `
			}
			n.eventually("the log", func() bool { return strings.Contains(n.log.String(), want) })
			before := n.log.String()
			log := n.end(backend.ErrStopping)
			if strings.Contains(log, "Started charon") {
				t.Errorf("another charon was started:\n%s", log)
			}
			if ending := log[len(before):]; strings.HasPrefix(ending, "E") || strings.Contains(ending, "\nE") {
				t.Errorf("the end is an error:\n%s", log)
			}
		})
	}
}

// listen listens on a socket, and accepts no connection. If the socket is to be full, the kernel does not, either.
func listen(t *testing.T, path string, full bool) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 1); err != nil {
		t.Fatal(err)
	}
	for full {
		c, err := net.Dial("unix", path)
		if err != nil {
			return
		}
		t.Cleanup(func() { c.Close() })
	}
}
