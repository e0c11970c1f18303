package plain

import (
	"slices"
	"sync"
	"time"

	"k8s.io/klog/v2"
)

const (
	// mostLines is how many lines with one message may be logged at once. A large cluster that starts has some hundreds.
	mostLines = 500

	// linesPerMinute is how many lines with one message are logged in the long run. Lines have about 200 bytes.
	linesPerMinute = 60

	// maxMessages is how many messages have an allowance of their own. The program has some hundreds.
	maxMessages = 1000

	tooMany = "Too many lines with one message; some are left out (--v=2 logs all)"
)

// A budget bounds how many lines are logged, by message.
type budget struct {
	mu       sync.Mutex
	messages map[string]*allowance
}

// An allowance is how many lines with one message may be logged.
type allowance struct {
	lines   float64 // as of the time at
	at      time.Time
	leftOut int       // lines since the last one that was logged
	warned  time.Time // when it was logged that lines are left out
}

// take returns the values of a line with a message, with the number of lines that were left out since the last one. ok is
// false if the line is to be left out, too; then warn is true, once a minute, for that to be logged.
func (b *budget) take(msg string, keysAndValues []any) (values []any, ok, warn bool) {
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	a := b.messages[msg]
	if a == nil && len(b.messages) >= maxMessages {
		msg = "" // all others share one
		a = b.messages[msg]
	}
	if a == nil {
		a = &allowance{lines: mostLines, at: now}
		b.messages[msg] = a
	}
	a.lines = min(mostLines, a.lines+now.Sub(a.at).Minutes()*linesPerMinute)
	a.at = now
	if a.lines < 1 && !klog.V(2).Enabled() {
		a.leftOut++
		if warn = now.Sub(a.warned) >= time.Minute; warn {
			a.warned = now
		}
		return nil, false, warn
	}
	a.lines = max(0, a.lines-1)
	if a.leftOut > 0 {
		keysAndValues = append(slices.Clone(keysAndValues), "leftOut", a.leftOut)
		a.leftOut = 0
	}
	return keysAndValues, true, false
}
