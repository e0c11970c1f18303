package kernel

import (
	"fmt"
	"time"

	"k8s.io/klog/v2"
)

// fights remembers what others undo, in case they do so again and again.
type fights struct {
	over   map[Key]*fight
	blink  time.Duration // see fightBlink
	unsaid []*fight
	count  int    // how many go on
	latest Object // over which one was said to; nil: none goes on
}

// A fight is over one object.
type fight struct {
	object  Object
	times   int       // that it was undone
	counted time.Time // for the last time
	first   time.Time
	last    time.Time
	set     time.Time // when we set it again
}

const (
	// From so many times on it is a fight: by then it is no person who tries
	// things.
	fightTimes = 20
	// What happens within this time is once: "ip route flush" alone goes ten
	// rounds in two milliseconds before it gives up.
	fightBlink = 50 * time.Millisecond
	// Who waits longer than this has to be counted afresh.
	fightCalm = time.Minute
	// What is undone sooner than this after it was set waits for Retry.
	fightPace = time.Second
)

// undone counts that somebody changed or removed what was as it should be, and
// tells whether to wait before it is set again.
func (f *fights) undone(o Object) bool {
	now := time.Now()
	g := f.over[o.Key()]
	if g == nil || now.Sub(g.last) > fightCalm {
		if g != nil && g.times >= fightTimes {
			f.count--
		}
		g = &fight{object: o, first: now}
		f.over[o.Key()] = g
	}
	g.last = now
	if now.Sub(g.counted) >= f.blink {
		g.counted = now
		if g.times++; g.times == fightTimes {
			f.count++
			f.unsaid = append(f.unsaid, g)
		}
	}
	return g.times >= fightTimes && now.Sub(g.set) < fightPace
}

// done takes note that an object is set, and tells whether it is fought over.
func (f *fights) done(k Key) bool {
	g := f.over[k]
	if g == nil {
		return false
	}
	g.set = time.Now()
	return g.times >= fightTimes
}

// say tells of new fights, in one line.
func (f *fights) say() {
	if len(f.unsaid) == 0 {
		return
	}
	g, more := f.unsaid[0], ""
	if n := len(f.unsaid) - 1; n > 0 {
		more = fmt.Sprintf(" (and %d more)", n)
	}
	f.latest = g.object
	klog.Warningf("Somebody undoes what is set, %d times in %v: %s%s: it is set once a second while that goes on; "+
		"`ip monitor all` shows each change, and mostly it is another network manager on this host, to be told to leave this alone",
		g.times, g.last.Sub(g.first).Round(time.Millisecond), g.object, more)
	f.unsaid = nil
}

// forget drops what has been left alone for a while.
func (f *fights) forget() {
	ended := 0
	for k, g := range f.over {
		if time.Since(g.last) > fightCalm {
			delete(f.over, k)
			if g.times >= fightTimes {
				ended++
			}
		}
	}
	f.count -= ended
	if f.count == 0 {
		f.latest = nil
	}
	if ended > 0 {
		klog.Infof("Nobody undoes any more what is set (%d objects were fought over)", ended)
	}
}
