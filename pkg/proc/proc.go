// Package proc finds other programs on this host, and the programs that a thread has started.
package proc

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
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
	if s, ok := read(strconv.Itoa(pid)); ok {
		return s.state
	}
	return 0
}

// A process is what a line of /proc/PID/stat says (proc_pid_stat(5)).
type process struct {
	pid, parent, group int
	state              byte
	begun              uint64 // in ticks since boot
}

// read reads the line of a process; ok is false if there is none.
func read(pid string) (p process, ok bool) {
	stat, _ := os.ReadFile("/proc/" + pid + "/stat")
	// The fields from the third one on follow the name, which is in brackets.
	f := strings.Fields(string(stat[strings.LastIndex(string(stat), ")")+1:]))
	if len(f) < 20 {
		return process{}, false
	}
	p.state = f[0][0]
	p.pid, _ = strconv.Atoi(pid)
	p.parent, _ = strconv.Atoi(f[1])
	p.group, _ = strconv.Atoi(f[2])
	p.begun, _ = strconv.ParseUint(f[19], 10, 64)
	return p, true
}

// list returns all processes.
func list() (all []process) {
	dirs, _ := filepath.Glob("/proc/[0-9]*") // fails only for a bad pattern
	for _, dir := range dirs {
		if p, ok := read(filepath.Base(dir)); ok {
			all = append(all, p)
		}
	}
	return all
}

// ticks is how many ticks of /proc a second has: USER_HZ, which is 100 wherever this program runs.
const ticks = 100

// A Thread is a thread of this process, which starts programs.
type Thread struct {
	list  string // the file that lists the thread's children
	begun uint64 // when Mark was called, in ticks since boot
}

// Mark returns the calling thread, for Children to find the processes that the thread starts from now on. The caller
// has locked the thread.
func Mark() Thread {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &now) // fails only for a clock that is unknown
	return Thread{
		list:  fmt.Sprintf("/proc/self/task/%d/children", unix.Gettid()),
		begun: uint64(now.Nano()) / (1e9 / ticks),
	}
}

// Children returns the processes that the thread has started, and that still run or are zombies.
//
// A kernel without CONFIG_PROC_CHILDREN does not distinguish the threads that have started a process. There, Children
// returns all children of this process since Mark that are in the process group of this process.
func (t Thread) Children() (pids []int) {
	text, err := os.ReadFile(t.list)
	for pid := range strings.FieldsSeq(string(text)) {
		if n, err := strconv.Atoi(pid); err == nil {
			pids = append(pids, n)
		}
	}
	if err == nil {
		return pids
	}
	for _, p := range list() {
		if p.parent == os.Getpid() && p.group == unix.Getpgrp() && p.begun >= t.begun {
			pids = append(pids, p.pid)
		}
	}
	return pids
}

// Kill sends SIGKILL to the thread's children, and to all their descendants, also in other process groups.
func (t Thread) Kill() {
	var stopped []int // a process that is stopped starts no other: none can be missed
	for {
		found := t.descendants()
		for _, pid := range found {
			if !slices.Contains(stopped, pid) {
				_ = unix.Kill(pid, unix.SIGSTOP)
			}
		}
		if slices.Equal(found, stopped) {
			break
		}
		stopped = found
	}
	for _, pid := range stopped {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
}

// descendants returns the children, their children, and so on.
func (t Thread) descendants() []int {
	pids, all := t.Children(), list()
	for i := 0; i < len(pids); i++ {
		for _, p := range all {
			if p.parent == pids[i] {
				pids = append(pids, p.pid)
			}
		}
	}
	return pids
}
