package etcd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flanneld/flanneld/subnet"
)

// Holdings returns all leases and reservations, sorted, for an operator. Nodes have names where flanneld is alive.
func (m *Manager) Holdings(ctx context.Context) ([]subnet.Holding, error) {
	records, _, err := m.list(ctx)
	if err != nil {
		return nil, err
	}
	ends, err := m.expiriesOf(ctx, records)
	if err != nil {
		return nil, err
	}
	alive, err := m.alive(ctx)
	if err != nil {
		return nil, err
	}
	var all []subnet.Holding
	for _, r := range records {
		h := subnet.Holding{Lease: *r.asLease(), Reserved: r.reserved()}
		h.Expires = ends[r.subnets]
		if holder := alive.of(r); holder != nil {
			h.Node = holder.Hostname
		}
		switch {
		case !r.valid:
			h.Note = "cannot be read: no node is reached with it"
		case r.unused():
			h.Note = "not used yet"
		}
		all = append(all, h)
	}
	slices.SortFunc(all, func(a, b subnet.Holding) int {
		return slices.CompareFunc(a.Each(), b.Each(), netip.Prefix.Compare)
	})
	return all, nil
}

// living are the nodes that are alive, by public address.
type living map[netip.Addr]holder

// of returns the node that is alive with a record's address; nil: none is known to be.
func (l living) of(r record) *holder {
	for _, ip := range r.attrs.PublicIPs() {
		if h, ok := l[ip]; ok {
			return &h
		}
	}
	return nil
}

// alive reads who holds public addresses.
func (m *Manager) alive(ctx context.Context) (living, error) {
	prefix := path.Join(m.options.Prefix, "nodes") + "/"
	var found *clientv3.GetResponse
	_, err := m.do(ctx, "read which nodes are alive", func(ctx context.Context, c *clientv3.Client) (h *pb.ResponseHeader,
		err error) {
		if found, err = c.Get(ctx, prefix, clientv3.WithPrefix()); err != nil {
			return nil, err
		}
		return found.Header, nil
	})
	if err != nil {
		return nil, err
	}
	all := living{}
	for _, kv := range found.Kvs {
		var h holder
		ip, err := netip.ParseAddr(strings.TrimPrefix(string(kv.Key), prefix))
		if err != nil {
			continue
		}
		if len(kv.Value) > maxHolder || json.Unmarshal(kv.Value, &h) != nil {
			h = holder{} // the address is held all the same
		}
		all[ip] = h
	}
	return all, nil
}

// A Change is what an operator has asked for, before it is made.
type Change struct {
	Effect string   // what is so afterwards, in words
	Cuts   []string // which nodes it cuts off, or may cut off: a text for each; none: it cuts nobody off

	at     watchPoint // of the records that it was decided by
	drop   []record
	put    record // its key, and its value, are written; zero: nothing is
	leased bool   // the key gets an etcd lease
}

// Reserve returns the change that reserves subnets for the node with self's public addresses. Nothing is reserved that
// the node could not take: a subnet that does not fit the configuration, or that is reserved for another node.
func (m *Manager) Reserve(ctx context.Context, s subnet.Subnets, self subnet.Attrs) (*Change, error) {
	l, err := m.ledger(ctx)
	if err != nil {
		return nil, err
	}
	if l.cfg == nil {
		return nil, fmt.Errorf("the network is not configured: etcd has no key %s", m.configKey())
	}
	if err := l.check(s, self); err != nil {
		return nil, err
	}
	c, err := l.reserve(s, self)
	if err != nil {
		return nil, err
	}
	c.at = l.at
	if c.put.value != nil {
		c.put.key = m.subnetKey(s)
	}
	return c, nil
}

// Release returns the change that gives up the lease or the reservation that has the subnets; one of the families is
// enough.
func (m *Manager) Release(ctx context.Context, s subnet.Subnets) (*Change, error) {
	l, err := m.ledger(ctx)
	if err != nil {
		return nil, err
	}
	c, err := l.release(s)
	if err != nil {
		return nil, err
	}
	c.at = l.at
	return c, nil
}

// Make makes a change. It does nothing, and returns an error, if any record has changed since the change was decided.
func (m *Manager) Make(ctx context.Context, c *Change) error {
	if c.put.key == "" && len(c.drop) == 0 {
		return nil
	}
	unchanged := []clientv3.Cmp{
		clientv3.Compare(clientv3.ModRevision(m.subnetsPrefix()), "<", c.at.revision+1).WithPrefix(),
	}
	var changes, now []clientv3.Op
	for _, r := range c.drop {
		if r.key != c.put.key {
			unchanged = append(unchanged, clientv3.Compare(clientv3.ModRevision(r.key), "=", r.changed))
			changes, now = append(changes, clientv3.OpDelete(r.key)), append(now, clientv3.OpGet(r.key))
		}
	}
	lease := clientv3.LeaseID(clientv3.NoLease)
	if c.leased {
		var err error
		if lease, _, err = m.grant(ctx, leaseTTL); err != nil {
			return err
		}
	}
	if r := c.put; r.key != "" {
		unchanged = append(unchanged, clientv3.Compare(clientv3.ModRevision(r.key), "=", r.changed))
		changes = append(changes, clientv3.OpPut(r.key, string(r.value), clientv3.WithLease(lease)))
		now = append(now, clientv3.OpGet(r.key))
	}
	answer, _, err := m.commit(ctx, "write the leases", unchanged, changes, now)
	if errors.Is(err, errLeaseEnded) || err == nil && !answer.Succeeded && !c.isMade(answer, lease) {
		err = errors.New("leases have changed meanwhile, and nothing was done: run the command again")
	}
	if err != nil && c.leased {
		m.revoke(lease)
	}
	return err
}

// isMade tells whether the records are as the change makes them: if the answer to the first attempt was lost, the second
// one finds what the first one wrote.
func (c *Change) isMade(answer *clientv3.TxnResponse, lease clientv3.LeaseID) bool {
	for i, op := range answer.Responses {
		kvs := op.GetResponseRange().Kvs
		isPut := c.put.key != "" && i == len(answer.Responses)-1
		if !isPut && len(kvs) > 0 || isPut && (len(kvs) == 0 || !bytes.Equal(kvs[0].Value, c.put.value) ||
			clientv3.LeaseID(kvs[0].Lease) != lease) {
			return false
		}
	}
	return true
}

// ledger reads what changes are decided by.
func (m *Manager) ledger(ctx context.Context) (l ledger, err error) {
	text, _, err := m.readConfig(ctx)
	if err != nil {
		return l, err
	}
	if text != nil {
		if l.cfg, err = m.parseConfig(text); err != nil {
			return l, err
		}
	}
	if l.records, l.at, err = m.list(ctx); err != nil {
		return l, err
	}
	l.alive, err = m.alive(ctx)
	return l, err
}
