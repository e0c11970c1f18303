package etcd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/subnet"
)

// A record is a key under subnets. The zero record stands for a key that does not exist.
type record struct {
	key     string
	subnets subnet.Subnets
	value   []byte
	attrs   subnet.Attrs
	valid   bool // the value could be read; attrs is zero otherwise

	created, changed int64            // revisions
	lease            clientv3.LeaseID // clientv3.NoLease: it does not expire
}

func (r record) exists() bool { return r.created != 0 }

// isGone tells whether the record stands for one that this node had, and that is gone from etcd.
func (r record) isGone() bool { return r.key != "" && r.changed == 0 }

// reserved tells whether the operator has reserved the subnets for a node.
func (r record) reserved() bool { return r.exists() && r.valid && r.lease == clientv3.NoLease }

// A reservation is the value of a record that an operator has written, in JSON. For flannel, it is a record like others:
// the node that takes it writes its own.
type reservation struct {
	PublicIP, PublicIPv6 string `json:",omitempty"`
	Unused               bool   // true
}

// unused tells whether the record is a reservation that no node has taken yet. An operator may have written it without
// flannelctl.
func (r record) unused() bool {
	if !r.reserved() || r.attrs.BackendType != "" || r.attrs.BackendData != nil || r.attrs.BackendV6Data != nil {
		return false
	}
	var v reservation
	return r.created == r.changed || json.Unmarshal(r.value, &v) == nil && v.Unused
}

// asLease returns the record as the lease that it is, without the time of its end.
func (r record) asLease() subnet.Lease {
	return subnet.Lease{Subnets: r.subnets, Attrs: r.attrs, Created: r.created}
}

// overlaps tells whether the record shares an address with the subnets.
func (r record) overlaps(s subnet.Subnets) bool {
	return r.subnets.IPv4.Overlaps(s.IPv4) || r.subnets.IPv6.Overlaps(s.IPv6)
}

// parse reads a record. If the value cannot be read, the record still occupies its subnets; if the key cannot be read,
// ok is false. Either is logged.
func (m *Manager) parse(kv *mvccpb.KeyValue) (r record, ok bool) {
	r = record{
		key:     string(kv.Key),
		value:   kv.Value,
		created: kv.CreateRevision,
		changed: kv.ModRevision,
		lease:   clientv3.LeaseID(kv.Lease),
	}
	var err error
	if r.subnets, err = subnet.ParseKey(strings.TrimPrefix(r.key, m.subnetsPrefix())); err != nil {
		m.records.Error(r.key, r.changed, err, "A key in etcd names no lease; ignoring it", "key", plain.Text(r.key))
		return record{}, false
	}
	if r.attrs, err = subnet.ParseAttrs(kv.Value); err != nil {
		r.value = bytes.Clone(kv.Value[:min(len(kv.Value), plain.Most+1)]) // which may be all of a megabyte
		m.records.Error(r.key, r.changed, err, "A lease in etcd cannot be read; its node is not reachable",
			"key", r.key, "fix", "if no node holds the lease: etcdctl del "+plain.Shell(r.key))
		return r, true
	}
	r.valid = true
	return r, true
}

// list reads all records as of one revision: in one request, or in several where the answer would be larger than
// maxAnswer. Others may write any number of records of etcd's largest size.
func (m *Manager) list(ctx context.Context) ([]record, watchPoint, error) {
	for {
		l := listing{Manager: m, next: m.subnetsPrefix()}
		for !l.done {
			at, err := m.do(ctx, "read the leases", l.read)
			if err != nil {
				return nil, watchPoint{}, err
			}
			if l.at.invalid == nil {
				l.at = at
			}
		}
		if l.lost {
			continue
		}
		m.records.ForgetOthers(slices.Values(l.keys))
		return l.records, l.at, nil
	}
}

