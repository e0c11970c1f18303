package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/rtnl"
	"github.com/flanneld/flanneld/test/lab"
)

// A watch follows the IPv4 routes of the node's kernel with the daemon's
// protocol. They are what the daemon sets last, and removes first.
type watch struct {
	*rtnl.Listener
	buf          []byte
	there        map[string]bool // by destination
	set, removed int             // since restart
	when         time.Time       // of the last change
}

// protocol is the daemon's mark (rtm_protocol).
const protocol = 70

func (b *bench) watch() (*watch, error) {
	w := &watch{buf: make([]byte, 64<<10), there: map[string]bool{}}
	err := b.node.Do(func() (err error) {
		w.Listener, err = rtnl.Listen(nil, unix.RTNLGRP_IPV4_ROUTE)
		return err
	})
	if err != nil {
		return nil, err
	}
	raw, err := w.SyscallConn()
	if err != nil {
		return nil, err
	}
	control := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 256<<20) // enough even while nothing reads
	})
	return w, errors.Join(control, err)
}

// restart counts from now on.
func (w *watch) restart() { w.set, w.removed = 0, 0 }

// routes waits until there are n routes.
func (w *watch) routes(ctx context.Context, n int) error {
	if err := w.SetReadDeadline(time.Now().Add(2 * lab.Patience)); err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { w.SetReadDeadline(time.Unix(1, 0)) })()
	for len(w.there) != n {
		if err := w.next(); err != nil {
			return fmt.Errorf("%d routes, and there should be %d: %w", len(w.there), n, err)
		}
	}
	return nil
}

// soFar takes in all that has happened.
func (w *watch) soFar() error {
	if err := w.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		return err
	}
	for {
		if err := w.next(); errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// next reads one datagram of notifications.
func (w *watch) next() error {
	datagram, err := w.Next(w.buf)
	if err != nil {
		return err
	}
	return rtnl.EachMessage(datagram, func(h unix.NlMsghdr, body []byte) error {
		w.take(h.Type, body)
		return nil
	})
}

// take takes in a notification (rtnetlink(7)).
func (w *watch) take(kind uint16, body []byte) {
	if len(body) < unix.SizeofRtMsg || body[5] != protocol {
		return
	}
	rtnl.EachAttr(body[unix.SizeofRtMsg:], func(attr uint16, value []byte) {
		if attr != unix.RTA_DST {
			return
		}
		switch dst := string(value); kind {
		case unix.RTM_NEWROUTE:
			w.there[dst] = true
			w.set++
		case unix.RTM_DELROUTE:
			delete(w.there, dst)
			w.removed++
		}
		w.when = time.Now()
	})
}
