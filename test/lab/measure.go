package lab

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// CPU returns the CPU time that a process has taken, by the clock that the
// kernel has for it (clock_getcpuclockid(3)).
func CPU(pid int) (time.Duration, error) {
	const sched = 2 // CPUCLOCK_SCHED, include/linux/posix-timers_types.h
	var t unix.Timespec
	if err := unix.ClockGettime(^int32(pid)<<3|sched, &t); err != nil {
		return 0, fmt.Errorf("the CPU clock of process %d: %w", pid, err)
	}
	return time.Duration(t.Nano()), nil
}

// AtRest waits until a process has taken next to no CPU for a second, and
// returns what it has taken.
func AtRest(ctx context.Context, pid int) (time.Duration, error) {
	const every, quiet = 100 * time.Millisecond, time.Second
	tick := time.NewTicker(every)
	defer tick.Stop()
	since, before := time.Now(), time.Duration(0)
	for {
		now, err := CPU(pid)
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
