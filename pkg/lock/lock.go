// Package lock excludes other processes of the same network namespace from what only one of them may use. A lock ends
// with the process that holds it.
package lock

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A Lock is held until Release, or until the process ends.
//
// A Lock is a listening unix socket with an abstract name (unix(7)): such names belong to the network namespace, and
// the kernel knows which process listens. Every user of the namespace can bind the name. A socket of another user than
// root or this process's own is no lock: it cannot keep out the process that asks for the lock.
type Lock struct{ socket net.Listener }

// Release ends the lock.
func (l *Lock) Release() { l.socket.Close() }

// A Holder is the process that holds a lock.
type Holder struct {
	PID  int // 0: the process is in a PID namespace that cannot be seen from here
	conn net.Conn
}

// Wait waits until the lock is free, or ctx ends.
func (h *Holder) Wait(ctx context.Context) {
	defer context.AfterFunc(ctx, h.Close)()
	_, _ = h.conn.Read(make([]byte, 1)) // the holder sends nothing; the kernel ends the connection with the holder's socket
	h.Close()
}

// Close ends the connection to the holder. Wait does the same.
func (h *Holder) Close() { h.conn.Close() }

// String names the process.
func (h *Holder) String() string {
	if h.PID == 0 {
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
	address := &net.UnixAddr{Net: "unix", Name: "@flanneld/" + name}
	var last error
	for range tries {
		l, err := net.ListenUnix("unix", address)
		if err == nil {
			return &Lock{l}, nil, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return nil, nil, fmt.Errorf("taking the lock %s: %w", address.Name, err)
		}
		h, err := holder(address)
		if h != nil || errors.Is(err, errStranger) {
			return nil, h, err
		}
		last = err // the holder ends now, does not listen yet, or never will
		select {
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		case <-time.After(pause):
		}
	}
	return nil, nil, fmt.Errorf("the socket %s is not flanneld's: %w; find its process with `ss -lxp`", address.Name, last)
}

var errStranger = errors.New("another user's process has flanneld's socket")

// holder connects to the holder of a lock.
func holder(address *net.UnixAddr) (*Holder, error) {
	conn, err := net.DialUnix("unix", nil, address)
	if err != nil {
		return nil, err
	}
	var peer *unix.Ucred // of the process that listens
	raw, err := conn.SyscallConn()
	if err == nil {
		ctlErr := raw.Control(func(fd uintptr) { peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
		err = errors.Join(err, ctlErr)
	}
	switch {
	case err != nil:
		conn.Close()
		return nil, err
	case peer.Uid != 0 && int(peer.Uid) != os.Geteuid():
		conn.Close()
		return nil, fmt.Errorf("%w %s: process %d of user %d; end it", errStranger, address.Name, peer.Pid, peer.Uid)
	}
	return &Holder{int(peer.Pid), conn}, nil
}
