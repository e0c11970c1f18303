package etcd

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/subnet"
)

// A request is one to etcd. It returns the header of an answer that shows etcd's
// latest revision; nil where the answer has none.
type request func(context.Context, *clientv3.Client) (*pb.ResponseHeader, error)

// do makes the request until it succeeds or ctx ends. Its purpose completes the
// sentence "waiting to …". It returns no moment where the request has no header.
func (m *Manager) do(ctx context.Context, purpose string, r request) (moment, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(m.ctx, cancel)()
	at, err := m.try(ctx, purpose, r)
	if err == nil || ctx.Err() != nil {
		return at, err
	}
	err = m.failed.retry(ctx, func() (err error) {
		at, err = m.try(ctx, purpose, r)
		return err
	})
	return at, err
}

// try makes the request once.
func (m *Manager) try(ctx context.Context, purpose string, r request) (moment, error) {
	before := m.now()
	var header *pb.ResponseHeader
	err := m.connection.attempt(ctx, func(ctx context.Context, c *clientv3.Client) (err error) {
		header, err = r(ctx, c)
		return err
	})
	switch {
	case ctx.Err() != nil:
		return moment{}, ctx.Err()
	case err != nil:
		why, text := explain(err)
		m.health.Failed(purpose, why, text)
		return moment{}, err
	}
	m.health.Succeeded(purpose)
	if header == nil {
		return moment{}, nil
	}
	return m.learn(before, header.Revision), nil
}

// A queue is for all whose request failed. They try again one after the other,
// with pauses that grow: however many they are, etcd gets no more requests than
// from one.
type queue struct {
	head  chan struct{} // one element: the right to try
	pause retry.Backoff
}

func newQueue() queue { return queue{head: make(chan struct{}, 1), pause: subnet.Backoff()} }

