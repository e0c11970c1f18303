package etcd

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/subnet"
)

// Keep implements subnet.Manager. It gives up the claim on the node's addresses when it returns.
func (m *Manager) Keep(ctx context.Context, lease subnet.Lease) error {
	defer m.release()
	defer m.setExpires(time.Time{})
	m.setExpires(lease.Expires)
	value, err := json.Marshal(lease.Attrs)
	if err != nil {
		return fmt.Errorf("what to publish with the lease: %w", err)
	}
	k := &keptLease{
		Manager: m, Lease: lease, key: m.subnetKey(lease.Subnets), value: value, ips: lease.Attrs.PublicIPs(),
		renewAt: lease.Expires.Add(-m.options.RenewMargin), fight: subnet.Backoff(),
	}
	for {
		if err := k.reconcile(ctx); err != nil {
			return err
		}
	}
}

// A keptLease is the lease that Keep keeps.
type keptLease struct {
	*Manager
	subnet.Lease
	key     string
	value   []byte // of the key
	ips     []netip.Addr
	renewAt time.Time

	fight     retry.Backoff // with a program that overwrites the lease again and again
	restored  time.Time     // when the lease was overwritten last
	duplicate bool          // another daemon with our identity was logged
}

// reconcile compares etcd with what should be there, and repairs the first difference. When there is none, it waits
// until one of the keys changes or the lease has to be renewed.
func (k *keptLease) reconcile(ctx context.Context) error {
	now, at, err := k.get(ctx, k.key)
	if err != nil {
		return err
	}
	if repaired, err := k.checkClaim(ctx); repaired || err != nil {
		return err
	}
	if repaired, err := k.checkRecord(ctx, now); repaired || err != nil {
		return err
	}
	if err := k.checkOverlap(ctx, now); err != nil {
		return err
	}
	return k.wait(ctx, at, now.reserved())
}

// checkClaim claims the node's addresses again where the claim is gone. It returns ErrLost when another node holds one
// of them.
func (k *keptLease) checkClaim(ctx context.Context) (repaired bool, err error) {
	holders, _, err := k.holders(ctx, k.ips)
	if err != nil {
		return false, err
	}
	claim := k.held(k.ips)
	unclaimed, asked, short := claim == nil, false, claim != nil && claim.short(k.pace())
	for _, h := range holders {
		switch {
		case h.changed == 0:
			unclaimed = true
		case h.isOther(k.options.Identity):
			k.ownRecords.Error("lost "+h.key, h.changed, nil,
				"Another node holds the public address, which was ours; giving up the lease", "address", h.ip,
				"hostname", plain.Text(h.Hostname), "key", h.key, "subnet", k.Subnets)
			return false, subnet.ErrLost
		case h.AskedBy != "":
			asked = true
			k.ownRecords.Error("asked "+h.key, h.AskedBy, nil,
				"Another node wants the public address, which is this node's: it waits", "address", h.ip,
				"hostname", plain.Text(h.AskedBy), "key", h.key,
				"fix", "give one of the two an address of its own with --iface or --public-ip; "+
					"if that node replaces this one, stop flanneld here")
		case claim != nil && h.lease != claim.lease && !k.duplicate:
			k.duplicate = true
			k.log.Error(nil, "Another daemon with this machine's identity claimed the public address", "address", h.ip,
				"fix", "stop the second flanneld on this machine; a cloned machine needs a /etc/machine-id of its own")
		}
	}
	if !unclaimed && !asked && !short {
		return false, nil
	}
	if unclaimed {
		// The claim may have ended while this machine was suspended. Meanwhile its clock for timers stood still: the lease
		// ends sooner than this daemon believes.
		k.renewAt = time.Time{}
	}
	if claim != nil && unclaimed {
		// Somebody deleted the key, or etcd lost the key with everything else.
		k.mu.Lock()
		k.invalidate()
		k.mu.Unlock()
	}
	// If another node was faster, the next call of reconcile finds out.
	_, _, err = k.tryClaim(ctx, k.ips)
	return true, err
}

