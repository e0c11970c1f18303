package kernel

// Stats are counts of what a Reconciler holds and has done. They are values and
// compare with ==.
type Stats struct {
	Kinds  [kinds]KindStats // by Kind
	Fights int              // objects that somebody undoes as often as they are set
	Fight  Object           // the latest of these that the log has named; nil: none
}

// KindStats are those of one kind of objects.
type KindStats struct {
	Wanted  int
	Held    int            // of these, by the kernel as they should be
	Repairs [causes]uint64 // by Cause
}

// A Cause is why something was set right that was not a wish of ours.
type Cause uint8

const (
	Missing  Cause = iota // somebody removed it
	Changed               // somebody changed it, or put another in its place
	LeftOver              // it was there and nobody wants it: removed
	Fight                 // any of these, time and again
	causes                // how many there are
)

func (c Cause) String() string {
	return [...]string{"missing", "changed", "left_over", "fight"}[c]
}

func (k Kind) String() string {
	return [...]string{"link", "address", "neighbor", "fdb", "nexthop", "route", "policy"}[k]
}

// Stats returns the counts of now. It costs nothing where nothing has changed, or
// else as much as there are objects that are not as they should be.
func (r *Reconciler) Stats() Stats {
	if !r.moved {
		return r.stats
	}
	r.moved = false
	s := &r.stats
	s.Fights, s.Fight = r.fights.Count(), r.fights.Latest()
	for k := range s.Kinds {
		s.Kinds[k] = KindStats{Wanted: r.wanted[k], Held: r.wanted[k], Repairs: r.repairs[k]}
	}
	// Whatever differs is in the list that its state names, maybe twice.
	lists := [...]struct {
		state   state
		entries []*entry
	}{{dirty, r.dirty}, {failed, r.failed}, {held, r.held}}
	for _, l := range lists {
		for _, e := range l.entries {
			if e.state == l.state && e.want != nil && e.want != e.have && !e.seen {
				e.seen = true
				s.Kinds[e.key().Kind].Held--
			}
		}
	}
	for _, l := range lists {
		for _, e := range l.entries {
			e.seen = false
		}
	}
	s.Kinds[KindNexthop] = KindStats{} // which may differ for good, and are a means only
	return *s
}

// count takes note of what was done about an entry, before the entry does.
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
	r.repairs[e.key().Kind][cause]++
}
