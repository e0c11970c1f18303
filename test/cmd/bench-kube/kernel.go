package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/rtnl"
	"github.com/flanneld/flanneld/test/kubelet"
	"github.com/flanneld/flanneld/test/lab"
)

// watch listens to the kernel's notifications on a node.
type watch struct {
	*rtnl.Listener
	buf []byte
}

func watchKernel(n *lab.Node) (*watch, error) {
	w := &watch{buf: make([]byte, 64<<10)}
	err := n.Do(func() (err error) {
		w.Listener, err = rtnl.Listen(nil, unix.RTNLGRP_NEIGH, unix.RTNLGRP_IPV4_ROUTE)
		return err
	})
	return w, err
}

// An object is one entry of the kernel's tables.
type object struct {
	kind string // route, neighbour, FDB entry
	key  string // the bytes of its destination, or of the MAC
}

// objects are what the kernel must hold for a peer.
func objects(n kubelet.Node) []object {
	base := string(n.Subnet.Addr().AsSlice())
	return []object{{"route", base}, {"neighbour", base}, {"FDB entry", string(n.MAC)}}
}

// programmed waits until the kernel has told of all that peers call for, and
// returns when that was.
func (w *watch) programmed(ctx context.Context, peers ...kubelet.Node) (time.Time, error) {
	missing := map[object]bool{}
	for _, p := range peers {
		for _, o := range objects(p) {
			missing[o] = true
		}
	}
	if err := w.SetReadDeadline(time.Now().Add(lab.Patience)); err != nil {
		return time.Time{}, err
	}
	defer context.AfterFunc(ctx, func() { w.SetReadDeadline(time.Unix(1, 0)) })()
	for len(missing) > 0 {
		datagram, err := w.Next(w.buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			for o := range missing {
				return time.Time{}, fmt.Errorf("%d entries are missing, the %s of %x for one", len(missing), o.kind, o.key)
			}
		}
		if err != nil {
			return time.Time{}, err
		}
		if err := rtnl.EachMessage(datagram, func(h unix.NlMsghdr, body []byte) error {
			if o, ok := added(h.Type, body); ok {
				delete(missing, o)
			}
			return nil
		}); err != nil {
			return time.Time{}, err
		}
	}
	return time.Now(), nil
}

// added reads a notification (rtnetlink(7)) of an entry that is there from now
// on.
func added(kind uint16, body []byte) (object, bool) {
	var o object
	var header int
	var attr uint16
	switch {
	case kind == unix.RTM_NEWROUTE && len(body) >= unix.SizeofRtMsg:
		o.kind, header, attr = "route", unix.SizeofRtMsg, unix.RTA_DST
	case kind == unix.RTM_NEWNEIGH && len(body) >= unix.SizeofNdMsg && body[0] == unix.AF_BRIDGE:
		o.kind, header, attr = "FDB entry", unix.SizeofNdMsg, unix.NDA_LLADDR
	case kind == unix.RTM_NEWNEIGH && len(body) >= unix.SizeofNdMsg:
		o.kind, header, attr = "neighbour", unix.SizeofNdMsg, unix.NDA_DST
	default:
		return o, false
	}
	found := false
	rtnl.EachAttr(body[header:], func(kind uint16, value []byte) {
		if kind == attr {
			o.key, found = string(value), true
		}
	})
	return o, found
}
