package subnet

import (
	"maps"
	"sync"
	"time"

	"k8s.io/klog/v2"
)

// Unreachable is the cause of a failure when the store cannot be reached, or can do nothing at all. It is not logged
// while another cause lasts.
const Unreachable = "unreachable"

// A StoreHealth records which requests to a store fail and why. It logs each cause once, whichever requests it makes
// fail, and logs once that the store is back.
type StoreHealth struct {
	log klog.Logger

	mu      sync.Mutex
	state   State
	failing map[failure]bool
	refused map[string]time.Time // when a failure of an operation's own was logged last, by operation
	used    bool                 // a request has succeeded
}

// A failure is over when a request succeeds: any request, or one for the same operation if the store has refused that.
type failure struct {
	cause, operation string
	refused          bool // the store answered; the cause is what it said
}

// NewStoreHealth returns the health of a store that nobody has used yet. State returns store, with Connected and
// Problem filled in.
func NewStoreHealth(log klog.Logger, store State) *StoreHealth {
	return &StoreHealth{log: log, state: store, failing: map[failure]bool{}, refused: map[string]time.Time{}}
}

// Located records where the store is, once that is known: its name, its endpoints and the command that checks it.
func (h *StoreHealth) Located(store State) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.state.Store, h.state.Endpoints, h.state.Check = store.Store, store.Endpoints, store.Check
}

// Failed records that a request has failed. The operation is what the request was for, such as "read the leases"; text
// says why it failed and what to do about it. Failures with the same cause are one: they are logged once, and over with
// the first success of any request. A failure without a cause is the operation's own: the store answered, and refused.
// An operation has one such failure at a time, and a log line a minute about it: the text is the store's, and may be
// another one each time.
func (h *StoreHealth) Failed(operation, cause, text string) {
	f := failure{cause, operation, false}
	if cause == "" {
		f = failure{text, operation, true}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.state.Problem = text
	if h.failing[f] {
		return
	}
	logged, others := false, false // for another operation; another cause
	for other := range h.failing {
		logged, others = logged || other.cause == f.cause, others || other.cause != f.cause
	}
	if cause == Unreachable && others {
		return
	}
	if f.refused {
		maps.DeleteFunc(h.failing, func(other failure, _ bool) bool { return other.operation == operation })
		if time.Since(h.refused[operation]) < recordRest {
			logged = true
		} else if !logged {
			h.refused[operation] = time.Now()
		}
	}
	h.failing[f] = true
	if !logged {
		h.log.Error(nil, "The store cannot be used; retrying", "store", h.state.Store, "operation", operation, "reason", text)
	}
}

// Succeeded records that a request has succeeded.
func (h *StoreHealth) Succeeded(operation string) {
	h.over(operation, func(f failure) bool { return !f.refused || f.operation == operation })
}

// Settled records a success that tells nothing of what else fails: a watch has lasted for a while without a word, while
// another watch may be cut with each event that it has; or the store has done what it does even for users whom it refuses.
func (h *StoreHealth) Settled(operation string) {
	h.over(operation, func(f failure) bool { return f.operation == operation })
}

// over records that an operation has succeeded, which ends the failures that ends chooses.
func (h *StoreHealth) over(operation string, ends func(failure) bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.used = true
	if len(h.failing) == 0 {
		return
	}
	maps.DeleteFunc(h.failing, func(f failure, _ bool) bool { return ends(f) })
	delete(h.refused, operation)
	if len(h.failing) == 0 {
		h.state.Problem = ""
		h.log.Info("The store is back", "store", h.state.Store)
	}
}

// State returns the store's State.
func (h *StoreHealth) State() State {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.state
	s.Connected = h.used && len(h.failing) == 0
	return s
}
