package network

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/subnet"
)

// health reports the node's state: to probes over HTTP, to systemd by sd_notify(3).
type health struct {
	mu      sync.Mutex
	missing string // what the node waits for; "" once it is ready

	families []string // why a family does not work

	manager subnet.Manager // knows what a lease waits for, after the start as well
	lease   string         // what systemd was notified of about that
}

func newHealth(m subnet.Manager) *health { return &health{missing: "to start", manager: m} }

// serve serves /healthz, /readyz, /metrics and, with profile, /debug/pprof until ctx ends;
// nowhere, if the port is 0. An address that is not valid stands for all addresses. No request changes anything.
func (h *health) serve(ctx context.Context, group *sync.WaitGroup, at netip.AddrPort, metrics http.Handler,
	profile bool) error {
	if at.Port() == 0 {
		return nil
	}
	where := at.String()
	if !at.Addr().IsValid() {
		where = fmt.Sprintf(":%d", at.Port())
	}
	l, err := net.Listen("tcp", where)
	if err != nil {
		return fmt.Errorf("--healthz-ip, --healthz-port: %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", h.readyz)
	mux.Handle("GET /metrics", metrics)
	if profile {
		// Without the command line, which may hold a password.
		mux.HandleFunc("GET /debug/pprof/", pprof.Index)
		mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	}
	serveHTTP(ctx, group, l, mux, "health server")
	return nil
}

func (h *health) readyz(w http.ResponseWriter, _ *http.Request) {
	if missing := h.waitingFor(); missing != "" {
		http.Error(w, "waiting for "+missing, http.StatusServiceUnavailable)
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	fmt.Fprintln(w, "ok")
	for _, why := range h.families {
		fmt.Fprintln(w, why)
	}
}

// setMissing sets which families do not work, and why. They do not keep the node from being ready.
func (h *health) setMissing(families map[family.Family]error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.families = nil
	for _, f := range family.All {
		if why := families[f]; why != nil {
			h.families = append(h.families, plain.Line(why.Error()))
		}
	}
}

// waitFor sets what the node waits for, until it has been ready once.
func (h *health) waitFor(what string) {
	what = plain.Line(what) // a line of systemd's protocol, and of the answer to a probe
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.missing == "" || h.missing == what {
		return
	}
	h.missing = what
	notify("STATUS=Waiting for " + what)
}

// waitingFor returns what the node waits for, "" once it has been ready; after that, it may wait for another lease.
func (h *health) waitingFor() string {
	if waiting := waitingFor(h.manager); waiting != "" {
		return waiting
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.missing
}

// notifyLease notifies systemd of what the lease waits for, if that has changed.
func (h *health) notifyLease() {
	waiting := waitingFor(h.manager)
	h.mu.Lock()
	defer h.mu.Unlock()
	if waiting == h.lease {
		return
	}
	h.lease = waiting
	if waiting = cmp.Or(waiting, h.missing); waiting != "" {
		notify("STATUS=Waiting for " + waiting)
	} else {
		notify("STATUS=Ready")
	}
}

// waitingFor returns what the lease of the manager's node waits for.
func waitingFor(m subnet.Manager) string {
	if m == nil {
		return ""
	}
	if what := m.State().Waiting; what != "" {
		return "a lease: " + plain.Line(what)
	}
	return ""
}

func (h *health) setReady() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.missing = ""
	notify("READY=1\nSTATUS=Ready")
}

// watchdog ticks twice within the time after which systemd, where it is our parent,
// takes the daemon for hung. It is nil where systemd has no watchdog for the daemon.
func watchdog(log klog.Logger) <-chan time.Time {
	limit, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		log.Error(err, "systemd's WatchdogSec has no effect")
	}
	if limit == 0 {
		return nil
	}
	return time.Tick(limit / 2)
}

// notify sends the state to systemd, where it is our parent and waits for that.
func notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		klog.Background().Error(err, "Cannot notify systemd")
	}
}
