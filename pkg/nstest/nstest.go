// Package nstest gives a test a network namespace of its own.
package nstest

import (
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// New moves the calling goroutine into a new, empty network namespace with lo
// up, until the test ends. Sockets that it opens and commands that it starts
// belong to the namespace; goroutines that it starts do not. Without root the
// test is skipped.
func New(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: network namespaces")
	}
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	own, err := netns.New() // moves this thread into it
	if err != nil {
		t.Fatalf("creating a network namespace: %v", err)
	}
	t.Cleanup(func() {
		own.Close()
		if err := netns.Set(home); err != nil {
			t.Errorf("leaving the network namespace: %v", err)
			return // the thread stays locked and ends with the goroutine
		}
		home.Close()
		runtime.UnlockOSThread()
	})
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		t.Fatalf("setting lo up: %v", err)
	}
}

// Run runs a command in the calling goroutine's namespace and returns what it
// prints. The line is split at spaces; failure fails the test.
func Run(t testing.TB, line string) string {
	t.Helper()
	out, err := Try(line)
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return out
}

// Try is Run for commands that may fail.
func Try(line string) (string, error) {
	f := strings.Fields(line)
	out, err := exec.Command(f[0], f[1:]...).CombinedOutput()
	return strings.TrimRight(string(out), "\n"), err
}

// Need skips the test unless the named programs are installed.
func Need(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("needs %s: %v", p, err)
		}
	}
}
