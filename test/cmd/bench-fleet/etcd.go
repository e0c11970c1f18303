package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/subnet/etcd"
	"github.com/flanneld/flanneld/test/lab"
)

const subnetsPrefix = lab.Prefix + "/subnets/"

// maxProxies is how many proxies there are addresses for.
const maxProxies = 100

// An etcdStore is an etcd that holds the leases itself.
type etcdStore struct {
	*cluster
	proxies []*server // between nodes and members; none: nodes reach the members directly
	dir     string
}

// newEtcdStore starts etcd, and proxies of it, in an empty directory.
func newEtcdStore(ctx context.Context, program, dir string, proxies int) (*etcdStore, error) {
	c, err := startEtcd(program, dir)
	s := &etcdStore{cluster: c, dir: dir}
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
	if err := s.startProxies(ctx, program, proxies); err != nil {
		return s, err
	}
	return s, s.put(ctx, lab.Prefix+"/config", network)
}

func proxyPort(proxy int) int { return 23790 + proxy }

// startProxies starts proxies, and waits until they answer. What they do for nodes is not counted: the members count
// what is left of that.
func (s *etcdStore) startProxies(ctx context.Context, program string, count int) error {
	for i := range count {
		file := filepath.Join(s.dir, fmt.Sprintf("proxy%d", i))
		url := fmt.Sprintf("127.0.0.1:%d", proxyPort(i))
		p := &server{kind: "etcd grpc-proxy", log: file + ".log", args: []string{
			program, "grpc-proxy", "start", "--endpoints", strings.Join(s.endpoints, ","), "--data-dir", file,
			"--listen-addr", fmt.Sprintf("0.0.0.0:%d", proxyPort(i)), "--advertise-client-url", url,
		}}
		s.proxies = append(s.proxies, p)
		if err := p.start(); err != nil {
			return err
		}
		if err := lab.Poll(ctx, "etcd grpc-proxy to answer", func() error {
			request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+url+"/health", nil)
			if err != nil {
				return err
			}
			answer, err := http.DefaultClient.Do(request)
			if err != nil {
				return err
			}
			answer.Body.Close()
			if answer.StatusCode != http.StatusOK {
				return errors.New(answer.Status)
			}
			return nil
		}); err != nil {
			return fmt.Errorf("%w; see %s", err, p.log)
		}
	}
	return nil
}

func (s *etcdStore) close() {
	for _, p := range s.proxies {
		p.kill()
	}
	s.cluster.close()
}

func (s *etcdStore) servers() []*server { return append(slices.Clone(s.members), s.proxies...) }
func (s *etcdStore) own() int64         { return s.requests.Load() }
func (s *etcdStore) rests() []rest      { return []rest{{what: "at rest"}} }

func (s *etcdStore) moments() []moment {
	all := []moment{
		{"leader", "the leader is lost", s.loseLeader},
		{"member", "another member is lost", s.loseFollower},
		{"store", "all members are away for 60 s", s.loseAll},
		{"compaction", "a compaction while half of the nodes are cut off", s.loseHistory},
		{"expiry", "every etcd lease ends, 1000 a second", s.expire},
	}
	if len(s.proxies) > 1 {
		all = append(all, moment{"proxy", "a proxy is lost", func(ctx context.Context, f *fleet) (time.Time, error) {
			return lose(ctx, f, s.proxies[0])
		}})
	}
	return all
}

// etcdField is the field of a server of etcd.
func etcdField(t *traffic, line string) *float64 {
	is := func(metric, method string) bool {
		return strings.HasPrefix(line, metric+"{") && strings.Contains(line, `grpc_method="`+method+`"`)
	}
	switch {
	case is("grpc_server_msg_received_total", "Watch"),
		is("grpc_server_msg_sent_total", "LeaseKeepAlive"): // as many as received, which counts the ends of streams, too
		return &t.requests
	case is("grpc_server_msg_sent_total", "Watch"):
		return &t.messages
	case is("grpc_server_started_total", "Watch"), is("grpc_server_started_total", "LeaseKeepAlive"):
		// a proxy keeps one stream open for many requests
	case strings.HasPrefix(line, "grpc_server_started_total{"):
		return &t.requests
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
	port, count := clientPort, len(s.members)
	if len(s.proxies) > 0 {
		port, count = proxyPort, len(s.proxies)
	}
	var endpoints []string
	for i := range count {
		endpoints = append(endpoints, fmt.Sprintf("http://127.0.%d.%d:%d", n.half(), 1+i, port(i)))
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
