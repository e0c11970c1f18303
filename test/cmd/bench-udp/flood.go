package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"
)

const (
	floodBatch = 64
	// floodWindow is how many packets may be under way: less than a device's
	// queue holds, so that what is measured is the way and not how fast a sender
	// can have packets dropped.
	floodWindow = 384
)

// flood sends small UDP packets from pod to pod, as fast as they arrive, and
// returns how many a second did. burst is how many the sender hands to the
// kernel as one (UDP_SEGMENT, udp(7)), as QUIC's programs do: 1, or floodBatch.
func (t *track) flood(ctx context.Context, size, burst int, long time.Duration) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, long)
	defer cancel()
	var in, out net.Conn
	open := func(conn *net.Conn, f func() (net.Conn, error)) func() error {
		return func() (err error) {
			*conn, err = f()
			return err
		}
	}
	listen := func() (net.Conn, error) { return net.ListenUDP("udp", nil) }
	if err := t.to.Do(open(&in, listen)); err != nil {
		return 0, err
	}
	defer in.Close()
	_, port, err := net.SplitHostPort(in.LocalAddr().String())
	if err != nil {
		return 0, err
	}
	dial := func() (net.Conn, error) { return net.Dial("udp", net.JoinHostPort(t.target, port)) }
	if err := t.from.Do(open(&out, dial)); err != nil {
		return 0, err
	}
	defer out.Close()

	if burst > 1 {
		err := set(out.(*net.UDPConn), unix.UDP_SEGMENT, size)
		if err == nil {
			err = set(in.(*net.UDPConn), unix.UDP_GRO, 1)
		}
		if err != nil {
			return 0, fmt.Errorf("UDP in bursts: %w", err)
		}
	}
	var received atomic.Int64
	progress, done := make(chan struct{}, 1), make(chan struct{})
	go func() {
		defer close(done)
		c, all := ipv4.NewPacketConn(in.(net.PacketConn)), messages(floodBatch, size*burst)
		for {
			n, err := c.ReadBatch(all, 0)
			if err != nil {
				return
			}
			for _, m := range all[:n] {
				received.Add(int64(m.N / size))
			}
			select {
			case progress <- struct{}{}:
			default:
			}
		}
	}()
	c, all := ipv4.NewPacketConn(out.(net.PacketConn)), messages(floodBatch/burst, size*burst)
	sent, lost := int64(0), int64(0)
	began := time.Now()
	for ctx.Err() == nil {
		if before := received.Load(); sent-lost-before > floodWindow-floodBatch {
			select {
			case <-progress:
			case <-time.After(50 * time.Millisecond):
				lost = sent - before
			}
			continue
		}
		n, err := c.WriteBatch(all, 0)
		if err != nil {
			return 0, fmt.Errorf("UDP: %w", err)
		}
		sent += int64(n * burst)
	}
	took := time.Since(began)
	in.Close()
	<-done
	if received.Load() == 0 {
		return 0, errors.New("no UDP packet arrives")
	}
	return float64(received.Load()) / took.Seconds(), nil
}

func set(c *net.UDPConn, option, value int) error {
	raw, err := c.SyscallConn()
	if err == nil {
		failed := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_UDP, option, value) })
		err = errors.Join(failed, err)
	}
	return err
}

func messages(count, size int) []ipv4.Message {
	all := make([]ipv4.Message, count)
	for i := range all {
		all[i].Buffers = [][]byte{make([]byte, size)}
	}
	return all
}
