package firewall

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// The kernel does not notify of changes of iptables-legacy. How many rules
	// its tables hold is counted this often, and half as often while the count
	// changes: other programs may change their rules without end, and then all
	// rules are read, which costs more than to count them.
	legacyInterval     = time.Second
	legacyBusyInterval = 2 * time.Second
)

// legacy counts the entries of iptables-legacy's tables in one network namespace.
type legacy struct {
	net     *os.File // its /proc/…/net
	sockets [2]*os.File
}

// legacyTables are where each family's tables are: the file that lists the tables
// that exist (to ask for another table would make it), and the level of the
// socket option.
var legacyTables = [2]struct {
	family, level int
	names         string
}{
	{unix.AF_INET, unix.SOL_IP, "ip_tables_names"},
	{unix.AF_INET6, unix.SOL_IPV6, "ip6_tables_names"},
}

// openLegacy returns a legacy for the calling thread's network namespace.
func openLegacy() (*legacy, error) {
	dir, err := os.Open("/proc/thread-self/net")
	if err != nil {
		return nil, err
	}
	l := &legacy{net: dir}
	for i, t := range legacyTables {
		fd, err := unix.Socket(t.family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err == nil { // or the host does without IPv6
			l.sockets[i] = os.NewFile(uintptr(fd), t.names)
		}
	}
	return l, nil
}

func (l *legacy) close() {
	l.net.Close()
	for _, s := range l.sockets {
		if s != nil {
			s.Close()
		}
	}
}

// watch calls signal when iptables-legacy has more entries than before, or
// fewer, until ctx ends. It closes l.
func (l *legacy) watch(ctx context.Context, before entries, signal func()) {
	defer l.close()
	next := time.NewTimer(legacyInterval)
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-next.C:
		}
		interval := legacyInterval
		now := l.count()
		if now != before {
			signal()
			interval = legacyBusyInterval
		}
		before = now
		next.Reset(interval)
	}
}

// entries are how many each family's tables nat and filter hold: rules, and what
// chains begin and end with.
type entries [len(legacyTables)][2]uint32

// count returns the entries. A table that does not exist, or cannot be read, has 0.
func (l *legacy) count() (all entries) {
	for i, t := range legacyTables {
		if l.sockets[i] == nil {
			continue
		}
		names, err := l.read(t.names)
		if err != nil {
			continue // this variant of iptables is not in the kernel
		}
		for j, c := range []chain{postrouting, forward} {
			if !strings.Contains("\n"+names, "\n"+c.table+"\n") {
				continue
			}
			info := tableInfo{}
			copy(info.name[:], c.table)
			size := uint32(unsafe.Sizeof(info))
			_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, l.sockets[i].Fd(), uintptr(t.level), getInfo,
				uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
			if errno == 0 {
				all[i][j] = info.entries
			}
		}
	}
	return all
}

// read returns what a file of the namespace holds.
func (l *legacy) read(name string) (string, error) {
	fd, err := unix.Openat(int(l.net.Fd()), name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("%s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	text, err := io.ReadAll(f)
	return string(text), err
}

// getInfo is IPT_SO_GET_INFO and IP6T_SO_GET_INFO, and tableInfo what it
// answers, struct ipt_getinfo (linux/netfilter_ipv4/ip_tables.h).
const getInfo = 64

type tableInfo struct {
	name             [32]byte
	hooks            uint32
	entry, underflow [5]uint32
	entries, size    uint32
}
