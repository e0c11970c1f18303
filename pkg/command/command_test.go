package command

import (
	"context"
	"errors"
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/nstest"
)

// TestMain lets the test binary play a program with threads, which sleeps, and a process that waits for the end of a
// program.
func TestMain(m *testing.M) {
	switch {
	case os.Getenv("TEST_SLEEPS") != "":
		time.Sleep(time.Hour)
	case os.Getenv("TEST_WAITS") != "":
		ended := make(chan struct{})
		time.AfterFunc(killGrace/4, func() { // during the standstill of this process
			time.Sleep(2 * killTick) // the program needs a moment
			close(ended)
		})
		fmt.Println("begun")
		graceFor(ended, func() {})
		select {
		case <-ended:
			fmt.Println("ended")
		default:
			fmt.Println("given up")
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// patience is how long something may take that takes a moment.
const patience = 30 * time.Second

// logged returns a context whose logger writes to the buffer.
func logged(t *testing.T) (context.Context, *nstest.Log) {
	log := &nstest.Log{}
	return log.Context(t.Context()), log
}

func shell(script string) Command {
	return Command{Path: "sh", Args: []string{"-c", script}, Name: "the test"}
}

// pidOf waits for a process id in a file, and has the process killed when the test ends.
func pidOf(t *testing.T, file string) int {
	t.Helper()
	pid := 0
	eventually(t, "a process id in "+file, func() bool {
		text, _ := os.ReadFile(file)
		var err error
		pid, err = strconv.Atoi(strings.TrimSpace(string(text)))
		return err == nil && strings.HasSuffix(string(text), "\n")
	})
	t.Cleanup(func() { _ = unix.Kill(pid, unix.SIGKILL) })
	return pid
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited for %s in vain", what)
		}
	}
}

// gone reports whether a process has ended. Nobody may have waited for it yet.
func gone(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || strings.Contains(string(stat), ") Z ")
}

// within fails the test if f takes so long that it waits for what never happens.
func within(t *testing.T, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatal("Run waits without end")
	}
}

// limits calls try with longer and longer limits until try returns true: the programs have come as far as they should
// before they were killed, however busy the machine is.
func limits(t *testing.T, try func(limit time.Duration) bool) {
	t.Helper()
	for limit := 2 * time.Second; !try(limit); limit *= 2 {
		if t.Failed() || limit > patience/2 {
			t.Fatalf("the programs have not come far within %v", limit)
		}
	}
}

func TestRun(t *testing.T) {
	t.Setenv("KEPT", "as it is")
	t.Setenv("CHANGED", "before")
	r := &Runner{}
	c := shell(`cat; echo "$KEPT, $CHANGED"; echo wrong >&2`)
	c.Env, c.Stdin = []string{"CHANGED=after"}, "input\n"
	out, err := r.Run(t.Context(), c)
	if err != nil || string(out.Stdout) != "input\nas it is, after\n" || string(out.Stderr) != "wrong\n" {
		t.Errorf("%q, %q, %v", out.Stdout, out.Stderr, err)
	}
	if text := out.Text(); text != "input | as it is, after | wrong" {
		t.Errorf("in one line: %s", text)
	}

	out, err = r.Run(t.Context(), shell("echo so far; exit 3"))
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 3 || string(out.Stdout) != "so far\n" {
		t.Errorf("%q, %v", out.Stdout, err)
	}
	if _, err := r.Run(t.Context(), Command{Path: "no-such-program"}); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("no program: %v", err)
	}

	c = shell("head -c 1000000 /dev/zero; echo much >&2")
	c.Keep = 3
	if out, err := r.Run(t.Context(), c); err != nil || len(out.Stdout) != 3 || string(out.Stderr) != "muc" {
		t.Errorf("%d bytes, %q, %v", len(out.Stdout), out.Stderr, err)
	}

	file, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	c = shell("echo wrong >&2")
	c.Stderr = file
	out, err = r.Run(t.Context(), c)
	if text, _ := os.ReadFile(file.Name()); err != nil || len(out.Stderr) > 0 || string(text) != "wrong\n" {
		t.Errorf("%q in the file, %q, %v", text, out.Stderr, err)
	}
}

