package wireguard

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/pkg/rtnl"
	"github.com/flanneld/flanneld/subnet"
)

const (
	// WireGuard tells nobody when its configuration changes: it is looked at
	// every lookFirst or, where that takes long, so that it takes a
	// lookShare-th of the time.
	lookFirst = time.Second
	lookMost  = time.Minute
	lookShare = 1000

	// Where peers come and go all the time, looking and configuring takes a
	// restShare-th of the time.
	restShare = 10

	// wordy is how many changes at once are logged one by one.
	wordy = 20
)

// A keeper is Work for one device, and one lease of this node's.
type keeper struct {
	tunnel
	inKernel bool
	gone     chan<- struct{} // told when the device is of no more use
	want     config

	device  device // nil: not open
	number  int    // of the link that it is
	again   bool   // it was open before: its sessions are lost
	sights  sights
	stale   bool          // want is: there is news of peers
	due     time.Time     // when it is looked at next
	cost    time.Duration // of a look, as it seems
	rested  time.Time     // when it may be looked at because of news
	pause   retry.Backoff // after a failure
	trouble retry.LastError
}

// Work implements backend.Worker.
func (w *wireguard) Work(ctx context.Context, own subnet.Lease, peers <-chan subnet.Update) error {
	links, err := rtnl.Signals(ctx, unix.RTNLGRP_LINK)
	if err != nil {
		return fmt.Errorf("listening for devices: %w", err)
	}
	if !w.inKernel {
		why := "this kernel has no WireGuard"
		if os.Getenv(userSpace) == "1" {
			why = userSpace + " is set"
		}
		klog.Infof("wireguard: %s: flanneld encrypts packets itself", why)
	}
	gone := make(chan struct{}, 1)
	var keepers []*keeper
	for _, t := range w.tunnels {
		k := &keeper{tunnel: t, inKernel: w.inKernel, gone: gone}
		defer k.close()
		keepers = append(keepers, k)
	}
	leases := map[subnet.Subnets]subnet.Lease{}
	known := false // a device keeps what it has until peers are known
	var key secret
	next := time.NewTimer(0)
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case u := <-peers:
			u.Apply(leases)
			known = known || u.Snapshot
			for _, k := range keepers {
				k.stale, k.due = true, k.rested
			}
		case <-links:
			for _, k := range keepers {
				k.follow()
			}
		case <-gone:
			for _, k := range keepers {
				k.follow()
			}
		case <-next.C:
		}
		if !known {
			continue
		}
		if key == (secret{}) {
			if key, err = privateKey(keyFile()); err != nil {
				keepers[0].say(ctx, err)
				next.Reset(lookFirst)
				continue
			}
		}
		soonest := time.Now().Add(lookMost)
		for _, k := range keepers {
			if begun := time.Now(); !begun.Before(k.due) {
				if k.stale {
					k.want, k.stale = w.config(k.tunnel, key, own, leases), false
				}
				wait := k.look(ctx)
				k.due, k.rested = time.Now().Add(wait), time.Now().Add(restShare*time.Since(begun))
			}
			if k.due.Before(soonest) {
				soonest = k.due
			}
		}
		next.Reset(time.Until(soonest))
	}
}

// follow finds out whether the device is still the one that it was, or is there
// again.
func (k *keeper) follow() {
	if k.device != nil {
		select {
		case <-k.device.Gone():
			k.close()
		default:
			if link := k.link(); link == nil || link.Attrs().Index != k.number {
				k.close()
			}
		}
	}
	if k.device == nil && k.link() != nil {
		k.due = time.Time{}
	}
}

// link returns the device if it is there, up, and of the right kind.
func (k *keeper) link() netlink.Link {
	link, err := netlink.LinkByName(k.dev)
	if err != nil || link.Attrs().Flags&net.FlagUp == 0 {
		return nil
	}
	kind := "tuntap"
	if k.inKernel {
		kind = "wireguard"
	}
	if link.Type() != kind {
		return nil
	}
	return link
}

// look makes the device hold what it should, and returns the time until it is
// looked at again.
func (k *keeper) look(ctx context.Context) time.Duration {
	err := k.settle()
	k.say(ctx, err)
	if err != nil {
		return k.pause.Next()
	}
	k.pause.Reset()
	return min(max(lookFirst, lookShare*k.cost), lookMost)
}

func (k *keeper) settle() (err error) {
	if k.device == nil {
		link := k.link()
		if link == nil {
			return nil // it will be made, or the log says why not
		}
		if k.inKernel {
			k.device, err = openKernel(k.dev)
		} else {
			k.device, err = openUser(k.dev, k.want.Private, k.port, k.gone)
		}
		if err != nil {
			k.device = nil
			return err
		}
		k.number = link.Attrs().Index
	}
	start := time.Now()
	have, err := k.device.Device()
	if errors.Is(err, errGone) {
		k.close()
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading it: %w", err)
	}
	steps, sights := changes(k.dev, have, k.want, k.sights, k.again, start)
	// What took long once may have waited for a processor.
	k.cost = min(time.Since(start), 2*max(k.cost, lookFirst/lookShare/2))
	for _, s := range steps {
		if err := k.device.Configure(s.Config); err != nil {
			return fmt.Errorf("configuring it: %w", err)
		}
		tell(s.commands)
	}
	k.sights, k.again = sights, false
	return nil
}

// tell logs what was done: a line for each of a few changes, a count of many.
func tell(commands []string) {
	if len(commands) > wordy && !klog.V(2).Enabled() {
		klog.Infof("%s …, and %d more changes (--v=2 shows each)", commands[0], len(commands)-1)
		return
	}
	for _, c := range commands {
		klog.Info(c)
	}
}

func (k *keeper) close() {
	if k.device != nil {
		k.device.Close()
		k.device, k.again = nil, true
	}
}

func (k *keeper) say(ctx context.Context, err error) {
	k.trouble.Log(klog.FromContext(ctx), "wireguard: "+k.dev, err)
}
