package network

import (
	"context"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/firewall"
)

// rules keeps the node's firewall rules, in a goroutine of its own: the
// programs that set them may wait long for a lock.
type rules struct {
	wants  chan wish // the latest only
	states chan bool // whether the latest are in place
}

// A wish is for rules, and where they are kept.
type wish struct {
	firewall.Desired
	nftables bool // or else iptables
}

func keepRules(ctx context.Context, group *sync.WaitGroup, resync time.Duration) *rules {
	r := &rules{make(chan wish, 1), make(chan bool)}
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

func (r *rules) keep(ctx context.Context, resync time.Duration) {
	var want wish
	select {
	case want = <-r.wants:
		want.warn()
	case <-ctx.Done():
		return
	}
	var driver *firewall.Driver
	said, set, told := "", false, false
	after := retryFirst
	next := time.NewTimer(0)
	defer next.Stop()
	for {
		changed := false
		select {
		case <-ctx.Done():
			return
		case latest := <-r.wants:
			if latest.nftables != want.nftables {
				latest.warn()
				driver = nil // the new one removes what the old one made
			}
			want, changed = latest, true
		case <-next.C:
		}
		err := r.look(ctx, &driver, want, set && !changed)
		set = err == nil
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			if said != "" {
				klog.Info("Rules: all is well again")
			}
			said, after = "", retryFirst
			next.Reset(resync)
		default:
			if err.Error() != said {
				said = err.Error()
				klog.Errorf("Rules: %v", err)
			}
			next.Reset(after)
			after = min(2*after, retryMax)
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

// look sets the rules, unless they are said to be set already and still are.
func (r *rules) look(ctx context.Context, driver **firewall.Driver, want wish, set bool) error {
	if *driver == nil {
		d, err := firewall.New(ctx, want.nftables)
		if err != nil {
			if want.IPv4.IsZero() && want.IPv6.IsZero() {
				klog.V(1).Infof("No rules are wanted, and none can be there: %v", err)
				return nil
			}
			return err
		}
		*driver, set = d, false
	}
	if set {
		ok, err := (*driver).Check(ctx)
		if ok || err != nil {
			return err
		}
		klog.Warningf("Rules: somebody changed ours in %s: setting them again", *driver)
	}
	return (*driver).Apply(ctx, want.Desired)
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