// retry calls f until it succeeds or ctx ends.
func (q *queue) retry(ctx context.Context, f func() error) error {
	turn := func() error {
		select {
		case q.head <- struct{}{}:
			defer func() { <-q.head }()
		case <-ctx.Done():
			return ctx.Err()
		}
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

// A moment is a point in etcd's history, from which changes can be followed.
//
// History must not go backwards. It does when etcd is restored from a backup or
// starts anew with an empty disk, and then a watch from before waits in silence
// for revisions of the future. Whoever follows changes must heed replaced.
type moment struct {
	revision int64
	replaced chan struct{} // closed when this history turned out to be void
}

// now returns the latest moment that is known.
func (m *Manager) now() moment {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.latest
}

// learn takes note of the revision that an answer showed, and returns its
// moment. Before is what was known when the question was asked.
func (m *Manager) learn(before moment, revision int64) moment {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.latest.replaced == before.replaced {
		if revision < before.revision {
			klog.Warningf("etcd went back from revision %d to %d, as after a restore or with a new disk: reading everything again", before.revision, revision)
			m.renounce()
			before = m.latest
		}
		m.latest.revision = max(m.latest.revision, revision)
	}
	return moment{revision, before.replaced}
}

// renounce tells all who follow changes to read everything again. The caller
// holds m.mu.
func (m *Manager) renounce() {
	close(m.latest.replaced)
	m.latest = moment{0, make(chan struct{})}
}

// beat renews the claim, and asks for etcd's revision, from time to time: see
// pulseEvery. That the one fails must not keep the other from happening.
func (m *Manager) beat() {
	tick := time.NewTicker(pulseEvery)
	defer tick.Stop()
	for {
		select {
		case <-m.ctx.Done():
			return
		case <-tick.C:
		}
		m.keepClaim()
		m.try(m.ctx, "see it again", func(ctx context.Context, c *clientv3.Client) (*pb.ResponseHeader, error) {
			got, err := c.Get(ctx, m.configKey(), clientv3.WithCountOnly())
			if err != nil {
				return nil, err
			}
			return got.Header, nil
		})
	}
}

// await returns nil when one of the keys changed after the moment, or may have
// without our knowing: the caller reads them again.
func (m *Manager) await(ctx context.Context, at moment, keys []string, options ...clientv3.OpOption) error {
	changed, stop := m.changes(ctx, at, keys, options...)
	defer stop()
	<-changed
	return ctx.Err()
}

// changes returns a channel that is closed when one of the keys changed after
// the moment, or may have, and when ctx ends. The caller must call stop.
func (m *Manager) changes(ctx context.Context, at moment, keys []string, options ...clientv3.OpOption) (changed <-chan struct{}, stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	stop = func() { cancel(); running.Wait() }
	client, watch, err := m.connection.open(ctx)
	if err != nil {
		cancel() // the caller's next request says why
		return ctx.Done(), stop
	}
	running.Go(func() {
		select {
		case <-ctx.Done():
		case <-m.ctx.Done():
		case <-at.replaced:
		}
		cancel()
	})
	for _, key := range keys {
		options := append([]clientv3.OpOption{clientv3.WithRev(at.revision + 1)}, options...)
		running.Go(func() {
			defer cancel()
			for answer := range client.Watch(clientv3.WithRequireLeader(watch), key, options...) {
				if len(answer.Events) > 0 {
					return
				}
			}
			// The watch broke, or never was. Should that repeat while
			// requests succeed, reading once a second will do.
			retry.Sleep(ctx, time.Second)
		})
	}
	return ctx.Done(), stop
}

// explain words an error for the operator, with what to check. The cause is as
// subnet.Outage has it.
func explain(err error) (cause, text string) {
	text = status.Convert(err).Message()
	if _, inner, found := strings.Cut(text, `desc = "`); found { // gRPC's wrapping
		text = strings.TrimPrefix(strings.TrimSuffix(inner, `"`), "transport: ")
	}
	says := func(parts ...string) bool {
		return slices.ContainsFunc(parts, func(part string) bool { return strings.Contains(text, part) })
	}
	var known rpctypes.EtcdError
	switch err := rpctypes.Error(err); {
	case errors.Is(err, rpctypes.ErrAuthFailed):
		return "login", text + ": check --etcd-username and --etcd-password"
	case errors.Is(err, rpctypes.ErrUserEmpty):
		return "login", text + ": it wants a user, set --etcd-username and --etcd-password, or a client certificate with --etcd-certfile and --etcd-keyfile"
	case refused(err):
		return "login", text + ": etcd does not accept the token that it gave, perhaps users change at the moment"
	case errors.Is(err, rpctypes.ErrNoSpace):
		return "", text + ": compact and defragment etcd, or raise its --quota-backend-bytes, and then: etcdctl alarm disarm"
	case errors.Is(err, rpctypes.ErrPermissionDenied):
		return "", text + ": the user must be allowed to read and write all keys under --etcd-prefix, see etcdctl role grant-permission --prefix"
	case says("x509:"):
		return "certificate", text + ": the server's certificate is not to be trusted, check --etcd-cafile and the names in --etcd-endpoints"
	case says("remote error: tls:"):
		return "certificate", text + ": the server does not accept our certificate, check --etcd-certfile and --etcd-keyfile"
	case says("first record does not look like a TLS handshake", "handshake failed: EOF"):
		return "scheme", text + ": the server does not speak TLS, perhaps --etcd-endpoints should say http://"
	case says("error reading server preface: EOF"):
		return "scheme", text + ": the server closes the connection, perhaps --etcd-endpoints should say https://"
	case errors.Is(err, context.DeadlineExceeded), status.Code(err) == codes.DeadlineExceeded,
		text == context.DeadlineExceeded.Error(): // etcd 3.4 says so of what its leader did not answer
		return subnet.Unreachable, fmt.Sprintf("no answer within %v", requestTimeout)
	case status.Code(err) == codes.Canceled: // while the time for the request ran out
		return subnet.Unreachable, "no answer until the connections were replaced"
	case status.Code(err) == codes.Unavailable, errors.As(err, &known) && known.Code() == codes.Unavailable:
		return subnet.Unreachable, text
	}
	return "", text
}
