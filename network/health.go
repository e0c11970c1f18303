package network

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"sync"

	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/subnet"
)

// health reports the node's state: to probes over HTTP, and to the caller of Run.
type health struct {
	mu      sync.Mutex
	missing string // what the node waits for; "" once it is ready

	families []string // why a family does not work

	manager subnet.Manager // knows what a lease waits for, after the start as well

	changed  func(waiting string) // see Options.Waiting
	reported string               // what it was called with last
}

// starting is what a node waits for until something else is known.
const starting = "to start"

func newHealth(m subnet.Manager, changed func(string)) *health {
	return &health{missing: starting, manager: m, changed: changed, reported: starting}
}

// serve serves /healthz and /readyz until ctx ends, and what other serves, which may be nil; nowhere, if the port is 0.
// An address that is not valid stands for all addresses.
func (h *health) serve(ctx context.Context, group *sync.WaitGroup, at netip.AddrPort, other http.Handler) error {
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
	if other != nil {
		mux.Handle("/", other)
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
	h.mu.Lock()
	if h.missing != "" {
		h.missing = plain.Line(what) // a line of the answer to a probe
	}
	h.mu.Unlock()
	h.report()
}

// setReady records that the node is ready for the first time.
func (h *health) setReady() {
	h.mu.Lock()
	h.missing = ""
	h.mu.Unlock()
	h.report()
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

// report calls changed if what the node waits for has changed. It is for the main loop alone.
func (h *health) report() {
	if waiting := h.waitingFor(); waiting != h.reported {
		h.reported = waiting
		if h.changed != nil {
			h.changed(waiting)
		}
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
