package etcd

import (
	"fmt"
	"time"
)

const (
	// mostSilence is for how long a watch may have no answer while etcd has later revisions than the watch has shown. A
	// member sends a progress notification to a watch without events, every 10 to 11 minutes
	// (--watch-progress-notify-interval), but the first of them up to 22 minutes after an event. Where the revision
	// stays the same, members since 3.6 send none. A proxy may keep a watch that the member has ended.
	mostSilence = 25 * time.Minute

	// silentTicks is how many parts mostSilence has. They are counted, so that the time in which this process was stopped
	// does not count.
	silentTicks = 10
)

// A silence is for how long a watch has had no answer that it should have had.
type silence struct {
	shown int64 // the revision of the last answer
	known int64 // etcd's revision at the last tick
	ticks int
}

// tick is to be called silentTicks times in mostSilence, with the latest revision that is known of etcd, and whether
// etcd answers requests. When the silence has lasted for too long, tick returns a revision that the watch should have
// shown by now; else 0.
func (s *silence) tick(latest int64, connected bool) (missed int64) {
	before := s.known
	s.known = latest
	if !connected || latest <= s.shown {
		s.ticks = 0
		return 0
	}
	if s.ticks++; s.ticks <= silentTicks {
		return 0
	}
	return before
}

// end is to be called with the revision of an answer.
func (s *silence) end(revision int64) {
	s.ticks, s.shown = 0, max(s.shown, revision)
}

// A silentError is why a watch ended that was silent for too long.
type silentError struct {
	missed int64 // a revision that the watch should have shown
}

func (e *silentError) Error() string {
	return fmt.Sprintf("the watch has not shown etcd's revision %d", e.missed)
}

// A gap is where a silent watch should have reported changes. The zero gap is none.
type gap struct {
	after   watchPoint
	through int64 // revision
}

// has tells whether a change belongs to the gap. At is when the change was found.
func (g gap) has(changed int64, at watchPoint) bool {
	return changed > g.after.revision && changed <= g.through && at.invalid == g.after.invalid
}
