// Package fight notices that another program undoes our change again and again.
// Two programs that never give in would use up a CPU and fill the log.
package fight

import (
	"slices"
	"time"

	"k8s.io/klog/v2"
)

// Options say what a fight is, and how the log describes it.
type Options struct {
	Times int           // a change that is undone this often is fought over
	Burst time.Duration // undone several times within this time counts once
	Calm  time.Duration // a change left alone for longer is fought over no more; 0: until End
	Pace  time.Duration // a change that is fought over is restored once in this time

	Message string // of the log line when a fight begins
	Key     string // of what is fought over in this line, and its value is the T
	Fix     string // what a person can do
}

// A Detector counts how often other programs undo our changes, each known by
// a K and described by a T. It is for one goroutine.
type Detector[K comparable, T any] struct {
	Options
	log     klog.Logger
	records map[K]*record[T]
	fresh   []*record[T] // fights that are not logged yet
	count   int          // of fights
	latest  T            // fought over and logged; the zero T: nothing
}

// A record is of one change that was undone.
type record[T any] struct {
	what     T
	times    int       // undone, by Options.Burst
	counted  time.Time // the last of these times
	first    time.Time // undone
	last     time.Time // undone
	restored time.Time
}

// New returns a Detector that logs to log.
func New[K comparable, T any](log klog.Logger, o Options) *Detector[K, T] {
	return &Detector[K, T]{Options: o, log: log, records: map[K]*record[T]{}}
}

// Undone counts that another program undid a change. It returns whether to
// wait before the change is restored.
func (d *Detector[K, T]) Undone(k K, what T) (wait bool) {
	now := time.Now()
	r := d.records[k]
	if r != nil && d.calm(r, now) {
		d.logEnd(d.drop(k))
		r = nil
	}
	if r == nil {
		r = &record[T]{what: what, first: now}
		d.records[k] = r
	}
	r.last = now
	if now.Sub(r.counted) >= d.Burst {
		r.counted = now
		if r.times++; r.times == d.Times {
			d.count++
			d.fresh = append(d.fresh, r)
		}
	}
	return r.times >= d.Times && now.Sub(r.restored) < d.Pace
}

// Restored notes that a change was made again. It returns whether the change
// is fought over.
func (d *Detector[K, T]) Restored(k K) (fought bool) {
	r := d.records[k]
	if r == nil {
		return false
	}
	r.restored = time.Now()
	return r.times >= d.Times
}

// LogNew logs the fights that began since the last time, in one line.
func (d *Detector[K, T]) LogNew() {
	if len(d.fresh) == 0 {
		return
	}
	r := d.fresh[0]
	values := []any{d.Key, r.what, "count", r.times, "period", r.last.Sub(r.first).Round(time.Millisecond)}
	if more := len(d.fresh) - 1; more > 0 {
		values = append(values, "more", more)
	}
	d.log.Error(nil, d.Message, append(values, "fix", d.Fix)...)
	d.latest, d.fresh = r.what, nil
}

// End forgets a change: nobody undoes it.
func (d *Detector[K, T]) End(k K) { d.logEnd(d.drop(k)) }

// Forget forgets all changes that were left alone for longer than Calm.
func (d *Detector[K, T]) Forget() {
	now, ended := time.Now(), 0
	for k, r := range d.records {
		if d.calm(r, now) {
			ended += d.drop(k)
		}
	}
	d.logEnd(ended)
}

// Count returns how many changes are fought over.
func (d *Detector[K, T]) Count() int { return d.count }

// Latest returns what the latest logged fight is over; the zero T when there
// is no fight.
func (d *Detector[K, T]) Latest() T { return d.latest }

func (d *Detector[K, T]) calm(r *record[T], now time.Time) bool {
	return d.Calm > 0 && now.Sub(r.last) > d.Calm
}

// drop removes a record and returns how many fights end with it: 0 or 1.
func (d *Detector[K, T]) drop(k K) (ended int) {
	r := d.records[k]
	delete(d.records, k)
	d.fresh = slices.DeleteFunc(d.fresh, func(f *record[T]) bool { return f == r })
	if r == nil || r.times < d.Times {
		return 0
	}
	if d.count--; d.count == 0 {
		d.latest = *new(T)
	}
	return 1
}

func (d *Detector[K, T]) logEnd(ended int) {
	if ended > 0 {
		d.log.Info("Other programs no longer undo what they fought over", "count", ended)
	}
}
