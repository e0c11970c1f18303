package etcd

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

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
	AskedBy  string    `json:",omitempty"` // host name of the node that asks whether the holder is alive, see silent

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
	ttl   time.Duration
}

// short tells whether the claim ends too soon for the number of nodes.
func (c *claim) short(p pace) bool { return 2*c.ttl <= p.claimTTL() }

// claimAll claims the node's public addresses, and waits until no other node holds one of them. A holder that does not
// answer, such as a machine that this one replaces, does not hold them any more.
func (m *Manager) claimAll(ctx context.Context, ips []netip.Addr) error {
	defer m.setWaiting("")
	answered := map[string]string{} // identities of the holders that are alive, by key
	waited := false
	for {
		others, at, err := m.tryClaim(ctx, ips)
		if err != nil {
			return err
		}
		if len(others) == 0 {
			if waited {
				m.log.Info("The public address is free now", "addresses", ips)
			}
			return nil
		}
		if unknown := slices.DeleteFunc(slices.Clone(others), func(h holder) bool {
			return h.lease == clientv3.NoLease || h.AskedBy == "" && answered[h.key] == h.Identity
		}); len(unknown) > 0 {
			dead, err := m.silent(ctx, unknown)
			if err != nil {
				return err
			}
			for _, h := range unknown {
				answered[h.key] = h.Identity
			}
			for _, h := range dead {
				delete(answered, h.key)
				m.log.Info("The machine that held the public address is gone: it does not answer. Taking its place",
					"address", h.ip, "hostname", plain.Text(h.Hostname), "key", h.key,
					"fix", "if that machine still runs, give one of the two an address of its own")
			}
			m.setWaiting("")
			continue
		}
		waited = true
		for _, h := range others {
			m.logHolder(h)
		}
		if err := m.awaitChange(ctx, at, keysOfHolders(others)); err != nil {
			return err
		}
	}
}

// logHolder logs that another node holds our public address, and what to do about it; State has that, too.
func (m *Manager) logHolder(h holder) {
	name := plain.Text(h.Hostname)
	message := "Another node holds the public address, and is alive; waiting until it is free"
	fix := "If this machine replaces " + name + ", stop flanneld there (systemctl stop flanneld). If not, give this " +
		"node an address of its own with --iface, --iface-regex, --iface-can-reach or --public-ip. " +
		"Machines behind NAT may all have the same address, such as 10.0.2.15"
	if h.lease == clientv3.NoLease {
		message = "Another node holds the public address; waiting until it is free"
		fix += ". If no such node exists: etcdctl del " + plain.Shell(h.key)
	}
	m.setWaiting(fmt.Sprintf("the public address %s, which the node %s holds (key %s). %s", h.ip, name, h.key, fix))
	m.ownRecords.Error(h.key, h.Identity, nil, message,
		"address", h.ip, "hostname", name, "key", h.key, "fix", fix)
}

// claimGrace is how long a live daemon may take to claim its address again when it is asked. It takes milliseconds,
// unless its node or etcd is overloaded.
const claimGrace = 5 * time.Second

// silent asks holders of addresses whether they are alive, and returns those that do not answer within claimGrace; they
// hold their addresses no longer.
//
// The question is the holder's own claim, with AskedBy set, and on an etcd lease of the node that asks. A live daemon
// claims its address again at once. Meanwhile nobody else can claim the address, and any number of nodes may ask. The
// node that asked may be dead by now, or may be an earlier run of this daemon: the node that has waited for claimGrace
// deletes a question without an answer.
func (m *Manager) silent(ctx context.Context, holders []holder) ([]holder, error) {
	lease, _, err := m.grant(ctx, pace{}.claimTTL())
	if err != nil {
		return nil, err
	}
	defer m.revoke(lease) // if ctx ends, the question ends too
	asked, at, err := m.ask(ctx, holders, lease)
	if errors.Is(err, errLeaseEnded) {
		return m.silent(ctx, holders)
	}
	if err != nil {
		return nil, err
	}
	grace, cancel := context.WithTimeout(ctx, claimGrace)
	defer cancel()
	for len(asked) > 0 {
		late := m.awaitChange(grace, at, keysOfHolders(asked))
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		now, readAt, err := m.holders(ctx, addressesOf(asked))
		if err != nil {
			return nil, err
		}
		at, asked = readAt, slices.DeleteFunc(asked, func(h holder) bool {
			return !slices.ContainsFunc(now, func(n holder) bool { return n.key == h.key && n.changed == h.changed })
		})
		if late != nil {
			break
		}
	}
	for _, h := range asked {
		if err := m.removeKey(ctx, "delete the claim of a machine that is gone", h.key, h.changed); err != nil {
			return nil, err
		}
	}
	return asked, nil
}

