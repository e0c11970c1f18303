package iface

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/nstest"
	"github.com/flanneld/flanneld/pkg/rtnl"
)

// awaitLocal waits until an IPv6 address can be used: the kernel's workqueue must have made its route.
func awaitLocal(t *testing.T, ip string) {
	t.Helper()
	for until := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		if strings.Contains(nstest.Run(t, "ip -6 route show table local"), "local "+ip+" ") {
			return
		}
		if time.Now().After(until) {
			t.Fatalf("there is no route to %s", ip)
		}
	}
}

// awaitClosed waits until the Dialer has closed a connection.
func awaitClosed(t *testing.T, c net.Conn) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("from %s: %v", c.LocalAddr(), err)
	}
}

// A Dialer connects in the namespace in which it was made, from goroutines in any namespace.
func TestDialerElsewhere(t *testing.T) {
	nstest.New(t)
	d, err := NewDialer(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var group sync.WaitGroup
	group.Go(func() { // on a thread of the process's own namespace
		conn, err := d.DialContext(t.Context(), "tcp", l.Addr().String())
		if err != nil {
			t.Error(err)
			return
		}
		conn.Close()
	})
	group.Wait()
}

// A connection is closed when its own address is removed, and stays open when another address is removed.
func TestDialer(t *testing.T) {
	nstest.New(t)
	nstest.Run(t, "ip link set lo up")
	for _, a := range []string{"198.18.0.1/24", "198.18.0.2/24", "fd18::1/64 nodad"} {
		nstest.Run(t, "ip addr add dev lo "+a)
	}
	awaitLocal(t, "fd18::1")
	d, err := NewDialer(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	dial := func(network, from string) net.Conn {
		t.Helper()
		l, err := net.Listen(network, net.JoinHostPort(from, "0"))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
		c, err := d.DialContext(t.Context(), network, l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		peer, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { peer.Close() })
		return c
	}
	stays, goes := dial("tcp4", "198.18.0.1"), dial("tcp4", "198.18.0.2")
	six, lo := dial("tcp6", "fd18::1"), dial("tcp4", "127.0.0.7")
	closed := dial("tcp4", "198.18.0.1")
	closed.Close()
	nstest.Run(t, "ip addr del 198.18.0.2/24 dev lo")
	nstest.Run(t, "ip addr del fd18::1/64 dev lo")
	for _, c := range []net.Conn{goes, six} {
		awaitClosed(t, c)
	}
	for _, c := range []net.Conn{stays, lo} {
		c.SetReadDeadline(time.Now())
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, io.EOF) {
			t.Errorf("from %s: %v", c.LocalAddr(), err)
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.conns) != 1 {
		t.Errorf("%d connections are watched, want 1", len(d.conns))
	}
}

// twoUplinks moves the test into the namespace of a host with eth0 and eth1, and
// returns what listens in another one, at 203.0.113.1 and 2001:db8:f::1, which
// the host reaches through both: the default routes lead to eth0.
func twoUplinks(t *testing.T) net.Listener {
	t.Helper()
	setup(t, "")
	near, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { near.Close() })
	setup(t, fmt.Sprintf(`
		link add far0 type veth peer name eth0 netns /proc/%[1]d/fd/%[2]d
		link add far1 type veth peer name eth1 netns /proc/%[1]d/fd/%[2]d
		link set far0 up
		link set far1 up
		addr add 203.0.113.1/32 dev lo
		addr add 198.18.0.254/24 dev far0
		addr add 198.18.1.254/24 dev far1
		addr add 2001:db8:f::1/128 dev lo nodad
		addr add fd18::fe/64 dev far0 nodad
		addr add fd18:1::fe/64 dev far1 nodad
		route add 198.18.77.1 via 198.18.0.1`, os.Getpid(), int(near)))
	awaitLocal(t, "2001:db8:f::1")
	l, err := net.Listen("tcp", ":7")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	if err := netns.Set(near); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"link set eth0 addrgenmode none", "link set eth1 addrgenmode none", // link-local addresses would take a second
		"link set eth0 up", "link set eth1 up",
		"addr add 198.18.77.1/32 dev lo", "addr add 198.18.88.1/32 dev lo",
		"addr add 198.18.0.1/24 dev eth0", "addr add 198.18.1.1/24 dev eth1",
		"addr add fd18::1/64 dev eth0 nodad", "addr add fd18:1::1/64 dev eth1 nodad",
		"route add default via 198.18.0.254 metric 100", "route add default via fd18::fe metric 100",
	} {
		nstest.Run(t, "ip "+line)
	}
	awaitLocal(t, "fd18::1")
	awaitLocal(t, "fd18:1::1")
	return l
}

