package task

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
)

var errStop = errors.New("stopped by the test")

// run is a function that ends when it is stopped and the test lets it. It adds
// to runs, which is not guarded: the race detector sees two that run at once.
func run(runs *int, causes *[]error, release <-chan struct{}) func(context.Context) error {
	return func(ctx context.Context) error {
		*runs++
		<-ctx.Done()
		<-release
		*causes = append(*causes, context.Cause(ctx))
		return errors.New("stopped: nobody is to know")
	}
}

// Each function starts when the one before has returned, though Restart does not
// wait; Stop waits for all of them.
func TestRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var runs int
		var causes []error
		release := make(chan struct{})
		k := New()
		k.Stop(nil)
		k.Restart(t.Context(), nil, run(&runs, &causes, release))
		synctest.Wait()
		k.Restart(t.Context(), errStop, run(&runs, &causes, release))
		k.Restart(t.Context(), nil, run(&runs, &causes, release))
		synctest.Wait()
		if runs != 1 {
			t.Fatalf("%d run before the first has returned", runs)
		}
		stopped := false
		go func() {
			k.Stop(context.Canceled)
			stopped = true
		}()
		for want := 1; want <= 3; want++ {
			synctest.Wait()
			if runs != want || stopped {
				t.Fatalf("%d have run, want %d; stopped: %t", runs, want, stopped)
			}
			release <- struct{}{}
		}
		synctest.Wait()
		if !stopped || len(causes) != 3 || causes[0] != errStop || causes[1] != context.Canceled ||
			causes[2] != context.Canceled {
			t.Errorf("stopped: %t; the causes are %v", stopped, causes)
		}
		k.Stop(nil) // once more
	})
}

// An error is sent, unless the function was stopped, also when nobody receives.
func TestFailed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fails := func(context.Context) error { return errStop }
		k := New()
		k.Restart(t.Context(), nil, fails)
		if err := <-k.Failed(); err != errStop {
			t.Errorf("got %v", err)
		}
		k.Restart(t.Context(), nil, fails)
		synctest.Wait()
		k.Restart(t.Context(), nil, func(ctx context.Context) error {
			<-ctx.Done()
			return errStop
		})
		synctest.Wait()
		k.Stop(nil)
		select {
		case err := <-k.Failed():
			t.Errorf("after Stop: %v", err)
		default:
		}
		ctx, cancel := context.WithCancel(t.Context())
		k.Restart(ctx, nil, fails)
		synctest.Wait()
		cancel()
		k.Stop(nil)
	})
}
