package wireguard

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/pkg/rtnl"
	"github.com/flanneld/flanneld/subnet"
)

const (
	// WireGuard sends no notification when its configuration changes. The configuration is read every syncInterval;
	// where reading takes long, the interval is longer, so that reading takes no more than a syncShare-th of the time.
	syncInterval    = time.Second
	syncIntervalMax = time.Minute
	syncShare       = 1000

	// Where peers come and go all the time, reading and configuring take a restShare-th of the time.
	restShare = 10

	// logMost is how many changes at once are logged one by one.
	logMost = 20
)

// A deviceSync makes one device hold what it must, for one lease of this node.
type deviceSync struct {
	tunnel
	log      klog.Logger
	inKernel bool
	gone     chan<- struct{} // receives a value when the device can no longer be used
	desired  config

	device     device // nil: not open
	index      int    // of the link of the device
	reopened   bool   // the device was open before: its sessions are lost
	peerStates peerStates
	stale      bool          // the peers have changed since desired was computed
	due        time.Time     // of the next sync
	cost       time.Duration // of reading the device, estimated
	rested     time.Time     // when a change of peers may cause the next sync
	pause      retry.Backoff // after a failure
	lastError  retry.LastError
}

// Work implements backend.Worker.
func (w *wireguard) Work(ctx context.Context, own subnet.Lease, peers <-chan subnet.Update) error {
	links, err := rtnl.Signals(ctx, unix.RTNLGRP_LINK)
	if err != nil {
		return fmt.Errorf("listening for devices: %w", err)
	}
	log := klog.FromContext(ctx)
	if !w.inKernel {
		why := "this kernel has no WireGuard"
		if w.host.UserSpace {
			why = "the kernel's WireGuard is not to be used on this host"
		}
		log.Info("Encrypting packets in flanneld", "reason", why)
	}
	gone := make(chan struct{}, 1)
	var devices []*deviceSync
	file := memory{path: w.host.endpointFile()}
	file.read(log)
	for _, t := range w.tunnels {
		d := &deviceSync{tunnel: t, log: log.WithValues("device", t.dev), inKernel: w.inKernel, gone: gone,
			peerStates: expect(file.written[t.dev])}
		defer d.close()
		devices = append(devices, d)
	}
	all := func(do func(*deviceSync)) {
		for _, d := range devices {
			do(d)
		}
	}
	leases := map[subnet.Subnets]*subnet.Lease{}
	known := false // a device keeps its peers until the peers are known
	var key secret
	next := time.NewTimer(0)
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			all((*deviceSync).learn)
			file.keep(log, devices)
			return nil
		case u := <-peers:
			u.Apply(leases)
			known = known || u.Snapshot
			all(func(d *deviceSync) { d.stale, d.due = true, d.rested })
		case <-links:
			all((*deviceSync).checkLink)
		case <-gone:
			all((*deviceSync).checkLink)
		case <-next.C:
		}
		if !known {
			continue
		}
		if key == (secret{}) {
			if key, err = privateKey(w.host.KeyFile); err != nil {
				devices[0].logOnce(err)
				next.Reset(syncInterval)
				continue
			}
		}
		synced, soonest := false, time.Now().Add(syncIntervalMax)
		for _, d := range devices {
			if begun := time.Now(); !begun.Before(d.due) {
				if d.stale {
					d.desired, d.stale = w.config(d.tunnel, key, own, leases), false
				}
				wait := d.sync()
				synced = true
				d.due, d.rested = time.Now().Add(wait), time.Now().Add(restShare*time.Since(begun))
			}
			if d.due.Before(soonest) {
				soonest = d.due
			}
		}
		if synced {
			file.keep(log, devices)
		}
		next.Reset(time.Until(soonest))
	}
}

// checkLink closes a device that was removed or replaced, and has a device that was added synced at once.
func (d *deviceSync) checkLink() {
	if d.device != nil {
		select {
		case <-d.device.Gone():
			d.close()
		default:
			if link := d.link(); link == nil || link.Attrs().Index != d.index {
				d.close()
			}
		}
	}
	if d.device == nil && d.link() != nil {
		d.due = time.Time{}
	}
}

