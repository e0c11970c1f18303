package iface

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A Dialer makes connections that end when the address which they come from
// leaves the node. TCP does not notice that by itself: it would send from there
// until it gives up, minutes later.
type Dialer struct {
	net.Dialer

	kernel *netlink.Handle
	mu     sync.Mutex
	conns  map[*conn]netip.Addr // by where they come from
}

// conn is a connection that its Dialer looks after.
type conn struct {
	net.Conn
	dialer *Dialer
}

// NewDialer returns a Dialer for the calling thread's network namespace. It
// looks after its connections until ctx ends.
func NewDialer(ctx context.Context) (*Dialer, error) {
	changes, err := Changes(ctx)
	if err != nil {
		return nil, err
	}
	kernel, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	d := &Dialer{kernel: kernel, conns: map[*conn]netip.Addr{}}
	go func() {
		for range changes {
			d.look()
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		kernel.Close()
		d.kernel = nil
	}()
	return d, nil
}

// DialContext is net.Dialer's.
func (d *Dialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	nc, err := d.Dialer.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	tcp, ok := nc.LocalAddr().(*net.TCPAddr)
	if !ok {
		return nc, nil
	}
	from := tcp.AddrPort().Addr().Unmap().WithZone("")
	c := &conn{nc, d}
	d.mu.Lock()
	defer d.mu.Unlock()
	// A node may use addresses that no interface has, by a route of type local.
	if local, err := d.local(); err != nil || !local[from] {
		return nc, nil
	}
	d.conns[c] = from
	return c, nil
}

func (c *conn) Close() error {
	c.dialer.mu.Lock()
	delete(c.dialer.conns, c)
	c.dialer.mu.Unlock()
	return c.Conn.Close()
}

// look closes the connections from addresses that are no more.
func (d *Dialer) look() {
	d.mu.Lock()
	defer d.mu.Unlock()
	local, err := d.local()
	if err != nil {
		return // it is in doubt
	}
	for c, from := range d.conns {
		if !local[from] {
			delete(d.conns, c)
			c.Conn.Close()
		}
	}
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
