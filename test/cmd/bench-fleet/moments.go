package main

import (
	"context"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/flanneld/flanneld/test/lab"
)

// A moment is something bad that happens to a fleet. Its function returns when the fleet could become right again.
type moment struct {
	name, what string
	happen     func(context.Context, *fleet) (since time.Time, err error)
}

// joins is how many nodes join at once.
const joins = 100

// away is how long all of the store, or half of the network, is away.
const away = time.Minute

// moments returns all bad moments of a store.
func moments(s store) []moment {
	all := append([]moment{
		{"joins", "100 join at once", func(ctx context.Context, f *fleet) (time.Time, error) {
			return f.start(ctx, joins, 0)
		}},
		{"restart", "all daemons restart at once", func(ctx context.Context, f *fleet) (time.Time, error) {
			end(f.nodes)
			since := time.Now()
			for _, n := range f.nodes {
				n.start(ctx)
			}
			return since, nil
		}},
	}, s.moments()...)
	return append(all,
		moment{"partition", "half of the nodes are cut off for 60 s", func(ctx context.Context, f *fleet) (time.Time, error) {
			return f.cutHalf(ctx, away, func() error { return nil })
		}},
		moment{"rolling", "a rolling upgrade, a twentieth at a time", func(ctx context.Context, f *fleet) (time.Time, error) {
			return f.upgrade(ctx)
		}},
	)
}

// choose returns the moments with these names: all where names is nil, none where the only name is "-".
func choose(all []moment, names []string) (chosen []moment, err error) {
	if names == nil {
		return all, nil
	}
	if slices.Equal(names, []string{"-"}) {
		return nil, nil
	}
	var known []string
	for _, m := range all {
		known = append(known, m.name)
		if slices.Contains(names, m.name) {
			chosen = append(chosen, m)
		}
	}
	for _, name := range names {
		if !slices.Contains(known, name) {
			return nil, fmt.Errorf("-moments has %q, which this store does not have: it has %s", name,
				strings.Join(known, ", "))
		}
	}
	return chosen, nil
}

func (f *fleet) upgrade(ctx context.Context) (since time.Time, err error) {
	since = time.Now()
	batch := max(1, len(f.nodes)/20)
	for i := 0; i < len(f.nodes); i += batch {
		nodes := f.nodes[i:min(i+batch, len(f.nodes))]
		end(nodes)
		for _, n := range nodes {
			n.start(ctx)
		}
		if err := f.awaitHeld(ctx, nodes); err != nil {
			return since, err
		}
	}
	return since, nil
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// awaitHeld waits until nodes hold leases and know peers.
func (f *fleet) awaitHeld(ctx context.Context, nodes []*node) error {
	return lab.Poll(ctx, "nodes to be ready", func() error {
		for _, n := range nodes {
			n.mu.Lock()
			ready := n.held && len(n.slots) > 0
			n.mu.Unlock()
			if !ready {
				return fmt.Errorf("node %d is not ready", n.number)
			}
		}
		return nil
	})
}

// cutHalf drops the packets of every other node to the store for a while, and calls meanwhile after something that
// these nodes miss.
func (f *fleet) cutHalf(ctx context.Context, d time.Duration, meanwhile func() error) (since time.Time, err error) {
	nft := func(script string) error {
		cmd := exec.CommandContext(ctx, "nft", "-f", "-")
		cmd.Stdin = strings.NewReader(script)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("nft: %w: %s", err, out)
		}
		return nil
	}
	if err := nft(`table ip cut {
		chain out { type filter hook output priority 0; ip daddr 127.0.1.0/24 drop; ip saddr 127.0.1.0/24 drop; }
	}`); err != nil {
		return since, err
	}
	began := time.Now()
	if err := f.mark(ctx); err != nil {
		return since, err
	}
	if err := meanwhile(); err != nil {
		return since, err
	}
	if err := pause(ctx, time.Until(began.Add(d))); err != nil {
		return since, err
	}
	since = time.Now()
	return since, nft("delete table ip cut")
}