// dialPair returns our end of a connection to l at an address, from an address
// or from the one that the kernel chooses.
func dialPair(t *testing.T, d *Dialer, l net.Listener, from, to string) net.Conn {
	t.Helper()
	d.Dialer = net.Dialer{Timeout: time.Minute}
	if from != "" {
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
	}
	c, err := d.DialContext(t.Context(), "tcp", net.JoinHostPort(to, "7"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	peer, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { peer.Close() })
	return c
}

// awaitSilence waits until a Dialer that exists already has made its last check, because the kernel sends no more
// notifications.
func awaitSilence(t *testing.T) {
	t.Helper()
	signals, err := rtnl.Signals(t.Context(), routing...)
	if err != nil {
		t.Fatal(err)
	}
	for until := time.Now().Add(time.Minute); time.Now().Before(until); {
		select {
		case <-signals:
		case <-time.After(3 * settleFor):
			return
		}
	}
	t.Fatal("the kernel is never silent")
}

// A connection is closed when the node has left the uplink of the connection, and only then.
func TestDialerUplink(t *testing.T) {
	const four, six = "203.0.113.1", "2001:db8:f::1"
	for _, c := range []struct {
		name, to     string
		before, from string // commands before the connection is made; the address that it is bound to
		change       string // commands that leave the connection open
		close        string // a command after these that closes the connection; empty: none
	}{
		{name: "the default route moves", to: four, close: "route replace default via 198.18.1.254 metric 100"},
		{name: "the default route moves, IPv6", to: six,
			before: "route add default via fd18:1::fe metric 200", close: "route del default via fd18::fe"},
		{name: "a better default route appears", to: four, close: "route add default via 198.18.1.254 metric 50"},
		{name: "the uplink goes down, the next takes over", to: four,
			before: "route add default via 198.18.1.254 metric 200", close: "link set eth0 down"},
		{name: "the uplink goes down, the next comes later", to: four,
			change: "link set eth0 down", close: "route add default via 198.18.1.254"},
		{name: "the uplink goes down and comes back", to: four,
			change: "link set eth0 down\nlink set eth0 up\nroute add default via 198.18.0.254"},
		{name: "a route for the remote end alone", to: four, close: "route add 203.0.113.0/24 via 198.18.1.254"},
		{name: "a rule for the remote end", to: four,
			before: "route add default via 198.18.1.254 table 77", close: "rule add to 203.0.113.1 lookup 77"},
		{name: "other routes", to: four, change: "route add 198.51.100.0/24 via 198.18.1.254\nroute del 198.51.100.0/24"},
		{name: "one of two equal routes changes another's", to: four,
			before: "route replace default metric 100 nexthop via 198.18.0.254 nexthop via 198.18.1.254",
			change: "route add 198.51.100.0/24 via 198.18.1.254\naddr add 198.18.1.2/24 dev eth1"},
		{name: "the address goes along", to: four,
			before: "route replace default via 198.18.0.254 metric 100 src 198.18.77.1",
			change: "route replace default via 198.18.1.254 metric 100 src 198.18.77.1"},
		{name: "bound to another address", to: four, from: "198.18.77.1",
			change: "route replace default via 198.18.1.254 metric 100"},
		{name: "a new address is preferred, the old one stays valid", to: six,
			change: "addr add fd18::2/64 dev eth0 nodad\naddr change fd18::1/64 dev eth0 preferred_lft 0 valid_lft 3600",
			close:  "addr del fd18::1/64 dev eth0"},
		{name: "the gateway changes", to: four, change: "route replace default via 198.18.0.253 metric 100"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := twoUplinks(t)
			ip := func(script string) {
				for line := range strings.Lines(script) {
					nstest.Run(t, "ip "+strings.TrimSpace(line))
				}
			}
			ip(c.before)
			d, err := NewDialer(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			conn := dialPair(t, d, l, c.from, c.to)
			if c.change != "" {
				// When this connection is closed, the Dialer has checked all changes before its address was removed.
				own, err := net.Listen("tcp", "198.18.88.1:7")
				if err != nil {
					t.Fatal(err)
				}
				defer own.Close()
				last := dialPair(t, d, own, "", "198.18.88.1")
				ip(c.change)
				ip("addr del 198.18.88.1/32 dev lo")
				awaitClosed(t, last)
				d.mu.Lock()
				kept := len(d.conns) == 1
				d.mu.Unlock()
				if !kept {
					t.Fatalf("the connection from %s is closed after: %s", conn.LocalAddr(), c.change)
				}
			}
			if c.close != "" {
				awaitSilence(t) // so that no earlier change causes the check
				ip(c.close)
				awaitClosed(t, conn)
			}
		})
	}
}

// A connection to the node itself is not watched.
func TestDialerLoopback(t *testing.T) {
	nstest.New(t)
	d, err := NewDialer(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:7")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dialPair(t, d, l, "", "127.0.0.1")
	if len(d.conns) != 0 {
		t.Error("the connection is watched")
	}
}

// Many changes of routes cost few checks.
func TestDialerBurst(t *testing.T) {
	nstest.New(t)
	const changes = 5000
	var batch strings.Builder
	for i := range changes {
		fmt.Fprintf(&batch, "route add 10.%d.%d.0/24 dev lo\n", i/256, i%256)
	}
	batch.WriteString("link add last type veth\n")
	file := filepath.Join(t.TempDir(), "batch")
	if err := os.WriteFile(file, []byte(batch.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	signals, err := rtnl.Signals(ctx, routing...)
	if err != nil {
		t.Fatal(err)
	}
	checks := 0
	done := make(chan struct{})
	kernel, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer kernel.Close()
	go func() {
		defer close(done)
		eachBurst(ctx, signals, func() {
			checks++
			if _, err := kernel.LinkByName("last"); err == nil {
				cancel()
			}
		})
	}()
	nstest.Run(t, "ip -batch "+file)
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Fatal("no check")
	}
	t.Logf("%d checks", checks)
	if checks > changes/10 {
		t.Errorf("%d checks for %d changes", checks, changes)
	}
}
