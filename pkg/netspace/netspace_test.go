package netspace

import (
	"os"
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/nstest"
)

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
				if unix.Gettid() == unix.Getpid() {
					t.Error("the first thread has moved, and the process with it")
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
