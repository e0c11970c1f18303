// Package lock excludes other processes of the same network namespace from what only one of them may use. A lock ends
// with the process that holds it.
package lock

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A Lock is held until Release, or until the process ends.
//
// A Lock is a listening unix socket with an abstract name (unix(7)): such names belong to the network namespace, and
// the kernel knows which process listens. Every user of the namespace can bind the name. A socket of another user than
// root or this process's own is no lock: it cannot keep out the process that asks for the lock.
//
// A process that asks for the lock connects to the socket. Its connection stays until either side closes it, and so
// tells it when the lock is free. Connections of other users are closed at once: they must not fill the queue.
type Lock struct {
	socket *net.UnixListener
	group  sync.WaitGroup

	mu       sync.Mutex
	waiting  map[net.Conn]struct{} // of processes that asked for the lock
	released bool
}

// maxWaiting is how many processes can wait for the end of a lock. The connections of further ones are closed.
const maxWaiting = 64

// Release ends the lock.
func (l *Lock) Release() {
	l.socket.Close()
	l.mu.Lock()
	l.released = true
	for conn := range l.waiting {
		conn.Close()
	}
	l.mu.Unlock()
	l.group.Wait()
}

// accept accepts the connections of those that ask for the lock until Release.
func (l *Lock) accept() {
	for {
		conn, err := l.socket.AcceptUnix()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil: // such as too many open files
			time.Sleep(pause)
		case l.admit(conn):
			l.group.Go(func() { l.keep(conn) })
		default:
			conn.Close()
		}
	}
}

// admit returns whether to keep a connection.
func (l *Lock) admit(conn *net.UnixConn) bool {
	peer, err := credentials(conn)
	if err != nil || !trusted(peer) {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.released || len(l.waiting) == maxWaiting {
		return false
	}
	l.waiting[conn] = struct{}{}
	return true
}

// keep keeps a connection until either side closes it.
func (l *Lock) keep(conn net.Conn) {
	_, _ = conn.Read(make([]byte, 1)) // nobody sends anything
	conn.Close()
	l.mu.Lock()
	delete(l.waiting, conn)
	l.mu.Unlock()
}

// A Holder is the process that holds a lock.
type Holder struct {
	PID int // 0: the process is in a PID namespace that cannot be seen from here

	// Silent says that the process accepts no connections, so that nothing is known of it: it is stopped, and its queue
	// of connections is full.
	Silent bool

	conn net.Conn // nil: Silent
}

// Wait waits until the lock is free, or ctx ends. Wait can return early: if the holder is Silent, or has too many
// connections already. The caller takes the lock again, and pauses if the lock is still held.
func (h *Holder) Wait(ctx context.Context) {
	if h.Silent {
		return
	}
	defer context.AfterFunc(ctx, h.Close)()
	_, _ = h.conn.Read(make([]byte, 1)) // the holder sends nothing; the connection ends with the lock
	h.Close()
}

// Close ends the connection to the holder. Wait does the same.
func (h *Holder) Close() {
	if !h.Silent {
		h.conn.Close()
	}
}

// String names the process.
func (h *Holder) String() string {
	switch {
	case h.Silent:
		return "a process that accepts no connections (`ss -lxp` shows it)"
	case h.PID == 0:
		return "a process in another container"
	}
	return fmt.Sprintf("process %d", h.PID)
}

// A process that takes a lock binds its socket first, and listens then: so often, with pauses, a socket that does not
// listen is tried.
const (
	tries = 20
	pause = 50 * time.Millisecond
)

// Take takes the lock with a name, up to 90 bytes. If another process has the lock, Take returns its Holder. It is an
// error if the lock cannot be had although no process has it; then processes are not kept apart.
func Take(ctx context.Context, name string) (*Lock, *Holder, error) {
	address := &net.UnixAddr{Net: "unix", Name: namespace + name}
	var last error
	for range tries {
		socket, err := net.ListenUnix("unix", address)
		if err == nil {
			l := &Lock{socket: socket, waiting: map[net.Conn]struct{}{}}
			l.group.Go(l.accept)
			return l, nil, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return nil, nil, fmt.Errorf("taking the lock %s: %w", address.Name, err)
		}
		h, err := holder(address)
		if h != nil || errors.Is(err, errStranger) {
			return nil, h, err
		}
		last = err // the holder ends now, does not listen yet, or never will; or its queue is full
		select {
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		case <-time.After(pause):
		}
	}
	if errors.Is(last, unix.ECONNREFUSED) || errors.Is(last, unix.EPROTOTYPE) { // it does not listen, or is no stream
		return nil, nil, fmt.Errorf("the socket %s is not flanneld's: %w; find its process with `ss -lxp`", address.Name, last)
	}
	return nil, &Holder{Silent: true}, nil // EAGAIN: some process listens, and two must not have the lock
}

// namespace is what the names of all sockets begin with.
const namespace = "@flanneld/"

// Names returns the names, with a prefix, of the locks in the network namespace: those of this process, and those that
// other users only pretend to have, too.
func Names(prefix string) ([]string, error) {
	table, err := os.ReadFile("/proc/thread-self/net/unix")
	if err != nil {
		return nil, err
	}
	const listens = 1 << 16 // __SO_ACCEPTCON (linux/net.h); connections to a socket have its name, too
	var names []string
	for line := range strings.Lines(string(table)) {
		f := strings.Fields(line) // Num RefCount Protocol Flags Type St Inode Path
		if len(f) < 8 {
			continue
		}
		name, ours := strings.CutPrefix(f[7], namespace)
		flags, err := strconv.ParseUint(f[3], 16, 32)
		if ours && err == nil && flags&listens != 0 && strings.HasPrefix(name, prefix) {
			names = append(names, name)
		}
	}
	return names, nil
}

var errStranger = errors.New("another user's process has flanneld's socket")

// holder connects to the holder of a lock.
func holder(address *net.UnixAddr) (*Holder, error) {
	conn, err := net.DialUnix("unix", nil, address)
	if err != nil {
		return nil, err
	}
	peer, err := credentials(conn)
	switch {
	case err != nil:
		conn.Close()
		return nil, err
	case !trusted(peer):
		conn.Close()
		return nil, fmt.Errorf("%w %s: process %d of user %d; end it", errStranger, address.Name, peer.Pid, peer.Uid)
	}
	return &Holder{PID: int(peer.Pid), conn: conn}, nil
}

// credentials returns who is at the other end: the process that listened, or the one that connected.
func credentials(conn *net.UnixConn) (peer *unix.Ucred, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	ctlErr := raw.Control(func(fd uintptr) { peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	return peer, errors.Join(err, ctlErr)
}

func trusted(peer *unix.Ucred) bool { return peer.Uid == 0 || int(peer.Uid) == os.Geteuid() }
