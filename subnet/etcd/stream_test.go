package etcd

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"k8s.io/klog/v2"
	"k8s.io/klog/v2/textlogger"
)

// A refuser refuses all watches, as etcd does when a token has ended.
type refuser struct{ pb.UnimplementedWatchServer }

func (refuser) Watch(stream pb.Watch_WatchServer) error {
	for {
		if _, err := stream.Recv(); err != nil {
			return err
		}
		err := stream.Send(&pb.WatchResponse{Header: &pb.ResponseHeader{}, WatchId: clientv3.InvalidWatchID, Created: true,
			Canceled: true, CancelReason: rpctypes.ErrGRPCInvalidAuthToken.Error()})
		if err != nil {
			return err
		}
	}
}

// managerOf returns a manager of a server.
func managerOf(t *testing.T, ctx context.Context, register func(*grpc.Server)) *Manager {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	register(server)
	go server.Serve(listener)
	t.Cleanup(server.Stop)
	m, err := New(ctx, Options{Endpoints: []string{"http://" + listener.Addr().String()}, Identity: "a"})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// However many watches fail at the same time, each of them ends, and so does the manager: see stream.
func TestWatchesThatFailTogether(t *testing.T) {
	m := managerOf(t, t.Context(), func(s *grpc.Server) { pb.RegisterWatchServer(s, refuser{}) })
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for range 100 {
			var watches sync.WaitGroup
			for range 8 {
				watches.Go(func() {
					if m.watch(t.Context(), watchPoint{}, "key", nil, func(*clientv3.WatchResponse) bool { return true }) == nil {
						t.Error("a watch that is refused has no error")
					}
				})
			}
			watches.Wait()
		}
		m.Close()
	}()
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Fatal("watches wait for ever")
	}
}

// A mute server has a lease more at each request, and reports none of them to a watch, as a proxy may that has lost the
// watch of its member.
type mute struct {
	pb.UnimplementedKVServer
	pb.UnimplementedWatchServer
	leases atomic.Int64
	notify bool // it sends progress notifications
}

func (s *mute) Range(_ context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	answer := &pb.RangeResponse{Header: &pb.ResponseHeader{Revision: 1000}}
	if string(r.Key) != "subnets/" {
		return answer, nil
	}
	n := s.leases.Add(1)
	answer.Header.Revision, answer.Count = n, n
	for i := range n {
		answer.Kvs = append(answer.Kvs, &mvccpb.KeyValue{
			Key: fmt.Appendf(nil, "subnets/10.5.%d.0-24", i), CreateRevision: i + 1, ModRevision: i + 1,
			Lease: 1, Value: fmt.Appendf(nil, `{"PublicIP":"198.18.0.%d"}`, i+1),
		})
	}
	return answer, nil
}

func (s *mute) Watch(stream pb.Watch_WatchServer) error {
	for id := int64(0); ; id++ {
		if _, err := stream.Recv(); err != nil {
			return err
		}
		err := stream.Send(&pb.WatchResponse{Header: &pb.ResponseHeader{Revision: 1}, WatchId: id, Created: true})
		for s.notify && err == nil {
			err = stream.Send(&pb.WatchResponse{Header: &pb.ResponseHeader{Revision: 1}, WatchId: id})
			time.Sleep(time.Millisecond)
		}
		if err != nil {
			return err
		}
	}
}

// A watch without answers is not trusted for ever, and what it did not report is known in the end. A watch with progress
// notifications goes on.
func TestSilentWatch(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		notify    bool
		silence   time.Duration
		snapshots int
	}{"silent": {false, 100 * time.Millisecond, 3}, "progress": {true, 2 * time.Second, 1}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var log bytes.Buffer
			logger := textlogger.NewLogger(textlogger.NewConfig(textlogger.Output(&log)))
			m := managerOf(t, klog.NewContext(t.Context(), logger), func(s *grpc.Server) {
				etcd := &mute{notify: c.notify}
				pb.RegisterKVServer(s, etcd)
				pb.RegisterWatchServer(s, etcd)
			})
			m.silence = c.silence
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			if c.notify {
				time.AfterFunc(2*c.silence, cancel)
			}
			snapshots := 0
			for u := range m.Watch(ctx) {
				snapshots++
				if !u.Snapshot || len(u.Leases) != snapshots {
					t.Errorf("got %+v, want snapshot %d", u, snapshots)
				}
				if !c.notify && snapshots == c.snapshots {
					cancel()
				}
			}
			m.Close()
			if snapshots != c.snapshots {
				t.Errorf("%d snapshots, want %d", snapshots, c.snapshots)
			}
			if said := strings.Count(log.String(), "did not report changes"); said != c.snapshots-1 {
				t.Errorf("the log has %d times that the watch did not report changes:\n%s", said, log.String())
			}
		})
	}
}
