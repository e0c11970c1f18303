package etcd_test

import (
	"context"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
)

// A proxy may keep a connection, and answer its pings, behind which there is
// nobody any more. New connections lead to where somebody is.
func TestConnectionThatLeadsNowhere(t *testing.T) {
	s := newOwnSite(t)
	s.up()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	asked := make(chan struct{}, 100)
	nowhere := grpc.NewServer(
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}),
		grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
			asked <- struct{}{}
			<-stream.Context().Done()
			return stream.Context().Err()
		}))
	go nowhere.Serve(listener)
	defer nowhere.Stop()

	s.relay.point(listener.Addr().String())
	o := s.options("a")
	m := s.managerWith(o)
	done := make(chan error, 1)
	go func() {
		_, err := m.Previous(s.ctx(), want("198.18.0.1").Attrs)
		done <- err
	}()
	receive(t, asked)
	s.relay.divert(s.server.addr())
	if err := receive(t, done); err != nil {
		t.Error(err)
	}
	store := "etcd at " + o.Endpoints[0]
	if lines, _ := log.lines(store); len(lines) != 2 || !strings.Contains(lines[1], "is back") {
		t.Errorf("the log has %q", lines)
	}
}

// Endpoints that accept connections and say nothing are in nobody's way.
func TestEndpointsThatSayNothing(t *testing.T) {
	s := newOwnSite(t)
	s.up()
	o := s.options("a")
	real := o.Endpoints[0]
	o.Endpoints = nil
	for range 2 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		o.Endpoints = append(o.Endpoints, "http://"+l.Addr().String())
	}
	o.Endpoints = append(o.Endpoints, real)
	s.answers(o)
	if lines, _ := log.lines(real); len(lines) != 0 {
		t.Errorf("the log has %q", lines)
	}
}

// Of a cluster of three one member hangs, and then a second.
func TestMembersThatHang(t *testing.T) {
	t.Parallel()
	ofEachVersion(t, func(t *testing.T, path string) {
		s, members := newClusterSite(t, path)
		o := s.options("a")
		o.Endpoints = nil
		for _, p := range members {
			o.Endpoints = append(o.Endpoints, "http://"+p.addr())
		}
		s.start()
		w := s.worker(o)
		w.store = "etcd at " + strings.Join(o.Endpoints, ",")

		members[0].signal(t, syscall.SIGSTOP)
		s.settle()
		w.works()
		before, _ := log.lines(w.store)
		began, _ := log.lines("cannot be used", w.store)
		members[1].signal(t, syscall.SIGSTOP)
		log.await(t, len(began)+1, "cannot be used", w.store)
		// The member without a leader refuses requests at once: the first of the pauses between them are short.
		requests, since := s.requests(), time.Now()
		time.Sleep(6 * time.Second)
		s.few(18, requests, since)
		members[0].signal(t, syscall.SIGCONT)
		members[1].signal(t, syscall.SIGCONT)
		s.settle()
		w.works()
		began, _ = log.lines("cannot be used", w.store)
		log.await(t, len(began), "is back", w.store)
		// One request may still have waited for the first member when the second hung, and may have failed before all
		// others do: two outages then. Each is one line at its beginning and one at its end.
		lines, _ := log.lines(w.store)
		if n := len(lines) - len(before); n > 4 {
			t.Errorf("%d lines about two members that hang, want at most 4:\n%s", n, strings.Join(lines, "\n"))
		}
		for i, line := range lines {
			if want := []string{"cannot be used", "is back"}[i%2]; !strings.Contains(line, want) {
				t.Errorf("line %d is %q, want %q", i, line, want)
			}
		}
	})
}

// settle returns when the cluster has a leader again.
func (s *programSite) settle() {
	s.t.Helper()
	for ctx := s.ctx(); ; {
		_, err := s.client.Put(ctx, "x", "")
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			s.t.Fatal(err)
		}
	}
}

// etcd's database is full, until the administrator has made room.
func TestDatabaseIsFull(t *testing.T) {
	t.Parallel()
	ofEachVersion(t, func(t *testing.T, path string) {
		s := newProgramSite(t, path, "--quota-backend-bytes=4000000")
		s.up()
		o := s.options("a")
		w := s.worker(o)
		w.refused("etcdctl alarm disarm", func() {
			for {
				if _, err := s.client.Put(s.ctx(), "filler", strings.Repeat("x", 500000)); err != nil {
					return
				}
			}
		}, func() {
			got, err := s.client.Delete(s.ctx(), "filler")
			if err != nil {
				t.Fatal(err)
			}
			must(s, func(ctx context.Context) (*clientv3.CompactResponse, error) {
				return s.client.Compact(ctx, got.Header.Revision, clientv3.WithCompactPhysical())
			})
			must(s, func(ctx context.Context) (*clientv3.DefragmentResponse, error) {
				return s.client.Defragment(ctx, "http://"+s.program.addr())
			})
			must(s, func(ctx context.Context) (*clientv3.AlarmResponse, error) {
				return s.client.AlarmDisarm(ctx, &clientv3.AlarmMember{})
			})
		})
	})
}
