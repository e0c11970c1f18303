// Package task runs a function in a goroutine that can be stopped and restarted.
package task

import (
	"context"

	"github.com/flanneld/flanneld/pkg/netspace"
)

// A Task runs one function at a time: the next function starts when the one
// before has returned. Its methods are for one goroutine.
type Task struct {
	failed chan error
	stop   func(cause error) // cancels the function and waits for its end
}

// New returns a Task that runs nothing yet.
func New() *Task { return &Task{failed: make(chan error), stop: func(error) {}} }

// Failed sends the error of a function that returned before it was stopped.
func (t *Task) Failed() <-chan error { return t.failed }

// Restart runs f in place of the function before, which it stops with cause
// (see context.Cause). It does not wait: f starts when the function before has
// returned, even if f has been stopped meanwhile. f runs until ctx ends or until
// the Task is stopped, in the network namespace of ctx (see netspace).
func (t *Task) Restart(ctx context.Context, cause error, f func(context.Context) error) {
	ctx, cancel := context.WithCancelCause(ctx)
	stopBefore, done := t.stop, make(chan struct{})
	t.stop = func(cause error) {
		cancel(cause)
		<-done
	}
	go netspace.FromContext(ctx).In(func() {
		defer close(done)
		defer cancel(nil)
		stopBefore(cause)
		if err := f(ctx); err != nil && ctx.Err() == nil {
			select {
			case t.failed <- err:
			case <-ctx.Done():
			}
		}
	})()
}

// Stop stops the function with cause and waits until it has returned. A Task
// that runs nothing is stopped already.
func (t *Task) Stop(cause error) { t.stop(cause) }
