package firewall

import (
	"context"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/command"
	"github.com/flanneld/flanneld/pkg/fight"
	"github.com/flanneld/flanneld/pkg/retry"
)

// A Reconciler keeps the latest desired rules in place. The programs that set
// them may wait long for a lock: Run does so in a goroutine of its own.
type Reconciler struct {
	resync  time.Duration
	desired chan target // the latest only
	states  chan State  // of the latest target only
	open    func(ctx context.Context, nftables bool) (driver, error)

	mu    sync.Mutex // held while desired or states is written
	stats Stats

	// Of Run alone:
	driver  driver             // nil: none yet that works
	changes <-chan struct{}    // of the rules that the driver keeps; nil: not watched
	unwatch context.CancelFunc // ends changes
	fights  *fight.Detector[string, string]
	pace    pace
}

// A State is how the latest desired rules are.
type State struct {
	InPlace bool
	Err     error  // why not
	Fight   string // the mode ("iptables") in which another program changes our rules again and again; "": none
}

// Stats are counts of what a Reconciler has done.
type Stats struct {
	Checks  uint64
	Writes  uint64
	Repairs uint64 // checks that found the rules changed
	InPlace bool   // after the last check
	Checked time.Time
}

// A target is the desired rules, and where they belong.
type target struct {
	Desired
	nftables bool // or else iptables
}

func (t target) mode() string {
	if t.nftables {
		return "nftables"
	}
	return "iptables"
}

// A driver is what a Reconciler needs of a Driver.
type driver interface {
	Outdated(context.Context) bool
	Check(context.Context) (bool, error)
	Apply(context.Context, Desired) error
	Changes(context.Context) (<-chan struct{}, error)
	Disturbs() bool
}

// NewReconciler returns a Reconciler for the rules of a network (see New) that checks
// them every resync, and sooner when another program changes them.
func NewReconciler(network string, resync time.Duration) *Reconciler {
	programs := &command.Runner{} // of all drivers: it remembers which programs take long
	return &Reconciler{
		resync: resync, desired: make(chan target, 1), states: make(chan State, 1),
		open: func(ctx context.Context, nftables bool) (driver, error) {
			d, err := newDriver(ctx, programs, network, nftables)
			if err != nil {
				return nil, err
			}
			return d, nil
		},
	}
}

// Set makes these the rules to keep, in place of any before. A State that is
// received after Set is one of these rules. Set does not wait.
func (r *Reconciler) Set(d Desired, nftables bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	replace(r.desired, target{d, nftables})
	select {
	case <-r.states: // of the rules before
	default:
	}
}

// States sends a State after each Set, after each attempt that fails, and when
// the State changes. A State that nobody has received yet is replaced by the
// next one.
func (r *Reconciler) States() <-chan State { return r.states }

// replace makes v what is received from c next. The only senders to c hold the
// Reconciler's mutex.
func replace[T any](c chan T, v T) {
	select {
	case <-c:
	default:
	}
	c <- v
}

// Stats returns the counts of now. Any goroutine may call it, at any time.
func (r *Reconciler) Stats() Stats {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stats
}

func (r *Reconciler) count(f func(*Stats)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f(&r.stats)
}

