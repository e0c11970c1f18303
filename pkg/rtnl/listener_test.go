package rtnl

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/nstest"
)

// mark changes an MTU, which nothing else does, and returns what recognizes the notification of the change.
func mark(t *testing.T, mtu int) (is func(datagram []byte) bool) {
	t.Helper()
	nstest.Run(t, fmt.Sprintf("ip link set eth0 mtu %d", mtu))
	attr := binary.NativeEndian.AppendUint16(nil, 8)
	attr = binary.NativeEndian.AppendUint16(attr, unix.IFLA_MTU)
	attr = binary.NativeEndian.AppendUint32(attr, uint32(mtu))
	return func(datagram []byte) bool { return bytes.Contains(datagram, attr) }
}

// await reads until the condition holds.
func await(t *testing.T, l *Listener, what string, condition func(datagram []byte, err error) bool) {
	t.Helper()
	if err := l.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<16)
	for {
		datagram, err := l.Next(buf)
		if condition(datagram, err) {
			return
		}
		if err != nil && !errors.Is(err, ErrLost) {
			t.Fatalf("%s: %v", what, err)
		}
	}
}

func start(t *testing.T, filter []unix.SockFilter) *Listener {
	t.Helper()
	nstest.New(t)
	nstest.Need(t, "ip")
	nstest.Run(t, "ip link add eth0 type veth peer name far0")
	l, err := Listen(filter, unix.RTNLGRP_LINK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// A loss is only over when everything that had waited was read.
func TestLoss(t *testing.T) {
	l := start(t, nil)
	nstest.Overflow(t, l, "eth0")
	await(t, l, "the loss", func(_ []byte, err error) bool { return errors.Is(err, ErrLost) })
	is := mark(t, 1200)
	await(t, l, "what came after it", func(datagram []byte, _ error) bool { return is(datagram) })
}

// TryNext returns what has come, and nothing when nothing has. Wait returns when there is something, and reads
// nothing.
func TestWaitAndTryNext(t *testing.T) {
	l := start(t, nil)
	buf := make([]byte, 1<<16)
	for round := range 3 {
		waited := make(chan error, 1)
		go func() { waited <- l.Wait() }()
		select {
		case err := <-waited:
			t.Fatalf("round %d: nothing has happened, and Wait returns %v", round, err)
		case <-time.After(20 * time.Millisecond):
		}
		if datagram, err := l.TryNext(buf); datagram != nil || err != nil {
			t.Fatalf("round %d: nothing has happened: %d bytes, %v", round, len(datagram), err)
		}
		is := mark(t, 1200+round)
		if err := <-waited; err != nil {
			t.Fatal(err)
		}
		found := false
		for {
			datagram, err := l.TryNext(buf)
			if err != nil {
				t.Fatal(err)
			}
			if datagram == nil {
				break
			}
			found = found || is(datagram)
		}
		if !found {
			t.Fatalf("round %d: the notification is not among those that have come", round)
		}
	}
	nstest.Overflow(t, l, "eth0")
	if err := l.Wait(); err != nil {
		t.Fatal(err)
	}
	lost := false
	for range 100 {
		datagram, err := l.TryNext(buf)
		if lost = errors.Is(err, ErrLost); lost || datagram == nil {
			break
		}
	}
	if datagram, err := l.TryNext(buf); !lost || datagram != nil || err != nil {
		t.Errorf("after an overflow, ErrLost %t, and then %d bytes, %v", lost, len(datagram), err)
	}
}

func TestFilter(t *testing.T) {
	l := start(t, []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 0}}) // lets nothing through
	mark(t, 1200)
	if err := l.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if datagram, err := l.Next(make([]byte, 1<<16)); err == nil {
		t.Errorf("got %d bytes", len(datagram))
	}
}

func TestCloseEndsNextAndWait(t *testing.T) {
	buf := make([]byte, 1<<16)
	for name, wait := range map[string]func(*Listener) error{
		"Next": func(l *Listener) error { _, err := l.Next(buf); return err },
		"Wait": (*Listener).Wait,
	} {
		l := start(t, nil)
		done := make(chan error)
		go func() { done <- wait(l) }()
		l.Close()
		if err := <-done; err == nil || errors.Is(err, ErrLost) {
			t.Errorf("%s: got %v", name, err)
		}
		if _, err := l.TryNext(buf); err == nil {
			t.Error("TryNext reads what is closed")
		}
	}
}
