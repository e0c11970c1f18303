package etcd

import (
	"context"
	"errors"
	"strconv"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/metadata"
)

// A stream carries watches: all those of a node that began since the last failure of one.
//
// The client has one stream of gRPC for each kind of context. When two watches on it fail at the same time, such as for
// a token that has ended, the client can wait for ever for the second one. Then no watch on the stream gets an answer or
// an error any more, and none can begin. So all watches of a stream end when one of them fails, and the next ones have
// another stream.
type stream struct {
	context.Context // ends when a watch has failed
	fail            context.CancelFunc
	number          int
	left            bool // watches that begin now have another
}

// streamKey is what distinguishes the contexts of streams, in the metadata of requests.
const streamKey = "flannel-stream"

var (
	errWatchPoint = errors.New("etcd has another history")
	errStream     = errors.New("another watch has failed")
)

// stream returns the stream for watches that begin now.
func (c *connection) stream() *stream {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := c.watches; s != nil && s.Err() == nil && !s.left {
		return s
	}
	s := &stream{}
	if c.watches != nil {
		s.number = c.watches.number + 1
	}
	s.Context, s.fail = context.WithCancel(context.Background())
	c.watches = s
	return s
}

// leave has watches that begin now use another stream: a proxy may have lost this one. The watches on it go on: each is
// to find out for itself that it is silent, since its reader then reads everything again.
func (c *connection) leave(s *stream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s.left = true
}

// watch calls each with the answers of a watch that begins after a watch point, for as long as each returns true. The
// error is why the watch ended otherwise: errWatchPoint, errStream, a silentError, that of ctx, or etcd's. Answers may
// be progress notifications, without events.
func (m *Manager) watch(ctx context.Context, at watchPoint, key string, options []clientv3.OpOption,
	each func(*clientv3.WatchResponse) bool) error {
	client, request, err := m.connection.open(ctx)
	if err != nil {
		return err // the next request logs why
	}
	s := m.connection.stream()
	request, end := context.WithCancel(metadata.AppendToOutgoingContext(request, streamKey, strconv.Itoa(s.number)))
	var running sync.WaitGroup
	defer running.Wait()
	defer end()
	defer context.AfterFunc(s, end)()
	options = append([]clientv3.OpOption{clientv3.WithRev(at.revision + 1), clientv3.WithProgressNotify()}, options...)
	begun := make(chan clientv3.WatchChan, 1)
	running.Go(func() { begun <- client.Watch(request, key, options...) }) // which waits for etcd's first answer
	var answers clientv3.WatchChan
	tick := time.NewTicker(m.silence / silentTicks)
	defer tick.Stop()
	quiet := silence{shown: at.revision}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-at.invalid:
			return errWatchPoint
		case <-s.Done():
			return errStream
		case answers = <-begun:
		case <-tick.C:
			// One kind of request may get no answer, and keep all others waiting, while etcd answers the rest.
			connected := m.health.State().Connected || m.readRevision(ctx) == nil
			if missed := quiet.tick(m.latestPoint().revision, connected); missed != 0 {
				m.connection.leave(s)
				return &silentError{missed}
			}
		case answer, ok := <-answers:
			quiet.end(answer.Header.GetRevision())
			switch {
			case ctx.Err() != nil:
				return ctx.Err()
			case s.Err() != nil:
				return errStream
			case !ok:
				err = errors.New("the watch ended")
			default:
				err = answer.Err()
			}
			if err != nil {
				s.fail()
				m.connection.noteMember(client, err)
				if tokenRefused(err) {
					m.connection.logOut(request)
				}
				return err
			}
			if !each(&answer) {
				return nil
			}
		}
	}
}

// closePatience is how long a client may take to close.
const closePatience = 2 * time.Second

// closeClient closes a client, and ends its watches. A client that waits for ever for a watch, see stream, keeps some
// memory, but does not keep the daemon from its end.
func closeClient(client *clientv3.Client) error {
	closed := make(chan error, 1)
	go func() { closed <- client.Close() }()
	select {
	case err := <-closed:
		return err
	case <-time.After(closePatience):
		return client.ActiveConnection().Close()
	}
}
