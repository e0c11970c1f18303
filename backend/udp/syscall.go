package udp

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// syscall3 makes a system call that does not block. Where it is brief, Go's
// scheduler is not told: that would wake a thread of its own (sysmon, package
// runtime) beside each lone packet. The scheduler must be told now and then
// though, since it is that thread that gives other goroutines their turn.
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

// A pace tells whether a system call that moves so many bytes is brief.
type pace uint8

// briefBytes are moved faster than it takes to wake a thread.
const briefBytes = 4 << 10

func (p *pace) brief(bytes int) bool {
	*p++
	return bytes <= briefBytes && *p%32 != 0
}
