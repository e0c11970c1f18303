package udp

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/pkg/rtnl"
	"github.com/flanneld/flanneld/subnet"
)

// reportEvery is the time between reports of packets dropped.
const reportEvery = time.Minute

// queues is how many queues of the device are used. With more than one, the kernel
// moves a connection to the queue on which its last packet came in
// (tun_flow_update, drivers/net/tun.c), and packets of it pass each other.
const queues = 1

// A proxy is Work, for one lease of this node's. It belongs to one goroutine;
// those that move packets read its table.
type proxy struct {
	*udp
	own      subnet.Lease
	peers    map[subnet.Subnets]subnet.Lease
	table    atomic.Pointer[table]
	lanes    []*lane
	errors   *complaints    // nil: not listening yet
	inlets   sync.WaitGroup // run while listening
	outlets  sync.WaitGroup // run while attached
	attached bool
	gone     chan error // why an outlet ended
	trouble  retry.LastError
	reported [reasons]uint64
}

// A lane is a queue of the device, and a socket a family.
type lane struct {
	queue    atomic.Pointer[queue] // nil: not attached
	sockets  [2]*socket            // for IPv4 and IPv6; nil: off
	sent     tally
	received [2]tally
}

// Work implements backend.Worker.
func (u *udp) Work(ctx context.Context, own subnet.Lease, peers <-chan subnet.Update) error {
	links, err := rtnl.Signals(ctx, unix.RTNLGRP_LINK)
	if err != nil {
		return fmt.Errorf("listening for %s: %w", device, err)
	}
	p := &proxy{udp: u, own: own, peers: map[subnet.Subnets]subnet.Lease{}, gone: make(chan error, u.queues)}
	for range u.queues {
		p.lanes = append(p.lanes, &lane{})
	}
	p.table.Store(newTable(own, nil, u.Port))
	u.running.Store(p)
	defer u.running.Store(nil)
	defer p.close()

	report := time.NewTicker(reportEvery)
	defer report.Stop()
	again := time.NewTimer(0)
	defer again.Stop()
	var pause retry.Backoff
	for {
		select {
		case <-ctx.Done():
			return nil
		case news := <-peers:
			p.update(news)
			continue
		case <-report.C:
			p.report()
			continue
		case err := <-p.gone:
			klog.V(1).Infof("udp: %s: %v: waiting for it to be there again", device, err)
			p.detach()
		case <-links:
		case <-again.C:
		}
		err := p.open()
		if !errors.Is(err, kernel.ErrNoDevice) { // it will be made, or the log says why not
			p.trouble.Log(klog.FromContext(ctx), "udp", err)
		} else {
			err = nil
		}
		if err != nil {
			again.Reset(pause.Next())
		} else {
			pause.Reset()
		}
	}
}

// update takes news of peers.
func (p *proxy) update(u subnet.Update) {
	u.Apply(p.peers)
	p.table.Store(newTable(p.own, p.peers, p.Port))
}

// open does what is left to be done for packets to be moved.
func (p *proxy) open() error {
	if err := p.listen(); err != nil {
		return err
	}
	return p.attach()
}

// listen opens the sockets.
func (p *proxy) listen() (err error) {
	if p.errors != nil {
		return nil
	}
	defer func() {
		if err != nil {
			p.closeSockets()
		}
	}()
	for _, l := range p.lanes {
		for i, at := range p.local {
			if !at.IsValid() {
				continue
			}
			if l.sockets[i], err = listen(netip.AddrPortFrom(at, uint16(p.Port)), len(p.lanes) > 1, p.able); err != nil {
				return err
			}
		}
	}
	if p.errors, err = newComplaints(p.own); err != nil {
		return err
	}
	for _, l := range p.lanes {
		for i, s := range l.sockets {
			if s != nil {
				in := newInlet(s, &l.queue, &p.table, p.errors, &l.received[i])
				p.inlets.Go(func() { in.run() })
			}
		}
	}
	return nil
}

// attach opens the device's queues.
func (p *proxy) attach() (err error) {
	if p.attached {
		return nil
	}
	for _, l := range p.lanes {
		q, err := attach(p.able)
		if err != nil {
			p.detach()
			return err
		}
		l.queue.Store(q)
	}
	for _, l := range p.lanes {
		out := newOutlet(l.queue.Load(), l.sockets, &p.table, p.errors, &l.sent)
		p.outlets.Go(func() { p.gone <- out.run() })
	}
	p.attached = true
	return nil
}

// detach closes the device's queues.
func (p *proxy) detach() {
	for _, l := range p.lanes {
		if q := l.queue.Swap(nil); q != nil {
			q.file.Close()
		}
	}
	p.outlets.Wait()
	for len(p.gone) > 0 {
		<-p.gone
	}
	p.attached = false
}

func (p *proxy) closeSockets() {
	for _, l := range p.lanes {
		for i, s := range l.sockets {
			if s != nil {
				s.file.Close()
			}
			l.sockets[i] = nil
		}
	}
	p.inlets.Wait()
	if p.errors != nil {
		p.errors.close()
		p.errors = nil
	}
}

// close ends all that moves packets. The device stays.
func (p *proxy) close() {
	for _, l := range p.lanes {
		for _, s := range l.sockets {
			if s != nil {
				s.file.Close() // an outlet may wait for it
			}
		}
	}
	p.detach()
	p.closeSockets()
}

// report logs what packets were dropped since the last time.
func (p *proxy) report() {
	var now [reasons]uint64
	for _, t := range p.Traffic() {
		for r := range now {
			now[r] += t.Sent.Drops[r] + t.Received.Drops[r]
		}
	}
	if text := dropped(now, p.reported); text != "" {
		klog.Infof("udp: packets dropped in the last minute: %s", text)
	}
	p.reported = now
}

// Traffic tells what each queue has moved since Work began.
func (u *udp) Traffic() []Traffic {
	p := u.running.Load()
	if p == nil {
		return nil
	}
	all := make([]Traffic, len(p.lanes))
	for i, l := range p.lanes {
		l.sent.add(&all[i].Sent)
		for f := range l.received {
			l.received[f].add(&all[i].Received)
		}
	}
	return all
}
