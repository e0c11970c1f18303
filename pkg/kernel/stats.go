package kernel

// Stats are counts of what a Reconciler holds and has done. They are values and compare with ==.
type Stats struct {
	Kinds  [kinds]KindStats // by Kind
	Fights int              // objects that another program undoes as often as they are set
	Fight  Object           // the latest of these that the log has named; nil: there is no fight
}

// KindStats are the counts of one kind of objects.
type KindStats struct {
	Wanted  int            // objects that are desired
	Held    int            // of these, those that the kernel holds as desired
	Repairs [causes]uint64 // by Cause
}

// A Cause is why something was repaired that Set did not change.
type Cause uint8

const (
	Missing  Cause = iota // another program removed it
	Changed               // another program changed it, or put another in its place
	LeftOver              // it was there and not desired: it was removed
	Fight                 // any of these, again and again
	causes                // how many there are
)

func (c Cause) String() string {
	return [...]string{"missing", "changed", "left_over", "fight"}[c]
}

// Stats returns the present counts. It takes no time when nothing has changed since the last call, and otherwise a
// time that grows with the number of objects that are not as desired.
func (r *Reconciler) Stats() Stats {
	if !r.changed {
		return r.stats
	}
	r.changed = false
	s := &r.stats
	s.Fights, s.Fight = r.fights.Count(), r.fights.Latest()
	for k := range s.Kinds {
		s.Kinds[k] = KindStats{}
		if !kindTable[k].bestEffort { // which may differ for good
			s.Kinds[k] = KindStats{Wanted: r.wanted[k], Held: r.wanted[k], Repairs: r.repairs[k]}
		}
	}
	// Whatever differs is in the list that its state names, maybe twice.
	for e, state := range r.differing {
		if e.state == state && e.want != nil && e.want != e.have && !e.seen && !kindTable[e.kind].bestEffort {
			e.seen = true
			s.Kinds[e.kind].Held--
		}
	}
	for e := range r.differing {
		e.seen = false
	}
	return *s
}

// differing yields the entries of all lists, with the state that the list stands for.
func (r *Reconciler) differing(yield func(*entry, state) bool) {
	for _, e := range r.dirty {
		if !yield(e, dirty) {
			return
		}
	}
	for _, f := range r.failed {
		if !yield(f.entry, failed) {
			return
		}
	}
	for _, e := range r.paced {
		if !yield(e, paced) {
			return
		}
	}
}

// count takes note of a repair, before the entry does.
func (r *Reconciler) count(e *entry, fought bool) {
	cause := Missing
	switch {
	case !e.drift:
		return
	case fought:
		cause = Fight
	case e.want == nil:
		cause = LeftOver
	case e.have != nil:
		cause = Changed
	}
	r.repairs[e.kind][cause]++
}
