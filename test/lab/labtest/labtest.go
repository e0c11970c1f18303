// Package labtest makes labs for tests: what goes wrong fails the test, and
// the lab goes with it.
package labtest

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/nstest"
	"github.com/flanneld/flanneld/test/lab"
)

// Context returns a context for a test that is done within the limit where it runs alone. Several tests run at a time,
// so that each gets three times as long.
func Context(t testing.TB, limit time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), lab.Patiently(3*limit))
	t.Cleanup(cancel)
	return ctx
}

// Selected tells whether a case of a test runs: by LONG=all every case, by LONG=rest those that are not quick, and
// otherwise those that are. make test runs the quick cases, and make test-long the rest.
func Selected(quick bool) bool {
	switch os.Getenv("LONG") {
	case "all":
		return true
	case "rest":
		return !quick
	}
	return quick
}

// New makes a lab with as many nodes, none started, as there are options. When
// the test fails, the daemons' logs are shown; it fails when a daemon panics.
func New(ctx context.Context, t testing.TB, config string, nodes ...lab.NodeOptions) *lab.Lab {
	t.Helper()
	return NewWith(ctx, t, lab.Options{}, config, nodes...)
}

// NewWith is New with options for the lab.
func NewWith(ctx context.Context, t testing.TB, o lab.Options, config string, nodes ...lab.NodeOptions) *lab.Lab {
	t.Helper()
	nstest.NeedRoot(t)
	NeedPrograms(t, o.Store, o.APIServer)
	l, err := lab.New(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, n := range l.Nodes() {
			if strings.Contains(n.Log(), "\ngoroutine ") {
				t.Errorf("flanneld on %s has panicked", n.Hostname)
			}
		}
		if t.Failed() {
			for _, n := range l.Nodes() {
				t.Logf("%s said:\n%s", n.Hostname, n.Log())
			}
		}
		if err := l.Close(); err != nil {
			t.Errorf("closing the lab: %v", err)
		}
	})
	Do(t, l.Etcd.Configure(ctx, config))
	for _, o := range nodes {
		Must(l.AddNode(ctx, o))(t)
	}
	return l
}

// NeedPrograms is for a test that runs programs which have to be built, such as
// stores/kine; "" is none.
func NeedPrograms(t testing.TB, names ...string) {
	t.Helper()
	for _, name := range names {
		if name == "" {
			continue
		}
		if _, err := lab.Program(name); err != nil {
			nstest.Missing(t, "%v", err)
		}
	}
}

// NeedDevice skips the test unless the kernel can make such a device: what
// follows "type" in "ip link add", or "" for none.
func NeedDevice(t testing.TB, kind string) {
	t.Helper()
	if kind != "" {
		NeedKernel(t, "ip link add try type "+kind)
	}
}

// NeedKernel skips the test unless the command, split at spaces, succeeds in a
// network namespace of its own. make test-vm has a kernel that can do more.
func NeedKernel(t testing.TB, line string) {
	t.Helper()
	nstest.NeedRoot(t)
	words := strings.Fields(line)
	cmd := exec.Command(words[0], words[1:]...)
	cmd.SysProcAttr = &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Skipf("this kernel cannot do it: %s: %v %s", line, err, bytes.TrimSpace(out))
	}
}

// Start starts the daemon on all nodes at once and waits until they are ready.
func Start(ctx context.Context, t testing.TB, l *lab.Lab, args ...string) {
	t.Helper()
	for _, n := range l.Nodes() {
		Do(t, n.Start(args...))
	}
	for _, n := range l.Nodes() {
		Do(t, n.WaitReady(ctx))
	}
}

// Do fails the test on an error.
func Do(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Must is for calls that return a value too: Must(n.Run(ctx, "ip route"))(t).
func Must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		Do(t, err)
		return v
	}
}
