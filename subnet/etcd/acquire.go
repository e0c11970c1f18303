package etcd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"

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
	defer m.setWaiting("")
	defer m.listed.forget()
	pause := m.pace().backoff()
	full, enough := false, freeEnough
	var created subnet.Lease // by this call; zero: none
	for {
		if m.held(ips) == nil {
			if err := m.claimAll(ctx, ips); err != nil {
				return subnet.Lease{}, err
			}
		}
		records, at, err := m.recall(ctx, want.Attrs)
		if err != nil {
			return subnet.Lease{}, err
		}
		c := choose(records, cfg, want, m.wrote, enough, rand.IntN)
		m.logUnfit(cfg, c.unfit)
		switch {
		case len(c.drop) > 0:
			if err := m.drop(ctx, cfg, c.drop); err != nil {
				return subnet.Lease{}, err
			}
			continue
		case c.take.exists() && c.take.subnets == created.Subnets && m.isWrote(c.take):
			m.verified = c.take.created
			return created, nil
		case c.take.exists():
			r, expires, ok, err := m.publish(ctx, c.take, c.take.key, value)
			if err != nil {
				return subnet.Lease{}, err
			}
			if ok {
				if c.take.valid && !sameNode(c.take.attrs, want.Attrs) {
					m.log.Info("This node's public address changed; it takes its lease along", "subnet", r.subnets,
						"addresses", ips, "before", c.take.attrs.PublicIPs())
				}
				m.setWrote(r)
				m.verified = r.created
				return subnet.Lease{Subnets: r.subnets, Attrs: want.Attrs, Expires: expires}, nil
			}
		case len(c.create.Each()) > 0:
			r, expires, ok, err := m.publish(ctx, record{}, m.subnetKey(c.create), value)
			if err != nil {
				return subnet.Lease{}, err
			}
			if ok {
				// The next turn takes it, if no older lease overlaps it.
				created = subnet.Lease{Subnets: r.subnets, Attrs: want.Attrs, Expires: expires}
				m.setWrote(r)
				continue
			}
		default:
			if !full {
				full = true
				m.logFull(cfg, len(records))
			}
			deletions := []clientv3.OpOption{clientv3.WithPrefix(), clientv3.WithFilterPut()}
			if err := m.awaitChange(ctx, at, []string{m.subnetsPrefix()}, deletions...); err != nil {
				return subnet.Lease{}, err
			}
			continue
		}
		// Another node was faster. If many start at once, most of them see this.
		enough = min(enough*freeMore, freeMost)
		if err := pause.Sleep(ctx); err != nil {
			return subnet.Lease{}, err
		}
	}
}

// drop deletes records that keep this node from its lease.
func (m *Manager) drop(ctx context.Context, cfg *subnet.Config, records []record) error {
	for _, r := range records {
		if o, hindered := cfg.Hinders(r.subnets); hindered {
			m.log.Error(nil, "Giving up a lease that overlaps what this host uses", "subnet", r.subnets, "key", r.key,
				"overlaps", o.Name)
		} else {
			m.log.Info("Deleting a lease with this node's address, or of this node, which does not use it",
				"subnet", r.subnets, "key", r.key)
		}
		if err := m.remove(ctx, r); err != nil {
			return err
		}
	}
	return nil
}

// logFull logs that no subnet is free, and what to do about it; State has that, too.
func (m *Manager) logFull(cfg *subnet.Config, leases int) {
	fix := fmt.Sprintf("release the subnets of nodes that no longer exist (flannelctl leases list; flannelctl leases "+
		"release SUBNET), or add another network to Networks in %s", m.configKey())
	m.setWaiting("a subnet, none of which is free: " + fix)
	m.log.Error(nil, "No subnet is free; waiting until a lease is deleted",
		"leases", leases, "subnets", describePools(cfg), "fix", fix)
}

// logUnfit logs which reservations of this node cannot be used, and why.
func (m *Manager) logUnfit(cfg *subnet.Config, reservations []record) {
	for _, r := range reservations {
		reason := "it does not fit the network's configuration, or overlaps another lease"
		if o, hindered := cfg.Hinders(r.subnets); hindered {
			reason = "it overlaps " + o.Name + " of this host"
		}
		m.records.Error(r.key, r.changed, nil, "The reservation of this node cannot be used", "key", r.key, "reason", reason)
	}
}

// describePools returns the subnets that there are, such as "/24 from 10.5.1.0 to 10.5.255.0".
func describePools(cfg *subnet.Config) string {
	var pools []string
	for _, p := range cfg.Each() {
		for _, r := range p.Ranges {
			if !r.Retired {
				pools = append(pools, fmt.Sprintf("/%d from %v to %v", p.SubnetLen, r.Min, r.Max))
			}
		}
	}
	text := strings.Join(pools, ", ")
	if n := len(cfg.Obstacles); n > 0 {
		text += ", without what this host uses: " + cfg.Obstacles[0].Name
		if n > 1 {
			text += fmt.Sprintf(" and %d more", n-1)
		}
	}
	return text
}
