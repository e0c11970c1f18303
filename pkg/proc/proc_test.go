package proc

import (
	"os/exec"
	"slices"
	"testing"
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
