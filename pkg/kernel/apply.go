package kernel

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// apply makes the kernel hold what is desired, as far as it accepts that, and returns what it refuses.
func (r *Reconciler) apply() error {
	r.fights.LogNew()
	if r.mustCompare {
		if err := r.compare(); err != nil {
			return fmt.Errorf("reading the kernel's tables: %w", err)
		}
	}
	interrupted := r.mustCompare // the tables changed while they were read, which is no failure
	log := changes{log: r.log}
	todo := r.take()
	r.remove(todo, true, &log)
	r.applyKind(KindLink, todo, true, &log)
	for _, e := range todo {
		if e.want != e.have && e.state == idle {
			r.queue(e)
		}
	}
	todo = r.take() // with what was lost when a link was replaced
	for _, e := range todo {
		if n := r.nexthop(e); n != nil {
			r.queue(n)
		}
	}
	todo = append(todo, r.take()...)
	for k := KindLink + 1; k < kinds; k++ {
		r.applyKind(k, todo, true, &log)
	}
	// Last, what routes may have needed until they were replaced: with a nexthop, the kernel also removes the routes
	// that still go through it.
	r.remove(todo, false, &log)
	log.write()
	return r.refused(r.mustCompare && !interrupted)
}

// remove removes the entries of the kinds that are removed first, or of the others.
func (r *Reconciler) remove(todo []*entry, first bool, log *changes) {
	for k := int(kinds) - 1; k >= 0; k-- {
		if kindTable[k].removeFirst == first {
			r.applyKind(Kind(k), todo, false, log)
		}
	}
}

// take empties the queue, and forgets the former failures of the entries in it.
func (r *Reconciler) take() []*entry {
	todo := r.dirty
	r.dirty = nil
	for _, e := range todo {
		e.state = idle
	}
	kept := r.failed[:0]
	for _, f := range r.failed {
		if f.state == failed {
			kept = append(kept, f)
		}
	}
	r.failed = kept
	return todo
}

// applyKind adds (or else removes) the entries of one kind.
func (r *Reconciler) applyKind(k Kind, todo []*entry, add bool, log *changes) {
	unknown := r.tryKind(k, todo, add, log)
	if len(unknown) == 0 {
		return
	}
	// Other programs set objects with the same keys, and their notifications are to come.
	if err := r.compare(); err != nil {
		r.mustCompare = true
	}
	for _, e := range r.tryKind(k, unknown, add, log) {
		r.done(e, unix.EEXIST, log)
	}
}

// tryKind does what applyKind does, but for entries that the kernel does not add because it has an object with the same
// key that we do not know of. It returns these.
func (r *Reconciler) tryKind(k Kind, todo []*entry, add bool, log *changes) (unknown []*entry) {
	d := &kindTable[k]
	var batch []*entry
	var requests []request
	var via []uint32 // the nexthop of each
	for _, e := range todo {
		if e.kind != k || e.want == e.have || e.state == failed || (e.want != nil) != add {
			continue // done or failed meanwhile, or not its turn
		}
		switch {
		case !add && !d.ours(r, e.have):
			r.entries.Remove(e.key(), e)
			e.have = nil
			continue
		case d.apply != nil:
			r.done(e, d.apply(r, e), log)
			continue
		case add && d.skip != nil && d.skip(r, e):
			continue
		case !r.supported[k]:
			r.done(e, d.unsupported, log)
			continue
		}
		if add && d.blocked != nil {
			if err := d.blocked(r, e); err != nil {
				r.done(e, err, log)
				continue
			}
		}
		o, by := e.have, e.via
		if add {
			o, by = e.want, r.viaNexthop(e)
		}
		dev, err := r.deviceIndex(o.device())
		if err != nil {
			if !add {
				err = nil // the object went with its device
			}
			r.done(e, err, log)
			continue
		}
		request := d.encode(o, dev, by, add)
		if add && d.blocked != nil && e.have == nil {
			request.flags = unix.NLM_F_CREATE | unix.NLM_F_EXCL
		}
		batch, via, requests = append(batch, e), append(via, by), append(requests, request)
	}
	if len(batch) == 0 {
		return nil
	}
	results, err := r.sockets[d.protocol].do(requests)
	if err == nil && add && d.evict {
		err = r.evict(d, batch, requests, results)
	}
	if err == nil && add && d.permit != nil {
		err = r.setPermitted(d, batch, requests, results)
	}
	var removed []Object
	for i, e := range batch {
		if err != nil {
			r.done(e, err, log)
			r.mustCompare = true
			continue
		}
		if requests[i].flags&unix.NLM_F_EXCL != 0 && errors.Is(results[i], unix.EEXIST) {
			unknown = append(unknown, e)
			continue
		}
		if !add && isGone(results[i]) {
			results[i] = nil
			e.drift = false // it had gone before: nothing was left over
		}
		if results[i] == nil {
			e.via = via[i]
			if !add {
				removed = append(removed, e.have)
			}
		}
		r.done(e, results[i], log)
	}
	if d.removed != nil { // after the whole batch, since it may drop other entries of the batch
		for _, o := range removed {
			d.removed(r, o)
		}
	}
	return unknown
}

