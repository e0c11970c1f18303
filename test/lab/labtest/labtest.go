// Package labtest makes labs for tests: what goes wrong fails the test, and
// the lab goes with it.
package labtest

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
)

// Context returns a context for a test that should be done within the limit.
func Context(t testing.TB, limit time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	return ctx
}

// New makes a lab with as many nodes, none started, as there are options. When
// the test fails, the daemons' logs are shown.
func New(ctx context.Context, t testing.TB, config string, nodes ...lab.NodeOptions) *lab.Lab {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: network namespaces")
	}
	l, err := lab.New(ctx, lab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
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
