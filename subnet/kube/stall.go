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

	// silence is how long it may then send nothing: API servers send a bookmark per minute to each watch.
	silence = 2 * time.Minute
)

// errStalled ends a request whose answer does not arrive.
type errStalled struct{ after time.Duration }

func (e errStalled) Error() string { return fmt.Sprintf("no answer for %v", e.after) }

// Timeout and Temporary make errStalled a net.Error: client-go resumes a watch after a net.Error.
func (errStalled) Timeout() bool   { return true }
func (errStalled) Temporary() bool { return true }

// causeKey is the key of the context's value in which a stallGuard stores why there is no answer.
type causeKey struct{}

// A stallGuard ends requests whose answer does not begin, or does not continue, while the connection is open: client-go
// would wait for as long as it is open.
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

// guardedBody is the body of an answer that a stallGuard ends when nothing arrives.
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
