package etcd

import (
	"context"
	"encoding/json"
	"net/netip"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/subnet"
)

// A holder is a node that is alive on a public address. Its exported fields are the value of the key under nodes, in
// JSON.
type holder struct {
	Identity string    // of the machine, see Options
	Hostname string    // for people
	Since    time.Time // when the daemon claimed the address

	ip      netip.Addr
	key     string
	changed int64            // revision; zero: nobody holds the address
	lease   clientv3.LeaseID // clientv3.NoLease where somebody wrote the key by hand
}

// maxHolder is the size of the largest claim that is read, in bytes. Ours have about 150.
const maxHolder = 4 << 10

// isOther tells whether another node than the one with this identity holds the address.
func (h holder) isOther(identity string) bool { return h.changed != 0 && h.Identity != identity }

// A claim is what a running daemon holds on its public addresses.
type claim struct {
	ips   []netip.Addr
	lease clientv3.LeaseID
}

// claimAll claims the node's public addresses, and waits until no other node holds one of them.
func (m *Manager) claimAll(ctx context.Context, ips []netip.Addr) error {
	var logged holder
	for {
		other, at, err := m.tryClaim(ctx, ips)
		switch {
		case err != nil:
			return err
		case other == nil && logged.changed != 0:
			m.log.Info("The public address is free now", "addresses", ips)
			return nil
		case other == nil:
			return nil
		}
		if other.Identity != logged.Identity || other.ip != logged.ip || logged.changed == 0 {
			logged = *other
			m.logHolder(logged)
		}
		if err := m.awaitChange(ctx, at, []string{other.key}); err != nil {
			return err
		}
	}
}

// logHolder logs that another node holds our public address, and what to do about it.
func (m *Manager) logHolder(h holder) {
	fix := "Give this node an address of its own with --iface, --iface-regex, --iface-can-reach or --public-ip. " +
		"Machines behind NAT may all have the same address, such as 10.0.2.15"
	if h.lease == clientv3.NoLease {
		fix += ". If no such node exists: etcdctl del " + plain.Shell(h.key)
	}
	m.ownRecords.Error(h.key, h.changed, nil, "Another node holds the public address; waiting until it is free",
		"address", h.ip, "hostname", plain.Text(h.Hostname), "key", h.key, "fix", fix)
}

// tryClaim claims all of the addresses, or none. When another node holds an address, tryClaim returns this node, and
// the point from which to watch for a change.
func (m *Manager) tryClaim(ctx context.Context, ips []netip.Addr) (*holder, watchPoint, error) {
	now := time.Now().UTC().Truncate(time.Second)
	value, err := json.Marshal(holder{Identity: m.options.Identity, Hostname: m.hostname, Since: now})
	if err != nil {
		return nil, watchPoint{}, err
	}
	pause := subnet.Backoff()
	for {
		holders, at, err := m.holders(ctx, ips)
		if err != nil {
			return nil, watchPoint{}, err
		}
		for _, h := range holders {
			// A claim with our own identity is left from an earlier run of this daemon.
			if h.isOther(m.options.Identity) {
				return &h, at, nil
			}
		}
		lease, _, err := m.grant(ctx, claimTTL)
		if err != nil {
			return nil, watchPoint{}, err
		}
		won, err := m.writeClaim(ctx, holders, string(value), lease)
		if err != nil {
			return nil, watchPoint{}, err
		}
		if won {
			m.release() // the earlier claim, if there is one
			m.mu.Lock()
			m.claim = &claim{ips, lease}
			m.mu.Unlock()
			return nil, at, nil
		}
		m.revoke(lease)
		if err := pause.Sleep(ctx); err != nil {
			return nil, watchPoint{}, err
		}
	}
}

// writeClaim writes the keys of all holders, unless one of the keys has changed since it was read.
func (m *Manager) writeClaim(ctx context.Context, holders []holder, value string, lease clientv3.LeaseID) (
	won bool, err error,
) {
	var unchanged []clientv3.Cmp
	var puts, gets []clientv3.Op
	for _, h := range holders {
		unchanged = append(unchanged, clientv3.Compare(clientv3.ModRevision(h.key), "=", h.changed))
		puts = append(puts, clientv3.OpPut(h.key, value, clientv3.WithLease(lease)))
		gets = append(gets, clientv3.OpGet(h.key))
	}
	write := func(ctx context.Context, c *clientv3.Client) (*pb.ResponseHeader, error) {
		answer, err := c.Txn(ctx).If(unchanged...).Then(puts...).Else(gets...).Commit()
		if err != nil {
			return nil, err
		}
		won = answer.Succeeded
		if !won {
			// We may have changed the key ourselves: the answer to an earlier attempt was lost.
			kvs := answer.Responses[0].GetResponseRange().Kvs
			won = len(kvs) == 1 && clientv3.LeaseID(kvs[0].Lease) == lease
		}
		return answer.Header, nil
	}
	_, err = m.do(ctx, "claim the public address", write)
	return won, err
}

// release gives up the claim, if there is one.
func (m *Manager) release() {
	m.mu.Lock()
	c := m.claim
	m.claim = nil
	m.mu.Unlock()
	if c != nil {
		m.revoke(c.lease)
	}
}

// renewClaim renews the claim, if there is one.
func (m *Manager) renewClaim() {
	m.mu.Lock()
	c := m.claim
	m.mu.Unlock()
	if c == nil {
		return
	}
	ttl, err := m.renew(m.ctx, "renew the claim on the public address", c.lease)
	if err != nil || ttl > 0 {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.claim == c {
		// The claim ended during an outage, or etcd has lost it. In the second case, etcd may have lost everything else.
		m.claim = nil
		m.invalidate()
	}
}

// held returns the claim on the addresses; nil when there is none, or it has ended.
func (m *Manager) held(ips []netip.Addr) *claim {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.claim == nil || !slices.Equal(m.claim.ips, ips) {
		return nil
	}
	return m.claim
}

// holders reads who holds each of the addresses.
func (m *Manager) holders(ctx context.Context, ips []netip.Addr) ([]holder, watchPoint, error) {
	var gets []clientv3.Op
	for _, ip := range ips {
		gets = append(gets, clientv3.OpGet(m.nodeKey(ip)))
	}
	var answer *clientv3.TxnResponse
	read := func(ctx context.Context, c *clientv3.Client) (h *pb.ResponseHeader, err error) {
		if answer, err = c.Txn(ctx).Then(gets...).Commit(); err != nil {
			return nil, err
		}
		return answer.Header, nil
	}
	at, err := m.do(ctx, "read who holds the public address", read)
	if err != nil {
		return nil, watchPoint{}, err
	}
	holders := make([]holder, len(ips))
	for i, ip := range ips {
		h := &holders[i]
		for _, kv := range answer.Responses[i].GetResponseRange().Kvs { // one at most
			if len(kv.Value) > maxHolder || json.Unmarshal(kv.Value, h) != nil {
				*h = holder{} // the address is held all the same
			}
			h.changed, h.lease = kv.ModRevision, clientv3.LeaseID(kv.Lease)
		}
		h.ip, h.key = ip, m.nodeKey(ip)
	}
	return holders, at, nil
}
