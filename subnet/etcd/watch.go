package etcd

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

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
		for {
			began := time.Now()
			if err := m.watchOnce(ctx, updates); err != nil {
				return
			}
			if time.Since(began) > time.Minute {
				pause.Reset()
			}
			if err := retry.Sleep(ctx, pause.Next()+rand.N(m.pace().reread()+1)); err != nil {
				return
			}
		}
	}()
	return updates.C()
}

// watchOnce puts a snapshot and then changes. It returns nil when it may have missed some, and an error when ctx
// ended or the manager was closed.
func (m *Manager) watchOnce(ctx context.Context, updates *subnet.Mailbox) error {
	records, at, err := m.list(ctx)
	if err != nil {
		return err
	}
	snapshot := subnet.Update{Snapshot: true, Leases: make(map[subnet.Subnets]subnet.Lease, len(records))}
	for _, r := range records {
		if r.valid && !r.unused() {
			snapshot.Put(r.asLease())
		}
	}
	updates.Put(snapshot)
	pause := m.pace().backoff()
	for {
		next, lost, err := m.follow(ctx, at, updates)
		if err != nil || lost {
			return err
		}
		if next > at.revision {
			pause.Reset()
		}
		at.revision = next
		if err := pause.Sleep(ctx); err != nil {
			return err
		}
	}
}

// follow puts the changes after a watch point until the watch ends. It returns the revision after which another watch
// can go on, if etcd has lost its leader for a while: all nodes see that, and none of them has missed anything.
// Otherwise lost is set: etcd may no longer have what happened since, or have another history.
func (m *Manager) follow(ctx context.Context, at watchPoint, updates *subnet.Mailbox) (
	revision int64, lost bool, err error,
) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	revision = at.revision
	client, watch, err := m.connection.open(ctx)
	if err != nil {
		return 0, true, m.ctx.Err()
	}
	// Progress notifications let a quiet watch survive compaction: after a broken connection, the watch continues from
	// the last of them.
	events := client.Watch(watch, m.subnetsPrefix(), clientv3.WithPrefix(),
		clientv3.WithRev(at.revision+1), clientv3.WithProgressNotify())
	for {
		select {
		case <-at.invalid:
			return 0, true, nil
		case answer, ok := <-events:
			switch {
			case ctx.Err() != nil:
				return 0, false, ctx.Err()
			case errors.Is(answer.Err(), rpctypes.ErrNoLeader):
				m.log.V(1).Info("The watch of the leases ended; going on", "err", answer.Err())
				m.connection.noteMember(client, answer.Err())
				return revision, false, nil
			case !ok || answer.Err() != nil:
				m.log.V(1).Info("The watch of the leases ended; reading them again", "err", answer.Err())
				return 0, true, nil
			}
			if answer.IsProgressNotify() {
				revision = answer.Header.Revision
			}
			if n := len(answer.Events); n > 0 {
				revision = answer.Events[n-1].Kv.ModRevision // there may be more that the header's revision has
				m.observe(at, answer.Header.Revision)
				updates.Put(m.updateOf(answer.Events))
			}
		case <-ctx.Done():
			return 0, false, ctx.Err()
		}
	}
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
