package lock

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

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
	case "crowd": // connects more often than the queue is long, until it is refused, and leaves it so
		for range 100 {
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
			if err == nil {
				err = unix.Connect(fd, &unix.SockaddrUnix{Name: "@flanneld/x"})
			}
			if err != nil && !errors.Is(err, unix.EAGAIN) {
				os.Stdout.WriteString(err.Error())
			}
		}
	default:
		os.Exit(m.Run())
	}
	os.Stdout.Close()               // the name is taken
	_, _ = os.Stdin.Read([]byte{0}) // until the test ends it
}

// child starts a process that takes the name. end ends the process, also if several goroutines call it.
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
	end = sync.OnceFunc(func() { in.Close(); _ = cmd.Wait() })
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
}

// Of a process that listens and accepts nothing, nothing is known: it counts as the holder.
func TestFullQueue(t *testing.T) {
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
	l, h, err := Take(t.Context(), "x")
	if l != nil || err != nil || h == nil || !h.Silent {
		t.Fatalf("got %v, held by %v, %v", l, h, err)
	}
	h.Wait(t.Context()) // returns
	h.Close()
}

// However often the lock is asked for, by whomever, the holder is known, also while it is stopped, and no file
// descriptors are left.
func TestManyAsk(t *testing.T) {
	nstest.New(t)
	nstest.Need(t, "sysctl")
	nstest.Run(t, "sysctl -qw net.core.somaxconn=4") // of the namespace
	pid, _ := child(t, "holder", nil)
	open := func(of int) int {
		files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", of))
		if err != nil {
			t.Fatal(err)
		}
		return len(files)
	}
	ask := func() {
		t.Helper()
		_, h, err := Take(t.Context(), "x")
		if err != nil || h == nil || h.PID != pid {
			t.Fatalf("held by %v, %v: want process %d", h, err, pid)
		}
		h.Close()
	}
	ask()
	ours, theirs := open(os.Getpid()), open(pid)
	for range 100 {
		ask()
	}
	child(t, "crowd", &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}) // keeps its connections
	ask()
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	ask()
	if err := unix.Kill(pid, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	const few = 10 // pipes of the other child, and what is about to be closed
	for deadline := time.Now().Add(20 * time.Second); open(pid) > theirs || open(os.Getpid()) > ours+few; {
		if time.Now().After(deadline) {
			t.Fatalf("the holder has %d open files, at first %d; this process %d, at first %d", open(pid), theirs,
				open(os.Getpid()), ours)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// The number of processes that wait is limited; all of them are notified of the end.
func TestManyWait(t *testing.T) {
	nstest.New(t)
	l := mustTake(t, "x")
	var holders []*Holder
	for range maxWaiting + 1 {
		_, h, err := Take(t.Context(), "x")
		if err != nil {
			t.Fatal(err)
		}
		holders = append(holders, h)
	}
	holders[maxWaiting].Wait(t.Context()) // returns: there are too many
	l.Release()
	for _, h := range holders {
		h.Wait(t.Context())
	}
	mustTake(t, "x").Release()
}

// Names lists the locks, and not the connections to them.
func TestNames(t *testing.T) {
	nstest.New(t)
	for _, name := range []string{"a/1", "a/2", "b/1"} {
		defer mustTake(t, name).Release()
	}
	_, h, err := Take(t.Context(), "a/1")
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	names, err := Names("a/")
	if slices.Sort(names); err != nil || !slices.Equal(names, []string{"a/1", "a/2"}) {
		t.Errorf("%q, %v", names, err)
	}
}
