// Package netspace keeps goroutines in the network namespace of the thread that has started them. Goroutines do not stay
// there by themselves: the Go runtime runs them on other threads, which belong to the process's own namespace.
package netspace

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// A Space is a network namespace. The nil Space is the process's own, in which every goroutine is that has not locked
// its thread and moved it.
type Space struct {
	own, home *os.File // of this namespace, and of the process's own; closed by the garbage collector
}

// Current returns the namespace of the calling thread.
func Current() (*Space, error) {
	own, err := open()
	if err != nil {
		return nil, err
	}
	var home *os.File
	var group sync.WaitGroup
	group.Go(func() { home, err = open() }) // if the caller has locked its thread, this runs on another one
	group.Wait()
	if err != nil {
		own.Close()
		return nil, err
	}
	ownInfo, ownErr := own.Stat()
	homeInfo, homeErr := home.Stat()
	if ownErr == nil && homeErr == nil && !os.SameFile(ownInfo, homeInfo) {
		return &Space{own, home}, nil
	}
	own.Close()
	home.Close()
	return nil, nil
}

// open opens the namespace of the calling thread.
func open() (*os.File, error) {
	f, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("the network namespace: %w", err)
	}
	return f, nil
}

// In returns a function that runs f in the namespace. It is for a goroutine to begin with: go s.In(f)(). Goroutines that
// f starts are not in the namespace.
//
// The function panics if the kernel does not let the process enter the namespace. The thread that Current was called in
// has entered it, too.
func (s *Space) In(f func()) func() {
	if s == nil {
		return f
	}
	return func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The first thread's namespace is that of the whole process in /proc. This thread is locked: f runs on another.
			defer runtime.UnlockOSThread()
			var group sync.WaitGroup
			group.Go(s.In(f))
			group.Wait()
			return
		}
		if err := enter(s.own); err != nil {
			panic(err)
		}
		defer func() {
			// A thread that stays locked ends with its goroutine.
			if enter(s.home) == nil {
				runtime.UnlockOSThread()
			}
		}()
		f()
	}
}

func enter(f *os.File) error {
	if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("entering a network namespace: %w", err)
	}
	return nil
}

// Do runs f in the namespace, and waits until f has returned.
func (s *Space) Do(f func()) {
	if s == nil {
		f()
		return
	}
	var group sync.WaitGroup
	group.Go(s.In(f))
	group.Wait()
}

// key is the key of the Space in a context.
type key struct{}

// NewContext returns a context that has the namespace.
func (s *Space) NewContext(ctx context.Context) context.Context {
	if s == nil {
		return ctx
	}
	return context.WithValue(ctx, key{}, s)
}

// FromContext returns the namespace that a context has, or nil.
func FromContext(ctx context.Context) *Space {
	s, _ := ctx.Value(key{}).(*Space)
	return s
}
