package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"github.com/flanneld/flanneld/test/lab"
)

// A cluster is etcd on loopback addresses, or kine in its place, and a client.
type cluster struct {
	*clientv3.Client
	members   []*server
	endpoints []string
	requests  atomic.Int64 // of the client
}

// startEtcd starts an etcd of three members with no data, in an empty directory.
func startEtcd(program, dir string) (*cluster, error) {
	const members = 3
	c := &cluster{}
	var initial []string
	for i := range members {
		initial = append(initial, fmt.Sprintf("m%d=http://127.0.0.1:%d", i, peerPort(i)))
	}
	for i := range members {
		url := fmt.Sprintf("http://127.0.0.1:%d", clientPort(i))
		c.endpoints = append(c.endpoints, url)
		name := fmt.Sprintf("m%d", i)
		c.members = append(c.members, &server{kind: "etcd", log: filepath.Join(dir, name+".log"), args: []string{
			program, "--name", name, "--data-dir", filepath.Join(dir, name),
			"--listen-client-urls", fmt.Sprintf("http://0.0.0.0:%d", clientPort(i)), "--advertise-client-urls", url,
			"--listen-peer-urls", fmt.Sprintf("http://127.0.0.1:%d", peerPort(i)),
			"--initial-advertise-peer-urls", fmt.Sprintf("http://127.0.0.1:%d", peerPort(i)),
			"--initial-cluster", strings.Join(initial, ","), "--log-level", "error",
			"--unsafe-no-fsync", // the three members share one disk, which real ones do not
		}})
	}
	return c, c.start()
}

// startKine starts kine on SQLite with no data, in an empty directory.
func startKine(program, dir string) (*cluster, error) {
	url := fmt.Sprintf("http://127.0.0.1:%d", clientPort(0))
	c := &cluster{endpoints: []string{url}, members: []*server{{
		kind: "kine", log: filepath.Join(dir, "kine.log"), args: []string{
			program, "--listen-address", url, "--metrics-bind-address=0", "--endpoint",
			"sqlite://" + filepath.Join(dir, "kine.db") + "?_journal=WAL&cache=shared&_busy_timeout=30000",
			"--compact-min-retain=0", // compact is for all that there is
		},
	}}}
	return c, c.start()
}

func clientPort(member int) int { return 2379 + 1000*member }
func peerPort(member int) int   { return 2380 + 1000*member }

// start starts the members, and makes the client.
func (c *cluster) start() (err error) {
	for _, m := range c.members {
		if err := m.start(); err != nil {
			return err
		}
	}
	count := func(ctx context.Context, method string, in, out any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker,
		opts ...grpc.CallOption) error {
		c.requests.Add(1)
		return invoke(ctx, method, in, out, cc, opts...)
	}
	quick := grpc.ConnectParams{MinConnectTimeout: time.Second, Backoff: backoff.Config{
		BaseDelay: 50 * time.Millisecond, Multiplier: 1.5, MaxDelay: 500 * time.Millisecond,
	}}
	c.Client, err = clientv3.New(clientv3.Config{
		Endpoints: c.endpoints, Logger: zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(quick), grpc.WithChainUnaryInterceptor(count)},
	})
	return err
}

func (c *cluster) close() {
	if c == nil {
		return
	}
	if c.Client != nil {
		c.Client.Close()
	}
	for _, m := range c.members {
		m.kill()
	}
}

// leader returns the member that leads.
func (c *cluster) leader(ctx context.Context) (*server, error) {
	for i, m := range c.members {
		status, err := c.Status(ctx, c.endpoints[i])
		if err != nil {
			return nil, err
		}
		if status.Leader == status.Header.MemberId {
			return m, nil
		}
	}
	return nil, errors.New("etcd has no leader")
}

// followers returns the other members.
func (c *cluster) followers(ctx context.Context) ([]*server, error) {
	leader, err := c.leader(ctx)
	return slices.DeleteFunc(slices.Clone(c.members), func(m *server) bool { return m == leader }), err
}

// compact removes the history of all keys.
func (c *cluster) compact(ctx context.Context) error {
	now, err := c.Get(ctx, lab.Prefix)
	if err != nil {
		return err
	}
	_, err = c.Compact(ctx, now.Header.Revision, clientv3.WithCompactPhysical())
	return err
}

// loseLeader is a bad moment.
func (c *cluster) loseLeader(ctx context.Context, f *fleet) (time.Time, error) {
	leader, err := c.leader(ctx)
	if err != nil {
		return time.Time{}, err
	}
	return lose(ctx, f, leader)
}

// loseFollower is a bad moment.
func (c *cluster) loseFollower(ctx context.Context, f *fleet) (time.Time, error) {
	followers, err := c.followers(ctx)
	if err != nil {
		return time.Time{}, err
	}
	return lose(ctx, f, followers[0])
}

// loseAll is a bad moment.
func (c *cluster) loseAll(ctx context.Context, f *fleet) (time.Time, error) {
	return outage(ctx, f, c.members...)
}
