package netspace

import (
	"os"
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/nstest"
)

func init() { runtime.LockOSThread() } // the main goroutine stays on the first thread

// onFirst takes functions to run on the first thread of the process.
var onFirst = make(chan func())

func TestMain(m *testing.M) {
	code := make(chan int)
	go func() { code <- m.Run() }()
	for {
		select {
		case f := <-onFirst:
			f()
		case c := <-code:
			os.Exit(c)
		}
	}
}

// here identifies the namespace of the calling thread.
func here(t *testing.T) string {
	name, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Error(err)
	}
	return name
}

// elsewhere identifies the namespace of a new goroutine.
func elsewhere(t *testing.T) (name string) {
	var group sync.WaitGroup
	group.Go(func() { name = here(t) })
	group.Wait()
	return name
}

// TestHome: in the process's own namespace there is no Space, and nothing costs anything.
func TestHome(t *testing.T) {
	for _, locked := range []bool{false, true} {
		if locked {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
		}
		s, err := Current()
		if s != nil || err != nil {
			t.Errorf("with a locked thread (%t): %v, %v", locked, s, err)
		}
	}
	ran := false
	var s *Space
	s.Do(func() { ran = true })
	if ctx := s.NewContext(t.Context()); ctx != t.Context() || FromContext(ctx) != nil || !ran {
		t.Error("the nil Space is not the process's own")
	}
}

// TestAway: goroutines begin in the namespace of the thread that has called Current, and leave their threads as they
// were.
func TestAway(t *testing.T) {
	home := elsewhere(t)
	nstest.New(t)
	away := here(t)
	s, err := Current()
	if err != nil || s == nil || away == home {
		t.Fatalf("%v, %v in %s of a process in %s", s, err, away, home)
	}
	s = FromContext(s.NewContext(t.Context()))
	for range 20 {
		var all sync.WaitGroup
		for range 20 {
			all.Go(s.In(func() {
				if got := here(t); got != away {
					t.Errorf("In runs in %s, not in %s", got, away)
				}
			}))
		}
		s.Do(func() {
			if got := here(t); got != away {
				t.Errorf("Do runs in %s, not in %s", got, away)
			}
		})
		all.Wait()
		for range 20 {
			if got := elsewhere(t); got != home {
				t.Fatalf("a thread was left in %s, not in %s", got, home)
			}
		}
	}
}

// TestFirstThread: the first thread does not move, and the process with it, in the eyes of others.
func TestFirstThread(t *testing.T) {
	nstest.New(t)
	away := here(t)
	s, err := Current()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	onFirst <- s.In(func() {
		defer close(done)
		if got := here(t); got != away || unix.Gettid() == unix.Getpid() {
			t.Errorf("thread %d of process %d runs in %s, not in %s", unix.Gettid(), unix.Getpid(), got, away)
		}
	})
	<-done
}