// link returns the link of the device, if it exists, is up, and has the right kind.
func (d *deviceSync) link() netlink.Link {
	link, err := netlink.LinkByName(d.dev)
	if err != nil || link.Attrs().Flags&net.FlagUp == 0 {
		return nil
	}
	kind := "tuntap"
	if d.inKernel {
		kind = "wireguard"
	}
	if link.Type() != kind {
		return nil
	}
	return link
}

// sync makes the device hold what it must, and returns the time until the next sync.
func (d *deviceSync) sync() time.Duration {
	err := d.configure()
	d.logOnce(err)
	if err != nil {
		return d.pause.Next()
	}
	d.pause.Reset()
	return min(max(syncInterval, syncShare*d.cost), syncIntervalMax)
}

// configure opens the device, if it is not open, and changes what differs from the desired configuration.
func (d *deviceSync) configure() (err error) {
	if d.device == nil {
		link := d.link()
		if link == nil {
			return nil // the reconciler makes the device, or logs why it cannot
		}
		if d.inKernel {
			d.device, err = openKernel(d.dev)
		} else {
			d.device, err = openUser(d.log, d.dev, d.desired.Private, d.port, d.gone)
		}
		if err != nil {
			d.device = nil
			return err
		}
		d.index = link.Attrs().Index
	}
	start := time.Now()
	have, err := d.device.Device()
	if errors.Is(err, errGone) {
		d.close()
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading it: %w", err)
	}
	steps, states := changes(d.dev, have, d.desired, d.peerStates, d.reopened, start)
	// A single long duration may come from waiting for a processor.
	d.cost = min(time.Since(start), 2*max(d.cost, syncInterval/syncShare/2))
	for _, s := range steps {
		if err := d.device.Configure(s.Config); err != nil {
			return fmt.Errorf("configuring it: %w", err)
		}
		d.logCommands(s.commands)
	}
	d.peerStates, d.reopened = states, false
	d.reportAlone(start)
	return nil
}

// learn reads where the peers are, before the end.
func (d *deviceSync) learn() {
	if d.device == nil || d.stale {
		return
	}
	if have, err := d.device.Device(); err == nil {
		_, d.peerStates = changes(d.dev, have, d.desired, d.peerStates, d.reopened, time.Now())
	}
}

// reportAlone logs the peers without a session for which NAT may be the reason, once, and when there is a session.
func (d *deviceSync) reportAlone(now time.Time) {
	reported := 0
	for key, s := range d.peerStates {
		p := d.desired.peers[key]
		switch {
		case s.alone.IsZero() && s.reported:
			s.reported = false
			d.log.Info("There is a session with the peer now", "peer", join(p.allowed))
		case s.alone.IsZero() || s.reported || p.nat == noNAT || now.Sub(s.alone) < sessionWait:
			continue
		default:
			s.reported = true
			if reported++; reported <= logMost || d.log.V(2).Enabled() {
				d.log.Error(nil, "There is no session with a peer", "peer", join(p.allowed), "endpoint", p.endpoint,
					"reason", p.noSession(d.port))
			}
		}
		d.peerStates[key] = s
	}
	if reported > logMost && !d.log.V(2).Enabled() {
		d.log.Error(nil, "There is no session with more peers; --v=2 logs each", "peers", reported-logMost)
	}
}

// logCommands logs each of a few changes, or the first of many and their number.
func (d *deviceSync) logCommands(commands []string) {
	if len(commands) > logMost && !d.log.V(2).Enabled() {
		d.log.Info("Applied many changes; --v=2 logs each", "command", commands[0], "changes", len(commands))
		return
	}
	for _, c := range commands {
		d.log.Info("Applied", "command", c)
	}
}

func (d *deviceSync) close() {
	if d.device != nil {
		d.device.Close()
		d.device, d.reopened = nil, true
	}
}

func (d *deviceSync) logOnce(err error) { d.lastError.Log(d.log, "wireguard", err) }
