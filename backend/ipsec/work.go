package ipsec

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/strongswan/govici/vici"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/command"
	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/subnet"
)

const (
	// charonStart is about how long charon takes to start, startLimit the time after which a charon that does not listen
	// yet is an error, and startTimeout the time after which such a charon is ended, and another started.
	charonStart  = 100 * time.Millisecond
	startLimit   = 5 * time.Second
	startTimeout = time.Minute

	// checkEvery is the time between checks of what charon holds, checkTimeout the limit of a check.
	checkEvery   = 10 * time.Second
	checkTimeout = time.Minute
)

// A charonSync makes charon hold the keys and connections that it must, for one lease of this node.
type charonSync struct {
	*ipsec
	log       klog.Logger
	own       subnet.Lease
	peers     map[subnet.Subnets]*subnet.Lease
	keys      map[netip.Addr]bool // the keys that were loaded into the running charon
	client    client              // zero: not connected
	charon    *command.Process    // the charon that we have started, if any
	started   time.Time           // when
	lastError retry.LastError
}

// Work implements backend.Worker.
func (b *ipsec) Work(ctx context.Context, own subnet.Lease, peers <-chan subnet.Update) error {
	c := &charonSync{ipsec: b, log: klog.FromContext(ctx), own: own, peers: map[subnet.Subnets]*subnet.Lease{}}
	defer c.close(ctx)
	select { // charon keeps what it holds until the peers are known
	case <-ctx.Done():
		return nil
	case news := <-peers:
		news.Apply(c.peers)
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	pause := retry.Backoff{First: charonStart}
	for {
		var ended <-chan struct{}
		if c.charon != nil {
			ended = c.charon.Done()
		}
		select {
		case <-ctx.Done():
			return nil
		case news := <-peers:
			news.Apply(c.peers)
		case <-ended:
			c.log.Error(nil, "charon has ended; starting it again", "reason", c.charon.Reason())
			c.charon = nil
			c.disconnect()
		case <-timer.C:
		}
		err := c.sync(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if !errors.Is(err, errStarting) {
			c.lastError.Log(c.log, "ipsec", err)
		}
		if err != nil {
			c.disconnect()
			timer.Reset(pause.Next())
		} else {
			timer.Reset(c.check)
			pause.Reset()
		}
	}
}

// errStarting is returned while a charon that was just started does not listen yet.
var errStarting = errors.New("charon starts")

// connect connects to charon. If no charon is running, connect starts one.
func (c *charonSync) connect() error {
	if c.client.Session != nil {
		return nil
	}
	s, err := vici.NewSession(vici.WithAddr("unix", c.socket))
	switch {
	case err == nil:
		c.client, c.keys = client{s}, map[netip.Addr]bool{}
		return nil
	case errors.Is(err, unix.EAGAIN): // the queue of connections is full
		return fmt.Errorf("charon hangs: it accepts no connection at %s", c.socket)
	case c.charon != nil && !c.charon.Ended():
		return c.awaitStart()
	}
	if c.charon, err = start(); err != nil {
		c.charon = nil
		return err
	}
	c.started = time.Now()
	c.log.Info("Started charon", "path", c.charon.Path())
	return errStarting
}

// awaitStart returns the error for a charon that runs and does not listen. A charon that takes too long is ended.
func (c *charonSync) awaitStart() error {
	took := time.Since(c.started)
	if took < c.startLimit {
		return errStarting
	}
	if took >= c.startTimeout {
		c.charon.Stop(stopTimeout)
		c.charon = nil
	}
	return fmt.Errorf("charon was started, and does not listen at %s after %v; ending it after %v, and starting it again",
		c.socket, c.startLimit, c.startTimeout)
}

func (c *charonSync) disconnect() {
	if c.client.Session != nil {
		c.client.Close()
	}
	c.client = client{}
}

// sync makes charon hold a key for each peer and a connection for each tunnel, and no others of this node.
func (c *charonSync) sync(ctx context.Context) error {
	if err := c.connect(); err != nil {
		return err
	}
	end := c.waits.Begin(c.log, c.socket, "charon", "socket", c.socket, "limit", checkTimeout.String())
	err := c.load(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("charon hangs, or is busy: %w after %v", err, checkTimeout)
	}
	end(err)
	return err
}

// load is sync with a charon that it is connected to.
func (c *charonSync) load(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	tunnels := map[string]tunnel{}
	keys := map[netip.Addr]bool{}
	for _, l := range c.peers {
		for _, t := range c.tunnels(c.own, *l) {
			tunnels[t.name()] = t
			keys[t.from], keys[t.to] = true, true
		}
	}
	loaded, err := c.client.connections(ctx)
	if err != nil {
		return err
	}
	up, err := c.client.established(ctx)
	if err != nil {
		return err
	}
	var errs []error
	do := func(command string, args any) bool {
		_, err := c.client.call(ctx, command, args)
		if err != nil {
			errs = append(errs, err)
		}
		return err == nil
	}
	for _, ip := range slices.SortedFunc(maps.Keys(keys), netip.Addr.Compare) {
		if !c.keys[ip] {
			c.keys[ip] = do("load-shared", map[string]any{
				"id": keyName(ip), "type": "IKE", "data": string(c.PSK), "owners": []string{ip.String()},
			})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(loaded)) {
		if _, wanted := tunnels[name]; !wanted && c.ours(name) {
			c.unload(ctx, name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(tunnels)) {
		t := tunnels[name]
		switch {
		case !loaded[name]:
			c.log.V(1).Info("Loading a connection into charon", "connection", name)
			do("load-conn", map[string]any{name: c.connection(t)})
		case !up[name]:
			// The peer has ended the tunnel. charon tries to establish it again.
			do("initiate", map[string]string{"ike": name, "child": t.child(), "timeout": "-1"})
		}
	}
	for ip := range c.keys {
		if !keys[ip] && do("unload-shared", map[string]string{"id": keyName(ip)}) {
			delete(c.keys, ip)
		}
	}
	return errors.Join(errs...)
}

const keyPrefix = "flannel-"

// keyName is the name in charon of the key that this node shares with a host.
func keyName(ip netip.Addr) string { return keyPrefix + ip.String() }

// ours reports whether a connection is of this node. An earlier process may have made it, for another lease.
func (b *ipsec) ours(name string) bool {
	for _, ip := range family.Valid(b.uplink.Addrs()) {
		if strings.HasPrefix(name, ip.String()+"-") && strings.Count(name, "-") == 3 {
			return true
		}
	}
	return false
}

// unload has charon delete a connection and end its tunnel.
func (c *charonSync) unload(ctx context.Context, name string) {
	for _, x := range []struct {
		command string
		args    map[string]string
	}{{"unload-conn", map[string]string{"name": name}}, {"terminate", map[string]string{"ike": name,
		"timeout": "-1"}}} {
		if _, err := c.client.call(ctx, x.command, x.args); err != nil {
			c.log.V(1).Info("Cannot unload a connection", "connection", name, "reason", err) // it may not exist
		}
	}
}

// close changes nothing when flanneld stops, so that packets pass while flanneld restarts. Otherwise, close removes all
// connections.
func (c *charonSync) close(ctx context.Context) {
	defer c.disconnect()
	if errors.Is(context.Cause(ctx), backend.ErrStopping) {
		return
	}
	if c.client.Session != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		c.peers = nil
		if err := c.sync(ctx); err != nil {
			c.log.Error(err, "charon may keep connections that are no longer needed")
		}
	}
	if c.charon != nil {
		c.charon.Stop(stopTimeout)
	}
}
