package network

import (
	"bytes"
	"context"
	"errors"
	"log"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/retry"
)

// The limits of an HTTP server: how much of the daemon's memory and how many of its descriptors clients can take. A
// repair of rules or routes needs descriptors, too.
const (
	// maxConnections is how many connections a server has at a time. Probes, a scraper and a person need less than ten.
	maxConnections = 32

	// maxHeaderBytes is the size of a request's header. net/http reads 4 KiB more.
	maxHeaderBytes = 4 << 10

	// readTimeout is how long a client may take to send a request, writeTimeout how long the answer may take until the
	// client has received it. An answer to flannelctl takes up to requestTimeout until it begins. pprof adds the time for
	// which it measures.
	readTimeout  = 10 * time.Second
	writeTimeout = 3 * requestTimeout

	// idleTimeout is how long a connection may wait for the next request: longer than the usual time between two scrapes.
	idleTimeout = 2 * time.Minute
)

// serveHTTP serves HTTP on l until ctx ends. name is the server's name in the log.
func serveHTTP(ctx context.Context, group *sync.WaitGroup, l net.Listener, handler http.Handler, name string) {
	var open connections
	logged := &loggedListener{Listener: l, log: klog.FromContext(ctx), name: name}
	server := &http.Server{
		Handler:        handler,
		MaxHeaderBytes: maxHeaderBytes,
		ReadTimeout:    readTimeout, // of the header, too
		WriteTimeout:   writeTimeout,
		IdleTimeout:    idleTimeout,
		ConnState:      open.changed,
		ErrorLog:       log.New(logged, "", 0),
		BaseContext:    func(net.Listener) context.Context { return ctx },
	}
	group.Go(func() {
		if err := server.Serve(logged); ctx.Err() == nil {
			logged.log.Error(err, "The "+name+" stopped")
		}
	})
	context.AfterFunc(ctx, func() { server.Close() })
}

// connections are the open connections of a server, never more than maxConnections: the connection that has been silent
// for the longest time is closed for a new one. A server that did not accept new connections instead would not answer
// probes while other clients hold all connections.
type connections struct {
	mu   sync.Mutex
	list []net.Conn // the one whose state has not changed for the longest time comes first
}

// changed implements http.Server.ConnState.
func (c *connections) changed(conn net.Conn, state http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.list = slices.DeleteFunc(c.list, func(other net.Conn) bool { return other == conn })
	if state == http.StateClosed || state == http.StateHijacked {
		return
	}
	c.list = append(c.list, conn)
	if len(c.list) > maxConnections {
		c.list[0].Close() // its goroutine ends
		c.list = slices.Delete(c.list, 0, 1)
	}
}

// A loggedListener logs once why it cannot accept connections: net/http tries again each second, and logs all attempts.
type loggedListener struct {
	net.Listener
	log  klog.Logger
	name string
	last retry.LastError
}

func (l *loggedListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if !errors.Is(err, net.ErrClosed) {
		l.last.Log(l.log, l.name, err)
	}
	return conn, err
}

// Write logs a line of net/http, such as that a handler has panicked.
func (l *loggedListener) Write(line []byte) (int, error) {
	if !bytes.HasPrefix(line, []byte("http: Accept error: ")) {
		l.log.Error(nil, "The "+l.name+" reports", "message", string(bytes.TrimSpace(line)))
	}
	return len(line), nil
}
