package network

import (
	"context"
	"fmt"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/firewall"
	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/subnet"
)

// rules keeps the node's firewall rules, in a goroutine of its own: the
// programs that set them may wait long for a lock.
type rules struct {
	wants  chan wish // the latest only
	states chan bool // whether the latest are in place

	metrics *metrics
	manager subnet.Manager

	// Of keep alone:
	driver  *firewall.Driver   // nil: none yet that does what is wished
	news    <-chan struct{}    // of the rules it keeps; nil: there is none to be had
	unwatch context.CancelFunc // ends news
}

// A wish is for rules, and where they are kept.
type wish struct {
	firewall.Desired
	nftables bool // or else iptables
}

func keepRules(ctx context.Context, group *sync.WaitGroup, resync time.Duration, s *metrics, m subnet.Manager) *rules {
	r := &rules{wants: make(chan wish, 1), states: make(chan bool), metrics: s, manager: m}
	group.Go(func() { r.keep(ctx, resync) })
	return r
}

// set makes these the rules to keep.
func (r *rules) set(want firewall.Desired, nftables bool) {
	select {
	case <-r.wants: // not even seen yet
	default:
	}
	r.wants <- wish{want, nftables}
}

// ruleRest is the least time between checks that follow somebody's changes: a
// firewall that restarts makes many. It doubles with each time that they had to
// be set, until they are left alone for ruleCalm. Nor do checks take more than
// one part in ruleShare of the time: where rules are many, reading them takes long.
const (
	ruleRest = 50 * time.Millisecond
	ruleCalm = time.Second

	ruleShare = 20
)

func (r *rules) keep(ctx context.Context, resync time.Duration) {
	var want wish
	select {
	case want = <-r.wants:
		want.warn()
	case <-ctx.Done():
		return
	}
	defer r.close()
	set, told := false, false
	var lastError retry.LastError
	var undone quarrel
	var checked, written time.Time
	var took time.Duration // the last check
	haste := 0             // how often they were written lately
	soon := time.NewTimer(time.Hour)
	defer soon.Stop()
	var pause retry.Backoff
	next := time.NewTimer(0)
	defer next.Stop()
	for {
		changed, hasty := false, false
		select {
		case <-ctx.Done():
			return
		case latest := <-r.wants:
			if latest.nftables != want.nftables {
				latest.warn()
				r.close() // the new driver removes what the old one made
			}
			want, changed = latest, true
		case <-next.C:
		case <-r.news:
			if undone < quarrelTimes { // else the next check is soon enough
				rest := max(ruleRest<<min(haste, 10), ruleShare*took)
				soon.Reset(max(0, min(rest, resync)-time.Since(checked)))
			}
			continue
		case <-soon.C:
			hasty = true
		}
		checked = time.Now()
		if hasty && checked.Sub(written) > ruleCalm {
			haste, undone = 0, 0
		}
		wrote, err := r.look(ctx, want, set && !changed, hasty, &undone)
		set, took = err == nil, time.Since(checked)
		r.metrics.rulesChecked.SetToCurrentTime()
		r.metrics.rulesInPlace.Set(truth(set))
		if wrote {
			written, haste = time.Now(), haste+1
		}
		if ctx.Err() != nil {
			return
		}
		lastError.Log(klog.FromContext(ctx), "Rules", err)
		if err == nil {
			pause.Reset()
			next.Reset(resync)
		} else {
			r.metrics.failed("Rules")
			next.Reset(pause.Next())
		}
		if len(r.wants) > 0 || !changed && told == set {
			continue // these are the latest no more, or it is known
		}
		told = set
		select {
		case r.states <- told:
		case <-ctx.Done():
			return
		}
	}
}

// look sets the rules, unless they are said to be set already and still are. It
// tells whether it wrote any.
func (r *rules) look(ctx context.Context, want wish, set, hasty bool, undone *quarrel) (wrote bool, err error) {
	if r.driver == nil {
		if err := r.open(ctx, want.nftables); err != nil {
			if want.IPv4.IsZero() && want.IPv6.IsZero() {
				klog.V(1).Infof("No rules are wanted, and none can be there: %v", err)
				return false, nil
			}
			return false, err
		}
		set = false
	}
	if set {
		r.metrics.rulesChecks.Inc()
		ok, err := r.driver.Check(ctx)
		if err != nil {
			return false, err
		}
		if !ok {
			r.metrics.rulesRepairs.Inc()
		}
		if !ok || !hasty { // what we set ourselves is news, too, and no sign of peace
			undone.say(ok, r.driver.String())
		}
		if ok {
			herald(r.manager, "rules", "", "")
			return false, nil
		}
		if *undone == quarrelTimes {
			herald(r.manager, "rules", "FirewallFight", fmt.Sprintf("Somebody changes flannel's rules in %s, again and again. "+
				"`nft monitor` shows each change; mostly it is another firewall manager on the host, to be told to leave flannel's chains alone", r.driver))
		}
	}
	r.metrics.rulesWrites.Inc()
	return true, r.driver.Apply(ctx, want.Desired)
}

// open finds the driver, and follows changes of the rules that it is to keep.
func (r *rules) open(ctx context.Context, nftables bool) error {
	d, err := firewall.New(ctx, nftables)
	if err != nil {
		return err
	}
	watch, unwatch := context.WithCancel(ctx)
	news, err := d.Changes(watch)
	if err != nil {
		klog.Warningf("Rules are checked from time to time (--iptables-resync), and not as soon as somebody changes them: %v", err)
	}
	r.driver, r.news, r.unwatch = d, news, unwatch
	return nil
}

func (r *rules) close() {
	if r.driver == nil {
		return
	}
	r.unwatch()
	if r.news != nil {
		for range r.news { // until it is closed
		}
	}
	r.driver, r.news = nil, nil
}

// A quarrel counts how many checks on end found the rules changed.
type quarrel int

// quarrelTimes is how many are said one by one.
const quarrelTimes = 5

// say takes what a check found, and says it: each of the first changes, then
// that there is no end of them, and the end.
func (q *quarrel) say(ok bool, driver string) {
	if ok {
		if *q >= quarrelTimes {
			klog.Infof("Rules: nobody changes ours in %s any more", driver)
		}
		*q = 0
		return
	}
	switch *q++; {
	case *q == quarrelTimes:
		klog.Warningf("Rules: at each of the last %d checks somebody had changed ours in %s: they are set again at each check (--iptables-resync); "+
			"look for another firewall manager on this host (`nft monitor` shows each change) and tell it to leave flannel's chains alone", quarrelTimes, driver)
	case *q < quarrelTimes:
		klog.Warningf("Rules: somebody changed ours in %s: setting them again", driver)
	}
}

// warn says what keeps the rules from having an effect.
func (w wish) warn() {
	if w.nftables {
		return
	}
	if err := firewall.BridgeNetfilter(); err != nil {
		klog.Warning(err)
	}
}