// A program that hangs is killed with its child, although another child has left the process group and keeps all pipes
// open. The log says what is waited for, once for all attempts, and the error is the same each time.
func TestHang(t *testing.T) {
	limits(t, func(limit time.Duration) bool {
		ctx, log := logged(t)
		dir := t.TempDir()
		const script = `setsid sleep 1000 & echo $! >%[1]s/away; sleep 1000 & echo $! >%[1]s/child; echo so far; wait`
		r := &Runner{Limit: limit, Waits: Waits{Notice: 10 * time.Millisecond}}
		reason := fmt.Sprintf("ended, since it took longer than %v", limit)
		for range 2 {
			printed := ""
			within(t, func() {
				c := shell(fmt.Sprintf(script, dir))
				c.Stdin = strings.Repeat("more than a pipe takes ", 10000)
				out, err := r.Run(ctx, c)
				if err == nil || err.Error() != reason {
					t.Errorf("%q, %v", out.Stdout, err)
				}
				printed = string(out.Stdout)
			})
			if printed == "" {
				return false
			}
			if printed != "so far\n" {
				t.Errorf("got %q", printed)
			}
			child := pidOf(t, dir+"/child")
			eventually(t, "the child's end", func() bool { return gone(child) })
			if away := pidOf(t, dir+"/away"); gone(away) {
				t.Error("the test tests nothing: no process has kept the pipes open")
			}
		}
		lines := strings.Split(strings.TrimSpace(log.String()), "\n")
		if len(lines) != 2 || !strings.Contains(lines[0], `"Waiting for a program" program="the test" process=`) ||
			!strings.Contains(lines[0], fmt.Sprintf("limit=%q", limit)) || !strings.Contains(lines[1], fmt.Sprintf("reason=%q", reason)) {
			t.Errorf("two attempts have logged:\n%s", log)
		}
		return true
	})
}

// A program that ends, and leaves a child that keeps its output open, has ended. The child goes on if the operator has
// chosen the program.
func TestChildStays(t *testing.T) {
	for _, operators := range []bool{false, true} {
		t.Run(fmt.Sprintf("operators %v", operators), func(t *testing.T) {
			dir := t.TempDir()
			within(t, func() {
				c := shell(fmt.Sprintf("cd %s; { while [ ! -e go ]; do sleep 0.01; done; echo >there; } & "+
					"echo $! >pid; echo done", dir))
				c.Operators = operators
				out, err := (&Runner{}).Run(t.Context(), c)
				if err != nil || string(out.Stdout) != "done\n" {
					t.Errorf("%q, %v", out.Stdout, err)
				}
			})
			child := pidOf(t, dir+"/pid")
			if !operators {
				eventually(t, "the child's end", func() bool { return gone(child) })
				return
			}
			if err := os.WriteFile(dir+"/go", nil, 0o600); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the child to go on", func() bool {
				_, err := os.Stat(dir + "/there")
				return err == nil
			})
		})
	}
}

// When the context ends, a program is killed: at once, or after the grace, in which it may end by itself.
func TestContext(t *testing.T) {
	why := errors.New("the daemon ends")
	for _, c := range []struct {
		name, script string
		grace        time.Duration
		killed       bool
	}{
		{"at once", "echo $$ >%s; sleep 1000", 0, true},
		{"after the grace", "echo $$ >%s; sleep 1000", 10 * time.Millisecond, true},
		{"within the grace", "echo $$ >%[1]s; while [ ! -e %[1]s.end ]; do sleep 0.01; done", patience, false},
	} {
		t.Run(c.name, func(t *testing.T) {
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
				_ = os.WriteFile(file+".end", nil, 0o600)
			}()
			within(t, func() {
				_, err := (&Runner{Grace: c.grace}).Run(ctx, shell(fmt.Sprintf(c.script, file)))
				if c.killed != errors.Is(err, why) || !c.killed && err != nil {
					t.Errorf("got %v", err)
				}
			})
			if _, err := (&Runner{}).Run(ctx, Command{Path: "no-such-program"}); !errors.Is(err, why) {
				t.Errorf("after the context's end: %v", err)
			}
		})
	}
}

