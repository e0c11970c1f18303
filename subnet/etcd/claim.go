package etcd

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/subnet"
)

// A holder is a node that is alive on a public address. Its exported fields are
// the value of the key under nodes, in JSON.
type holder struct {
	Identity string    // of the machine, see Options
	Hostname string    // for people
	Since    time.Time // when the daemon claimed the address

	ip      netip.Addr
	key     string
	changed int64            // revision; zero: nobody holds the address
	lease   clientv3.LeaseID // clientv3.NoLease where somebody wrote it by hand
}

func (h holder) String() string {
	who := fmt.Sprintf("node %q", h.Hostname)
	if h.Hostname == "" {
		who = "another node"
	}
	return fmt.Sprintf("%s holds the public address %s (etcd key %s)", who, h.ip, h.key)
}

// A claim is what a running daemon holds on its public addresses.
type claim struct {
	ips   []netip.Addr
	lease clientv3.LeaseID
}

// claimAll claims the node's public addresses, and waits for any other node that
// holds one to go.
func (m *Manager) claimAll(ctx context.Context, ips []netip.Addr) error {
	said := ""
	for {
		other, at, err := m.tryClaim(ctx, ips)
		if err != nil {
			return err
		}
		if other == nil {
			if said != "" {
				klog.Info("The public address is free now")
			}
			return nil
		}
		if who := other.String() + other.Identity; said != who {
			said = who
			advice := ""
			if other.lease == clientv3.NoLease {
				advice = fmt.Sprintf(" If no such node exists: etcdctl del %s.", other.key)
			}
			klog.Errorf("%v. Two nodes cannot share one public address: give this one its own with --iface, --iface-regex, --iface-can-reach or --public-ip. "+
				"This is what happens on machines behind NAT where every node has the same address, such as 10.0.2.15.%s Waiting for the other node to go", other, advice)
		}
		if err := m.await(ctx, at, []string{other.key}); err != nil {
			return err
		}
	}
}

// tryClaim claims the addresses, all or none. When another node holds one it
// returns that, and the moment from which to wait for a change.
func (m *Manager) tryClaim(ctx context.Context, ips []netip.Addr) (*holder, moment, error) {
	value, err := json.Marshal(holder{Identity: m.options.Identity, Hostname: m.hostname, Since: time.Now().UTC().Truncate(time.Second)})
	if err != nil {
		return nil, moment{}, err
	}
	pause := subnet.Backoff()
	for {
		holders, at, err := m.holders(ctx, ips)
		if err != nil {
			return nil, moment{}, err
		}
		for _, h := range holders {
			// Our own identity is what an earlier run of this daemon left.
			if h.stranger(m.options.Identity) {
				return &h, at, nil
			}
		}
		lease, _, err := m.grant(ctx, claimTTL)
		if err != nil {
			return nil, moment{}, err
		}
		var unchanged []clientv3.Cmp
		var puts, gets []clientv3.Op
		for i, ip := range ips {
			key := m.nodeKey(ip)
			unchanged = append(unchanged, clientv3.Compare(clientv3.ModRevision(key), "=", holders[i].changed))
			puts = append(puts, clientv3.OpPut(key, string(value), clientv3.WithLease(lease)))
			gets = append(gets, clientv3.OpGet(key))
		}
		won := false
		_, err = m.do(ctx, "claim the public address", func(ctx context.Context, c *clientv3.Client) (*pb.ResponseHeader, error) {
			answer, err := c.Txn(ctx).If(unchanged...).Then(puts...).Else(gets...).Commit()
			if err != nil {
				return nil, err
			}
			won = answer.Succeeded
			if !won {
				// Perhaps by ourselves: the answer of an earlier attempt was lost.
				kvs := answer.Responses[0].GetResponseRange().Kvs
				won = len(kvs) == 1 && clientv3.LeaseID(kvs[0].Lease) == lease
			}
			return answer.Header, nil
		})
		if err != nil {
			return nil, moment{}, err
		}
		if won {
			m.release() // the earlier one, if there is
			m.mu.Lock()
			m.claim = &claim{ips, lease}
			m.mu.Unlock()
			return nil, at, nil
		}
		m.revoke(lease)
		if err := pause.Sleep(ctx); err != nil {
			return nil, moment{}, err
		}
	}
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

// keepClaim renews the claim, if there is one.
func (m *Manager) keepClaim() {
	m.mu.Lock()
	c := m.claim
	m.mu.Unlock()
	if c == nil {
		return
	}
	ttl, err := m.renew(m.ctx, "keep the claim to the public address", c.lease)
	if err != nil || ttl > 0 {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.claim == c {
		// It did not survive an outage, or etcd knows nothing of it any more:
		// then who can say what else is not what it was.
		m.claim = nil
		m.renounce()
	}
}

// held returns the claim to the addresses; nil when there is none, or it ran out.
func (m *Manager) held(ips []netip.Addr) *claim {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.claim == nil || !slices.Equal(m.claim.ips, ips) {
		return nil
	}
	return m.claim
}

// holders reads who holds each of the addresses.
func (m *Manager) holders(ctx context.Context, ips []netip.Addr) ([]holder, moment, error) {
	var gets []clientv3.Op
	for _, ip := range ips {
		gets = append(gets, clientv3.OpGet(m.nodeKey(ip)))
	}
	var answer *clientv3.TxnResponse
	at, err := m.do(ctx, "see who holds the public address", func(ctx context.Context, c *clientv3.Client) (h *pb.ResponseHeader, err error) {
		if answer, err = c.Txn(ctx).Then(gets...).Commit(); err != nil {
			return nil, err
		}
		return answer.Header, nil
	})
	if err != nil {
		return nil, moment{}, err
	}
	holders := make([]holder, len(ips))
	for i, ip := range ips {
		h := &holders[i]
		for _, kv := range answer.Responses[i].GetResponseRange().Kvs { // one at most
			if err := json.Unmarshal(kv.Value, h); err != nil {
				*h = holder{} // it is held all the same
			}
			h.changed, h.lease = kv.ModRevision, clientv3.LeaseID(kv.Lease)
		}
		h.ip, h.key = ip, m.nodeKey(ip)
	}
	return holders, at, nil
}

// stranger tells that another node holds the address.
func (h holder) stranger(identity string) bool { return h.changed != 0 && h.Identity != identity }
