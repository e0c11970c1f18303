package network

import (
	"context"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/task"
	"github.com/flanneld/flanneld/subnet"
)

// A worker runs a backend.Worker in a goroutine of its own, and passes updates of
// peers to it.
type worker struct {
	*task.Task // fails with what ends Work, and neither waiting nor retrying can solve

	backend backend.Backend // that runs, or is no backend.Worker
	own     subnet.Lease
	peers   *subnet.Mailbox // that Work reads; nil: nobody reads
}

func newWorker() *worker { return &worker{Task: task.New()} }

// start runs b for a lease, if b is a backend.Worker, in place of the backend that
// ran before. The next update must be a snapshot.
func (w *worker) start(ctx context.Context, b backend.Backend, own subnet.Lease) {
	if w.backend == b && w.own.Subnets == own.Subnets && w.own.Attrs.Equal(own.Attrs) {
		return
	}
	w.backend, w.own, w.peers = b, own, nil
	// The task outlives ctx until Stop gives the cause of its end.
	ctx = context.WithoutCancel(ctx)
	works, ok := b.(backend.Worker)
	if !ok {
		w.Restart(ctx, nil, func(context.Context) error { return nil })
		return
	}
	peers := subnet.NewMailbox()
	w.peers = peers
	w.Restart(ctx, nil, func(ctx context.Context) error { return works.Work(ctx, own, peers.C()) })
}

// update passes on which leases are peers', and which no longer are.
func (w *worker) update(u subnet.Update) {
	if w.peers != nil {
		w.peers.Put(u)
	}
}
