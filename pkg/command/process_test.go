package command

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A program that was started is in a session of its own, has no secrets, and is ended with its children, even if it
// ignores SIGTERM.
func TestProcess(t *testing.T) {
	t.Setenv("FLANNELD_ETCD_PASSWORD", "hunter2")
	for name, script := range map[string]string{
		"ends":            "",
		"ignores SIGTERM": "trap '' TERM; ",
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			script := script + fmt.Sprintf("sleep 1000 & echo $! >%[1]s/child; "+
				"echo \"$FLANNELD_ETCD_PASSWORD$MARK\" >%[1]s/env; echo $$ >%[1]s/self; wait; wait", dir)
			c := shell(script)
			c.Env = []string{"MARK=it is"}
			p, err := Start(c)
			if err != nil {
				t.Fatal(err)
			}
			self, child := pidOf(t, dir+"/self"), pidOf(t, dir+"/child")
			if session, err := unix.Getsid(self); err != nil || session != self {
				t.Errorf("process %d is in session %d, %v", self, session, err)
			}
			if text, _ := os.ReadFile(filepath.Join(dir, "env")); string(text) != "it is\n" {
				t.Errorf("the environment has %q", text)
			}
			if p.Ended() {
				t.Fatal("it has ended already")
			}
			p.Stop(10 * time.Millisecond)
			if !p.Ended() {
				t.Fatal("it has not ended")
			}
			<-p.Done()
			if reason := p.Reason(); reason != "signal: terminated" && reason != "signal: killed" {
				t.Errorf("it has ended by: %s", reason)
			}
			if p.Reason() == "signal: killed" {
				eventually(t, "the child's end", func() bool { return gone(child) })
			}
			p.Stop(time.Hour) // which there is nothing to wait for
		})
	}
	if _, err := Start(Command{Path: "no-such-program"}); err == nil {
		t.Error("a program that does not exist was started")
	}
}

// A program that was killed has its time to end, also if the process that waits stands still meanwhile, as it does on a
// machine that is suspended or overloaded.
func TestGraceOutlastsStandstill(t *testing.T) {
	t.Parallel()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "TEST_WAITS=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	lines := bufio.NewScanner(out)
	lines.Scan()               // "begun"
	time.Sleep(killGrace / 16) // it waits
	standstill := killGrace + time.Second
	if err := unix.Kill(cmd.Process.Pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	time.Sleep(standstill)
	if err := unix.Kill(cmd.Process.Pid, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if lines.Scan(); lines.Text() != "ended" {
		t.Errorf("after a standstill of %v: %q", standstill, lines.Text())
	}
}
