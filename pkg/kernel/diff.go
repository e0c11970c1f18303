package kernel

import (
	"errors"
	"fmt"
	"slices"
)

// Diff reads the kernel's tables and returns the ip and bridge commands that lead from what the kernel holds to what
// is desired, in an order in which they work. It changes nothing: what it has learned is for the next Reconcile.
func (r *Reconciler) Diff() ([]string, error) {
	defer func() {
		if r.pending() || r.waiting() {
			r.signal()
		}
	}()
	if err := r.compare(); err != nil {
		return nil, fmt.Errorf("reading the kernel's tables: %w", err)
	}
	if r.mustCompare {
		return nil, fmt.Errorf("reading the kernel's tables: %w", errors.New("they change all the time: try again"))
	}
	var adds, removes [kinds][]string
	for e := range r.entries.All() {
		k, d := e.kind, &kindTable[e.kind]
		switch {
		case e.want == e.have:
		case e.want == nil && !d.ours(r, e.have):
		case e.want == nil:
			removes[k] = append(removes[k], e.have.Undo())
		case d.bestEffort:
		case d.change != nil:
			adds[k] = append(adds[k], d.change(e.have, e.want))
		default:
			adds[k] = append(adds[k], e.want.String())
		}
	}
	var first, last [][]string
	for k := int(kinds) - 1; k >= 0; k-- {
		if kindTable[k].removeFirstInDiff {
			first = append(first, removes[k])
		} else {
			last = append(last, removes[k])
		}
	}
	var commands []string
	for _, part := range slices.Concat(first, adds[:], last) {
		slices.Sort(part)
		commands = append(commands, part...)
	}
	return commands, nil
}
