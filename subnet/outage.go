package subnet

import (
	"maps"
	"sync"

	"k8s.io/klog/v2"
)

// Away is the cause of failure when the store cannot be reached, or can do
// nothing. Where something else was said already, it adds nothing.
const Away = "away"

// An Outage remembers what keeps a Manager from what it is to do, so that each
// cause is said once, whoever notices, and once that all is well again. The zero
// value knows of nothing yet.
type Outage struct {
	Store string // its name: "etcd at http://192.0.2.1:2379"

	mu   sync.Mutex
	said map[cause]bool
	used bool   // something could be done
	last string // what went wrong last; "" once all is well
}

// A cause of failure is over when something could be done: only for a certain
// purpose, unless that is "".
type cause struct{ name, purpose string }

// Begin takes note that an attempt has failed: what it was for, as in "waiting
// to read leases", and why, with what to do about it. Failures with the same cause
// are said once, and over with the first success of any kind. Without a cause the
// failure is this purpose's own: the store did answer, and refused.
func (o *Outage) Begin(purpose, why, text string) {
	c := cause{name: why}
	if why == "" {
		c = cause{text, purpose}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.last = text
	if o.said[c] || why == Away && len(o.said) > 0 {
		return
	}
	logged := false // for another purpose
	for other := range o.said {
		logged = logged || other.name == c.name
	}
	if o.said == nil {
		o.said = map[cause]bool{}
	}
	o.said[c] = true
	if !logged {
		klog.Warningf("%s: %s. Waiting to %s", o.Store, text, purpose)
	}
}

// End takes note that something could be done.
func (o *Outage) End(purpose string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.used = true
	if len(o.said) == 0 {
		return
	}
	maps.DeleteFunc(o.said, func(c cause, _ bool) bool { return c.purpose == "" || c.purpose == purpose })
	if len(o.said) == 0 {
		o.last = ""
		klog.Infof("%s is back", o.Store)
	}
}

// State tells whether the store does what it is asked, and why not.
func (o *Outage) State() State {
	o.mu.Lock()
	defer o.mu.Unlock()
	return State{Store: o.Store, Connected: o.used && len(o.said) == 0, Trouble: o.last}
}
