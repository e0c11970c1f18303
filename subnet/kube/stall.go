package kube

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"time"
)

const (
	// answerWithin is how long a server may take before it begins to answer.
	answerWithin = 30 * time.Second

	// silence is how long it may then send nothing: API servers send a bookmark
	// a minute to who watches.
	silence = 2 * time.Minute
)

// errStalled ends a request of which nothing is heard.
type errStalled struct{ after time.Duration }

func (e errStalled) Error() string { return fmt.Sprintf("no answer for %v", e.after) }

// Timeout and Temporary make it a net.Error: client-go takes up a watch again
// after those.
func (errStalled) Timeout() bool   { return true }
func (errStalled) Temporary() bool { return true }

// causeKey is where in a context a stallGuard notes why there is no answer.
type causeKey struct{}

// A stallGuard gives up requests whose answer does not come, or stops coming
// while the connection stays: client-go would wait for as long as it stays.
type stallGuard struct{ next http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (g stallGuard) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	timer := time.AfterFunc(answerWithin, func() { cancel(errStalled{answerWithin}) })
	resp, err := g.next.RoundTrip(req.WithContext(ctx))
	if err != nil {
		timer.Stop()
		if stalled, ok := context.Cause(ctx).(errStalled); ok {
			err = stalled
		}
		cancel(nil)
		if cause, ok := ctx.Value(causeKey{}).(*error); ok {
			*cause = err
		}
		return nil, err
	}
	timer.Stop()
	timer = time.AfterFunc(silence, func() { cancel(errStalled{silence}) })
	resp.Body = &guardedBody{resp.Body, timer, cancel}
	return resp, nil
}

// guardedBody is an answer that a stallGuard looks after.
type guardedBody struct {
	io.ReadCloser
	timer  *time.Timer
	cancel context.CancelCauseFunc
}

func (b *guardedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if n > 0 {
		b.timer.Reset(silence)
	}
	return n, err
}

func (b *guardedBody) Close() error {
	b.timer.Stop()
	b.cancel(nil)
	return b.ReadCloser.Close()
}
