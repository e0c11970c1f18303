package network

import (
	"bytes"
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
	"k8s.io/klog/v2"
)

// questions are asked of the goroutine that owns the node, which runs them
// between two of its own duties.
type questions struct {
	asked     chan func()
	answering chan struct{} // closed once it does
}

func newQuestions() questions { return questions{make(chan func()), make(chan struct{})} }

// ask has f run, if there is somebody to do so before ctx ends. f must not wait
// for anything.
func (q questions) ask(ctx context.Context, f func()) error {
	done := make(chan struct{})
	select {
	case q.asked <- func() { f(); close(done) }:
		<-done
		return nil
	case <-ctx.Done():
		return errors.New("flanneld is busy")
	}
}

// answerFor is how long flanneld takes at most to answer a question.
const answerFor = 10 * time.Second

// answer serves flannelctl on a unix socket until ctx ends. That it cannot is
// worth a warning and no more.
func (n *node) answer(ctx context.Context) {
	if n.StatusSocket == "" {
		return
	}
	l, err := listenUnix(n.StatusSocket)
	if err != nil {
		klog.Warningf("flannelctl will have to look for itself: --status-socket: %v", err)
		return
	}
	mux := http.NewServeMux()
	serve := func(path string, f func(context.Context) (any, error)) {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, r *http.Request) {
			ctx, cancel := context.WithTimeout(r.Context(), answerFor)
			defer cancel()
			v, err := f(ctx)
			if err != nil {
				http.Error(w, err.Error(), http.StatusServiceUnavailable)
				return
			}
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(v) // whoever asked may be gone
		})
	}
	serve("/status", func(ctx context.Context) (any, error) {
		var s Status
		select {
		case <-n.answering:
			if err := n.ask(ctx, func() { s = n.status() }); err != nil {
				return nil, err
			}
		default: // it is not as far yet
			s = n.statusOfStore()
		}
		s.Daemon = true
		return s, nil
	})
	serve("/leases", func(ctx context.Context) (any, error) {
		var leases []Lease
		if err := n.ask(ctx, func() { leases = n.leaseList() }); err != nil {
			return nil, err
		}
		n.expiries(ctx, leases)
		return leases, nil
	})
	serve("/diff", func(ctx context.Context) (any, error) {
		var d demand
		var failed error
		if err := n.ask(ctx, func() { d, failed = n.demand() }); err != nil {
			return nil, err
		}
		if failed != nil {
			return nil, failed
		}
		return d.all(ctx)
	})
	serve("/skew", func(ctx context.Context) (any, error) { return skew(ctx, n.Manager) })
	server := &http.Server{Handler: mux, ReadHeaderTimeout: answerFor, BaseContext: func(net.Listener) context.Context { return ctx }}
	n.group.Go(func() {
		if err := server.Serve(l); ctx.Err() == nil {
			klog.Errorf("flannelctl gets no answers any more: %v", err)
		}
	})
	context.AfterFunc(ctx, func() { server.Close() })
}

// listenUnix listens on a socket for root alone. One that a daemon has left
// behind is replaced, one that is in use is not.
func listenUnix(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	if info, err := os.Lstat(path); err == nil {
		if info.Mode().Type() != os.ModeSocket {
			return nil, fmt.Errorf("%s is there and no socket", path)
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

// A Client asks a daemon by its socket.
type Client struct{ http *http.Client }

// NewClient returns a Client of the daemon with a socket. Nobody is asked yet.
func NewClient(socket string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}
	return &Client{&http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}}
}

// get asks a question. An error that the daemon answers with has its words.
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
		return errors.New(string(bytes.TrimSpace(body)))
	}
	return json.Unmarshal(body, into)
}

// Status returns what the daemon says of itself.
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

// Close ends it.
func (c *Client) Close() {}
