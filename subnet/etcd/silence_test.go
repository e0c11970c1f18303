package etcd

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"

	"github.com/flanneld/flanneld/pkg/nstest"
	"github.com/flanneld/flanneld/subnet"
)

// A mute server reports no lease to a watch, as a proxy may that has lost the watch of its member. Each lease has a
// revision of its own.
type mute struct {
	pb.UnimplementedKVServer
	pb.UnimplementedWatchServer

	unbegun bool // it does not even say that a watch has begun
	deaf    bool // it sends nothing to other watches either, which have progress notifications else
	notify  bool // it sends progress notifications to watches of leases, too
	late    bool // a lease is added when the leases are read, and not before
	still   bool // nothing is added
	away    bool // it refuses requests from then on that the leases have been read

	mu       sync.Mutex
	revision int64
	leases   []*mvccpb.KeyValue
	lists    int // how often the leases were read
	grown    int // how often something was added after that
	streams  int // of watches
}

// add adds a lease.
func (s *mute) add() {
	s.revision++
	s.leases = append(s.leases, &mvccpb.KeyValue{
		Key: fmt.Appendf(nil, "subnets/10.5.%d.0-24", s.revision), CreateRevision: s.revision, ModRevision: s.revision,
		Lease: 1, Value: fmt.Appendf(nil, `{"PublicIP":"198.18.0.%d"}`, s.revision),
	})
}

// Range adds something with the first other request after the leases were read.
func (s *mute) Range(_ context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	isList := string(r.Key) == "subnets/"
	switch {
	case s.away && s.grown > 0:
		return nil, rpctypes.ErrGRPCStopped
	case isList && s.lists == 0, isList && s.late:
		s.add()
	case !isList && s.grown < s.lists && !s.still:
		s.grown++
		if s.late {
			s.revision++ // another program's key
		} else {
			s.add()
		}
	}
	answer := &pb.RangeResponse{Header: &pb.ResponseHeader{Revision: s.revision}}
	if isList {
		s.lists++
		answer.Kvs, answer.Count = s.leases, int64(len(s.leases))
	}
	return answer, nil
}

func (s *mute) Watch(stream pb.Watch_WatchServer) error {
	s.mu.Lock()
	s.streams++
	s.mu.Unlock()
	var sending sync.Mutex
	send := func(answer *pb.WatchResponse) error {
		sending.Lock()
		defer sending.Unlock()
		s.mu.Lock()
		answer.Header = &pb.ResponseHeader{Revision: s.revision}
		s.mu.Unlock()
		return stream.Send(answer)
	}
	var notifying sync.WaitGroup
	defer notifying.Wait()
	for id := int64(0); ; {
		request, err := stream.Recv()
		if err != nil {
			return err
		}
		create := request.GetCreateRequest()
		if create == nil {
			continue
		}
		ofLeases := string(create.Key) == "subnets/"
		if ofLeases && s.unbegun {
			continue
		}
		created := &pb.WatchResponse{WatchId: id, Created: true}
		if err := send(created); err != nil {
			return err
		}
		if !ofLeases && !s.deaf || s.notify {
			notifying.Go(func() {
				for send(&pb.WatchResponse{WatchId: created.WatchId}) == nil {
					time.Sleep(10 * time.Millisecond)
				}
			})
		}
		id++
	}
}

