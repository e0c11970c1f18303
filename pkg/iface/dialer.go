package iface

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/rtnl"
)

// settleFor is how long a Dialer lets notifications come in before it looks at
// what they are about: a burst of them costs one look, and a route that is
// replaced in two steps has not moved. It also lets the kernel finish: it
// announces that a route is deleted before it deletes it.
const settleFor = 100 * time.Millisecond

// routing are the groups of notifications of what decides about the way to an
// address.
var routing = []int{
	unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
	unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE,
}

// A Dialer makes connections that end when the node has left the address or the
// uplink that they come from. TCP does not notice that by itself: it would send
// from there until it gives up, much later.
//
// An address is left when no interface has it any more. An uplink is left when
// the kernel now reaches the remote end through another link and from another
// address; a connection whose address goes with it to another link, as one on
// lo does, has lost nothing. Where there is no route at all, the old one may
// come back.
type Dialer struct {
	net.Dialer

	mu     sync.Mutex
	kernel *netlink.Handle // nil once ctx has ended
	conns  map[*conn]struct{}
}

// conn is a connection that its Dialer looks after.
type conn struct {
	net.Conn
	dialer   *Dialer
	from, to netip.Addr
	held     bool // from is an interface's address: it may be one by a route of type local
	via      int  // index of the link that leads to to; 0: more than routes decides about from
}

// NewDialer returns a Dialer for the calling thread's network namespace. It
// looks after its connections until ctx ends.
func NewDialer(ctx context.Context) (*Dialer, error) {
	changes, err := rtnl.Signals(ctx, routing...)
	if err != nil {
		return nil, fmt.Errorf("listening for changes of routes: %w", err)
	}
	kernel, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	d := &Dialer{kernel: kernel, conns: map[*conn]struct{}{}}
	go func() {
		eachBurst(ctx, changes, d.look)
		d.mu.Lock()
		defer d.mu.Unlock()
		kernel.Close()
		d.kernel = nil
	}()
	return d, nil
}

// eachBurst calls look after each burst of signals, until ctx ends.
func eachBurst(ctx context.Context, signals <-chan struct{}, look func()) {
	for {
		select {
		case <-signals:
		case <-ctx.Done():
			return
		}
		select {
		case <-time.After(settleFor):
		case <-ctx.Done():
			return
		}
		select {
		case <-signals: // it is of the same burst
		default:
		}
		look()
	}
}

// DialContext is net.Dialer's.
func (d *Dialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	nc, err := d.Dialer.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	local, ok := nc.LocalAddr().(*net.TCPAddr)
	remote, known := nc.RemoteAddr().(*net.TCPAddr)
	if !ok || !known || remote.IP.IsLoopback() {
		return nc, nil
	}
	c := &conn{Conn: nc, dialer: d, from: local.AddrPort().Addr().Unmap().WithZone(""), to: remote.AddrPort().Addr().Unmap()}
	d.mu.Lock()
	defer d.mu.Unlock()
	held, err := d.local()
	if err != nil {
		return nc, nil // it is in doubt
	}
	c.held = held[c.from]
	// Where it would be another source, the connection was bound to its own, or
	// goes by a rule for more than its destination.
	if way := d.way(c.to); way.err == nil && way.src == c.from {
		c.via = way.index
	}
	d.conns[c] = struct{}{}
	return c, nil
}

func (c *conn) Close() error {
	c.dialer.mu.Lock()
	delete(c.dialer.conns, c)
	c.dialer.mu.Unlock()
	return c.Conn.Close()
}

// look closes the connections from what the node has left.
func (d *Dialer) look() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.conns) == 0 {
		return
	}
	local, err := d.local()
	if err != nil {
		return // it is in doubt
	}
	for c := range d.conns {
		why := fmt.Sprintf("no interface has %s any more", c.from)
		if !c.held || local[c.from] {
			way := d.way(c.to)
			if c.via == 0 || way.err != nil || !way.src.IsValid() || way.src == c.from || way.index == c.via {
				continue
			}
			why = fmt.Sprintf("%s is now reached from %s", c.to, way.src)
		}
		klog.Infof("Closing the connection from %s to %s, to be made again: %s", c.from, c.Conn.RemoteAddr(), why)
		delete(d.conns, c)
		c.Conn.Close()
	}
}

// way asks the kernel which way it sends to an address now.
func (d *Dialer) way(to netip.Addr) route {
	if to.Zone() != "" {
		return route{err: unix.ENETUNREACH} // the zone is the way
	}
	return newRoute(d.kernel.RouteGet(to.AsSlice()))
}

// local returns the addresses of all interfaces.
func (d *Dialer) local() (map[netip.Addr]bool, error) {
	if d.kernel == nil {
		return nil, context.Canceled
	}
	addrs, err := dump(func() ([]netlink.Addr, error) { return d.kernel.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, err
	}
	local := map[netip.Addr]bool{}
	for _, a := range addrs {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			local[ip.Unmap()] = true
		}
	}
	return local, nil
}
