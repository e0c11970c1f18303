package network

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestListenUnix: a socket that is left over is replaced, and nothing else.
func TestListenUnix(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "flanneld.sock")
	l, err := listenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket: %v, %v", info, err)
	}
	if _, err := listenUnix(path); err == nil || !strings.Contains(err.Error(), "another flanneld answers") {
		t.Errorf("while it is in use: %v", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // as one who is killed
	l.Close()
	if _, err := os.Stat(path); err != nil {
		t.Fatal(err)
	}
	if l, err = listenUnix(path); err != nil {
		t.Fatalf("where one was left: %v", err)
	}
	l.Close()
	if err := os.WriteFile(path, []byte("precious"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := listenUnix(path); err == nil {
		t.Error("a file was taken for a socket")
	}
	if text, err := os.ReadFile(path); err != nil || string(text) != "precious" {
		t.Errorf("the file that was there: %q, %v", text, err)
	}
}

// TestStatusServer: there is a status also before the configuration is known, and
// requests wait for the main loop, but not for ever.
func TestStatusServer(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	path := filepath.Join(t.TempDir(), "flanneld.sock")
	n := &node{Options: Options{StatusSocket: path, Version: "v1", Manager: newManager("{}")}, status: newStatusServer(),
		health: &health{missing: "the network's configuration"}}
	n.serveStatus(ctx)
	defer n.group.Wait()
	defer cancel()
	c := NewClient(path)
	s, err := c.Status(ctx)
	if err != nil || !s.Daemon || s.Ready || s.Waiting != "the network's configuration" || s.Version != "v1" {
		t.Errorf("early: %+v, %v", s, err)
	}

	n.started, n.ready, n.health.missing = time.Now(), true, ""
	close(n.status.serving)
	var asking sync.WaitGroup
	asking.Go(func() {
		if s, err := c.Status(ctx); err != nil || !s.Ready {
			t.Errorf("then: %+v, %v", s, err)
		}
	})
	asking.Go(func() {
		if _, err := c.Diff(ctx); err == nil || !strings.Contains(err.Error(), "not known yet") {
			t.Errorf("the diff without a lease: %v", err)
		}
	})
	for range 2 {
		(<-n.status.requests)()
	}
	asking.Wait()

	busy, giveUp := context.WithCancel(ctx)
	giveUp()
	if err := n.status.do(busy, func() { t.Error("it was asked all the same") }); err == nil {
		t.Error("nobody had time, and that is no error")
	}
}
