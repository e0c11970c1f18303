package etcd

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/subnet"
)

// A request is a request to etcd. It returns the header of an answer that shows etcd's latest revision; nil where the
// answer has none.
type request func(context.Context, *clientv3.Client) (*pb.ResponseHeader, error)

// do makes the request until it succeeds or ctx ends. The operation is what subnet.StoreHealth logs. The watch point is
// zero where the request returns no header.
func (m *Manager) do(ctx context.Context, operation string, r request) (watchPoint, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(m.ctx, cancel)()
	at, err := m.try(ctx, operation, r)
	if err == nil || ctx.Err() != nil {
		return at, err
	}
	err = m.failed.retry(ctx, m.pace().backoff(), func() (err error) {
		at, err = m.try(ctx, operation, r)
		return err
	})
	return at, err
}

// try makes the request once.
func (m *Manager) try(ctx context.Context, operation string, r request) (watchPoint, error) {
	before := m.latestPoint()
	var header *pb.ResponseHeader
	err := m.connection.attempt(ctx, func(ctx context.Context, c *clientv3.Client) (err error) {
		header, err = r(ctx, c)
		return err
	})
	switch {
	case ctx.Err() != nil:
		return watchPoint{}, ctx.Err()
	case err != nil:
		cause, text := explain(err)
		m.health.Failed(operation, cause, text)
		return watchPoint{}, err
	}
	if header == nil {
		m.health.Settled(operation) // etcd does something about its leases even for users that it refuses
		return watchPoint{}, nil
	}
	m.health.Succeeded(operation)
	return m.observe(before, header.Revision), nil
}

// A queue holds all requests that failed. They are retried one after the other, with pauses that grow: however many
// there are, etcd gets no more requests than from one of them.
type queue struct {
	head  chan struct{} // one element: the right to try
	pause retry.Backoff
}

func newQueue() queue { return queue{head: make(chan struct{}, 1)} }

// retry calls f until it succeeds or ctx ends, with the pauses of b between attempts of all callers.
func (q *queue) retry(ctx context.Context, b retry.Backoff, f func() error) error {
	turn := func() error {
		select {
		case q.head <- struct{}{}:
			defer func() { <-q.head }()
		case <-ctx.Done():
			return ctx.Err()
		}
		q.pause.First, q.pause.Most, q.pause.Jitter = b.First, b.Most, b.Jitter
		if err := q.pause.Sleep(ctx); err != nil {
			return err
		}
		err := f()
		if err == nil {
			q.pause.Reset()
		}
		return err
	}
	for {
		if err := turn(); err == nil || ctx.Err() != nil {
			return err
		}
	}
}

// A watchPoint is a point in etcd's history, from which changes can be watched.
//
// History must not go backwards. It does when etcd is restored from a backup or starts with an empty disk: a watch from
// before then waits, without an error, for revisions that do not come for a long time. A watch must end when its
// watchPoint becomes invalid.
type watchPoint struct {
	revision int64
	invalid  chan struct{} // closed when etcd has another history
}

// latestPoint returns the latest watch point that is known.
func (m *Manager) latestPoint() watchPoint {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.latest
}

// observe records the revision that an answer showed, and returns its watch point. Before is the latest watch point
// that was known when the request was made.
func (m *Manager) observe(before watchPoint, revision int64) watchPoint {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.latest.invalid == before.invalid {
		if revision < before.revision {
			m.log.Error(nil, "The revision of etcd went back, as after a restore or with a new disk; reading everything again",
				"before", before.revision, "revision", revision)
			m.invalidate()
			before = m.latest
		}
		m.latest.revision = max(m.latest.revision, revision)
	}
	return watchPoint{revision, before.invalid}
}

// invalidate ends all watches, whose callers then read everything again. The caller holds m.mu.
func (m *Manager) invalidate() {
	close(m.latest.invalid)
	m.latest = watchPoint{0, make(chan struct{})}
}

// runHeartbeat renews the claim once per beat of the pace. It reads etcd's revision if the answer to that leaves a
// doubt, or where there is no claim. Nodes that start together do not beat together.
func (m *Manager) runHeartbeat() {
	for retry.Sleep(m.ctx, m.untilBeat()) == nil {
		if m.renewClaim() {
			continue
		}
		_ = m.readRevision(m.ctx)
	}
}

// readRevision reads etcd's revision, and makes one attempt at that.
func (m *Manager) readRevision(ctx context.Context) error {
	_, err := m.try(ctx, "check that etcd answers", func(ctx context.Context, c *clientv3.Client) (*pb.ResponseHeader, error) {
		got, err := c.Get(ctx, m.configKey(), clientv3.WithCountOnly())
		if err != nil {
			return nil, err
		}
		return got.Header, nil
	})
	return err
}

