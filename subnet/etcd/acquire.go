package etcd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"

	clientv3 "go.etcd.io/etcd/client/v3"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/subnet"
)

// Acquire implements subnet.Manager.
func (m *Manager) Acquire(ctx context.Context, cfg *subnet.Config, want subnet.Lease) (subnet.Lease, error) {
	ips := want.Attrs.PublicIPs()
	if len(ips) == 0 {
		return subnet.Lease{}, errors.New("a lease needs a public address")
	}
	value, err := json.Marshal(want.Attrs)
	if err != nil {
		return subnet.Lease{}, fmt.Errorf("what to publish with the lease: %w", err)
	}
	pause := subnet.Backoff()
	full := false
	for {
		if m.held(ips) == nil {
			if err := m.claimAll(ctx, ips); err != nil {
				return subnet.Lease{}, err
			}
		}
		records, at, err := m.list(ctx)
		if err != nil {
			return subnet.Lease{}, err
		}
		c := choose(records, cfg, want, m.wrote, rand.IntN)
		for _, r := range c.unfit {
			m.warnOnce(r.key+" unfit", r.changed, fmt.Sprintf("The reservation %s is for this node, but does not suit the network's configuration or overlaps another lease: it is not used", r.key))
		}
		switch {
		case len(c.drop) > 0:
			for _, r := range c.drop {
				klog.Infof("The lease of %v, which this node had, is of no use any more: deleting %s", r.subnets, r.key)
				if err := m.remove(ctx, r); err != nil {
					return subnet.Lease{}, err
				}
			}
			continue
		case c.take.exists():
			r, expires, ok, err := m.publish(ctx, c.take, c.take.key, value)
			if err != nil {
				return subnet.Lease{}, err
			}
			if ok {
				m.wrote, m.verified = r, r.created
				return subnet.Lease{Subnets: r.subnets, Attrs: want.Attrs, Expires: expires}, nil
			}
		case len(c.create.Each()) > 0:
			r, _, ok, err := m.publish(ctx, record{}, m.subnetKey(c.create), value)
			if err != nil {
				return subnet.Lease{}, err
			}
			if ok {
				// Taken up by the next turn, if no older lease overlaps it.
				m.wrote = r
				continue
			}
		default:
			if !full {
				full = true
				klog.Errorf("No subnet is free: %s. Delete the leases of nodes that are no more (etcdctl get --prefix %s; etcdctl del KEY), or enlarge the network in %s. Waiting for a lease to go",
					fullness(cfg, len(records)), m.subnetsPrefix(), m.configKey())
			}
			if err := m.await(ctx, at, []string{m.subnetsPrefix()}, clientv3.WithPrefix(), clientv3.WithFilterPut()); err != nil {
				return subnet.Lease{}, err
			}
			continue
		}
		// Somebody was faster.
		if err := pause.Sleep(ctx); err != nil {
			return subnet.Lease{}, err
		}
	}
}

// fullness says how much is taken of what.
func fullness(cfg *subnet.Config, leases int) string {
	text := fmt.Sprintf("leases in use: %d", leases)
	for _, p := range cfg.Each() {
		text += fmt.Sprintf("; subnets of %v: /%d from %v to %v", p.Network, p.SubnetLen, p.Min, p.Max)
	}
	return text
}