// A watch without answers is not trusted for ever where etcd has later revisions, and what the watch did not report is
// known in the end. Each time there is another stream, whatever the first one has besides.
func TestSilentWatch(t *testing.T) {
	t.Parallel()
	const some = 300 * time.Millisecond
	for _, c := range []struct {
		name      string
		server    *mute
		silence   time.Duration
		stuck     bool // a request that gets no answer, which keeps others from being made
		snapshots int  // each with one lease more than the one before
		reports   int  // that the watch did not report changes
	}{
		{"changes are not reported", &mute{}, some, false, 3, 2},
		{"no watch is answered", &mute{deaf: true}, some, false, 3, 2},
		{"the watch does not begin", &mute{unbegun: true}, some, false, 3, 2},
		{"another request gets no answer", &mute{}, some, true, 3, 2},
		{"changes came after the watch was given up", &mute{late: true}, some, false, 3, 0},
		{"nothing has changed", &mute{still: true}, some, false, 1, 0},
		{"etcd is away", &mute{away: true, deaf: true}, 800 * time.Millisecond, false, 1, 0},
		{"progress notifications", &mute{notify: true}, 2 * time.Second, false, 1, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			var log nstest.Log
			m := managerOf(t, log.Context(t.Context()), func(s *grpc.Server) {
				pb.RegisterKVServer(s, c.server)
				pb.RegisterWatchServer(s, c.server)
			})
			m.silence = c.silence
			patience := 20 * time.Second
			if c.stuck {
				patience = leastBeat * 4 / 5 // until the first heartbeat
			}
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			var running sync.WaitGroup
			running.Go(func() { // another watch, which does not keep that of the leases from being found silent
				for ctx.Err() == nil {
					_ = m.awaitChange(ctx, watchPoint{0, m.latestPoint().invalid}, []string{m.configKey()})
				}
			})
			time.Sleep(c.silence / 10)
			updates := m.Watch(ctx)
			snapshots := 0
			next := func() (more bool) {
				u, more := <-updates
				if !more {
					return false
				}
				snapshots++
				if !u.Snapshot || len(u.Leases) != snapshots {
					t.Errorf("got %+v, want snapshot %d", u, snapshots)
				}
				return true
			}
			next()
			running.Go(func() { // as the heartbeat does
				for ctx.Err() == nil {
					if c.stuck {
						m.health.Failed("a request", subnet.Unreachable, "no answer")
					} else {
						_, _, _ = m.readConfig(ctx)
					}
					time.Sleep(c.silence / 50)
				}
			})
			if c.snapshots == 1 {
				time.AfterFunc(3*c.silence, cancel)
			}
			for snapshots < c.snapshots && next() {
			}
			if c.snapshots > 1 {
				cancel()
			}
			for next() {
			}
			running.Wait()
			m.Close()
			if snapshots != c.snapshots {
				t.Errorf("%d snapshots, want %d", snapshots, c.snapshots)
			}
			if said := strings.Count(log.String(), "did not report changes"); said != c.reports {
				t.Errorf("the log has %d times that the watch did not report changes, want %d:\n%s", said, c.reports, log.String())
			}
			c.server.mu.Lock()
			defer c.server.mu.Unlock()
			if n := c.server.streams; n < c.snapshots-1 || c.snapshots == 1 && n != 1 { // the last watch may not begin
				t.Errorf("%d streams for %d watches", n, c.snapshots)
			}
		})
	}
}

// What a silence is made of. Each letter is a tick after which etcd's revision has grown by one: "x"; or has not: ".";
// or a tick at which etcd does not answer: "-"; or an answer to the watch, of the first revision: "a".
func TestSilence(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		events string
		missed int64 // with the last event; 0: the watch goes on
	}{
		{"..............................", 0},
		{"x.........", 0},
		{"x..........", 2},
		{"xxxxxxxxxxx", 11}, // what etcd had before the last tick
		{"..x..........", 2},
		{"x.....a...........", 2},
		{"x.....a..........", 0},
		{"x.....-...........", 2},
		{"x.....-..........", 0},
		{"x--------------------", 0},
	} {
		s, revision, missed := silence{shown: 1}, int64(1), int64(0)
		for i, e := range c.events {
			if missed != 0 {
				t.Errorf("%q: missed %d already before %d", c.events, missed, i)
			}
			switch e {
			case 'a':
				s.end(1)
				continue
			case 'x':
				revision++
			}
			missed = s.tick(revision, e != '-')
		}
		if missed != c.missed {
			t.Errorf("%q: missed %d, want %d", c.events, missed, c.missed)
		}
	}
}

// A renewal of the claim tells of etcd's revision, too: a node at rest does nothing else.
func TestRenewalShowsRevision(t *testing.T) {
	t.Parallel()
	m := managerOf(t, t.Context(), func(s *grpc.Server) {
		pb.RegisterKVServer(s, &mute{})
		pb.RegisterLeaseServer(s, renewer{})
	})
	defer m.Close()
	if _, _, err := m.readConfig(t.Context()); err != nil {
		t.Fatal(err)
	}
	m.mu.Lock()
	m.claim = &claim{lease: 1, ttl: time.Minute}
	m.mu.Unlock()
	if !m.renewClaim() || m.latestPoint().revision != renewedAt {
		t.Errorf("etcd's revision is %d, and %d is known", renewedAt, m.latestPoint().revision)
	}
}

const renewedAt = 1000

// A renewer has renewed each etcd lease, and is at the revision renewedAt.
type renewer struct{ pb.UnimplementedLeaseServer }

func (renewer) LeaseKeepAlive(stream pb.Lease_LeaseKeepAliveServer) error {
	r, err := stream.Recv()
	if err != nil {
		return err
	}
	return stream.Send(&pb.LeaseKeepAliveResponse{Header: &pb.ResponseHeader{Revision: renewedAt}, ID: r.ID, TTL: 60})
}

func (renewer) LeaseRevoke(context.Context, *pb.LeaseRevokeRequest) (*pb.LeaseRevokeResponse, error) {
	return &pb.LeaseRevokeResponse{Header: &pb.ResponseHeader{Revision: renewedAt}}, nil
}
