package command

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/nstest"
)

// library returns a function as a package has it that knows nothing of limits: it runs a script.
func library(script string) func() (string, error) {
	return func() (string, error) {
		out, err := exec.Command("sh", "-c", script).Output()
		return string(out), err
	}
}

func TestCall(t *testing.T) {
	r := &Runner{}
	if out, err := Call(t.Context(), r, "the call", library("echo done")); err != nil || out != "done\n" {
		t.Errorf("%q, %v", out, err)
	}
	out, err := Call(t.Context(), r, "the call", library("echo so far; exit 3"))
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 3 || out != "so far\n" {
		t.Errorf("%q, %v", out, err)
	}
}

// Programs run in the network namespace of the caller's thread.
func TestCallInNamespace(t *testing.T) {
	nstest.New(t) // of this thread alone
	want, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	out, err := Call(t.Context(), &Runner{}, "the call", library("readlink /proc/self/ns/net"))
	if err != nil || strings.TrimSpace(out) != want {
		t.Errorf("%q, %v; want %s", out, err, want)
	}
}

// A program of a function that hangs is killed, and so is its child in another session, which keeps the pipes open: at
// the limit, and when the context ends. The log names the call once for all attempts. Programs of other threads go on.
func TestCallHangs(t *testing.T) {
	stop := make(chan struct{})
	defer close(stop)
	other := exec.Command("sleep", "1000")
	var started sync.WaitGroup
	started.Add(1)
	go func() {
		runtime.LockOSThread()
		if err := other.Start(); err != nil {
			t.Error(err)
		}
		started.Done()
		<-stop
		_ = other.Process.Kill()
		_ = other.Wait()
	}()
	started.Wait()
	limits(t, func(limit time.Duration) bool {
		ctx, log := logged(t)
		dir := t.TempDir()
		r := &Runner{Limit: limit, Waits: Waits{Notice: 10 * time.Millisecond}}
		script := fmt.Sprintf(`setsid sh -c 'sleep 1000 & echo $! >%[1]s/child; wait' & echo $$ >%[1]s/self; exec sleep 1000`, dir)
		reason := fmt.Sprintf("ended, since it took longer than %v", limit)
		for range 2 {
			within(t, func() {
				_, err := Call(ctx, r, "the call", library(script))
				if err == nil || err.Error() != reason {
					t.Errorf("got %v", err)
				}
			})
			for _, name := range []string{"/self", "/child"} {
				if text, _ := os.ReadFile(dir + name); len(text) == 0 {
					return false
				}
				pid := pidOf(t, dir+name)
				eventually(t, "the end of "+name, func() bool { return gone(pid) })
				_ = os.Remove(dir + name)
			}
		}
		lines := strings.Split(strings.TrimSpace(log.String()), "\n")
		if len(lines) != 2 || !strings.HasSuffix(lines[0], fmt.Sprintf(`"Waiting for a program" program="the call" limit=%q`, limit)) ||
			!strings.Contains(lines[1], fmt.Sprintf("reason=%q", reason)) {
			t.Errorf("two attempts have logged:\n%s", log)
		}
		return true
	})
	if gone(other.Process.Pid) {
		t.Error("the program of another thread was killed")
	}
}

// The end of the context ends a call, although the function starts one program after the other.
func TestCallCanceled(t *testing.T) {
	why := errors.New("the daemon ends")
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	file := filepath.Join(t.TempDir(), "pid")
	go func() {
		for {
			if text, _ := os.ReadFile(file); strings.HasSuffix(string(text), "\n") {
				break
			}
			time.Sleep(time.Millisecond)
		}
		cancel(why)
	}()
	within(t, func() {
		_, err := Call(ctx, &Runner{}, "the call", func() (string, error) {
			_, _ = library("echo $$ >" + file + "; sleep 1000")()
			return library("sleep 1000")()
		})
		if !errors.Is(err, why) {
			t.Errorf("got %v", err)
		}
	})
	called := false
	_, err := Call(ctx, &Runner{}, "the call", func() (string, error) { called = true; return "", nil })
	if called || !errors.Is(err, why) {
		t.Errorf("after the context's end: called %v, %v", called, err)
	}
}

// A function that waits for what cannot be found is left alone, and not called again until it has returned.
func TestCallLeft(t *testing.T) {
	pid := filepath.Join(t.TempDir(), "pid")
	r := &Runner{}
	f := library("setsid sleep 1000 & echo $! >" + pid)
	var err error
	limits(t, func(limit time.Duration) bool {
		r.Limit = limit
		within(t, func() { _, err = Call(t.Context(), r, "the call", f) })
		return err == nil || !strings.HasPrefix(err.Error(), "ended")
	})
	if err == nil || !strings.Contains(err.Error(), "keeps the output open") {
		t.Fatalf("got %v", err)
	}
	called := false
	_, again := Call(t.Context(), r, "the call", func() (string, error) { called = true; return "", nil })
	if called || again == nil || again.Error() != err.Error() {
		t.Errorf("called again %v, %v", called, again)
	}
	if out, err := Call(t.Context(), r, "another", library("echo done")); err != nil || out != "done\n" {
		t.Errorf("another call: %q, %v", out, err)
	}
	_ = unix.Kill(pidOf(t, pid), unix.SIGKILL)
	eventually(t, "the end to be noticed", func() bool { return r.stuckError("the call") == nil })
}
