package network

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/klog/v2/textlogger"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/backend/backendtest"
	"github.com/flanneld/flanneld/subnet"
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

	// What cannot be written as JSON is an error, not an answer that ends before it has begun.
	n.state = state{setup: setup{cfg: &subnet.Config{}}, leases: map[subnet.Subnets]*subnet.Lease{
		peer2.Subnets: {Subnets: peer2.Subnets, Attrs: subnet.Attrs{BackendData: []byte("\n\x1b[2J")}},
	}}
	asking.Go(func() {
		var refusal Refusal
		if _, err := c.Leases(ctx); !errors.As(err, &refusal) || !strings.HasPrefix(err.Error(), "the answer cannot be written: ") {
			t.Errorf("leases that are not JSON: %v", err)
		}
	})
	(<-n.status.requests)()
	asking.Wait()

	busy, giveUp := context.WithCancel(ctx)
	giveUp()
	if err := n.status.do(busy, func() { t.Error("it was asked all the same") }); err == nil {
		t.Error("nobody had time, and that is no error")
	}
}

// vxlanSetup returns the setup of a node with vxlanConfig.
func vxlanSetup(t *testing.T) setup {
	t.Helper()
	cfg, err := subnet.ParseConfig([]byte(vxlanConfig))
	if err != nil {
		t.Fatal(err)
	}
	uplink, err := backendtest.ParseUplink("eth0 1500 198.18.0.1/24")
	if err != nil {
		t.Fatal(err)
	}
	b, err := backend.New(cfg, uplink)
	if err != nil {
		t.Fatal(err)
	}
	return setup{cfg, uplink, b}
}

// TestLoggedProblems: a peer whose lease is wrong in another way each time is a line a minute; a lease that is gone, or
// right, is not remembered.
func TestLoggedProblems(t *testing.T) {
	s := vxlanSetup(t)
	own := lease("10.5.1.0-24", `{"PublicIP":"198.18.0.1","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:00:00:00:00:01"}}`)
	synctest.Test(t, func(t *testing.T) {
		var text bytes.Buffer
		n := &node{state: state{setup: s, own: &own},
			records: subnet.NewRecordLog(textlogger.NewLogger(textlogger.NewConfig(textlogger.Output(&text))))}
		step := func(what string, lines, remembered int, u subnet.Update) {
			t.Helper()
			n.logProblems(n.applyUpdate(u).problems)
			n.forgetProblems(u)
			if got := strings.Count(text.String(), "\n"); got != lines || text.Len() > 1000 || n.records.Len() != remembered {
				t.Errorf("%s: logged %d lines, %.2000q, and %d are remembered; want %d and %d",
					what, got, &text, n.records.Len(), lines, remembered)
			}
			text.Reset()
		}
		wrong := func(i int) (u subnet.Update) {
			u.Put(new(lease("10.5.2.0-24", fmt.Sprintf(`{"PublicIP":"198.18.0.2","BackendType":"vxlan","BackendData":{"VNI":%d,"VtepMAC":"\n\u001b[2J%s"}}`,
				i, strings.Repeat("x", 3000)))))
			return u
		}
		right, gone := snapshot(peer2), subnet.Update{}
		right.Snapshot = false
		gone.Delete(peer2.Subnets)
		step("a snapshot", 0, 0, snapshot(own))
		step("wrong", 1, 1, wrong(1))
		for i := range 20 {
			step("wrong in another way", 0, 1, wrong(i+2))
		}
		time.Sleep(time.Minute)
		step("a minute later", 1, 1, wrong(30))
		time.Sleep(time.Minute)
		step("right", 0, 0, right)
		step("wrong again", 1, 1, wrong(30))
		time.Sleep(time.Minute)
		step("gone", 0, 0, gone)
		step("back", 1, 1, wrong(30))
		time.Sleep(time.Minute)
		step("gone in a gap", 0, 0, snapshot(own))
	})
}
