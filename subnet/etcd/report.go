package etcd

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/subnet"
)

// parallelReads is how many etcd leases are read at once.
const parallelReads = 16

// Expiries implements subnet.Manager.
func (m *Manager) Expiries(ctx context.Context, of ...subnet.Subnets) (map[subnet.Subnets]time.Time, error) {
	records, _, err := m.list(ctx)
	if err != nil {
		return nil, err
	}
	if len(of) > 0 {
		records = slices.DeleteFunc(records, func(r record) bool { return !slices.Contains(of, r.subnets) })
	}
	return m.expiriesOf(ctx, records)
}

// expiriesOf asks when records end. It takes a request for each of them.
func (m *Manager) expiriesOf(ctx context.Context, records []record) (map[subnet.Subnets]time.Time, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var mu sync.Mutex
	ends := map[subnet.Subnets]time.Time{}
	var all sync.WaitGroup
	todo := make(chan record)
	for range parallelReads {
		all.Go(func() {
			for r := range todo {
				ttl, err := m.timeToLive(ctx, r.lease)
				if err != nil {
					cancel(err)
					continue
				}
				mu.Lock()
				ends[r.subnets] = time.Now().Add(ttl)
				mu.Unlock()
			}
		})
	}
	for _, r := range records {
		if r.lease != clientv3.NoLease {
			todo <- r
		}
	}
	close(todo)
	all.Wait()
	return ends, context.Cause(ctx)
}

// timeToLive returns how long an etcd lease will last; less than zero: it has ended.
func (m *Manager) timeToLive(ctx context.Context, id clientv3.LeaseID) (ttl time.Duration, err error) {
	_, err = m.do(ctx, "read when leases end", func(ctx context.Context, c *clientv3.Client) (*pb.ResponseHeader, error) {
		answer, err := c.TimeToLive(ctx, id)
		if err != nil {
			return nil, err
		}
		ttl = time.Duration(answer.TTL) * time.Second
		return nil, nil
	})
	return ttl, err
}

// Clock implements subnet.Manager. gRPC answers have no time, but at the same address etcd answers over HTTP.
func (m *Manager) Clock(ctx context.Context) (time.Time, error) {
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: m.tls.config(), DisableKeepAlives: true}}
	last := errors.New("no endpoint is reached by HTTP")
	endpoints := m.options.Endpoints
	if d := m.connection.discovery; d != nil {
		var err error
		if endpoints, err = d.lookUp(ctx); err != nil {
			return time.Time{}, err
		}
	}
	for _, e := range endpoints {
		if !strings.HasPrefix(e, "http") {
			continue
		}
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, e+"/version", nil)
		if err != nil {
			return time.Time{}, err
		}
		answer, err := client.Do(request)
		if err != nil {
			last = err
			continue
		}
		answer.Body.Close()
		at, err := http.ParseTime(answer.Header.Get("Date"))
		if err == nil {
			return at, nil
		}
		last = fmt.Errorf("the answer of %s has no valid Date: %w", e, err)
	}
	return time.Time{}, last
}

// checkCommand returns the command that asks etcd whether it works, with our options. etcdctl asks for the password.
func checkCommand(o Options, endpoints []string) string {
	type flag struct{ name, value string }
	flags := []flag{{"endpoints", strings.Join(endpoints, ",")}}
	if len(endpoints) == 0 {
		flags = []flag{{"discovery-srv", o.DiscoverySRV}, {"discovery-srv-name", o.DiscoverySRVName}}
	}
	flags = append(flags, flag{"cacert", o.CAFile}, flag{"cert", o.CertFile}, flag{"key", o.KeyFile}, flag{"user", o.Username})
	command := "etcdctl"
	for _, f := range flags {
		if f.value != "" {
			command += " " + plain.Shell("--"+f.name+"="+f.value)
		}
	}
	return command + " endpoint health"
}
