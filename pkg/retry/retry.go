// Package retry is for what fails and is tried again: how long to wait before
// the next attempt, and when to log that the last one failed.
package retry

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"k8s.io/klog/v2"
)

// A Backoff paces attempts. The pause between two of them is First, then twice
// as long each time, up to Most. A copy of an unused Backoff starts from First,
// too.
type Backoff struct {
	First time.Duration // 0: 1 s
	Most  time.Duration // 0: 30 s

	// Jitter takes up to a half off each pause, at random. Without it, a
	// thousand nodes whose attempts failed at the same time come back at the
	// same time.
	Jitter bool

	next time.Duration // 0: First
}

// Next returns the pause before the next attempt.
func (b *Backoff) Next() time.Duration {
	pause := min(cmp.Or(b.next, b.First, time.Second), cmp.Or(b.Most, 30*time.Second))
	b.next = 2 * pause
	if b.Jitter {
		pause -= rand.N(pause) / 2
	}
	return pause
}

// Reset makes First the next pause, after an attempt that succeeded.
func (b *Backoff) Reset() { b.next = 0 }

// Sleep waits for the pause that Next returns. When ctx ends, Sleep returns its
// error early.
func (b *Backoff) Sleep(ctx context.Context) error { return Sleep(ctx, b.Next()) }

// Sleep waits for d. When ctx ends, Sleep returns its error early.
func Sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// A LastError is what the last attempt at an operation failed with; the zero
// value is nothing. It helps to log each cause once, and not at each attempt.
type LastError string

// Changed takes how an attempt ended. It returns whether to log that: the
// attempt failed for another reason than the one before, or the operation works
// again.
func (l *LastError) Changed(err error) bool {
	last := *l
	*l = ""
	if err != nil {
		*l = LastError(err.Error())
	}
	return *l != last
}

// Log logs how an attempt at an operation ended, if that changed.
func (l *LastError) Log(log klog.Logger, operation string, err error) {
	if l.Changed(err) {
		logEnd(log, operation, err)
	}
}

// LastErrors are those of several operations, by what distinguishes them. An
// operation that works has no entry.
type LastErrors[K comparable] map[K]LastError

// Changed is LastError.Changed of one operation.
func (l LastErrors[K]) Changed(k K, err error) bool {
	last := l[k]
	changed := last.Changed(err)
	if l[k] = last; err == nil {
		delete(l, k)
	}
	return changed
}

// Log is LastError.Log of the operation k.
func (l LastErrors[K]) Log(log klog.Logger, k K, err error) {
	if l.Changed(k, err) {
		logEnd(log, fmt.Sprint(k), err)
	}
}

// logEnd logs for the caller of its caller.
func logEnd(log klog.Logger, operation string, err error) {
	log = log.WithCallDepth(2)
	if err == nil {
		log.Info("Recovered", "operation", operation)
	} else {
		log.Error(err, "Failed; retrying", "operation", operation)
	}
}
