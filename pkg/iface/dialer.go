package iface

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/netspace"
	"github.com/flanneld/flanneld/pkg/rtnl"
)

// settleFor is how long a Dialer waits after a notification before it checks its connections. A burst of notifications
// costs one check, and a route that is replaced in two steps counts as unchanged. The kernel also needs time: it sends
// the notification of a deleted route before it deletes the route.
const settleFor = 100 * time.Millisecond

// routing are the groups of notifications of everything that affects the route to an address.
var routing = []int{
	unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
	unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE,
}

// A Dialer makes connections, and closes a connection when its local address has become unusable: when no interface
// has the address any more, or when the kernel reaches the remote address through another link and from another
// address. TCP does not notice this by itself: it would send from the old address until it gives up, much later.
//
// A connection stays open when its local address is used on the new link too, like an address of lo, and when there is
// no route at all, because the old route may come back.
type Dialer struct {
	net.Dialer
	log   klog.Logger
	space *netspace.Space

	mu     sync.Mutex
	kernel *netlink.Handle // nil once ctx has ended
	conns  map[*conn]struct{}
}

// conn is a connection that its Dialer watches.
type conn struct {
	net.Conn
	dialer   *Dialer
	from, to netip.Addr
	held     bool // an interface had from when the connection was made; else a route of type local makes from an address
	via      int  // index of the link on the route to to; 0: the route does not determine from
}

// NewDialer returns a Dialer for the calling thread's network namespace. The Dialer watches its connections until ctx
// ends. It resolves names in the process's own namespace.
func NewDialer(ctx context.Context) (*Dialer, error) {
	space, err := netspace.Current()
	if err != nil {
		return nil, err
	}
	changes, err := rtnl.Signals(ctx, routing...)
	if err != nil {
		return nil, fmt.Errorf("listening for changes of routes: %w", err)
	}
	kernel, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	d := &Dialer{log: klog.FromContext(ctx), space: space, kernel: kernel, conns: map[*conn]struct{}{}}
	go func() {
		eachBurst(ctx, changes, d.checkAll)
		d.mu.Lock()
		defer d.mu.Unlock()
		kernel.Close()
		d.kernel = nil
	}()
	return d, nil
}

// eachBurst calls check after each burst of signals, until ctx ends.
func eachBurst(ctx context.Context, signals <-chan struct{}, check func()) {
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
		case <-signals: // belongs to the same burst
		default:
		}
		check()
	}
}

// DialContext connects as net.Dialer does, and watches the connection unless the remote address is a loopback address.
func (d *Dialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	nc, err := d.dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	local, ok := nc.LocalAddr().(*net.TCPAddr)
	remote, known := nc.RemoteAddr().(*net.TCPAddr)
	if !ok || !known || remote.IP.IsLoopback() {
		return nc, nil
	}
	c := &conn{
		Conn: nc, dialer: d,
		from: local.AddrPort().Addr().Unmap().WithZone(""), to: remote.AddrPort().Addr().Unmap(),
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	held, err := d.local()
	if err != nil {
		return nc, nil // without the addresses, the connection cannot be checked later
	}
	c.held = held[c.from]
	// If the kernel chooses another source address, the connection was bound to its address, or a rule that matches
	// more than the destination applies.
	if r := d.routeTo(c.to); r.err == nil && r.src == c.from {
		c.via = r.index
	}
	d.conns[c] = struct{}{}
	return c, nil
}

// dial connects in the Dialer's namespace.
func (d *Dialer) dial(ctx context.Context, network, address string) (nc net.Conn, err error) {
	dialer := d.Dialer
	if d.space != nil {
		dialer.FallbackDelay = -1 // else net.Dialer makes sockets in goroutines of its own
	}
	d.space.Do(func() { nc, err = dialer.DialContext(ctx, network, address) })
	return nc, err
}

// Remotes returns the remote addresses of the connections that are watched, sorted.
func (d *Dialer) Remotes() []netip.Addr {
	d.mu.Lock()
	defer d.mu.Unlock()
	var all []netip.Addr
	for c := range d.conns {
		if !slices.Contains(all, c.to) {
			all = append(all, c.to)
		}
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return all
}

func (c *conn) Close() error {
	c.dialer.mu.Lock()
	delete(c.dialer.conns, c)
	c.dialer.mu.Unlock()
	return c.Conn.Close()
}

// checkAll closes the connections whose local address has become unusable.
func (d *Dialer) checkAll() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.conns) == 0 {
		return
	}
	local, err := d.local()
	if err != nil {
		return // the next change checks again
	}
	for c := range d.conns {
		reason := fmt.Sprintf("no interface has %s any more", c.from)
		if !c.held || local[c.from] {
			r := d.routeTo(c.to)
			if c.via == 0 || r.err != nil || !r.src.IsValid() || r.src == c.from || r.index == c.via {
				continue
			}
			reason = fmt.Sprintf("%s is now reached from %s", c.to, r.src)
		}
		d.log.Info("Closing a connection; the client connects again", "from", c.from, "to", c.Conn.RemoteAddr(),
			"reason", reason)
		delete(d.conns, c)
		c.Conn.Close()
	}
}

// routeTo returns the route by which the kernel sends to an address now.
func (d *Dialer) routeTo(to netip.Addr) route {
	if to.Zone() != "" {
		return route{err: unix.ENETUNREACH} // the zone determines the link, no route does
	}
	return newRoute(d.kernel.RouteGet(to.AsSlice()))
}

// local returns the addresses of all interfaces.
func (d *Dialer) local() (map[netip.Addr]bool, error) {
	if d.kernel == nil {
		return nil, context.Canceled
	}
	addrs, err := rtnl.Dump(func() ([]netlink.Addr, error) { return d.kernel.AddrList(nil, netlink.FAMILY_ALL) })
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
