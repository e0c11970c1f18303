package ipsec

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/strongswan/govici/vici"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/subnet"
)

const (
	// charonStarts is how long charon takes to start.
	charonStarts = 100 * time.Millisecond

	// checkEvery is the time between looks at what charon has, and how long they
	// may take at most.
	checkEvery   = 10 * time.Second
	checkTimeout = time.Minute
)

// A keyer is Work, for one lease of this node's: it makes charon hold what is
// wanted, and looks again whenever that may have changed.
type keyer struct {
	*ipsec
	own    subnet.Lease
	peers  map[subnet.Subnets]subnet.Lease
	keys   map[netip.Addr]bool // that charon has been given, since it is the one it is
	client client              // zero: not connected
	charon *process            // that we started, if any
	last   retry.LastError
}

// Work implements backend.Worker.
func (b *ipsec) Work(ctx context.Context, own subnet.Lease, peers <-chan subnet.Update) error {
	k := &keyer{ipsec: b, own: own, peers: map[subnet.Subnets]subnet.Lease{}}
	defer k.close(ctx)
	select { // what charon has is not compared before it is known what it must
	case <-ctx.Done():
		return nil
	case news := <-peers:
		news.Apply(k.peers)
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	pause := retry.Backoff{First: charonStarts}
	for {
		var ended chan struct{}
		if k.charon != nil {
			ended = k.charon.ended
		}
		select {
		case <-ctx.Done():
			return nil
		case news := <-peers:
			news.Apply(k.peers)
		case <-ended:
			klog.Errorf("ipsec: charon has ended (%v): starting it again", k.charon.ProcessState)
			k.charon = nil
			k.hangUp()
		case <-timer.C:
		}
		err := k.sync(ctx)
		if !errors.Is(err, errStarting) {
			k.last.Log(klog.FromContext(ctx), "ipsec", err)
		}
		if err != nil {
			k.hangUp()
			timer.Reset(pause.Next())
		} else {
			timer.Reset(k.check)
			pause.Reset()
		}
	}
}

// errStarting says that charon was just started, and does not listen yet.
var errStarting = errors.New("charon starts")

// dial connects to charon, and starts it if there is none.
func (k *keyer) dial() error {
	if k.client.Session != nil {
		return nil
	}
	s, err := vici.NewSession(vici.WithAddr("unix", k.socket))
	switch {
	case err == nil:
		k.client, k.keys = client{s}, map[netip.Addr]bool{}
		return nil
	case k.charon.running():
		return errStarting
	}
	if k.charon, err = start(); err != nil {
		return err
	}
	klog.Infof("ipsec: %s is started", k.charon.Path)
	return errStarting
}

func (k *keyer) hangUp() {
	if k.client.Session != nil {
		k.client.Close()
	}
	k.client = client{}
}

// sync makes charon hold a key for each peer and a connection for each tunnel,
// and no others of ours.
func (k *keyer) sync(ctx context.Context) error {
	if err := k.dial(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	tunnels := map[string]tunnel{}
	keys := map[netip.Addr]bool{}
	for _, l := range k.peers {
		for _, t := range k.tunnels(k.own, l) {
			tunnels[t.name()] = t
			keys[t.from], keys[t.to] = true, true
		}
	}
	loaded, err := k.client.connections(ctx)
	if err != nil {
		return err
	}
	up, err := k.client.established(ctx)
	if err != nil {
		return err
	}
	var errs []error
	do := func(command string, args any) bool {
		_, err := k.client.call(ctx, command, args)
		if err != nil {
			errs = append(errs, err)
		}
		return err == nil
	}
	for _, ip := range slices.SortedFunc(maps.Keys(keys), netip.Addr.Compare) {
		if !k.keys[ip] {
			k.keys[ip] = do("load-shared", map[string]any{"id": keyName(ip), "type": "IKE", "data": string(k.PSK), "owners": []string{ip.String()}})
		}
	}
	for _, name := range slices.Sorted(maps.Keys(loaded)) {
		if _, wanted := tunnels[name]; !wanted && k.ours(name) {
			k.unload(ctx, name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(tunnels)) {
		t := tunnels[name]
		switch {
		case !loaded[name]:
			klog.V(1).Infof("ipsec: charon is told of the connection %s", name)
			do("load-conn", map[string]any{name: k.connection(t)})
		case !up[name]:
			// The peer ended it. Whether it can be had again will show.
			do("initiate", map[string]string{"ike": name, "child": t.child(), "timeout": "-1"})
		}
	}
	for ip := range k.keys {
		if !keys[ip] && do("unload-shared", map[string]string{"id": keyName(ip)}) {
			delete(k.keys, ip)
		}
	}
	return errors.Join(errs...)
}

const keyPrefix = "flannel-"

// keyName is what charon knows the key by that we share with a host.
func keyName(ip netip.Addr) string { return keyPrefix + ip.String() }

// ours tells whether a connection is one that we have made, maybe in an earlier
// life and for another lease.
func (k *keyer) ours(name string) bool {
	for _, ip := range []netip.Addr{k.uplink.IPv4, k.uplink.IPv6} {
		if ip.IsValid() && strings.HasPrefix(name, ip.String()+"-") && strings.Count(name, "-") == 3 {
			return true
		}
	}
	return false
}

// unload has charon forget a connection and end its tunnel.
func (k *keyer) unload(ctx context.Context, name string) {
	for _, c := range []struct {
		command string
		args    map[string]string
	}{{"unload-conn", map[string]string{"name": name}}, {"terminate", map[string]string{"ike": name, "timeout": "-1"}}} {
		if _, err := k.client.call(ctx, c.command, c.args); err != nil {
			klog.V(1).Infof("ipsec: %s: %v", name, err) // there may be none
		}
	}
}

// close leaves everything as it is when flanneld ends, so that packets pass while
// it restarts. Else nothing stays behind.
func (k *keyer) close(ctx context.Context) {
	defer k.hangUp()
	if errors.Is(context.Cause(ctx), backend.ErrStopping) {
		return
	}
	if k.client.Session != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), charonEnds)
		defer cancel()
		k.peers = nil
		if err := k.sync(ctx); err != nil {
			klog.Warningf("ipsec: charon may keep connections that are no longer wanted: %v", err)
		}
	}
	k.charon.stop()
}
