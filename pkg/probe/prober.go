// Package probe finds out whether packets arrive at the peers of a host through its overlay network. It sends a small,
// steady number of ICMP echo requests. The kernel of the peer replies; a peer that uses this package, too, tells in its
// own requests what it receives, so that a direction in which packets are lost is known.
package probe

import (
	"container/heap"
	"context"
	"errors"
	"iter"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/flanneld/flanneld/pkg/echo"
	"github.com/flanneld/flanneld/pkg/family"
)

const (
	// DefaultInterval is the time in which each peer is asked at least once, while there are few enough peers.
	DefaultInterval = 30 * time.Second

	// Every tick, at most a batch of requests is sent, however many peers there are: ten a second. Together they cost less
	// than one by one, since a process that sleeps has to wake for each.
	tick  = time.Second
	batch = 10
)

// A conn is an *echo.Conn.
type conn interface {
	Send(from, to netip.Addr, seq uint16, data []byte) error
	Receive(buf []byte) (echo.Message, error)
	Close() error
}

// Observers are told of requests through the overlay. Each may be nil.
type Observers struct {
	RTT  func(time.Duration) // of each reply
	Loss func(share float64) // of some ten requests to one peer, which share had no reply
}

// A Prober asks the peers of a host. Its methods may be called at any time.
type Prober struct {
	interval  time.Duration
	created   time.Time // which is the moment of that name
	observers Observers
	open      func(family.Family) (conn, error)
	wake      chan struct{} // Run has to look at the queues again
	reports   chan struct{}

	mu     sync.Mutex
	pace   pace
	peers  map[string][]*path
	from   map[netip.Addr]*path // by the peer's addresses; several peers may share the public one
	nonces map[uint64]*path
	waits  queue  // between two rounds
	asks   queue  // in a round
	alarms int    // paths whose state is reported
	ticked moment // the latest batch began
	left   int    // requests of that batch that may still be sent
	err    error  // of Run
}

// New returns a Prober, which has no peers yet. interval 0 is DefaultInterval.
func New(interval time.Duration, o Observers) *Prober {
	if interval == 0 {
		interval = DefaultInterval
	}
	p := &Prober{
		interval: interval, created: time.Now(), observers: o, wake: make(chan struct{}, 1), reports: make(chan struct{}, 1),
		open:  func(f family.Family) (conn, error) { return echo.Open(f) },
		peers: map[string][]*path{}, from: map[netip.Addr]*path{}, nonces: map[uint64]*path{},
	}
	p.setPace()
	return p
}

// now returns the present moment.
func (p *Prober) now() moment { return created + moment(time.Since(p.created)) }

// Reports receives when a Path has been HostOnly or Silent for AlarmAfter, and when such a Path has recovered or is gone.
func (p *Prober) Reports() <-chan struct{} { return p.reports }

// Set replaces the paths to a peer. A path that stays as it is keeps its state. Without paths, the peer is forgotten.
func (p *Prober) Set(peer string, paths ...Path) {
	p.mu.Lock()
	defer p.mu.Unlock()
	old := p.peers[peer]
	var kept []*path
	for _, want := range paths {
		i := -1
		for j, have := range old {
			if have.ends() == want {
				i = j
			}
		}
		if i >= 0 {
			kept = append(kept, old[i])
			old = append(old[:i:i], old[i+1:]...)
			continue
		}
		kept = append(kept, newPath(want, &p.pace, p.now()))
	}
	for _, gone := range old {
		p.remove(gone)
	}
	for _, path := range kept {
		if path.due == 0 {
			p.add(path)
		}
	}
	p.peers[peer] = kept
	if len(kept) == 0 {
		delete(p.peers, peer)
	}
	p.setPace()
}

// add begins to ask on a path: soon, and not at the same time as on all others.
func (p *Prober) add(path *path) {
	path.due = p.now() + moment(rand.N(min(p.interval, 5*time.Second)))
	heap.Push(&p.waits, path)
	p.from[path.overlay], p.from[path.public], p.nonces[path.nonce] = path, path, path
	signal(p.wake)
}

