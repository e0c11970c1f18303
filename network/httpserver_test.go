package network

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/klog/v2"
	"k8s.io/klog/v2/textlogger"

	"github.com/flanneld/flanneld/pkg/nstest"
)

// TestHealthOnAllAddresses: without an address, the health server is reached at addresses of both families.
func TestHealthOnAllAddresses(t *testing.T) {
	nstest.NeedRoot(t)
	nstest.Run(t, "ip link set lo up")
	ctx, cancel := context.WithCancel(t.Context())
	var group sync.WaitGroup
	defer group.Wait()
	defer cancel()
	const port = 8471 // in the namespace of TestMain
	if err := newHealth(nil, nil).serve(ctx, &group, netip.AddrPortFrom(netip.Addr{}, port), nil); err != nil {
		t.Fatal(err)
	}
	for _, ip := range []string{"127.0.0.1", "::1"} {
		conn, err := net.Dial("tcp", net.JoinHostPort(ip, strconv.Itoa(port)))
		if err != nil {
			t.Error(err)
			continue
		}
		conn.Close()
	}
}

// TestManyConnections: clients that hold connections take no more than a few descriptors, and other clients are
// answered.
func TestManyConnections(t *testing.T) {
	if os.Getuid() == 0 { // in the namespace of TestMain
		nstest.Run(t, "ip link set lo up")
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	free.Close()
	at := free.Addr().(*net.TCPAddr).AddrPort()
	socket := filepath.Join(t.TempDir(), "flanneld.sock")
	for name, c := range map[string]struct {
		network, address, path string
		start                  func(ctx context.Context, group *sync.WaitGroup) error
	}{
		"health server": {"tcp", at.String(), "/healthz", func(ctx context.Context, group *sync.WaitGroup) error {
			err := newHealth(nil, nil).serve(ctx, group, at, nil)
			return err
		}},
		"status server": {"unix", socket, "/status", func(ctx context.Context, group *sync.WaitGroup) error {
			n := &node{Options: Options{StatusSocket: socket, Manager: newManager("{}")}, status: newStatusServer(),
				health: &health{missing: "to start"}}
			n.serveStatus(ctx)
			group.Go(n.group.Wait)
			return nil
		}},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			var group sync.WaitGroup
			defer group.Wait()
			defer cancel()
			if err := c.start(ctx, &group); err != nil {
				t.Fatal(err)
			}
			const surplus = 200
			var conns []net.Conn
			for range surplus + maxConnections {
				conn, err := net.Dial(c.network, c.address)
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				conn.SetDeadline(time.Now().Add(time.Minute))
				conns = append(conns, conn)
			}
			for i, conn := range conns[:surplus] {
				if n, err := conn.Read(make([]byte, 1)); n > 0 || isTimeout(err) {
					t.Fatalf("connection %d of %d is open: %v", i+1, len(conns), err)
				}
			}
			for i, conn := range conns[surplus:] {
				fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: flanneld\r\n\r\n", c.path)
				answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
				if err != nil {
					t.Fatalf("connection %d of %d: %v", surplus+i+1, len(conns), err)
				}
				if _, err := io.Copy(io.Discard, answer.Body); err != nil || answer.StatusCode != http.StatusOK {
					t.Errorf("connection %d of %d: %s, %v", surplus+i+1, len(conns), answer.Status, err)
				}
			}
		})
	}
}

func isTimeout(err error) bool {
	e, ok := err.(net.Error)
	return ok && e.Timeout()
}

// A memory is a listener without a network, for the clock of synctest.
type memory chan net.Conn

func (m memory) Accept() (net.Conn, error) {
	if conn, ok := <-m; ok {
		return conn, nil
	}
	return nil, net.ErrClosed
}

func (m memory) Close() error {
	close(m)
	return nil
}

func (m memory) Addr() net.Addr { return net.TCPAddrFromAddrPort(netip.AddrPort{}) }

// onMemory serves a handler, and calls a client with a connection to the server.
func onMemory(t *testing.T, handler http.HandlerFunc, client func(net.Conn)) {
	synctest.Test(t, func(t *testing.T) {
		m := make(memory)
		onListener(t.Context(), m, m, handler, client)
	})
}

