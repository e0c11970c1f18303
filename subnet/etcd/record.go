package etcd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

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
func (r record) asLease() *subnet.Lease {
	return &subnet.Lease{Subnets: r.subnets, Attrs: r.attrs, Created: r.created}
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

// publish gives the node's record the value, and renews its etcd lease, or replaces an etcd lease that has ended; a
// reservation stays without an etcd lease. The record is written only when it changes, because each write wakes all
// peers; or where this node has found it by its address alone: it may be another machine's, whose LeaseFile then counts
// no longer; or where it is a reservation that no node has taken. Now is the record as it was last read; if it is zero,
// publish creates the record. The results are the record and its end; ok is false when nothing was done: another program
// was faster, one of also does not hold, or the etcd lease ended meanwhile.
func (m *Manager) publish(ctx context.Context, now record, key string, value []byte, also ...clientv3.Cmp) (
	r record, expires time.Time, ok bool, err error,
) {
	lease := now.lease
	granted := false
	if !now.reserved() {
		ttl := time.Duration(0)
		if lease != clientv3.NoLease {
			if ttl, _, err = m.renew(ctx, "renew the lease", lease); err != nil {
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
	get := clientv3.OpGet(key)
	answer, _, err := m.commit(ctx, "write the lease "+key,
		append(also, clientv3.Compare(clientv3.ModRevision(key), "=", now.changed)),
		[]clientv3.Op{clientv3.OpPut(key, string(value), clientv3.WithLease(lease)), get}, []clientv3.Op{get})
	// The last operation is the get. If the answer to the first attempt was lost, the second one finds what the first
	// one wrote.
	if err == nil {
		kvs := answer.Responses[len(answer.Responses)-1].GetResponseRange().Kvs
		if len(kvs) == 1 && clientv3.LeaseID(kvs[0].Lease) == lease && bytes.Equal(kvs[0].Value, value) {
			if r, ok := m.parse(kvs[0]); ok {
				return r, expires, true, nil
			}
		}
	}
	if granted {
		m.revoke(lease)
	}
	if errors.Is(err, errLeaseEnded) {
		err = nil
	}
	return record{}, time.Time{}, false, err
}

// remove deletes a record, unless it changed since it was seen.
func (m *Manager) remove(ctx context.Context, r record) error {
	return m.removeKey(ctx, "delete the lease "+r.key, r.key, r.changed)
}

// removeKey deletes a key, unless it changed since the revision.
func (m *Manager) removeKey(ctx context.Context, operation, key string, changed int64) error {
	_, _, err := m.commit(ctx, operation, []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(key), "=", changed)},
		[]clientv3.Op{clientv3.OpDelete(key)}, nil)
	return err
}

// errLeaseEnded says that nothing was written because the etcd lease has ended that keys were to be put on: during an
// outage between its grant and the transaction, or with the loss of etcd's data. The caller needs another etcd lease.
var errLeaseEnded = rpctypes.ErrLeaseNotFound

// commit makes a transaction. The error is errLeaseEnded, or that of ctx.
func (m *Manager) commit(ctx context.Context, operation string, conditions []clientv3.Cmp, then, otherwise []clientv3.Op) (
	answer *clientv3.TxnResponse, at watchPoint, err error,
) {
	ended := false
	at, err = m.do(ctx, operation, func(ctx context.Context, c *clientv3.Client) (h *pb.ResponseHeader, err error) {
		answer, err = c.Txn(ctx).If(conditions...).Then(then...).Else(otherwise...).Commit()
		if ended = errors.Is(err, errLeaseEnded); ended {
			return nil, nil // no attempt can succeed
		}
		if err != nil {
			return nil, err
		}
		return answer.Header, nil
	})
	if err == nil && ended {
		err = errLeaseEnded
	}
	return answer, at, err
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

// renew renews an etcd lease for its full time, which it returns; zero when the lease is gone. The revision is the
// latest of one server. The client's own KeepAlive wakes up four times a second.
func (m *Manager) renew(ctx context.Context, operation string, id clientv3.LeaseID) (
	ttl time.Duration, revision int64, err error,
) {
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
		ttl, revision = time.Duration(answer.TTL)*time.Second, answer.GetHeader().GetRevision()
		return nil, stream.CloseSend()
	})
	return ttl, revision, err
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
