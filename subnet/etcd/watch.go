package etcd

import (
	"context"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/subnet"
)

// Watch implements subnet.Manager. Leases of peers come without the time of
// their end, which would take a request for each.
func (m *Manager) Watch(ctx context.Context) <-chan subnet.Update {
	out := make(chan subnet.Update)
	go func() {
		defer close(out)
		pause := subnet.Backoff()
		for {
			began := time.Now()
			if err := m.follow(ctx, out); err != nil {
				return
			}
			if time.Since(began) > time.Minute {
				pause.Reset()
			}
			if err := pause.Sleep(ctx); err != nil {
				return
			}
		}
	}()
	return out
}

// follow sends a snapshot and then changes. It returns nil when it may have
// missed some, and an error when ctx ended or the manager was closed.
func (m *Manager) follow(ctx context.Context, out chan<- subnet.Update) error {
	records, at, err := m.list(ctx)
	if err != nil {
		return err
	}
	// What the reader has not been told yet.
	news := subnet.Update{Snapshot: true, Leases: make(map[subnet.Subnets]subnet.Lease, len(records))}
	for _, r := range records {
		if r.valid {
			news.Put(subnet.Lease{Subnets: r.subnets, Attrs: r.attrs})
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	client, watch, err := m.connection.open(ctx)
	if err != nil {
		return m.ctx.Err()
	}
	// Progress notifications let a quiet watch survive compaction: after a
	// broken connection it goes on from the last of them.
	events := client.Watch(clientv3.WithRequireLeader(watch), m.subnetsPrefix(), clientv3.WithPrefix(), clientv3.WithRev(at.revision+1), clientv3.WithProgressNotify())
	for {
		send := out
		if !news.Snapshot && len(news.Leases) == 0 && len(news.Gone) == 0 {
			send = nil
		}
		select {
		case send <- news:
			news = subnet.Update{}
		case <-at.replaced:
			return nil
		case answer, ok := <-events:
			switch {
			case ctx.Err() != nil:
				return ctx.Err()
			case !ok || answer.Err() != nil:
				klog.V(1).Infof("The watch of the leases ended (%v): reading them again", answer.Err())
				return nil
			}
			if len(answer.Events) > 0 {
				m.learn(at, answer.Header.Revision)
			}
			if len(answer.Events) > 0 && news.Since.IsZero() {
				news.Since = time.Now()
			}
			for _, e := range answer.Events {
				m.note(&news, e)
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// note adds an event to the news. A record that cannot be read is no lease.
func (m *Manager) note(news *subnet.Update, e *clientv3.Event) {
	if e.Type == mvccpb.DELETE {
		if s, err := subnet.ParseKey(strings.TrimPrefix(string(e.Kv.Key), m.subnetsPrefix())); err == nil {
			news.Delete(s)
		}
		return
	}
	switch r, ok := m.parse(e.Kv); {
	case ok && r.valid:
		news.Put(subnet.Lease{Subnets: r.subnets, Attrs: r.attrs})
	case ok:
		news.Delete(r.subnets)
	}
}