// checkRecord restores the record of the lease, and renews the lease when it is time. It returns ErrLost when the
// record is another node's.
func (k *keptLease) checkRecord(ctx context.Context, now record) (repaired bool, err error) {
	state := stateOf(now, k.Attrs, k.value)
	switch state {
	case intact:
		if now.reserved() || time.Now().Before(k.renewAt) {
			if now.reserved() { // an operator may have made it so, and may make it a lease again
				k.setExpires(time.Time{})
				k.renewAt = time.Time{}
			}
			k.setWrote(now)
			return false, nil
		}
	case taken:
		k.log.Error(nil, "The lease went to another node", "subnet", k.Subnets, "addresses", now.attrs.PublicIPs())
		return false, subnet.ErrLost
	case deleted:
		k.ownRecords.Error(k.key, k.wrote.changed, nil, "The lease was deleted from etcd; restoring it",
			"subnet", k.Subnets, "key", k.key)
	case overwritten:
		k.ownRecords.Error(k.key, now.changed, nil, "The lease was overwritten; restoring it", "subnet", k.Subnets, "key", k.key,
			"found", plain.Text(string(now.value)), "addresses", k.ips,
			"fix", "if this repeats, stop the other daemon that uses these addresses")
		if time.Since(k.restored) > time.Minute {
			k.fight.Reset()
		} else if err := k.fight.Sleep(ctx); err != nil {
			return false, err
		}
		k.restored = time.Now()
	}
	if !now.valid && k.wrote.key == k.key {
		now.lease = k.wrote.lease // which may still be alive
	}
	r, expires, ok, err := k.publish(ctx, now, k.key, k.value)
	if ok && err == nil {
		k.setWrote(r)
		k.setExpires(expires)
		k.renewAt = expires.Add(-min(k.options.RenewMargin, time.Until(expires)-time.Second))
	}
	return true, err
}

// checkOverlap returns ErrLost, and deletes the lease, when an older lease of another node overlaps it.
func (k *keptLease) checkOverlap(ctx context.Context, now record) error {
	if now.created == k.verified {
		return nil
	}
	records, _, err := k.list(ctx)
	if err != nil {
		return err
	}
	var others []record
	for _, r := range records {
		if r.key != now.key && !(r.valid && sameNode(r.attrs, k.Attrs)) {
			others = append(others, r)
		}
	}
	if oldest(now, others) {
		k.verified = now.created
		return nil
	}
	k.log.Error(nil, "The lease overlaps an older lease; giving it up", "subnet", k.Subnets)
	if !now.reserved() {
		if err := k.remove(ctx, now); err != nil {
			return err
		}
	}
	return subnet.ErrLost
}

// wait returns when one of the keys has changed, when the watch point is invalid, as after the claim ended, or when the
// lease has to be renewed, or the claim has to have a longer time.
func (k *keptLease) wait(ctx context.Context, at watchPoint, reserved bool) error {
	keys := []string{k.key}
	for _, ip := range k.ips {
		keys = append(keys, k.nodeKey(ip))
	}
	changed, stop := k.changes(ctx, at, keys)
	defer stop()
	var due <-chan time.Time
	if !reserved {
		timer := time.NewTimer(time.Until(k.renewAt))
		defer timer.Stop()
		due = timer.C
	}
	select {
	case <-changed:
		return ctx.Err()
	case <-due:
	case <-k.regrow:
	}
	return nil
}

// A recordState is what became of our record.
type recordState int

const (
	intact recordState = iota
	deleted
	overwritten // with other data in our name, or with data that cannot be read
	taken       // by another node
)

func stateOf(now record, own subnet.Attrs, value []byte) recordState {
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

// get reads the record with a key, which names subnets.
func (m *Manager) get(ctx context.Context, key string) (record, watchPoint, error) {
	var found *clientv3.GetResponse
	read := func(ctx context.Context, c *clientv3.Client) (h *pb.ResponseHeader, err error) {
		if found, err = c.Get(ctx, key); err != nil {
			return nil, err
		}
		return found.Header, nil
	}
	at, err := m.do(ctx, "read this node's lease", read)
	if err != nil || len(found.Kvs) == 0 {
		return record{}, at, err
	}
	r, _ := m.parse(found.Kvs[0])
	return r, at, nil
}
