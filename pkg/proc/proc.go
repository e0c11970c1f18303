// Package proc finds other programs on this host.
package proc

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Find returns the IDs of a program's processes in the calling thread's network namespace. It leaves out zombies, and
// processes that this process may not inspect.
func Find(program string) []int {
	own, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		return nil
	}
	var pids []int
	dirs, _ := filepath.Glob("/proc/[0-9]*") // fails only for a bad pattern
	for _, dir := range dirs {
		name, err := os.ReadFile(dir + "/comm")
		if err != nil || strings.TrimSpace(string(name)) != program {
			continue
		}
		if net, err := os.Readlink(dir + "/ns/net"); err != nil || net != own {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(dir)); err == nil && State(pid) != 'Z' {
			pids = append(pids, pid)
		}
	}
	return pids
}

// State returns the letter for the state of a process (proc_pid_stat(5)), such as 'T' for stopped, 0 if there is no
// such process.
func State(pid int) byte {
	stat, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	// The state follows the name, which is in brackets.
	if i := strings.LastIndex(string(stat), ") "); i >= 0 && i+2 < len(stat) {
		return stat[i+2]
	}
	return 0
}