// A listing is the state of reading all records.
type listing struct {
	*Manager
	at      watchPoint // of the first answer; zero: there was none
	next    string     // the key to go on from
	limit   int64      // of keys per answer; 0: none
	done    bool
	lost    bool // etcd no longer has the revision of the first answer
	keys    []string
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
	case tooLarge(err) && l.limit == 0:
		l.limit = 1024
		return nil, nil
	case tooLarge(err):
		l.limit = max(1, l.limit/8)
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, kv := range found.Kvs {
		l.keys = append(l.keys, string(kv.Key))
		if r, ok := l.parse(kv); ok {
			l.records = append(l.records, r)
		}
	}
	l.done = !found.More || len(found.Kvs) == 0
	if !l.done {
		l.next = string(found.Kvs[len(found.Kvs)-1].Key) + "\x00"
	}
	l.limit *= 2
	return found.Header, nil
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

// publish gives the node's record the value, and renews its etcd lease, or replaces an etcd lease that has ended; a
// reservation stays without an etcd lease. The record is written only when it changes, because each write wakes all
// peers; or where this node has found it by its address alone: it may be another machine's, whose LeaseFile then counts
// no longer; or where it is a reservation that no node has taken. Now is the record as it was last read; if it is zero,
// publish creates the record. The results are the record and its end; ok is false when another program was faster, or
// one of also does not hold, and nothing was done.
func (m *Manager) publish(ctx context.Context, now record, key string, value []byte, also ...clientv3.Cmp) (
	r record, expires time.Time, ok bool, err error,
) {
	lease := now.lease
	granted := false
	if !now.reserved() {
		ttl := time.Duration(0)
		if lease != clientv3.NoLease {
			if ttl, err = m.renew(ctx, "renew the lease", lease); err != nil {
				return record{}, time.Time{}, false, err
			}
		}
		if ttl <= 0 {
			if lease, ttl, err = m.grant(ctx, leaseTTL); err != nil {
				return record{}, time.Time{}, false, err
			}
			granted = true
		}
		expires = time.Now().Add(ttl)
	}
	known := now.exists() && m.isWrote(now)
	if now.exists() && !granted && bytes.Equal(now.value, value) && !now.unused() && (known || m.options.LeaseFile == "") {
		return now, expires, true, nil
	}
	if known {
		m.keep(value)
	}
	var answer *clientv3.TxnResponse
	write := func(ctx context.Context, c *clientv3.Client) (h *pb.ResponseHeader, err error) {
		answer, err = c.Txn(ctx).
			If(append(also, clientv3.Compare(clientv3.ModRevision(key), "=", now.changed))...).
			Then(clientv3.OpPut(key, string(value), clientv3.WithLease(lease)), clientv3.OpGet(key)).
			Else(clientv3.OpGet(key)).
			Commit()
		if err != nil {
			return nil, err
		}
		return answer.Header, nil
	}
	if _, err = m.do(ctx, "write the lease "+key, write); err != nil {
		return record{}, time.Time{}, false, err
	}
	// The last operation is the get. If the answer to the first attempt was lost, the second one finds what the first
	// one wrote.
	kvs := answer.Responses[len(answer.Responses)-1].GetResponseRange().Kvs
	if len(kvs) == 1 && clientv3.LeaseID(kvs[0].Lease) == lease && bytes.Equal(kvs[0].Value, value) {
		if r, ok := m.parse(kvs[0]); ok {
			return r, expires, true, nil
		}
	}
	if granted {
		m.revoke(lease)
	}
	return record{}, time.Time{}, false, nil
}

// remove deletes a record, unless it changed since it was seen.
func (m *Manager) remove(ctx context.Context, r record) error {
	return m.removeKey(ctx, "delete the lease "+r.key, r.key, r.changed)
}

// removeKey deletes a key, unless it changed since the revision.
func (m *Manager) removeKey(ctx context.Context, operation, key string, changed int64) error {
	remove := func(ctx context.Context, c *clientv3.Client) (*pb.ResponseHeader, error) {
		answer, err := c.Txn(ctx).
			If(clientv3.Compare(clientv3.ModRevision(key), "=", changed)).
			Then(clientv3.OpDelete(key)).
			Commit()
		if err != nil {
			return nil, err
		}
		return answer.Header, nil
	}
	_, err := m.do(ctx, operation, remove)
	return err
}

// grant creates an etcd lease.
func (m *Manager) grant(ctx context.Context, ttl time.Duration) (id clientv3.LeaseID, actual time.Duration, err error) {
	_, err = m.do(ctx, "create an etcd lease", func(ctx context.Context, c *clientv3.Client) (*pb.ResponseHeader, error) {
		answer, err := c.Grant(ctx, int64(ttl/time.Second))
		if err != nil {
			return nil, err
		}
		id, actual = answer.ID, time.Duration(answer.TTL)*time.Second
		return nil, nil // the header is that of one server, which may lag
	})
	return id, actual, err
}

// renew renews an etcd lease for its full time, which it returns; zero when the lease is gone. The client's own
// KeepAlive wakes up four times a second.
func (m *Manager) renew(ctx context.Context, operation string, id clientv3.LeaseID) (ttl time.Duration, err error) {
	_, err = m.do(ctx, operation, func(ctx context.Context, c *clientv3.Client) (*pb.ResponseHeader, error) {
		// The client's KeepAliveOnce repeats a failed attempt at once, for as long as ctx lasts: that would take a whole
		// processor.
		stream, err := clientv3.RetryLeaseClient(c).LeaseKeepAlive(ctx)
		if err != nil {
			return nil, err
		}
		if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: int64(id)}); err != nil {
			return nil, err
		}
		answer, err := stream.Recv()
		if err != nil {
			return nil, err
		}
		ttl = time.Duration(answer.TTL) * time.Second
		return nil, stream.CloseSend()
	})
	return ttl, err
}

// revoke ends an etcd lease that is not needed any more. A lease that cannot be revoked ends by itself.
func (m *Manager) revoke(id clientv3.LeaseID) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	err := m.connection.attempt(ctx, func(ctx context.Context, c *clientv3.Client) error {
		_, err := c.Revoke(ctx, id)
		return err
	})
	if err != nil {
		m.log.V(2).Info("Cannot revoke an etcd lease", "id", id, "err", err)
	}
}