// deviceIndex returns the index of a device, 0 for "".
func (r *Reconciler) deviceIndex(name string) (int, error) {
	index, ok := r.devices.number[name]
	switch {
	case ok || name == "":
		return index, nil
	case r.ownsDevice(name):
		return 0, unix.ENODEV // why it is missing is reported already
	}
	return 0, fmt.Errorf("there is no device %s", name)
}

// evict tries again what the kernel refused to put in the place of another object, after removing the other. The
// kernel does not replace a route when ours, with the same key, comes after it (EEXIST), nor in IPv6 when the route
// leads to our gateway (EINVAL).
func (r *Reconciler) evict(d *descriptor, batch []*entry, requests []request, results []error) error {
	var refused []int
	var second []request
	for i, e := range batch {
		if e.have == nil || !errors.Is(results[i], unix.EEXIST) && !errors.Is(results[i], unix.EINVAL) {
			continue
		}
		refused = append(refused, i)
		second = append(second, d.encode(e.have, r.devices.number[e.have.device()], 0, false), requests[i])
	}
	if len(second) == 0 {
		return nil
	}
	answers, err := r.sockets[d.protocol].do(second)
	if err != nil {
		return err
	}
	for n, i := range refused {
		results[i] = answers[2*n+1]
	}
	return nil
}

// setPermitted tries again what the kernel refused for a setting that is ours to change.
func (r *Reconciler) setPermitted(d *descriptor, batch []*entry, requests []request, results []error) error {
	var refused []int
	var second []request
	for i, e := range batch {
		if results[i] != nil && d.permit(r, e.want, results[i]) {
			refused, second = append(refused, i), append(second, requests[i])
		}
	}
	if len(second) == 0 {
		return nil
	}
	answers, err := r.sockets[d.protocol].do(second)
	for n, i := range refused {
		if err == nil {
			results[i] = answers[n]
		}
	}
	return err
}

// isGone tells the errors that the kernel answers to the removal of what is not there: of routes ESRCH, of
// neighbours, FDB entries and policies ENOENT, of addresses EADDRNOTAVAIL, of anything on a device that is gone
// ENODEV.
func isGone(err error) bool {
	return errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) ||
		errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.ENODEV)
}

// done takes note of the kernel's answer.
func (r *Reconciler) done(e *entry, err error, log *changes) {
	d := &kindTable[e.kind]
	r.changed = true
	if err != nil && d.bestEffort {
		r.log.V(1).Info("The kernel refuses an object that others do without", "command", command(e), "err", err)
		return
	}
	if err != nil {
		e.state = failed
		r.failed = append(r.failed, refusal{e, err})
		return
	}
	fought := r.fights.Restored(e.key())
	if !fought {
		log.add(e)
	}
	r.count(e, fought)
	if f, ok := e.have.(foreign); ok { // it has been replaced or removed
		delete(r.foreign, f)
	}
	if e.want == nil {
		r.entries.Remove(e.key(), e)
	}
	e.have, e.drift, e.held = e.want, false, true
}