// onListener does the same by a listener that takes its connections from m.
func onListener(ctx context.Context, l net.Listener, m memory, handler http.HandlerFunc, client func(net.Conn)) {
	ctx, cancel := context.WithCancel(ctx)
	var group sync.WaitGroup
	serveHTTP(ctx, &group, l, handler, "test server")
	here, there := net.Pipe()
	m <- there
	client(here)
	here.Close()
	cancel()
	group.Wait()
}

// TestSlowClients: the server closes the connection of a client that keeps the server waiting. A server that did not
// would be waiting for ever, which synctest reports as a deadlock.
func TestSlowClients(t *testing.T) {
	const get = "GET / HTTP/1.1\r\nHost: flanneld\r\n"
	for name, request := range map[string]string{
		"sends nothing":           "",
		"sends half a request":    get,
		"sends half a body":       get + "Content-Length: 9\r\n\r\nhalf",
		"sends no second request": get + "\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			onMemory(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") }, func(conn net.Conn) {
				go io.WriteString(conn, request) // the server may not read all
				io.Copy(io.Discard, conn)
			})
		})
	}
	t.Run("reads no answer", func(t *testing.T) {
		onMemory(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") }, func(conn net.Conn) {
			io.WriteString(conn, get+"\r\n")
			for {
				if _, err := io.WriteString(conn, "x"); err != nil {
					return
				}
			}
		})
	})
}

// TestLongHeader: the memory for a request's header is limited.
func TestLongHeader(t *testing.T) {
	onMemory(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") }, func(conn net.Conn) {
		go fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: flanneld\r\nX: %0*d\r\n\r\n", 4*maxHeaderBytes, 0)
		answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil || answer.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
			t.Errorf("%+v, %v", answer, err)
		}
		io.Copy(io.Discard, conn)
	})
}

// TestSlowRequests: the server takes the requests of a scraper that reuses its connection once a minute, and a request
// may take until its own limit.
func TestSlowRequests(t *testing.T) {
	handler := func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(requestTimeout)
		fmt.Fprint(w, "done")
	}
	onMemory(t, handler, func(conn net.Conn) {
		answers := bufio.NewReader(conn)
		for i := range 3 {
			io.WriteString(conn, "GET / HTTP/1.1\r\nHost: flanneld\r\n\r\n")
			answer, err := http.ReadResponse(answers, nil)
			if err != nil {
				t.Fatalf("request %d: %v", i+1, err)
			}
			if text, err := io.ReadAll(answer.Body); string(text) != "done" {
				t.Errorf("request %d: %q, %v", i+1, text, err)
			}
			time.Sleep(time.Minute)
		}
	})
}

// crowded is a listener in a process that has so many descriptors that it cannot accept connections for a while.
type crowded struct {
	memory
	attempts int // that fail
}

func (c *crowded) Accept() (net.Conn, error) {
	if c.attempts > 0 {
		c.attempts--
		return nil, &net.OpError{Op: "accept", Net: "memory", Err: os.NewSyscallError("accept4", syscall.EMFILE)}
	}
	return c.memory.Accept()
}

// TestFewDescriptors: what keeps a server from accepting connections is logged once, and other faults are logged still.
func TestFewDescriptors(t *testing.T) {
	var log bytes.Buffer
	synctest.Test(t, func(t *testing.T) {
		ctx := klog.NewContext(t.Context(), textlogger.NewLogger(textlogger.NewConfig(textlogger.Output(&log))))
		m := make(memory)
		handler := func(http.ResponseWriter, *http.Request) { panic("a fault of ours") }
		onListener(ctx, &crowded{m, 20}, m, handler, func(conn net.Conn) {
			io.WriteString(conn, "GET / HTTP/1.1\r\nHost: flanneld\r\n\r\n")
			io.Copy(io.Discard, conn)
		})
	})
	for text, want := range map[string]int{"too many open files": 1, `"Recovered" operation="test server"`: 1,
		"a fault of ours": 1, "Accept error": 0, "stopped": 0} {
		if got := strings.Count(log.String(), text); got != want {
			t.Errorf("%q is logged %d times, want %d:\n%s", text, got, want, &log)
		}
	}
}
