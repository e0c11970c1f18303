package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// cpuOf returns the CPU time that a process has taken, by the clock that the
// kernel has for it (clock_getcpuclockid(3)).
func cpuOf(pid int) (time.Duration, error) {
	const sched = 2 // CPUCLOCK_SCHED, include/linux/posix-timers_types.h
	var t unix.Timespec
	if err := unix.ClockGettime(^int32(pid)<<3|sched, &t); err != nil {
		return 0, fmt.Errorf("the CPU clock of process %d: %w", pid, err)
	}
	return time.Duration(t.Nano()), nil
}

// atRest waits until a process has taken next to no CPU for two seconds, and
// returns what it has taken.
func atRest(ctx context.Context, pid int) (time.Duration, error) {
	const every, quiet = 250 * time.Millisecond, 2 * time.Second
	tick := time.NewTicker(every)
	defer tick.Stop()
	since, before := time.Now(), time.Duration(0)
	for {
		now, err := cpuOf(pid)
		if err != nil {
			return 0, err
		}
		if now-before > time.Millisecond {
			since = time.Now()
		}
		if before = now; time.Since(since) > quiet {
			return now, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
}

// readMemory reads what a process has of memory, and had at most.
func (r *result) readMemory(pid int) error {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return err
	}
	lines := bufio.NewScanner(bytes.NewReader(text))
	for lines.Scan() {
		var key string
		var kib int
		if n, _ := fmt.Sscan(lines.Text(), &key, &kib); n < 2 {
			continue
		}
		switch key {
		case "VmRSS:":
			r.resident = kib
		case "RssAnon:":
			r.anonymous = kib
		case "VmHWM:":
			r.peak = kib
		}
	}
	return lines.Err()
}
