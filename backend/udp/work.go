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

// reportInterval is the time between reports of dropped packets.
const reportInterval = time.Minute

// A proxy does the work of Work for one lease of this node. The proxy belongs to one goroutine. The goroutines that
// move packets read its table, its tun and its sockets.
type proxy struct {
	*udp
	log   klog.Logger
	own   subnet.Lease
	peers map[subnet.Subnets]*subnet.Lease
	table atomic.Pointer[table]

	sockets  [2]*socket          // for IPv4 and IPv6; nil: the family is off, or the proxy does not listen yet
	tun      atomic.Pointer[tun] // nil: the proxy is not attached to the device
	icmp     *icmpSender         // nil: the proxy does not listen yet
	sent     counters
	received [2]counters

	receivers sync.WaitGroup // run while the proxy listens
	sender    sync.WaitGroup // runs while the proxy is attached
	detached  chan error     // why the sender has ended

	lastError retry.LastError
	reported  [reasons]uint64
}

// Work implements backend.Worker.
func (u *udp) Work(ctx context.Context, own subnet.Lease, peers <-chan subnet.Update) error {
	links, err := rtnl.Signals(ctx, unix.RTNLGRP_LINK)
	if err != nil {
		return fmt.Errorf("listening for %s: %w", device, err)
	}
	p := &proxy{
		udp: u, log: klog.FromContext(ctx), own: own, peers: map[subnet.Subnets]*subnet.Lease{}, detached: make(chan error, 1),
	}
	p.table.Store(newTable(own, nil, u.Port))
	u.running.Store(p)
	defer u.running.Store(nil)
	defer p.close()

	report := time.NewTicker(reportInterval)
	defer report.Stop()
	again := time.NewTimer(0)
	defer again.Stop()
	var pause retry.Backoff
	for {
		select {
		case <-ctx.Done():
			return nil
		case update := <-peers:
			update.Apply(p.peers)
			p.table.Store(newTable(p.own, p.peers, p.Port))
			continue
		case <-report.C:
			p.report()
			continue
		case err := <-p.detached:
			p.log.V(1).Info("Device was lost; waiting until it is there again", "device", device, "reason", err)
			p.detach()
		case <-links:
		case <-again.C:
		}
		err := p.open()
		if errors.Is(err, kernel.ErrNoDevice) {
			err = nil // the reconciler makes the device, or logs why it cannot
		} else {
			p.lastError.Log(p.log, "udp", err)
		}
		if err != nil {
			again.Reset(pause.Next())
		} else {
			pause.Reset()
		}
	}
}

// open does what is left to do before packets can be moved.
func (p *proxy) open() error {
	if err := p.listen(); err != nil {
		return err
	}
	return p.attach()
}

// listen opens the sockets.
func (p *proxy) listen() (err error) {
	if p.icmp != nil {
		return nil
	}
	defer func() {
		if err != nil {
			p.closeSockets()
		}
	}()
	for i, local := range p.local {
		if !local.IsValid() {
			continue
		}
		at := netip.AddrPortFrom(local, uint16(p.Port))
		if p.sockets[i], err = listen(p.log, at, p.offloads); err != nil {
			return err
		}
	}
	if p.icmp, err = newICMPSender(p.own); err != nil {
		return err
	}
	for i, s := range p.sockets {
		if s != nil {
			r := newReceiver(s, &p.tun, &p.table, p.icmp, &p.received[i])
			p.receivers.Go(r.run)
		}
	}
	return nil
}

// attach opens the device.
func (p *proxy) attach() error {
	if p.tun.Load() != nil {
		return nil
	}
	t, err := attach(p.offloads)
	if err != nil {
		return err
	}
	p.tun.Store(t)
	s := newSender(t, p.sockets, &p.table, p.icmp, &p.sent)
	p.sender.Go(func() { p.detached <- s.run() })
	return nil
}

// detach closes the device.
func (p *proxy) detach() {
	if t := p.tun.Swap(nil); t != nil {
		t.file.Close()
	}
	p.sender.Wait()
	for len(p.detached) > 0 {
		<-p.detached
	}
}

// closeSockets ends the receivers. The sender must have ended.
func (p *proxy) closeSockets() {
	for i, s := range p.sockets {
		if s != nil {
			s.file.Close()
		}
		p.sockets[i] = nil
	}
	p.receivers.Wait()
	if p.icmp != nil {
		p.icmp.close()
		p.icmp = nil
	}
}

// close ends everything that moves packets. The device stays.
func (p *proxy) close() {
	for _, s := range p.sockets {
		if s != nil {
			s.file.Close() // the sender may wait for the socket
		}
	}
	p.detach()
	p.closeSockets()
}

// report logs how many packets were dropped since the last report.
func (p *proxy) report() {
	var now [reasons]uint64
	sent, received := p.totals()
	for r := range now {
		now[r] = sent.drops[r] + received.drops[r]
	}
	if text := describeDrops(now, p.reported); text != "" {
		p.log.Info("Packets were dropped", "within", reportInterval, "packets", text)
	}
	p.reported = now
}

// totals returns what the proxy has moved since Work began.
func (p *proxy) totals() (sent, received totals) {
	p.sent.addTo(&sent)
	for i := range p.received {
		p.received[i].addTo(&received)
	}
	return sent, received
}
