package network

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/netspace"
	"github.com/flanneld/flanneld/pkg/plain"
)

// A statusServer passes requests to the goroutine that owns the node, which runs them
// between two events.
type statusServer struct {
	requests chan func()
	serving  chan struct{} // closed once the goroutine runs requests
}

func newStatusServer() statusServer { return statusServer{make(chan func()), make(chan struct{})} }

// do has the goroutine run f, unless ctx ends before. f must not wait for anything.
func (s statusServer) do(ctx context.Context, f func()) error {
	done := make(chan struct{})
	select {
	case s.requests <- func() { f(); close(done) }:
		<-done
		return nil
	case <-ctx.Done():
		return errors.New("flanneld is busy")
	}
}

// requestTimeout is how long a request may take.
const requestTimeout = 10 * time.Second

// serveStatus serves flannelctl on a unix socket until ctx ends. The node works
// without the socket, too.
func (n *node) serveStatus(ctx context.Context) {
	if n.StatusSocket == "" {
		return
	}
	l, err := listenUnix(n.StatusSocket)
	if err != nil {
		n.log.Error(err, "Cannot serve flannelctl, which has to inspect the node without the daemon",
			"flag", "--status-socket")
		return
	}
	mux := http.NewServeMux()
	serve := func(path string, f func(context.Context) (any, error)) {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, r *http.Request) {
			ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
			defer cancel()
			var v any
			var err error
			netspace.FromContext(ctx).Do(func() { v, err = f(ctx) }) // it may run commands
			answer(w, v, err)
		})
	}
	serve("/status", func(ctx context.Context) (any, error) {
		var s Status
		select {
		case <-n.status.serving:
			if err := n.status.do(ctx, func() { s = n.view().status() }); err != nil {
				return nil, err
			}
		default: // the main loop does not run yet
			s = view{
				Options: Options{Manager: n.Manager, Version: n.Version, SubnetFile: n.SubnetFile}, // which never change
				waiting: n.health.waitingFor(),
			}.statusOfStore()
		}
		s.Daemon = true
		return s, nil
	})
	serve("/leases", func(ctx context.Context) (any, error) {
		var leases []Lease
		var b backend.Backend
		if err := n.status.do(ctx, func() { leases, b = n.view().leaseList(), n.backend }); err != nil {
			return nil, err
		}
		fillExpiries(ctx, n.Manager, leases)
		fillKeys(ctx, b, leases)
		return leases, nil
	})
	serve("/diff", func(ctx context.Context) (any, error) {
		var d desired
		var failed error
		if err := n.status.do(ctx, func() { d, failed = n.view().desired(n.kernel) }); err != nil {
			return nil, err
		}
		if failed != nil {
			return nil, failed
		}
		return d.diff(ctx)
	})
	serve("/skew", func(ctx context.Context) (any, error) { return clockSkew(ctx, n.Manager) })
	serveHTTP(ctx, &n.group, l, mux, "status server")
}

// answer sends a value as JSON, or the error. Nothing is sent before the whole answer is known.
func answer(w http.ResponseWriter, v any, err error) {
	if err != nil {
		http.Error(w, plain.Line(err.Error()), http.StatusServiceUnavailable)
		return
	}
	text, err := json.Marshal(v)
	if err != nil {
		http.Error(w, plain.Line("the answer cannot be written: "+err.Error()), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(text) // fails where the client is gone
}

// listenUnix listens on a socket for root alone. A socket that a daemon has left
// behind is replaced, a socket that is in use is not.
func listenUnix(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	if info, err := os.Lstat(path); err == nil {
		if info.Mode().Type() != os.ModeSocket {
			return nil, fmt.Errorf("%s exists and is not a socket", path)
		}
		conn, err := net.Dial("unix", path)
		if err == nil {
			conn.Close()
			return nil, fmt.Errorf("another flanneld answers at %s", path)
		}
		if !errors.Is(err, unix.ECONNREFUSED) {
			return nil, err
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// A Client sends requests to a daemon through its socket.
type Client struct{ http *http.Client }

// NewClient returns a Client of the daemon with a socket. It does not connect yet.
func NewClient(socket string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}
	return &Client{&http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}}
}

// A Refusal is the error that a daemon answers with.
type Refusal string

// Error returns the text of the answer.
func (r Refusal) Error() string { return string(r) }

// get sends a request. If the daemon answers with an error, get returns a Refusal.
func (c *Client) get(ctx context.Context, path string, into any) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://flanneld"+path, nil)
	if err != nil {
		return err
	}
	answer, err := c.http.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		return err
	}
	if answer.StatusCode != http.StatusOK {
		return Refusal(plain.Line(string(body)))
	}
	return json.Unmarshal(body, into)
}

// Status returns the status of the daemon's node.
func (c *Client) Status(ctx context.Context) (s Status, err error) {
	err = c.get(ctx, "/status", &s)
	return s, err
}

// Leases returns all leases that the daemon knows.
func (c *Client) Leases(ctx context.Context) (leases []Lease, err error) {
	err = c.get(ctx, "/leases", &leases)
	return leases, err
}

// Diff returns the commands that would make the host what it should be.
func (c *Client) Diff(ctx context.Context) (commands []string, err error) {
	err = c.get(ctx, "/diff", &commands)
	return commands, err
}

// Skew returns how much this host's clock is ahead of the store's.
func (c *Client) Skew(ctx context.Context) (d time.Duration, err error) {
	err = c.get(ctx, "/skew", &d)
	return d, err
}

// Close does nothing: no connection is kept.
func (c *Client) Close() {}
