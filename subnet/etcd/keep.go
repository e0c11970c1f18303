package etcd

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/subnet"
)

// Keep implements subnet.Manager. It gives up the claim to the node's addresses
// when it returns.
//
// It looks at how things are in etcd, sets right what is not, looks again, and
// when nothing is left to do waits until something changes or falls due.
func (m *Manager) Keep(ctx context.Context, lease subnet.Lease) error {
	defer m.release()
	defer m.expire(time.Time{})
	m.expire(lease.Expires)
	value, err := json.Marshal(lease.Attrs)
	if err != nil {
		return fmt.Errorf("what to publish with the lease: %w", err)
	}
	key, ips := m.subnetKey(lease.Subnets), lease.Attrs.PublicIPs()
	watched := []string{key}
	for _, ip := range ips {
		watched = append(watched, m.nodeKey(ip))
	}
	renewAt := lease.Expires.Add(-m.options.RenewMargin)
	quarrel := subnet.Backoff()
	var quarrelled time.Time
	twin := false

	for {
		now, at, err := m.get(ctx, key)
		if err != nil {
			return err
		}
		holders, _, err := m.holders(ctx, ips)
		if err != nil {
			return err
		}

		claim := m.held(ips)
		unclaimed := claim == nil
		for _, h := range holders {
			switch {
			case h.changed == 0:
				unclaimed = true
			case h.stranger(m.options.Identity):
				klog.Errorf("%v, which was ours: giving up the lease of %v", h, lease.Subnets)
				return subnet.ErrLost
			case claim != nil && h.lease != claim.lease && !twin:
				twin = true
				klog.Warningf("Another daemon with this machine's identity claimed %s: is a second flanneld running here, or was the machine cloned with its identity?", h.ip)
			}
		}
		if unclaimed {
			if claim != nil {
				// Somebody deleted the key, or etcd lost it with all else.
				m.mu.Lock()
				m.renounce()
				m.mu.Unlock()
			}
			// Whoever may be faster is met at the next look.
			if _, _, err := m.tryClaim(ctx, ips); err != nil {
				return err
			}
			continue
		}

		fate := fateOf(now, lease.Attrs, value)
		switch {
		case fate == taken:
			klog.Errorf("The lease of %v went to the node at %v", lease.Subnets, now.attrs.PublicIPs())
			return subnet.ErrLost
		case fate == deleted:
			klog.Warningf("The lease of %v was deleted from etcd, putting it back: %s", lease.Subnets, key)
		case fate == overwritten:
			klog.Warningf("The lease of %v was overwritten, putting ours back: %s. If this repeats, another daemon uses the public address %v too: etcd had %s", lease.Subnets, key, ips, now.value)
			if time.Since(quarrelled) > time.Minute {
				quarrel.Reset()
			} else if err := quarrel.Sleep(ctx); err != nil {
				return err
			}
			quarrelled = time.Now()
		}
		if fate != intact || !now.reserved() && !time.Now().Before(renewAt) {
			if !now.valid && m.wrote.key == key {
				now.lease = m.wrote.lease // which may still be alive
			}
			r, expires, ok, err := m.publish(ctx, now, key, value)
			if err != nil {
				return err
			}
			if ok {
				m.wrote = r
				m.expire(expires)
				renewAt = expires.Add(-min(m.options.RenewMargin, time.Until(expires)-time.Second))
			}
			continue
		}
		m.wrote = now

		if now.created != m.verified {
			first, err := m.first(ctx, now, lease.Attrs)
			if err != nil {
				return err
			}
			if !first {
				klog.Errorf("The lease of %v overlaps another that was there before: giving it up", lease.Subnets)
				if !now.reserved() {
					if err := m.remove(ctx, now); err != nil {
						return err
					}
				}
				return subnet.ErrLost
			}
			m.verified = now.created
		}

		if err := m.rest(ctx, at, watched, now.reserved(), renewAt); err != nil {
			return err
		}
	}
}

// rest returns when one of the keys changed, history was renounced (as when the
// claim ran out) or the lease is to be renewed.
func (m *Manager) rest(ctx context.Context, at moment, keys []string, reserved bool, renewAt time.Time) error {
	changed, stop := m.changes(ctx, at, keys)
	defer stop()
	var due <-chan time.Time
	if !reserved {
		timer := time.NewTimer(time.Until(renewAt))
		defer timer.Stop()
		due = timer.C
	}
	select {
	case <-changed:
		return ctx.Err()
	case <-due:
		return nil
	}
}

// fate is what became of our record.
type fate int

const (
	intact fate = iota
	deleted
	overwritten // with something else in our name, or with nonsense
	taken       // by another node
)

func fateOf(now record, own subnet.Attrs, value []byte) fate {
	switch {
	case !now.exists():
		return deleted
	case now.valid && !sameNode(now.attrs, own):
		return taken
	case !bytes.Equal(now.value, value):
		return overwritten
	}
	return intact
}

// get reads the record with a key, which has subnets.
func (m *Manager) get(ctx context.Context, key string) (record, moment, error) {
	var found *clientv3.GetResponse
	at, err := m.do(ctx, "see after the lease", func(ctx context.Context, c *clientv3.Client) (h *pb.ResponseHeader, err error) {
		if found, err = c.Get(ctx, key); err != nil {
			return nil, err
		}
		return found.Header, nil
	})
	if err != nil || len(found.Kvs) == 0 {
		return record{}, at, err
	}
	r, _ := m.parse(found.Kvs[0])
	return r, at, nil
}

// first tells that no other node's lease that overlaps ours was there before.
func (m *Manager) first(ctx context.Context, ours record, self subnet.Attrs) (bool, error) {
	records, _, err := m.list(ctx)
	if err != nil {
		return false, err
	}
	var others []record
	for _, r := range records {
		if r.key != ours.key && !(r.valid && sameNode(r.attrs, self)) {
			others = append(others, r)
		}
	}
	return oldest(ours, others), nil
}
