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

// A call is what the commands of one peer are run with. It is complete: a peer
// is removed as it was added, whatever the configuration and the peer's lease
// have become since.
type call struct {
	Variables   [4]string // of the environment
	Data        string    // on standard input
	Add, Remove string    // the commands
}

// A peer is what there is, and what there should be.
type peer struct {
	subnets subnet.Subnets

	have *call // that SubnetAddCommand was run with, maybe in vain; nil: never
	want *call // nil: the peer is gone

	pending bool          // there is something to do
	due     time.Time     // when
	tries   int           // that failed in a row
	pause   retry.Backoff // from a failure to the next attempt
	trouble retry.LastError
}

// job is Work, for one lease of this node's. It belongs to one goroutine, so
// that no two commands run at a time.
type job struct {
	*extension
	own      subnet.Lease
	peers    map[subnet.Subnets]*peer
	recorded record
}

// Work implements backend.Worker.
func (x *extension) Work(ctx context.Context, own subnet.Lease, peers <-chan subnet.Update) error {
	j := &job{extension: x, own: own, peers: map[subnet.Subnets]*peer{}, recorded: readRecord(x.record)}
	for s, c := range j.recorded {
		j.peers[s] = &peer{subnets: s, have: &c}
	}
	j.start(ctx)
	for ctx.Err() == nil {
		var due <-chan time.Time
		next := j.next()
		if next != nil {
			due = time.After(time.Until(next.due))
		} else {
			j.save()
		}
		select {
		case <-ctx.Done():
		case u := <-peers:
			j.update(u)
		case <-due:
			j.attend(ctx, next)
		}
	}
	j.save()
	if context.Cause(ctx) == backend.ErrStopping {
		j.end(context.WithoutCancel(ctx))
	}
	return nil
}

// start runs PostStartupCommand until it does well. No peer is added before.
func (j *job) start(ctx context.Context) {
	pause := j.pause
	var trouble retry.LastError
	for {
		err := j.run(ctx, "PostStartupCommand", j.PostStartupCommand, j.environment(), "")
		if err == nil || ctx.Err() != nil {
			return
		}
		if trouble.Changed(err) {
			klog.Errorf("%v; it is tried again, and peers are added once it has worked", err)
		}
		pause.Sleep(ctx)
	}
}

// end runs ShutdownCommand.
func (j *job) end(ctx context.Context) {
	if err := j.run(ctx, "ShutdownCommand", j.ShutdownCommand, j.environment(), ""); err != nil {
		klog.Error(err)
	}
}

// environment returns the variables of the commands for this node itself.
func (j *job) environment() []string {
	v := variables(j.own)
	return append(v[:], "NETWORK="+prefix(j.networks.IPv4))
}

// run runs a command, if there is one.
func (j *job) run(ctx context.Context, name, command string, environment []string, stdin string) error {
	if command == "" {
		return nil
	}
	_, err := j.runner.run(ctx, name, command, environment, stdin)
	return err
}

// update takes news of peers.
func (j *job) update(u subnet.Update) {
	now := time.Now()
	if u.Snapshot {
		for s, p := range j.peers {
			if _, still := u.Leases[s]; !still {
				j.want(p, nil, now)
			}
		}
	}
	for s := range u.Gone {
		if p := j.peers[s]; p != nil {
			j.want(p, nil, now)
		}
	}
	for s, l := range u.Leases {
		p := j.peers[s]
		if p == nil {
			p = &peer{subnets: s}
			j.peers[s] = p
		}
		data, err := dataOf(l)
		if err != nil {
			j.want(p, nil, now) // Peer says why
			continue
		}
		j.want(p, &call{variables(l), data, j.SubnetAddCommand, j.SubnetRemoveCommand}, now)
	}
}

// want sets what there should be of a peer. Where it is what it was, nothing
// needs doing.
func (j *job) want(p *peer, c *call, now time.Time) {
	switch {
	case p.want == nil && c == nil && p.pending:
	case p.want != nil && c != nil && *p.want == *c:
	default:
		p.want, p.pending, p.due, p.tries, p.pause, p.trouble = c, true, now, 0, j.pause, ""
	}
}

// next returns the peer to attend to next, removals first; nil where all is in
// order.
func (j *job) next() *peer {
	var first *peer
	for _, p := range j.peers {
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
	if (p.want == nil) != (q.want == nil) {
		return p.want == nil
	}
	return p.subnets.String() < q.subnets.String()
}

// attend brings a peer in order. What was added is removed first where it is
// not what is wanted, and where adding it has failed halfway.
func (j *job) attend(ctx context.Context, p *peer) {
	if p.have != nil && (p.want == nil || *p.want != *p.have || p.tries > 0) {
		err := j.run(ctx, "SubnetRemoveCommand for "+p.subnets.String(), p.have.Remove, p.have.Variables[:], p.have.Data)
		switch {
		case ctx.Err() != nil: // it may have been ended
			return
		case err != nil && p.want == nil && p.tries+1 < removeTries:
			p.fail(err)
			return
		case err != nil && p.want == nil:
			klog.Errorf("%v; that was attempt %d, and the last", err, removeTries)
		case err != nil && p.tries == 0:
			klog.Warningf("%v; the peer has changed, and is added as it is now", err)
		}
		p.have = nil
	}
	if p.want == nil {
		p.pending = false
		delete(j.peers, p.subnets)
		return
	}
	if p.want.Remove != "" && j.recorded[p.subnets] != *p.want {
		j.save()
	}
	p.have = p.want
	err := j.run(ctx, "SubnetAddCommand for "+p.subnets.String(), p.have.Add, p.have.Variables[:], p.have.Data)
	switch {
	case ctx.Err() != nil: // it may have been ended
	case err != nil:
		p.fail(err)
	default:
		p.pending = false
	}
}

// fail has a command tried again.
func (p *peer) fail(err error) {
	if p.trouble.Changed(err) {
		klog.Errorf("%v; it is tried again", err)
	}
	p.tries++
	p.due = time.Now().Add(p.pause.Next())
}

// save records who has been added, or is about to be, and can be removed.
func (j *job) save() {
	all := record{}
	for s, p := range j.peers {
		c := p.have
		if c == nil {
			c = p.want
		}
		if c != nil && c.Remove != "" {
			all[s] = *c
		}
	}
	if maps.Equal(all, j.recorded) {
		return
	}
	if err := all.write(j.record); err != nil {
		klog.Errorf("Peers that leave while flanneld is down will not be removed: %v", err)
	}
	j.recorded = all
}