// Run keeps the rules in the calling thread's network namespace until ctx ends.
// The rules stay. Run finds the programs of the expected mode, nftables or iptables,
// before the first Set, and looks again where kubelet has made its chain since then.
func (r *Reconciler) Run(ctx context.Context, nftables bool) {
	log := klog.FromContext(ctx)
	r.fights = newFights(log)
	want := target{nftables: nftables}
	_ = r.openDriver(ctx, want) // the first Set tries again, and logs the error
	defer r.close()
	select {
	case latest := <-r.desired:
		if latest.nftables != want.nftables || r.driver != nil && r.driver.Outdated(ctx) {
			r.close()
		}
		want = latest
		checkBridge(log, want)
	case <-ctx.Done():
		return
	}
	var sent State
	var lastError retry.LastError
	var backoff retry.Backoff
	next := time.NewTimer(0)
	defer next.Stop()
	early := time.NewTimer(time.Hour) // a check after a change
	defer early.Stop()
	for {
		changed, isEarly := false, false
		select {
		case <-ctx.Done():
			return
		case latest := <-r.desired:
			if latest.nftables != want.nftables {
				checkBridge(log, latest)
				r.fights.End(want.mode())
				r.pace = pace{}
				r.close() // the new driver removes what the old driver made
			}
			want, changed = latest, true
		case <-next.C:
		case <-r.changes:
			r.pace.hear()
			if r.fights.Count() == 0 { // else the next check is soon enough
				early.Reset(min(r.pace.rest(), r.resync-time.Since(r.pace.checked)))
			}
			continue
		case <-early.C:
			isEarly = true
		}
		err := r.reconcile(ctx, want, changed, isEarly)
		if ctx.Err() != nil {
			return
		}
		lastError.Log(log, "Rules", err)
		if err == nil {
			backoff.Reset()
			next.Reset(r.resync)
		} else {
			next.Reset(backoff.Next())
		}
		state := State{InPlace: err == nil, Err: err, Fight: r.fights.Latest()}
		if !changed && err == nil && state == sent {
			continue
		}
		sent = state
		r.send(state)
	}
}

// send makes this the State to receive, unless Set has been called since.
func (r *Reconciler) send(s State) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.desired) == 0 {
		replace(r.states, s)
	}
}

// reconcile runs one check, or sets what changed.
func (r *Reconciler) reconcile(ctx context.Context, want target, changed, early bool) error {
	r.pace.checked = time.Now()
	if early && r.pace.calm() {
		r.fights.End(want.mode())
	}
	wrote, err := r.attempt(ctx, want, r.Stats().InPlace && !changed, early)
	if early {
		r.pace.add()
	}
	if wrote {
		r.pace.written = time.Now()
		r.pace.writes++
	}
	r.pace.took, r.pace.first = time.Since(r.pace.checked), time.Time{}
	r.pace.polite = r.driver != nil && r.driver.Disturbs()
	r.count(func(s *Stats) { s.InPlace, s.Checked = err == nil, time.Now() })
	return err
}

// attempt sets the rules, unless they were set already and are still in place.
// It returns whether it wrote any.
func (r *Reconciler) attempt(ctx context.Context, want target, inPlace, early bool) (wrote bool, err error) {
	log := klog.FromContext(ctx)
	if r.driver == nil {
		if err := r.openDriver(ctx, want); err != nil {
			if want.IPv4.IsZero() && want.IPv6.IsZero() {
				log.V(1).Info("No rules are desired, and none can be there", "reason", err)
				return false, nil
			}
			return false, err
		}
		inPlace = false
	}
	if inPlace {
		r.count(func(s *Stats) { s.Checks++ })
		ok, err := r.driver.Check(ctx)
		if err != nil {
			return false, err
		}
		if ok {
			if !early { // an early check may follow our own change, and is no sign of calm
				r.fights.End(want.mode())
			}
			return false, nil
		}
		r.count(func(s *Stats) { s.Repairs++ })
		before := r.fights.Count()
		r.fights.Undone(want.mode(), want.mode())
		r.fights.LogNew()
		if before+r.fights.Count() == 0 { // the log has each of the first changes, and then the fight
			log.Info("Restoring the rules", "mode", want.mode(), "reason", "another program changed them")
		}
	}
	r.count(func(s *Stats) { s.Writes++ })
	return true, r.driver.Apply(ctx, want.Desired)
}

// openDriver finds the driver, and watches the rules that it is to keep.
func (r *Reconciler) openDriver(ctx context.Context, want target) error {
	d, err := r.open(ctx, want.nftables)
	if err != nil {
		return err
	}
	watch, unwatch := context.WithCancel(ctx)
	changes, err := d.Changes(watch)
	if err != nil {
		klog.FromContext(ctx).Error(err,
			"Cannot watch the rules for changes; the rules are only checked at intervals (--iptables-resync)",
			"mode", want.mode(), "interval", r.resync)
	}
	r.driver, r.changes, r.unwatch = d, changes, unwatch
	return nil
}

