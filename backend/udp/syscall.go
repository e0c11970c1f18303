package udp

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// syscall3 makes a system call that does not block. A brief call bypasses the scheduler of Go, which would wake a
// thread (sysmon, package runtime) for each lone packet. Some calls must go through the scheduler: that thread is what
// lets other goroutines run.
//
//go:uintptrescapes
func syscall3(call, a, b, c uintptr, brief bool) (int, syscall.Errno) {
	var n uintptr
	var errno syscall.Errno
	if brief {
		n, _, errno = unix.RawSyscall6(call, a, b, c, 0, 0, 0)
	} else {
		n, _, errno = unix.Syscall6(call, a, b, c, 0, 0, 0)
	}
	return int(n), errno
}

// A pace decides which system calls are brief.
type pace uint8

// briefBytes are moved in less time than it takes to wake a thread.
const briefBytes = 4 << 10

func (p *pace) brief(bytes int) bool {
	*p++
	return bytes <= briefBytes && *p%32 != 0
}
