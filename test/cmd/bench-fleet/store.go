package main

import (
	"context"
	"crypto/tls"
	"net/http"
	"time"

	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/test/lab"
)

// A store is what the nodes share: servers in this namespace, and clients of them.
type store interface {
	// servers returns its processes.
	servers() []*server

	// rests returns what others may do to it while the nodes do nothing.
	rests() []rest

	// moments returns the bad moments of such a store alone.
	moments() []moment

	// manager returns the manager of a node, which reaches the store by the addresses of its half of the network.
	manager(ctx context.Context, n *node) (subnet.Manager, error)

	// register makes the nodes with these numbers known, where a store has to know nodes before they start.
	register(ctx context.Context, from, to int) error

	// remove deletes what the store has of nodes that are gone.
	remove(ctx context.Context, gone []*node) error

	// mark writes the lease of a node that does not exist.
	mark(ctx context.Context, number int) error

	// leases returns all leases in the store. It fails where the store has something else of so many nodes.
	leases(ctx context.Context, nodes int) (map[subnet.Subnets]subnet.Attrs, error)

	// probe writes and reads something, as another client does.
	probe(ctx context.Context) error

	// own returns how many of the requests that the servers count were the simulator's own.
	own() int64

	close()
}

// A rest is a time in which the nodes do nothing.
type rest struct {
	what string
	// others writes for a while what other programs write; nil: nobody writes.
	others func(ctx context.Context, nodes int) error
}

// A traffic is what a server, or all of them, had to do for clients.
type traffic struct {
	requests float64 // a watch that begins is one
	refused  float64 // requests beside these, which the server was too busy for
	messages float64 // to clients' watches
	events   float64 // that were sent to watches
	in, out  float64 // bytes
}

// each calls f for each counter of t and of o.
func (t *traffic) each(o traffic, f func(mine *float64, other float64)) {
	f(&t.requests, o.requests)
	f(&t.refused, o.refused)
	f(&t.messages, o.messages)
	f(&t.events, o.events)
	f(&t.in, o.in)
	f(&t.out, o.out)
}

func (t *traffic) add(o traffic) { t.each(o, func(mine *float64, other float64) { *mine += other }) }
func (t *traffic) sub(o traffic) { t.each(o, func(mine *float64, other float64) { *mine -= other }) }

// awaitAnswer waits until a store answers a client.
func awaitAnswer(ctx context.Context, s store) error {
	return lab.Poll(ctx, "the store to answer", func() error {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		return s.probe(ctx)
	})
}

// startServers starts the servers that are down, and waits until the store answers.
func startServers(ctx context.Context, s store) error {
	for _, server := range s.servers() {
		if err := server.start(); err != nil {
			return err
		}
	}
	return awaitAnswer(ctx, s)
}

// lose ends a server as a crash would.
func lose(ctx context.Context, f *fleet, s *server) (since time.Time, err error) {
	since = time.Now()
	s.kill()
	return since, f.mark(ctx)
}

// outage ends servers as a crash would, and starts them again after a while.
func outage(ctx context.Context, f *fleet, servers ...*server) (since time.Time, err error) {
	for _, s := range servers {
		s.kill()
	}
	if err := pause(ctx, away); err != nil {
		return since, err
	}
	if err := startServers(ctx, f.store); err != nil {
		return since, err
	}
	f.meter.reset() // nobody got answers before
	return time.Now(), f.mark(ctx)
}

// insecure is a client of servers that have certificates of their own, on this host.
func insecure() *http.Transport {
	return &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, MaxIdleConnsPerHost: 32}
}
