package lock

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/nstest"
)

// childVar is set in the environment of a copy of the test program that takes a name, and waits.
const childVar = "TEST_LOCK_CHILD"

func TestMain(m *testing.M) {
	switch os.Getenv(childVar) {
	case "holder":
		l, _, err := Take(context.Background(), "x")
		if err != nil {
			os.Stdout.WriteString(err.Error())
		}
		defer runtime.KeepAlive(l)
	case "deaf": // binds the name, and never listens
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		if err == nil {
			err = unix.Bind(fd, &unix.SockaddrUnix{Name: "@flanneld/x"})
		}
		if err != nil {
			os.Stdout.WriteString(err.Error())
		}
	default:
		os.Exit(m.Run())
	}
	os.Stdout.Close()               // the name is taken
	_, _ = os.Stdin.Read([]byte{0}) // until the test ends it
}

// child starts a process that takes the name, and returns its end.
func child(t *testing.T, kind string, attr *syscall.SysProcAttr) (pid int, end func()) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childVar+"="+kind)
	cmd.SysProcAttr = attr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	end = func() { in.Close(); _ = cmd.Wait() }
	t.Cleanup(end)
	if n, _ := out.Read(make([]byte, 1)); n > 0 {
		t.Fatal("the other process cannot take the name")
	}
	return cmd.Process.Pid, end
}

func mustTake(t *testing.T, name string) *Lock {
	t.Helper()
	l, h, err := Take(t.Context(), name)
	if err != nil || h != nil {
		t.Fatalf("not taken: held by %v, %v", h, err)
	}
	return l
}

// The holder is known, and when it ends the lock is free.
func TestHolder(t *testing.T) {
	nstest.New(t)
	pid, end := child(t, "holder", nil)
	mustTake(t, "y").Release() // another name
	l, h, err := Take(t.Context(), "x")
	if l != nil || err != nil || h == nil || h.PID != pid {
		t.Fatalf("got %v, held by %v, %v: want process %d", l, h, err, pid)
	}
	go end()
	h.Wait(t.Context())
	l = mustTake(t, "x")
	_, h, err = Take(t.Context(), "x")
	if h == nil || h.PID != os.Getpid() {
		t.Fatalf("held by %v, %v: want this process", h, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	h.Wait(ctx) // returns
	l.Release()
	mustTake(t, "x").Release()
}

// A network namespace has locks of its own.
func TestNamespaces(t *testing.T) {
	nstest.New(t)
	child(t, "holder", &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET})
	mustTake(t, "x").Release()
}

// No other user can take the lock, or keep root waiting.
func TestStrangers(t *testing.T) {
	nobody := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	t.Run("who listens", func(t *testing.T) {
		nstest.New(t)
		child(t, "holder", nobody)
		if l, h, err := Take(t.Context(), "x"); l != nil || h != nil || !errors.Is(err, errStranger) {
			t.Errorf("got %v, held by %v, %v", l, h, err)
		}
	})
	t.Run("who does not", func(t *testing.T) {
		nstest.New(t)
		child(t, "deaf", nobody)
		if l, h, err := Take(t.Context(), "x"); l != nil || h != nil || !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("got %v, held by %v, %v", l, h, err)
		}
	})
	t.Run("whose queue is full", func(t *testing.T) {
		nstest.New(t)
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: "@flanneld/x"}), unix.Listen(fd, 0)); err != nil {
			t.Fatal(err)
		}
		conn, err := net.Dial("unix", "@flanneld/x")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if l, h, err := Take(t.Context(), "x"); l != nil || h != nil || !errors.Is(err, unix.EAGAIN) {
			t.Errorf("got %v, held by %v, %v", l, h, err)
		}
	})
}
