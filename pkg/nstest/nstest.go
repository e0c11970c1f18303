// Package nstest gives a test a network namespace of its own, programs of its own, and what was logged.
package nstest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Main runs the tests of a package, as its TestMain, in a network namespace of their own with lo up, and in a mount
// namespace: for tests of what works in many threads, or in processes that it starts, or would meet another of its kind on
// the host. Without root, the tests run where they are.
func Main(m *testing.M) {
	const inside = "NSTEST_INSIDE"
	if os.Getuid() == 0 && os.Getenv(inside) == "" {
		self := exec.Command(os.Args[0], os.Args[1:]...)
		self.Env = append(os.Environ(), inside+"=1")
		self.Stdin, self.Stdout, self.Stderr = os.Stdin, os.Stdout, os.Stderr
		self.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags: syscall.CLONE_NEWNET, Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL,
		}
		err := self.Run()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(self.ProcessState.ExitCode())
	}
	if os.Getuid() == 0 {
		if err := loUp(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// loUp sets lo up.
func loUp() error {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("setting lo up: %w", err)
	}
	return nil
}

// New moves the calling goroutine into a new, empty network namespace with lo up, until the test ends. Sockets that the
// goroutine opens and commands that it starts belong to the namespace; goroutines that it starts do not. The test needs
// root and the program ip.
func New(t testing.TB) {
	t.Helper()
	NeedRoot(t)
	Need(t, "ip")
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
	if err := loUp(); err != nil {
		t.Fatal(err)
	}
}

// Run runs a command in the calling goroutine's namespace and returns its output. The line is split at spaces. The test
// fails if the command fails.
func Run(t testing.TB, line string) string {
	t.Helper()
	out, err := Try(line)
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return out
}

// Try runs a command as Run does, but returns an error if the command fails.
func Try(line string) (string, error) {
	f := strings.Fields(line)
	out, err := exec.Command(f[0], f[1:]...).CombinedOutput()
	return strings.TrimRight(string(out), "\n"), err
}

// AwaitCarrier waits until the state of links is UP. The kernel sets the state, and notifies of it, a moment after both
// ends of a pair were set up.
func AwaitCarrier(t testing.TB, links ...string) {
	t.Helper()
	for _, link := range links {
		for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
			out := Run(t, "ip -o link show dev "+link)
			if strings.Contains(out, " state UP ") {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("not up within a minute: %s", out)
			}
		}
	}
}

// Missing skips a test whose requirement is missing. In continuous integration (CI=true), where nothing may be missing,
// the test fails.
func Missing(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// NeedRoot skips a test that creates network namespaces unless it runs as root.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		Missing(t, "needs root: network namespaces")
	}
}

// Need skips a test that runs the named programs if one of them is missing.
func Need(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			Missing(t, "needs %s: %v", p, err)
		}
	}
}

// WriteProgram writes a program, in place of any before, which can be started at once: while the file is open for
// writing, no other goroutine forks a child, which would hold the file open for a moment, so that the kernel would
// refuse to execute the file ("text file busy").
func WriteProgram(t testing.TB, path, text string) {
	t.Helper()
	syscall.ForkLock.RLock()
	err := os.WriteFile(path+".new", []byte(text), 0o755)
	syscall.ForkLock.RUnlock()
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Overflow makes the kernel drop notifications for a netlink socket: it shrinks the socket's buffer, and changes the
// MTU of a link (to 1400 and more) many times. The buffer stays small.
func Overflow(t testing.TB, socket syscall.Conn, link string) {
	t.Helper()
	OverflowBy(t, socket, func(i int) { Run(t, fmt.Sprintf("ip link set %s mtu %d", link, 1400+i)) })
}

// OverflowBy does the same with calls of change, each of which makes the kernel send notifications.
func OverflowBy(t testing.TB, socket syscall.Conn, change func(i int)) {
	t.Helper()
	raw, err := socket.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var refused error
	err = raw.Control(func(fd uintptr) {
		refused = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 1) // the kernel's minimum
	})
	if err := errors.Join(err, refused); err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		change(i)
	}
	sockets, err := os.ReadFile("/proc/thread-self/net/netlink")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(sockets)) {
		// sk Eth Pid Groups Rmem Wmem Dump Locks Drops Inode
		if drops := strings.Fields(line)[8]; drops != "0" && drops != "Drops" {
			return
		}
	}
	t.Fatalf("nothing was lost: this tests nothing\n%s", sockets)
}
