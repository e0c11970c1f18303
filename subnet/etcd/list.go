package etcd

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// listed are all records as they were when they were last read. A node that starts needs all records several times, for
// its lease and for its peers: the first time it reads them, and then what has changed since.
type listed struct {
	turn chan struct{} // one element: the right to read all records

	mu   sync.Mutex
	last *listing // nil: none, or too long ago
}

// keepListed is how long all records are kept to be read again: a node that starts takes less. They are as large as what
// peers need.
const keepListed = 5 * time.Second

func newListed() listed { return listed{turn: make(chan struct{}, 1)} }

func (l *listed) get() *listing {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last
}

// set keeps a listing for keepListed at most.
func (l *listed) set(now *listing) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last = now
	time.AfterFunc(keepListed, l.forget)
}

// forget drops what is kept, once a lease has been acquired, or after a while.
func (l *listed) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last = nil
}

// list reads all records as of one revision.
func (m *Manager) list(ctx context.Context) ([]record, watchPoint, error) {
	select {
	case m.listed.turn <- struct{}{}:
		defer func() { <-m.listed.turn }()
	case <-ctx.Done():
		return nil, watchPoint{}, ctx.Err()
	}
	now, err := m.listChanged(ctx, m.listed.get())
	if err == nil && now == nil {
		now, err = m.listAll(ctx)
	}
	if err != nil {
		return nil, watchPoint{}, err
	}
	m.listed.set(now)
	m.nodes.Store(int64(len(now.keys)))
	m.records.ForgetOthers(maps.Keys(now.keys))
	return slices.Clone(now.records), now.at, nil // the caller may change what it gets
}

// listAll reads all records in pages.
func (m *Manager) listAll(ctx context.Context) (*listing, error) {
	for {
		l := &listing{Manager: m, next: m.subnetsPrefix(), limit: page, keys: map[string]bool{}}
		for !l.done {
			at, err := m.do(ctx, "read the leases", l.read)
			if err != nil {
				return nil, err
			}
			if l.at.invalid == nil {
				l.at = at
			}
		}
		if !l.lost {
			return l, nil
		}
	}
}

// listChanged returns an earlier listing with what has changed since; nil when that cannot be told.
func (m *Manager) listChanged(ctx context.Context, before *listing) (*listing, error) {
	if before == nil {
		return nil, nil
	}
	var found *clientv3.GetResponse
	read := func(ctx context.Context, c *clientv3.Client) (h *pb.ResponseHeader, err error) {
		found, err = c.Get(ctx, m.subnetsPrefix(), clientv3.WithPrefix(), clientv3.WithMinModRev(before.at.revision+1))
		switch {
		case tooLarge(err):
			found = nil
			return nil, nil
		case err != nil:
			return nil, err
		}
		return found.Header, nil
	}
	at, err := m.do(ctx, "read the leases", read)
	if err != nil || found == nil || at.invalid != before.at.invalid || at.revision < before.at.revision {
		return nil, err
	}
	now := &listing{Manager: m, at: at, keys: maps.Clone(before.keys)}
	changed := map[string]bool{}
	for _, kv := range found.Kvs {
		changed[string(kv.Key)] = true
		now.take(kv)
	}
	if int(found.Count) != len(now.keys) { // of all keys: some have been deleted
		return nil, nil
	}
	for _, r := range before.records {
		if !changed[r.key] {
			now.records = append(now.records, r)
		}
	}
	slices.SortFunc(now.records, func(a, b record) int { return strings.Compare(a.key, b.key) })
	return now, nil
}

// page is how many records are read in one request: some 250 KB. An answer of megabytes would keep etcd from answering
// others meanwhile.
const page = 1000

// A listing is the state of reading all records: in pages, which are smaller where an answer would be larger than
// maxAnswer. Others may write any number of records of etcd's largest size.
type listing struct {
	*Manager
	at      watchPoint // of the first answer; zero: there was none
	next    string     // the key to go on from
	limit   int64      // of keys per answer
	done    bool
	lost    bool // etcd no longer has the revision of the first answer
	keys    map[string]bool
	records []record
}

// read is a request for the next records.
func (l *listing) read(ctx context.Context, c *clientv3.Client) (*pb.ResponseHeader, error) {
	found, err := l.get(ctx, c)
	switch {
	case errors.Is(err, rpctypes.ErrCompacted) || errors.Is(err, rpctypes.ErrFutureRev):
		l.done, l.lost = true, true
		return nil, nil
	case tooLarge(err) && l.limit == 1: // this one is larger than any record that is read
		found, err = l.get(ctx, c, clientv3.WithKeysOnly())
	case tooLarge(err):
		l.limit = max(1, l.limit/8)
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, kv := range found.Kvs {
		l.take(kv)
	}
	l.done = !found.More || len(found.Kvs) == 0
	if !l.done {
		l.next = string(found.Kvs[len(found.Kvs)-1].Key) + "\x00"
	}
	l.limit = min(2*l.limit, page)
	return found.Header, nil
}

// take adds what a key has.
func (l *listing) take(kv *mvccpb.KeyValue) {
	l.keys[string(kv.Key)] = true
	if r, ok := l.parse(kv); ok {
		l.records = append(l.records, r)
	}
}

func (l *listing) get(ctx context.Context, c *clientv3.Client, options ...clientv3.OpOption) (
	*clientv3.GetResponse, error,
) {
	return c.Get(ctx, l.next, append(options, clientv3.WithRange(clientv3.GetPrefixRangeEnd(l.subnetsPrefix())),
		clientv3.WithLimit(l.limit), clientv3.WithRev(l.at.revision))...)
}

// tooLarge tells whether an answer was larger than maxAnswer.
func tooLarge(err error) bool {
	return status.Code(err) == codes.ResourceExhausted && strings.Contains(err.Error(), "received message")
}