// ask writes the question to the keys of holders that nobody has asked yet, and returns the holders that have not
// answered by then, as they are now.
func (m *Manager) ask(ctx context.Context, holders []holder, lease clientv3.LeaseID) ([]holder, watchPoint, error) {
	for _, h := range holders {
		if h.AskedBy != "" {
			continue
		}
		question := h
		question.AskedBy = cmp.Or(m.hostname, "unknown")
		value, err := json.Marshal(question)
		if err != nil {
			return nil, watchPoint{}, err
		}
		_, _, err = m.commit(ctx, "ask whether the holder of the public address is alive",
			[]clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(h.key), "=", h.changed)},
			[]clientv3.Op{clientv3.OpPut(h.key, string(value), clientv3.WithLease(lease))}, nil)
		if err != nil {
			return nil, watchPoint{}, err
		}
	}
	now, at, err := m.holders(ctx, addressesOf(holders))
	return slices.DeleteFunc(now, func(h holder) bool { return h.AskedBy == "" }), at, err
}

func keysOfHolders(holders []holder) (keys []string) {
	for _, h := range holders {
		keys = append(keys, h.key)
	}
	return keys
}

func addressesOf(holders []holder) (ips []netip.Addr) {
	for _, h := range holders {
		ips = append(ips, h.ip)
	}
	return ips
}

// tryClaim claims all of the addresses, or none. When other nodes hold an address, tryClaim returns these nodes, and
// the point from which to watch for a change.
func (m *Manager) tryClaim(ctx context.Context, ips []netip.Addr) (others []holder, at watchPoint, err error) {
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
				others = append(others, h)
			}
		}
		if len(others) > 0 {
			return others, at, nil
		}
		lease, ttl, err := m.grant(ctx, m.pace().claimTTL())
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
			m.claim = &claim{ips, lease, ttl}
			m.mu.Unlock()
			return nil, at, nil
		}
		m.revoke(lease)
		if err := pause.Sleep(ctx); err != nil {
			return nil, watchPoint{}, err
		}
	}
}

// writeClaim writes the keys of all holders, unless one of the keys has changed since it was read, or the etcd lease has
// ended.
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
	answer, _, err := m.commit(ctx, "claim the public address", unchanged, puts, gets)
	switch {
	case errors.Is(err, errLeaseEnded):
		return false, nil
	case err != nil:
		return false, err
	case answer.Succeeded:
		return true, nil
	}
	// We may have changed the key ourselves: the answer to an earlier attempt was lost.
	kvs := answer.Responses[0].GetResponseRange().Kvs
	return len(kvs) == 1 && clientv3.LeaseID(kvs[0].Lease) == lease, nil
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

// renewClaim renews the claim, if there is one, and tells whether etcd's answer leaves nothing to be asked: etcd knows
// the claim, and its revision has not gone back.
func (m *Manager) renewClaim() (answered bool) {
	m.mu.Lock()
	c := m.claim
	m.mu.Unlock()
	if c == nil {
		return false
	}
	if c.short(m.pace()) {
		select {
		case m.regrow <- struct{}{}:
		default:
		}
	}
	ttl, revision, err := m.renew(m.ctx, "renew the claim on the public address", c.lease)
	if err != nil {
		return false
	}
	if ttl > 0 {
		// The revision is that of one server, which may lag.
		latest := m.latestPoint()
		if revision < latest.revision || !m.health.State().Connected {
			return false
		}
		m.observe(latest, revision)
		return true
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.claim == c {
		// The claim ended during an outage, or etcd has lost it. In the second case, etcd may have lost everything else.
		m.claim = nil
		m.invalidate()
	}
	return false
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
	answer, at, err := m.commit(ctx, "read who holds the public address", nil, gets, nil)
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
