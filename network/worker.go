package network

import (
	"context"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/subnet"
)

// A worker runs what a backend has to do beside the kernel's state, in a
// goroutine of its own, and tells it of peers.
type worker struct {
	failed chan error // what ends Work, and no waiting can mend

	backend backend.Backend // that works, or has nothing to do
	own     subnet.Lease
	peers   chan subnet.Update // what it has not read yet; nil: nobody reads
	leave   func(cause error)  // ends the goroutine and waits for it
}

func newWorker() *worker {
	return &worker{failed: make(chan error), leave: func(error) {}}
}

// begin has b work for a lease, if b is one that works, in place of whatever
// worked before. It wants to be told of all peers next.
func (w *worker) begin(ctx context.Context, b backend.Backend, own subnet.Lease) {
	if w.backend == b && w.own.Subnets == own.Subnets && w.own.Attrs.Equal(own.Attrs) {
		return
	}
	w.backend, w.own, w.peers = b, own, nil
	before, done := w.leave, make(chan struct{})
	// It outlives ctx until somebody says why it ends.
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	w.leave = func(cause error) {
		cancel(cause)
		<-done
	}
	works, ok := b.(backend.Worker)
	peers := make(chan subnet.Update, 1)
	if ok {
		w.peers = peers
	}
	go func() {
		defer close(done)
		before(nil)
		if !ok {
			return
		}
		if err := works.Work(ctx, own, peers); err != nil && ctx.Err() == nil {
			select {
			case w.failed <- err:
			case <-ctx.Done():
			}
		}
	}()
}

// tell passes on which leases are peers' and which no longer are. What nobody
// has read yet it is merged with.
func (w *worker) tell(u subnet.Update) {
	if w.peers == nil {
		return
	}
	select {
	case old := <-w.peers:
		if !u.Snapshot {
			for s := range u.Gone {
				old.Delete(s)
			}
			for _, l := range u.Leases {
				old.Put(l)
			}
			u = old
		}
	default:
	}
	w.peers <- u
}
