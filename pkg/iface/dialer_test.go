package iface

import (
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/pkg/nstest"
)

// A connection ends with its address, and with no other.
func TestDialer(t *testing.T) {
	nstest.New(t)
	nstest.Run(t, "ip link set lo up")
	for _, a := range []string{"198.18.0.1/24", "198.18.0.2/24", "fd18::1/64 nodad"} {
		nstest.Run(t, "ip addr add dev lo "+a)
	}
	// An IPv6 address is of use once the kernel's workqueue has made its route.
	for until := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		if strings.Contains(nstest.Run(t, "ip -6 route show table local"), "local fd18::1 ") {
			break
		}
		if time.Now().After(until) {
			t.Fatal("there is no route to it")
		}
	}
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
	stays, goes, six, lo := dial("tcp4", "198.18.0.1"), dial("tcp4", "198.18.0.2"), dial("tcp6", "fd18::1"), dial("tcp4", "127.0.0.7")
	closed := dial("tcp4", "198.18.0.1")
	closed.Close()
	nstest.Run(t, "ip addr del 198.18.0.2/24 dev lo")
	nstest.Run(t, "ip addr del fd18::1/64 dev lo")
	for _, c := range []net.Conn{goes, six} {
		c.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("from %s: %v", c.LocalAddr(), err)
		}
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
		t.Errorf("%d connections are looked after", len(d.conns))
	}
}