func (r *Reconciler) close() {
	if r.driver == nil {
		return
	}
	r.unwatch()
	if r.changes != nil {
		for range r.changes { // until it is closed
		}
	}
	r.driver, r.changes = nil, nil
}

const (
	// ruleRest is the least time between checks that follow changes: a firewall
	// that restarts makes many. It doubles with each time that the rules had to
	// be set, until they are left alone for ruleCalm.
	ruleRest = 50 * time.Millisecond
	ruleCalm = time.Second

	// Checks that follow changes take at most one part in ruleShare of the time:
	// where rules are many, reading them takes long. After a time with fewer
	// checks, checks that take ruleBurst together come at once, and one that takes
	// longer does, too: what is seldom is restored without a wait.
	ruleShare = 20
	ruleBurst = 300 * time.Millisecond

	// Where the driver disturbs other programs, they are given time to finish what they do. A check that follows
	// changes comes when there was no change for ruleQuiet or, on a busy machine, for ruleQuietChecks times as long as
	// the last check took; or ruleQuietMost after the first change.
	ruleQuiet       = 100 * time.Millisecond
	ruleQuietChecks = 4
	ruleQuietMost   = time.Second
)

// A pace is how soon the rules may be checked after a change.
type pace struct {
	checked time.Time     // when the last check began
	took    time.Duration // how long the last check took
	first   time.Time     // when the first change since the last check was heard of
	heard   time.Time     // when the last change was heard of, which may be our own
	polite  bool          // writing may disturb another program
	owed    time.Duration // see debt
	settled time.Time     // when owed was right
	written time.Time
	writes  int // since the rules were left alone
}

// debt returns how long checks after changes have taken beyond their share of the
// time.
func (p *pace) debt() time.Duration { return max(0, p.owed-time.Since(p.settled)/ruleShare) }

// add takes the last check into account, which followed a change.
func (p *pace) add() {
	took := time.Since(p.checked)
	p.owed, p.settled = min(p.debt(), ruleBurst)+took, time.Now() // no check waits for more than ruleShare*took
}

// rest returns how long to wait until the next check, after a change that was heard of just now.
func (p *pace) rest() time.Duration {
	rest := max(0, ruleRest<<min(p.writes, 10)-time.Since(p.checked), (p.debt()-ruleBurst)*ruleShare)
	if !p.polite {
		return rest
	}
	return max(rest, min(max(ruleQuiet, ruleQuietChecks*p.took), ruleQuietMost-time.Since(p.first)))
}

// hear takes note of a change.
func (p *pace) hear() {
	p.heard = time.Now()
	if p.first.IsZero() {
		p.first = p.heard
	}
	if p.calm() {
		p.writes = 0
	}
}

// calm returns whether the rules had been left alone before the last change. Rules that are undone at once have not,
// however long the next check waits.
func (p *pace) calm() bool { return p.heard.Sub(p.written) > ruleCalm }

// newFights returns the detector of fights over the rules of a mode. It counts
// checks on end that found the rules changed.
func newFights(log klog.Logger) *fight.Detector[string, string] {
	return fight.New[string, string](log, fight.Options{
		Times:   7, // which takes six seconds: a firewall that starts, and is reloaded twice, takes four
		Message: "Another program changes the rules again and again; restoring them only at intervals (--iptables-resync)",
		Key:     "mode",
		Fix: "Find the other firewall manager on this host (`nft monitor` shows each change), " +
			"and configure it to leave flannel's chains alone",
	})
}

// checkBridge logs what keeps the rules from having an effect.
func checkBridge(log klog.Logger, want target) {
	if want.nftables {
		return
	}
	if err := BridgeNetfilter(); err != nil {
		log.Error(err, "Rules may have no effect on traffic between pods of this node")
	}
}
