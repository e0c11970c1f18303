package subnet

import (
	"context"
	"time"
)

// A Reporter is a Manager that tells operators more than the daemon needs.
type Reporter interface {
	// Report tells how things stand with the store, as far as is known.
	Report() Report

	// Expiries asks the store when leases end, the named ones or else all. Those
	// that never do are left out.
	Expiries(ctx context.Context, of ...Subnets) (map[Subnets]time.Time, error)

	// Clock asks for the store's time, which is good to the second.
	Clock(ctx context.Context) (time.Time, error)
}

// A Report is about a Manager's store.
type Report struct {
	Store   string    // "etcd at http://127.0.0.1:2379"
	Trouble string    // why it is of no use at the moment; "": it is
	Expires time.Time // this node's lease, as renewed last; zero: not known, or never
}
