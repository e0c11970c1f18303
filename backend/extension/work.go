package extension

import (
	"context"
	"maps"
	"time"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/subnet"
)

// A call is what the commands of one peer are run with. A call is complete: a peer is removed in the way it was added,
// although the configuration or the lease of the peer may have changed since.
type call struct {
	Variables   [4]string // of the environment
	Data        string    // on standard input
	Add, Remove string    // the commands
}

// A peer is the actual and the desired state of a peer.
type peer struct {
	subnets subnet.Subnets

	actual  *call // what SubnetAddCommand was run with, even if it failed; nil: it was not run
	desired *call // nil: the peer is gone

	pending   bool          // a command has to be run
	due       time.Time     // when
	failures  int           // in a row
	pause     retry.Backoff // from a failure to the next attempt
	lastError retry.LastError
}

// A worker does the work of Work for one lease of this node. The worker belongs to one goroutine, so that only one
// command runs at a time.
type worker struct {
	*extension
	log      klog.Logger
	own      subnet.Lease
	peers    map[subnet.Subnets]*peer
	recorded record
	unsaved  retry.LastError // of recorded
}

// Work implements backend.Worker.
func (x *extension) Work(ctx context.Context, own subnet.Lease, peers <-chan subnet.Update) error {
	log := klog.FromContext(ctx)
	w := &worker{extension: x, log: log, own: own, peers: map[subnet.Subnets]*peer{}, recorded: readRecord(log,
		x.record)}
	for s, c := range w.recorded {
		w.peers[s] = &peer{subnets: s, actual: &c}
	}
	w.start(ctx)
	for ctx.Err() == nil {
		var due <-chan time.Time
		next := w.next()
		if next != nil {
			due = time.After(time.Until(next.due))
		} else {
			w.save()
		}
		select {
		case <-ctx.Done():
		case u := <-peers:
			w.update(u)
		case <-due:
			w.syncPeer(ctx, next)
		}
	}
	w.save()
	if context.Cause(ctx) == backend.ErrStopping {
		w.end(context.WithoutCancel(ctx))
	}
	return nil
}

// start runs PostStartupCommand until it succeeds. Peers are added only after that.
func (w *worker) start(ctx context.Context) {
	pause := w.pause
	var last retry.LastError
	for {
		err := w.run(ctx, "PostStartupCommand", w.PostStartupCommand, w.environment(), "")
		if err == nil || ctx.Err() != nil {
			return
		}
		if last.Changed(err) {
			w.log.Error(err, "Command failed; retrying, and adding peers only after it has succeeded")
		}
		pause.Sleep(ctx)
	}
}

// end runs ShutdownCommand, if RunShutdownCommand is set.
func (w *worker) end(ctx context.Context) {
	if !w.RunShutdownCommand {
		return
	}
	if err := w.run(ctx, "ShutdownCommand", w.ShutdownCommand, w.environment(), ""); err != nil {
		w.log.Error(err, "Command failed")
	}
}

// environment returns the variables of the commands of this node itself.
func (w *worker) environment() []string {
	v := variables(w.own)
	return append(v[:], "NETWORK="+prefix(w.networks.Network(w.own.IPv4)))
}

// run runs a command, if the command is configured.
func (w *worker) run(ctx context.Context, name, command string, environment []string, stdin string) error {
	if command == "" {
		return nil
	}
	_, err := run(ctx, w.runner, name, command, environment, stdin)
	return err
}

// update applies an update of peers.
func (w *worker) update(u subnet.Update) {
	now := time.Now()
	if u.Snapshot {
		for s, p := range w.peers {
			if _, still := u.Leases[s]; !still {
				w.setDesired(p, nil, now)
			}
		}
	}
	for s := range u.Gone {
		if p := w.peers[s]; p != nil {
			w.setDesired(p, nil, now)
		}
	}
	for s, l := range u.Leases {
		p := w.peers[s]
		if p == nil {
			p = &peer{subnets: s}
			w.peers[s] = p
		}
		data, err := dataOf(*l)
		if err != nil {
			w.setDesired(p, nil, now) // Peer returns the reason
			continue
		}
		w.setDesired(p, &call{variables(*l), data, w.SubnetAddCommand, w.SubnetRemoveCommand}, now)
	}
}

// setDesired sets the desired state of a peer. If the state is the same as before, no command is run.
func (w *worker) setDesired(p *peer, c *call, now time.Time) {
	switch {
	case p.desired == nil && c == nil && p.pending:
	case p.desired != nil && c != nil && *p.desired == *c:
	default:
		p.desired, p.pending, p.due, p.failures, p.pause, p.lastError = c, true, now, 0, w.pause, ""
	}
}

// next returns the peer to sync next, removals first; nil: all peers are in sync.
func (w *worker) next() *peer {
	var first *peer
	for _, p := range w.peers {
		if p.pending && (first == nil || p.before(first)) {
			first = p
		}
	}
	return first
}

func (p *peer) before(q *peer) bool {
	if c := p.due.Compare(q.due); c != 0 {
		return c < 0
	}
	if (p.desired == nil) != (q.desired == nil) {
		return p.desired == nil
	}
	return p.subnets.String() < q.subnets.String()
}

// syncPeer runs the commands of a peer. A peer that was added in another way, or for which SubnetAddCommand has failed,
// is removed first.
func (w *worker) syncPeer(ctx context.Context, p *peer) {
	if p.actual != nil && (p.desired == nil || *p.desired != *p.actual || p.failures > 0) {
		name := "SubnetRemoveCommand for " + p.subnets.String()
		err := w.run(ctx, name, p.actual.Remove, p.actual.Variables[:], p.actual.Data)
		switch {
		case ctx.Err() != nil: // the command may have been killed
			return
		case err != nil && p.desired == nil && p.failures+1 < removeTries:
			w.retry(p, err)
			return
		case err != nil && p.desired == nil:
			w.log.Error(err, "Command failed; not retrying any more", "attempts", removeTries)
		case err != nil && p.failures == 0:
			w.log.Error(err, "Command failed; adding the changed peer nevertheless")
		}
		p.actual = nil
	}
	if p.desired == nil {
		p.pending = false
		delete(w.peers, p.subnets)
		return
	}
	if p.desired.Remove != "" && w.recorded[p.subnets] != *p.desired {
		w.save()
	}
	p.actual = p.desired
	name := "SubnetAddCommand for " + p.subnets.String()
	err := w.run(ctx, name, p.actual.Add, p.actual.Variables[:], p.actual.Data)
	switch {
	case ctx.Err() != nil: // the command may have been killed
	case err != nil:
		w.retry(p, err)
	default:
		p.pending = false
	}
}

// retry schedules the next attempt after a failure.
func (w *worker) retry(p *peer, err error) {
	if p.lastError.Changed(err) {
		w.log.Error(err, "Command failed; retrying")
	}
	p.failures++
	p.due = time.Now().Add(p.pause.Next())
}

// save records the peers that were added or are about to be added, and that can be removed.
func (w *worker) save() {
	all := record{}
	for s, p := range w.peers {
		c := p.actual
		if c == nil {
			c = p.desired
		}
		if c != nil && c.Remove != "" {
			all[s] = *c
		}
	}
	if maps.Equal(all, w.recorded) {
		return
	}
	err := all.write(w.record)
	if w.unsaved.Changed(err) && err != nil {
		w.log.Error(err, "Cannot record peers; those that leave while flanneld is down will not be removed",
			"path", w.record)
	}
	if err == nil {
		w.recorded = all
	}
}
