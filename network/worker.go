package network

import (
	"context"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/subnet"
)

// A worker runs a backend.Worker in a goroutine of its own, and passes updates of
// peers to it.
type worker struct {
	failed chan error // what ends Work, and neither waiting nor retrying can solve

	backend backend.Backend // that runs, or is no backend.Worker
	own     subnet.Lease
	peers   *subnet.Mailbox   // that Work reads; nil: nobody reads
	stop    func(cause error) // ends the goroutine and waits for it
}

func newWorker() *worker {
	return &worker{failed: make(chan error), stop: func(error) {}}
}

// start runs b for a lease, if b is a backend.Worker, in place of the backend that
// ran before. The next update must be a snapshot.
func (w *worker) start(ctx context.Context, b backend.Backend, own subnet.Lease) {
	if w.backend == b && w.own.Subnets == own.Subnets && w.own.Attrs.Equal(own.Attrs) {
		return
	}
	w.backend, w.own, w.peers = b, own, nil
	before, done := w.stop, make(chan struct{})
	// The goroutine outlives ctx until stop gives the cause of its end.
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	w.stop = func(cause error) {
		cancel(cause)
		<-done
	}
	works, ok := b.(backend.Worker)
	peers := subnet.NewMailbox()
	if ok {
		w.peers = peers
	}
	go func() {
		defer close(done)
		before(nil)
		if !ok {
			return
		}
		if err := works.Work(ctx, own, peers.C()); err != nil && ctx.Err() == nil {
			select {
			case w.failed <- err:
			case <-ctx.Done():
			}
		}
	}()
}

// update passes on which leases are peers', and which no longer are.
func (w *worker) update(u subnet.Update) {
	if w.peers != nil {
		w.peers.Put(u)
	}
}
