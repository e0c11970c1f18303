package etcd

import (
	"context"
	"net"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
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
