package etcd

import (
	"context"
	"errors"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/time/rate"

	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/subnet"
)

// Watch implements subnet.Manager. Leases of peers come without the time of their end, which would take a request
// for each of them. Reservations that no node has taken are no leases.
func (m *Manager) Watch(ctx context.Context) <-chan subnet.Update {
	updates := subnet.NewMailbox()
	go func() {
		defer updates.Close()
		pause := subnet.Backoff()
		var silent gap
		for {
			began := time.Now()
			var err error
			if silent, err = m.watchOnce(ctx, updates, silent); err != nil {
				return
			}
			if time.Since(began) > time.Minute {
				pause.Reset()
			}
			if err := retry.Sleep(ctx, pause.Next()+m.pace().untilReread()); err != nil {
				return
			}
		}
	}()
	return updates.C()
}

// watchOnce puts a snapshot and then changes. It returns no error when it may have missed some, and an error when ctx
// ended or the manager was closed. The gap is what the watch before was silent about; the result is the same of this
// watch.
func (m *Manager) watchOnce(ctx context.Context, updates *subnet.Mailbox, before gap) (gap, error) {
	records, at, err := m.list(ctx)
	if err != nil {
		return gap{}, err
	}
	snapshot := subnet.Update{Snapshot: true, Leases: make(map[subnet.Subnets]*subnet.Lease, len(records))}
	missed := 0
	for _, r := range records {
		if r.valid && !r.unused() {
			snapshot.Put(r.asLease())
		}
		if before.has(r.changed, at) {
			missed++
		}
	}
	if missed > 0 {
		m.log.Error(nil, "etcd answers requests, but the watch of the leases did not report changes; reading all leases "+
			"from time to time. If etcd's grpc-proxy is between this node and etcd's members, restart the proxy, and give "+
			"nodes the members (--etcd-endpoints) if etcd has users", "changes", missed, "silent", m.silence)
	}
	updates.Put(snapshot)
	f := follower{Manager: m, at: at, updates: updates}
	pause := m.pace().backoff()
	for {
		before := f.at.revision
		end, err := f.follow(ctx)
		switch {
		case err != nil || end == lost:
			return gap{}, err
		case end == silent:
			return f.gap, nil
		case end == crowded:
			err = retry.Sleep(ctx, m.pace().gather())
		default:
			if f.at.revision > before {
				pause.Reset()
			}
			err = pause.Sleep(ctx)
		}
		if err != nil {
			return gap{}, err
		}
	}
}

// A follower puts the changes after a watch point.
type follower struct {
	*Manager
	at      watchPoint // its revision grows with what was put
	gap     gap        // where the watch was silent, see watchEnd
	updates *subnet.Mailbox
}

// A watchEnd is why a watch ended.
type watchEnd int

const (
	lost    watchEnd = iota // etcd may no longer have what happened since, or have another history
	refused                 // by a member without a leader, or that does not know our token: nothing was missed
	crowded                 // too many changes came one by one, see pace.singles
	silent                  // nothing came for so long that the watch may be no more, see gap
)

// follow puts the changes until the watch ends. Unless it is lost, another watch can go on.
func (m *follower) follow(ctx context.Context) (watchEnd, error) {
	singles := rate.NewLimiter(m.pace().singles())
	options := []clientv3.OpOption{clientv3.WithPrefix()}
	var quiet *silentError
	err := m.watch(ctx, m.at, m.subnetsPrefix(), options, func(answer *clientv3.WatchResponse) bool {
		if answer.IsProgressNotify() {
			// A quiet watch survives compaction: after a broken connection, it continues from here.
			m.at.revision = max(m.at.revision, answer.Header.Revision) // another member may lag
		}
		n := len(answer.Events)
		if n == 0 {
			return true
		}
		m.observe(m.at, answer.Header.Revision)
		m.at.revision = answer.Events[n-1].Kv.ModRevision // there may be more that the header's revision has
		m.updates.Put(m.updateOf(answer.Events))
		limit, burst := m.pace().singles()
		singles.SetLimit(limit)
		singles.SetBurst(burst)
		return singles.Allow()
	})
	switch {
	case err == nil:
		return crowded, nil
	case ctx.Err() != nil:
		return lost, ctx.Err()
	case m.ctx.Err() != nil:
		return lost, m.ctx.Err()
	case errors.Is(err, rpctypes.ErrNoLeader), errors.Is(err, errStream), tokenRefused(err):
		m.log.V(1).Info("The watch of the leases ended; going on", "err", err)
		return refused, nil
	case errors.As(err, &quiet):
		m.log.V(1).Info("The watch of the leases is silent; reading them again", "silent", m.silence, "err", err)
		m.gap = gap{m.at, quiet.missed}
		return silent, nil
	}
	m.log.V(1).Info("The watch of the leases ended; reading them again", "err", err)
	return lost, nil
}

// updateOf returns what events change. A record that cannot be read is no lease.
func (m *Manager) updateOf(events []*clientv3.Event) subnet.Update {
	u := subnet.Update{Since: time.Now()}
	for _, e := range events {
		if e.IsCreate() {
			m.nodes.Add(1)
		}
		if e.Type == mvccpb.DELETE {
			m.nodes.Add(-1)
			m.records.Forget(string(e.Kv.Key))
			if s, err := subnet.ParseKey(strings.TrimPrefix(string(e.Kv.Key), m.subnetsPrefix())); err == nil {
				u.Delete(s)
			}
			continue
		}
		switch r, ok := m.parse(e.Kv); {
		case ok && r.valid && !r.unused():
			u.Put(r.asLease())
		case ok:
			u.Delete(r.subnets)
		}
	}
	return u
}