// A program that cannot be killed, as it waits in the kernel, is not waited for, and not started again until it has
// ended. Here, a thread of the program is not released, as a debugger does not take notice of its death.
func TestUnkillable(t *testing.T) {
	nstest.NeedRoot(t)
	runtime.LockOSThread() // ptrace(2): only this thread is the debugger
	defer runtime.UnlockOSThread()
	c := Command{Path: os.Args[0], Env: []string{"TEST_SLEEPS=1"}}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r := &Runner{}
	result := make(chan error, 1)
	go func() {
		_, err := r.Run(ctx, c)
		result <- err
	}()
	pid, thread := 0, 0
	eventually(t, "a thread of the program", func() bool {
		pids := childrenNamed(filepath.Base(c.Path))
		if len(pids) == 0 {
			return false
		}
		pid = pids[0]
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
		for _, task := range tasks {
			if tid, err := strconv.Atoi(filepath.Base(task)); err == nil && tid != pid {
				thread = tid
			}
		}
		return thread != 0
	})
	if err := unix.PtraceSeize(thread); err != nil {
		t.Fatal(err)
	}
	cancel()
	var err error
	select {
	case err = <-result:
	case <-time.After(patience):
		t.Error("Run waits without end")
	}
	want := fmt.Sprintf("process %d was killed and does not end", pid)
	if err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("got %v", err)
	}
	if _, again := r.Run(t.Context(), c); again == nil || again.Error() != err.Error() {
		t.Errorf("once more: %v", again)
	}
	if pids := childrenNamed(filepath.Base(c.Path)); !slices.Equal(pids, []int{pid}) {
		t.Errorf("%v run, want %d alone", pids, pid)
	}
	if _, err := unix.Wait4(thread, nil, unix.WALL, nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the end to be noticed", func() bool { return r.stuckError(c.line()) == nil })
}

// childrenNamed returns the children of this process with a program's name.
func childrenNamed(name string) (pids []int) {
	files, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, file := range files {
		text, _ := os.ReadFile(file)
		before, after, _ := strings.Cut(string(text), ") ")
		if f := strings.Fields(after); len(f) < 2 || f[1] != strconv.Itoa(os.Getpid()) {
			continue
		}
		id, comm, _ := strings.Cut(before, " (")
		pid, err := strconv.Atoi(id)
		if err == nil && comm != "" && strings.HasPrefix(name, comm) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// No other package of the daemon and its tools runs programs, and go-iptables, which does, is called in one file.
func TestNoOther(t *testing.T) {
	root := filepath.Join("..", "..")
	allowed := []string{"pkg/command", "pkg/nstest"}
	found := 0
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(root, path)
		switch {
		case err != nil:
			return err
		case d.IsDir() && (slices.Contains([]string{"test", "build", ".git"}, rel) || slices.Contains(allowed, rel)):
			return filepath.SkipDir
		case filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go"):
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		found++
		for _, i := range file.Imports {
			if i.Path.Value == `"os/exec"` {
				t.Errorf("%s imports os/exec: run programs with pkg/command", rel)
			}
			if strings.Contains(i.Path.Value, "go-iptables") && rel != "pkg/firewall/library.go" {
				t.Errorf("%s imports %s: call it in pkg/firewall/library.go, with command.Call", rel, i.Path.Value)
			}
		}
		return nil
	})
	if err != nil || found == 0 {
		t.Errorf("%d files, %v", found, err)
	}
}