func (p *Prober) remove(path *path) {
	heap.Remove(p.queueOf(path), int(path.index))
	for _, ip := range []netip.Addr{path.overlay, path.public} {
		if p.from[ip] == path {
			delete(p.from, ip)
		}
	}
	delete(p.nonces, path.nonce)
	p.setReported(path, "")
}

// setPace follows the number of paths.
func (p *Prober) setPace() {
	p.pace.interval = max(p.interval, time.Duration(len(p.waits)+len(p.asks))*tick/batch)
	p.pace.recent = 2*max(p.pace.interval, DefaultInterval) + 10*timeout // peers may ask less often than this host
}

func (p *Prober) queueOf(path *path) *queue {
	if path.attempt > 0 {
		return &p.asks
	}
	return &p.waits
}

// signal wakes the receiver of a channel with room for one.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Run asks until ctx ends, in the network namespace of the calling thread. It returns an error, and does nothing, where
// the host lets it not.
func (p *Prober) Run(ctx context.Context) error {
	var conns family.Pair[conn]
	var receivers sync.WaitGroup
	defer receivers.Wait()
	var errs []error
	for _, f := range family.All {
		c, err := p.open(f)
		if err != nil { // the host may lack IPv6
			errs = append(errs, err)
			continue
		}
		*conns.At(f) = c
		context.AfterFunc(ctx, func() { c.Close() }) // which ends a Send that waits, too
		receivers.Go(func() { p.receive(c) })
	}
	if len(errs) == len(family.All) {
		err := errors.Join(errs...)
		p.mu.Lock()
		p.err = err
		p.mu.Unlock()
		return err
	}
	p.send(ctx, conns)
	return nil
}

// send sends requests until ctx ends.
func (p *Prober) send(ctx context.Context, conns family.Pair[conn]) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.wake:
		case <-timer.C:
		}
		r, wait := p.next()
		for ; r != nil; r, wait = p.next() {
			if c := conns.Of(family.Of(r.to)); c != nil {
				if err := c.Send(r.from, r.to, r.seq, r.data); err != nil {
					p.setError(r, err)
				}
			}
		}
		timer.Reset(wait)
	}
}

// An outgoing is a request that is to be sent.
type outgoing struct {
	path     *path
	scope    scope
	from, to netip.Addr
	seq      uint16
	data     []byte
}

// next returns the request that is due; if none is, it returns how long to wait. Rounds in progress come first: where
// there are more peers than can be asked in time, a round does not take longer.
func (p *Prober) next() (*outgoing, time.Duration) {
	const idle = time.Hour
	p.mu.Lock()
	defer p.mu.Unlock()
	for now := p.now(); ; {
		path := p.asks.first()
		if w := p.waits.first(); path == nil || path.due > now && w != nil && w.due < path.due {
			path = w
		}
		if path == nil {
			return nil, idle
		}
		next := p.ticked + moment(tick)
		if path.due > now || p.left == 0 && next > now {
			return nil, max(path.due, next).sub(now)
		}
		if next <= now {
			p.ticked, p.left = now, batch
		}
		heap.Remove(p.queueOf(path), int(path.index))
		send := path.step(now)
		p.observeLosses(path)
		if !send {
			p.endRound(path, now)
			continue
		}
		p.left--
		path.due = now + moment(timeout)
		heap.Push(&p.asks, path)
		own := path.side.Value()
		r := &outgoing{path: path, scope: path.scope, from: own.source, to: path.overlay, seq: path.seq, data: path.data(now)}
		if path.scope == underlay {
			r.from, r.to = own.local, path.public
		}
		return r, 0
	}
}

// setError records why a request was not sent. There will be no reply to it.
func (p *Prober) setError(r *outgoing, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if r.scope == overlay {
		r.path.err = err
	}
}

func (p *Prober) observeLosses(path *path) {
	if share, ok := path.losses(); ok && p.observers.Loss != nil {
		p.observers.Loss(share)
	}
}

// endRound puts a path, which is in no queue, in the queue for its next round, and has its state reported.
func (p *Prober) endRound(path *path, now moment) {
	interval := p.pace.interval
	path.due = path.began + moment(interval-rand.N(interval/10+1))
	if at := path.since + moment(AlarmAfter); path.isBad() && at > now && at < path.due {
		path.due = at
	}
	heap.Push(&p.waits, path)
	p.report(path, now)
}

