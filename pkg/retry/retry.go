// Package retry is for what fails and is tried again: how long to wait before
// the next attempt, and when to say that the last one failed.
package retry

import (
	"cmp"
	"context"
	"math/rand/v2"
	"time"

	"k8s.io/klog/v2"
)

// A Backoff paces attempts. The pause between two of them is First, then twice
// as long each time, up to Most. A copy of one that was not used yet starts from
// First, too.
type Backoff struct {
	First time.Duration // 0: 1 s
	Most  time.Duration // 0: 30 s

	// Jitter takes up to a half off each pause, at random, lest a thousand
	// nodes whose attempts failed at the same moment come back at the same
	// moment.
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

// Reset makes First the next pause: an attempt did well.
func (b *Backoff) Reset() { b.next = 0 }

// Sleep waits for as long as Next says. It returns early, with the error of ctx,
// when that ends.
func (b *Backoff) Sleep(ctx context.Context) error { return Sleep(ctx, b.Next()) }

// Sleep waits for d, or for the end of ctx, whose error it returns then.
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

// A Trouble is what the last attempt failed with; the zero value is nothing.
type Trouble string

// News takes how an attempt ended, and tells whether that is worth saying: it
// failed otherwise than the one before, or nothing is wrong any more.
func (t *Trouble) News(err error) bool {
	now := Trouble("")
	if err != nil {
		now = Trouble(err.Error())
	}
	news := now != *t
	*t = now
	return news
}

// Log logs how an attempt at what ended, if that is news.
func (t *Trouble) Log(what string, err error) {
	switch {
	case !t.News(err):
	case err == nil:
		klog.InfofDepth(1, "%s: all is well again", what)
	default:
		klog.ErrorfDepth(1, "%s: %v", what, err)
	}
}
