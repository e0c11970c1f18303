package proc

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestFind(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	if !slices.Contains(Find("sleep"), pid) {
		t.Errorf("process %d is not found", pid)
	}
	if slices.Contains(Find("other"), pid) {
		t.Errorf("process %d is found by another name", pid)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if slices.Contains(Find("sleep"), pid) || State(pid) != 0 {
		t.Errorf("process %d has ended, but is found", pid)
	}
}

// A thread's programs are known, and killed with what they have started: also in another session, and also where the
// kernel does not list the children of threads.
func TestThread(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before := exec.Command("sleep", "1000")
	if err := before.Start(); err != nil {
		t.Fatal(err)
	}
	defer before.Wait()
	defer before.Process.Kill()
	old, _ := read(strconv.Itoa(before.Process.Pid))
	for name, hide := range map[string]bool{"listed": false, "not listed": true} {
		t.Run(name, func(t *testing.T) {
			runtime.LockOSThread() // this test has a goroutine of its own
			defer runtime.UnlockOSThread()
			for Mark().begun <= old.begun { // for 10 ms at most
				time.Sleep(time.Millisecond)
			}
			thread := Mark()
			if hide {
				thread.list = "/proc/self/no-such-file"
			}
			out, in, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer out.Close()
			apart := exec.Command("sleep", "1000") // as command.Runner runs programs
			apart.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
			cmd := exec.Command("sh", "-c", "setsid sleep 1000 & echo $!; exec sleep 1000")
			cmd.Stdout = in
			for _, c := range []*exec.Cmd{apart, cmd} {
				if err := c.Start(); err != nil {
					t.Fatal(err)
				}
				defer c.Process.Kill()
			}
			in.Close()
			var child int
			if _, err := fmt.Fscan(out, &child); err != nil {
				t.Fatal(err)
			}
			defer unix.Kill(child, unix.SIGKILL)
			want := []int{apart.Process.Pid, cmd.Process.Pid}
			if hide {
				want = want[1:]
			}
			if got := thread.Children(); !slices.Equal(got, want) {
				t.Errorf("children %v, want %v", got, want)
			}
			thread.Kill()
			if err := out.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
				t.Fatal(err)
			}
			if _, err := io.Copy(io.Discard, out); err != nil { // until the last one has closed its output
				t.Errorf("waiting for the end of the child: %v", err)
			}
			if err := cmd.Wait(); err == nil {
				t.Error("the program was not killed")
			}
			if hide {
				if s := State(apart.Process.Pid); s == 'Z' {
					t.Error("a program in a process group of its own was killed")
				}
				apart.Process.Kill()
			}
			apart.Wait()
		})
	}
	if s := State(before.Process.Pid); s == 'Z' || s == 0 {
		t.Errorf("the program of another thread, or of before, has state %c", s)
	}
}
