package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/subnet/etcd"
	"github.com/flanneld/flanneld/test/lab"
)

const subnetsPrefix = lab.Prefix + "/subnets/"

// An etcdStore is an etcd that holds the leases itself.
type etcdStore struct {
	*cluster
	dir string
}

// newEtcdStore starts etcd in an empty directory.
func newEtcdStore(ctx context.Context, program, dir string) (*etcdStore, error) {
	c, err := startEtcd(program, dir)
	s := &etcdStore{c, dir}
	if err != nil {
		return s, err
	}
	for i, m := range c.members {
		if m.metrics, err = http.NewRequest(http.MethodGet, c.endpoints[i]+"/metrics", nil); err != nil {
			return s, err
		}
		m.client, m.field = http.DefaultClient, etcdField
	}
	if err := awaitAnswer(ctx, s); err != nil {
		return s, err
	}
	return s, s.put(ctx, lab.Prefix+"/config", network)
}

func (s *etcdStore) servers() []*server { return s.members }
func (s *etcdStore) own() int64         { return s.requests.Load() }
func (s *etcdStore) rests() []rest      { return []rest{{what: "at rest"}} }

func (s *etcdStore) moments() []moment {
	return []moment{
		{"leader", "the leader is lost", s.loseLeader},
		{"member", "another member is lost", s.loseFollower},
		{"store", "all members are away for 60 s", s.loseAll},
		{"compaction", "a compaction while half of the nodes are cut off", s.loseHistory},
		{"expiry", "every etcd lease ends, 1000 a second", s.expire},
	}
}

// etcdField is the field of a server of etcd.
func etcdField(t *traffic, line string) *float64 {
	switch watch := strings.Contains(line, `grpc_method="Watch"`); {
	case strings.HasPrefix(line, "grpc_server_started_total{") && !watch,
		strings.HasPrefix(line, "grpc_server_msg_received_total{") && watch:
		return &t.requests // each renewal of an etcd lease is one
	case strings.HasPrefix(line, "grpc_server_msg_sent_total{") && watch:
		return &t.messages
	case strings.HasPrefix(line, "etcd_debugging_mvcc_events_total "):
		return &t.events
	case strings.HasPrefix(line, "etcd_network_client_grpc_received_bytes_total "):
		return &t.in
	case strings.HasPrefix(line, "etcd_network_client_grpc_sent_bytes_total "):
		return &t.out
	}
	return nil
}

func (s *etcdStore) manager(ctx context.Context, n *node) (subnet.Manager, error) {
	var endpoints []string
	for i := range s.members {
		endpoints = append(endpoints, fmt.Sprintf("http://127.0.%d.%d:%d", n.half(), 1+i, clientPort(i)))
	}
	return etcd.New(ctx, etcd.Options{
		Endpoints: endpoints, Prefix: lab.Prefix, Identity: fmt.Sprint("node ", n.number),
		LeaseFile: filepath.Join(s.dir, fmt.Sprintf("node%d.lease", n.number)),
	})
}

func (s *etcdStore) register(context.Context, int, int) error { return nil }

func (s *etcdStore) remove(ctx context.Context, gone []*node) error {
	for _, n := range gone {
		if _, err := s.Delete(ctx, subnetsPrefix+n.lease.Key()); err != nil {
			return err
		}
	}
	return nil
}

func (s *etcdStore) mark(ctx context.Context, number int) error {
	value := fmt.Sprintf(`{"PublicIP":"198.19.255.%d","BackendType":"vxlan","BackendData":{"VNI":1}}`, number)
	return s.put(ctx, fmt.Sprintf("%s9.0.%d.0-24", subnetsPrefix, number), value)
}

// put writes a key, until that succeeds.
func (s *etcdStore) put(ctx context.Context, key, value string) error {
	return lab.Poll(ctx, "writing "+key, func() error {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		_, err := s.Put(ctx, key, value)
		return err
	})
}

func (s *etcdStore) leases(ctx context.Context, nodes int) (map[subnet.Subnets]subnet.Attrs, error) {
	claims, err := s.Get(ctx, lab.Prefix+"/nodes/", clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil {
		return nil, err
	}
	if int(claims.Count) != nodes {
		return nil, fmt.Errorf("etcd has %d claims of %d nodes", claims.Count, nodes)
	}
	records, err := s.Get(ctx, subnetsPrefix, clientv3.WithPrefix())
	if err != nil {
		return nil, err
	}
	leases := map[subnet.Subnets]subnet.Attrs{}
	for _, kv := range records.Kvs {
		of, err := subnet.ParseKey(strings.TrimPrefix(string(kv.Key), subnetsPrefix))
		if err != nil {
			return nil, err
		}
		var a subnet.Attrs
		if err := json.Unmarshal(kv.Value, &a); err != nil {
			return nil, err
		}
		leases[of] = a
	}
	return leases, nil
}

func (s *etcdStore) probe(ctx context.Context) error {
	_, err := s.Put(ctx, "/probe", time.Now().String())
	if err == nil {
		_, err = s.Get(ctx, "/probe")
	}
	return err
}

func (s *etcdStore) loseHistory(ctx context.Context, f *fleet) (time.Time, error) {
	return f.cutHalf(ctx, 15*time.Second, func() error { return s.compact(ctx) })
}

// expire ends all etcd leases, as fast as etcd ends those that nobody renews.
func (s *etcdStore) expire(ctx context.Context, _ *fleet) (since time.Time, err error) {
	leases, err := s.Leases(ctx)
	if err != nil {
		return since, err
	}
	since = time.Now()
	const parallel = 8
	todo := make(chan clientv3.LeaseID)
	var running sync.WaitGroup
	for range parallel {
		running.Go(func() {
			for id := range todo {
				s.Revoke(ctx, id) // an error: it has ended
			}
		})
	}
	for i, l := range leases.Leases {
		time.Sleep(time.Until(since.Add(time.Duration(i) * time.Millisecond)))
		todo <- l.ID
	}
	close(todo)
	running.Wait()
	return since, nil
}
