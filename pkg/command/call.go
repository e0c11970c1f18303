package command

import (
	"context"
	"errors"
	"runtime"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/netspace"
	"github.com/flanneld/flanneld/pkg/proc"
)

// Call calls a function of another package, which starts programs by itself and waits for them, and returns what the
// function returns. name is how the log names the call, such as the command that the package runs.
//
// Call has the limits of Run: when the function takes too long, or when ctx has ended and the grace is over, Call kills
// the programs that the function has started, with all that they have started, and returns why. If the function does
// not return even so, Call returns without it, and returns an error at once for each later call of that name until the
// function has returned. The function must therefore share no variable with its caller.
//
// The programs run in the calling thread's network namespace. In two points, Call cannot promise what Run promises: the
// programs get the whole environment of this process, unless the package prevents that; and where a program has ended
// and has left a child that keeps its output open, packages that use os/exec wait for the child, and so does Call until
// the limit.
func Call[T any](ctx context.Context, r *Runner, name string, f func() (T, error)) (T, error) {
	var none T
	if ctx.Err() != nil {
		return none, context.Cause(ctx)
	}
	if err := r.stuckError(name); err != nil {
		return none, err
	}
	space, err := netspace.Current()
	if err != nil {
		return none, err
	}
	var result T
	var failed error
	threads, ended := make(chan proc.Thread, 1), make(chan struct{})
	go space.In(func() {
		defer close(ended)
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		threads <- proc.Mark()
		result, failed = f()
	})()
	thread := <-threads
	end := r.Waits.Begin(klog.FromContext(ctx), name, "a program", "program", name, "limit", r.limit().String())
	killed := r.await(ctx, ended, func() { killUntil(ended, thread) })
	select {
	case <-ended:
	default:
		err := leftError(thread)
		r.keepStuck(name, err, ended)
		end(err)
		return none, err // result and failed may still be written
	}
	if failed == nil {
		killed = nil
	} else if killed != nil {
		failed = killed
	}
	end(killed)
	return result, failed
}

// killUntil kills what a thread has started until ended is closed, for as long as that can take: in between, the
// function may have started another program.
func killUntil(ended <-chan struct{}, thread proc.Thread) {
	thread.Kill()
	graceFor(ended, thread.Kill)
}

// leftError is the error of a call that goes on although its programs were killed.
func leftError(thread proc.Thread) error {
	if pids := thread.Children(); len(pids) > 0 {
		return stuckError(pids[0])
	}
	return errors.New("a process that the program has left keeps the output open, and is waited for")
}
