package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/test/lab"
)

// memory is what a process has, in KiB.
type memory struct {
	resident, anonymous, peak int
}

func memoryOf(pid int) (m memory, err error) {
	return m, status(fmt.Sprintf("/proc/%d/status", pid), map[string]*int{"VmRSS:": &m.resident, "RssAnon:": &m.anonymous,
		"VmHWM:": &m.peak})
}

// status reads numbers from a status file of /proc.
func status(file string, fields map[string]*int) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	lines := bufio.NewScanner(bytes.NewReader(text))
	for lines.Scan() {
		var key string
		var value int
		if n, _ := fmt.Sscan(lines.Text(), &key, &value); n == 2 && fields[key] != nil {
			*fields[key] = value
		}
	}
	return lines.Err()
}

// activity is what a process has done so far.
type activity struct {
	cpu      time.Duration
	children time.Duration // CPU of those that have ended
	wakeups  int           // of all threads
}

func activityOf(pid int) (a activity, err error) {
	if a.cpu, err = lab.CPU(pid); err != nil {
		return a, err
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return a, err
	}
	// After the name in parentheses comes field 3; 16 and 17 are cutime and
	// cstime, in hundredths of a second (proc_pid_stat(5)).
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	for _, field := range fields[13:15] {
		var ticks int
		if _, err := fmt.Sscan(field, &ticks); err != nil {
			return a, err
		}
		a.children += time.Duration(ticks) * 10 * time.Millisecond
	}
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	for _, file := range threads {
		var switches int
		if err := status(file, map[string]*int{"voluntary_ctxt_switches:": &switches}); err != nil &&
			!errors.Is(err, os.ErrNotExist) {
			return a, err
		}
		a.wakeups += switches
	}
	return a, err
}

// forks counts the processes that a process starts, by the kernel's process
// events (linux/cn_proc.h).
type forks struct {
	fd     int
	parent uint32
}

const (
	cnProc      = 1 // CN_IDX_PROC, and CN_VAL_PROC
	procListen  = 1 // PROC_CN_MCAST_LISTEN
	procFork    = 1 // PROC_EVENT_FORK
	sizeofCnMsg = 20
)

func countForks(pid int) (*forks, error) {
	// Only the first network namespace has these events, where we are.
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_CONNECTOR)
	if err != nil {
		return nil, fmt.Errorf("process events: %w", err)
	}
	f := &forks{fd, uint32(pid)}
	err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: cnProc})
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20)
	}
	if err == nil {
		b := binary.NativeEndian.AppendUint32(nil, unix.NLMSG_HDRLEN+sizeofCnMsg+4)
		b = binary.NativeEndian.AppendUint16(b, unix.NLMSG_DONE)
		b = append(b, make([]byte, unix.NLMSG_HDRLEN-len(b))...)
		for _, word := range []uint32{cnProc, cnProc, 0, 0, 4, procListen} { // idx, val, seq, ack, len and flags, operation
			b = binary.NativeEndian.AppendUint32(b, word)
		}
		err = unix.Sendto(fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("process events: %w", err)
	}
	return f, nil
}

func (f *forks) Close() error { return unix.Close(f.fd) }

// soFar returns how many there were.
func (f *forks) soFar() (int, error) {
	count := 0
	buf := make([]byte, 4096)
	for {
		n, _, err := unix.Recvfrom(f.fd, buf, 0)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return count, nil
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return count, fmt.Errorf("process events: %w", err)
		}
		// struct proc_event: what, cpu, a time stamp of 8 bytes, and of a fork
		// the parent's thread and process, the child's thread and process.
		const event = unix.NLMSG_HDRLEN + sizeofCnMsg
		if n < event+32 {
			continue
		}
		word := func(at int) uint32 { return binary.NativeEndian.Uint32(buf[event+at:]) }
		if child, process := word(24), word(28); word(0) == procFork && word(20) == f.parent &&
			child == process { // else a thread
			count++
		}
	}
}