// report has the state of a path reported if it has to be, or if it was and is another one now.
func (p *Prober) report(path *path, now moment) {
	state := State("")
	if path.isBad() && now.sub(path.since) >= AlarmAfter {
		state = path.state
	}
	p.setReported(path, state)
}

func (p *Prober) setReported(path *path, state State) {
	if path.reported == state {
		return
	}
	if path.reported != "" {
		p.alarms--
	}
	if path.reported = state; state != "" {
		p.alarms++
	}
	signal(p.reports)
}

// receive takes what arrives until c is closed.
func (p *Prober) receive(c conn) {
	buf := make([]byte, 256)
	for {
		m, err := c.Receive(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil && p.take(m) {
			signal(p.wake)
		}
	}
}

// take takes a message. It returns whether a path is due earlier than it was.
func (p *Prober) take(m echo.Message) (earlier bool) {
	if len(m.Data) < dataLen {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	if m.Reply {
		if path := p.nonces[nonceOf(m.Data)]; path != nil {
			p.takeReply(path, m.Seq, now)
		}
		return false
	}
	path := p.from[m.From]
	if path == nil || !path.hear(now, m.Data) {
		return false
	}
	path.due = now
	heap.Fix(p.queueOf(path), int(path.index))
	return true
}

func (p *Prober) takeReply(path *path, seq uint16, now moment) {
	queue, asking := p.queueOf(path), path.attempt > 0
	if rtt := path.reply(now, seq); rtt > 0 && p.observers.RTT != nil {
		p.observers.RTT(rtt)
	}
	if ended := asking && path.attempt == 0; ended {
		heap.Remove(queue, int(path.index))
		p.endRound(path, now)
	} else {
		p.report(path, now) // a late reply
	}
}

// Err returns the error that Run has returned.
func (p *Prober) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// Results returns what is known of the paths to a peer.
func (p *Prober) Results(peer string) []Result {
	p.mu.Lock()
	defer p.mu.Unlock()
	var results []Result
	for _, path := range p.peers[peer] {
		results = append(results, path.result(p.now()))
	}
	return results
}

// All returns what is known of all paths, by peer.
func (p *Prober) All() map[string][]Result {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := make(map[string][]Result, len(p.peers))
	for peer, path := range p.paths() {
		all[peer] = append(all[peer], path.result(p.now()))
	}
	return all
}

// Count returns how many paths are in each State.
func (p *Prober) Count() map[State]int {
	p.mu.Lock()
	defer p.mu.Unlock()
	count := map[State]int{}
	for _, path := range p.paths() {
		count[path.state]++
	}
	return count
}

// Alarms returns the paths that have been HostOnly or Silent for AlarmAfter, by peer.
func (p *Prober) Alarms() map[string][]Result {
	p.mu.Lock()
	defer p.mu.Unlock()
	alarms := map[string][]Result{}
	if p.alarms == 0 {
		return alarms
	}
	for peer, path := range p.paths() {
		if path.reported != "" {
			alarms[peer] = append(alarms[peer], path.result(p.now()))
		}
	}
	return alarms
}

// paths yields all paths, each with its peer.
func (p *Prober) paths() iter.Seq2[string, *path] {
	return func(yield func(string, *path) bool) {
		for peer, paths := range p.peers {
			for _, path := range paths {
				if !yield(peer, path) {
					return
				}
			}
		}
	}
}

// A queue has the path that is due first in front.
type queue []*path

func (q queue) first() *path {
	if len(q) == 0 {
		return nil
	}
	return q[0]
}

// Len, Less, Swap, Push and Pop implement heap.Interface.
func (q queue) Len() int           { return len(q) }
func (q queue) Less(i, j int) bool { return q[i].due < q[j].due }
func (q queue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].index, q[j].index = int32(i), int32(j)
}

func (q *queue) Push(x any) {
	path := x.(*path)
	path.index = int32(len(*q))
	*q = append(*q, path)
}

func (q *queue) Pop() any {
	last := len(*q) - 1
	path := (*q)[last]
	(*q)[last] = nil
	*q = (*q)[:last]
	return path
}