// untilBeat returns how long to wait for the next beat: up to an eighth less than beat, at random.
func (m *Manager) untilBeat() time.Duration {
	beat := m.beat()
	return beat - rand.N(beat/8)
}

// beat is the time between two beats: that of the pace, unless the claim ends sooner than it would now.
func (m *Manager) beat() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.claim == nil {
		return m.pace().beat()
	}
	return min(m.pace().beat(), m.claim.ttl/beatsOfClaim)
}

// awaitChange returns nil when one of the keys has changed after the watch point, or may have changed: the caller reads
// the keys again.
func (m *Manager) awaitChange(ctx context.Context, at watchPoint, keys []string, options ...clientv3.OpOption) error {
	changed, stop := m.changes(ctx, at, keys, options...)
	defer stop()
	<-changed
	return ctx.Err()
}

// changes returns a channel that is closed when one of the keys has changed after the watch point, or may have changed,
// and when ctx ends. The caller must call stop.
func (m *Manager) changes(ctx context.Context, at watchPoint, keys []string, options ...clientv3.OpOption) (
	changed <-chan struct{}, stop func(),
) {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	forget := context.AfterFunc(m.ctx, cancel)
	stop = func() { forget(); cancel(); running.Wait() }
	for _, key := range keys {
		running.Go(func() {
			defer cancel()
			err := m.watch(ctx, at, key, options, func(answer *clientv3.WatchResponse) bool { return len(answer.Events) == 0 })
			if err != nil && !errors.Is(err, errWatchPoint) && !errors.As(err, new(*silentError)) {
				// If this repeats while requests succeed, one read a second is enough.
				retry.Sleep(ctx, time.Second)
			}
		})
	}
	return ctx.Done(), stop
}

// explain describes an error for the operator, and says what to check. The cause is the one that subnet.StoreHealth
// takes.
func explain(err error) (cause, text string) {
	text = status.Convert(err).Message()
	if _, inner, found := strings.Cut(text, `desc = "`); found { // gRPC's wrapping
		text = strings.TrimPrefix(strings.TrimSuffix(inner, `"`), "transport: ")
	}
	whole := text
	contains := func(parts ...string) bool {
		return slices.ContainsFunc(parts, func(part string) bool { return strings.Contains(whole, part) })
	}
	text = plain.Text(whole)
	switch err := rpctypes.Error(err); {
	case errors.Is(err, rpctypes.ErrAuthFailed):
		return "login", text + ": check --etcd-username and --etcd-password"
	case errors.Is(err, rpctypes.ErrUserEmpty):
		return "login", text + ": etcd requires a user; set --etcd-username and --etcd-password, " +
			"or a client certificate with --etcd-certfile and --etcd-keyfile"
	case tokenRefused(err):
		return "login", text + ": etcd does not accept the token that it issued; perhaps its users are being changed"
	case errors.Is(err, rpctypes.ErrNoSpace):
		return "", text + ": compact and defragment etcd, or raise its --quota-backend-bytes, and then: etcdctl alarm disarm"
	case errors.Is(err, rpctypes.ErrPermissionDenied):
		return "", text + ": the user must be allowed to read config under --etcd-prefix, and to read and " +
			"write subnets/ and nodes/ there, see etcdctl role grant-permission --prefix"
	case errors.As(err, new(*lookupError)):
		return "discovery", text
	case contains("certificate has expired or is not yet valid"):
		return "certificate", text + ": check this host's clock, and until when the server's certificate is valid"
	case contains("x509:"):
		return "certificate", text + ": the server's certificate cannot be verified, " +
			"check --etcd-cafile and the names of the endpoints"
	case contains("remote error: tls: expired certificate"):
		return "certificate", text + ": check until when our certificate is valid (--etcd-certfile), and the server's clock"
	case contains("remote error: tls:"):
		return "certificate", text + ": the server does not accept our certificate, check --etcd-certfile and --etcd-keyfile"
	case contains("first record does not look like a TLS handshake", "handshake failed: EOF"):
		return "scheme", text + ": the server does not speak TLS, perhaps --etcd-endpoints should begin with http://, " +
			"or the SRV record should be _etcd-client"
	case contains("error reading server preface: EOF"):
		return "scheme", text + ": the server closes the connection, perhaps --etcd-endpoints should begin with https://, " +
			"or the SRV record should be _etcd-client-ssl"
	case errors.Is(err, context.DeadlineExceeded), codeOf(err) == codes.DeadlineExceeded,
		text == context.DeadlineExceeded.Error(): // etcd 3.4 answers this when its leader does not answer
		return subnet.Unreachable, fmt.Sprintf("no answer within %v", requestTimeout)
	case codeOf(err) == codes.Canceled: // while the time for the request ran out
		return subnet.Unreachable, "no answer until the connections were replaced"
	case codeOf(err) == codes.Unavailable:
		return subnet.Unreachable, text
	}
	return "", text
}
