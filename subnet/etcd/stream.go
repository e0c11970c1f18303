package etcd

import (
	"context"
	"errors"
	"strconv"
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
}

// streamKey is what distinguishes the contexts of streams, in the metadata of requests.
const streamKey = "flannel-stream"

var (
	errWatchPoint = errors.New("etcd has another history")
	errStream     = errors.New("another watch has failed")
	errSilent     = errors.New("the watch is silent")
)

// mostSilence is for how long a watch may have no answer. A member sends a progress notification where nothing has
// changed, every 10 to 11 minutes (--watch-progress-notify-interval), but the first of them up to 22 minutes after a
// change. A proxy may keep a watch that the member has ended.
const mostSilence = 25 * time.Minute

// stream returns the stream for watches that begin now.
func (c *connection) stream() *stream {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := c.watches; s != nil && s.Err() == nil {
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

// watch calls each with the answers of a watch that begins after a watch point, for as long as each returns true. The
// error is why the watch ended otherwise: errWatchPoint, errStream, errSilent, that of ctx, or etcd's. Answers may be
// progress notifications, without events.
func (m *Manager) watch(ctx context.Context, at watchPoint, key string, options []clientv3.OpOption,
	each func(*clientv3.WatchResponse) bool) error {
	client, request, err := m.connection.open(ctx)
	if err != nil {
		return err // the next request logs why
	}
	s := m.connection.stream()
	request, end := context.WithCancel(metadata.AppendToOutgoingContext(request, streamKey, strconv.Itoa(s.number)))
	defer end()
	defer context.AfterFunc(s, end)()
	options = append([]clientv3.OpOption{clientv3.WithRev(at.revision + 1), clientv3.WithProgressNotify()}, options...)
	answers := client.Watch(request, key, options...)
	silent := time.NewTimer(m.silence)
	defer silent.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-at.invalid:
			return errWatchPoint
		case <-s.Done():
			return errStream
		case <-silent.C:
			return errSilent
		case answer, ok := <-answers:
			silent.Reset(m.silence)
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
