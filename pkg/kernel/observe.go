package kernel

import (
	"errors"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/rtnl"
)

// watch signals that notifications have come, and then waits until receive has read them. It reads nothing: while
// nobody reconciles, notifications stay in the socket, and when they do not fit any more the kernel reports a loss.
func (r *Reconciler) watch(l *listener) {
	for l.Wait() == nil {
		r.signal()
		select {
		case <-l.drained:
		case <-r.closed:
			return
		}
	}
}

// receive handles the notifications that have come. There is a limit, so that other work goes on in a flood of them.
func (r *Reconciler) receive() {
	const most = 1 << 14
	for _, l := range r.listeners {
		for range most {
			datagram, err := l.TryNext(r.buf)
			if errors.Is(err, rtnl.ErrLost) {
				r.log.V(1).Info("Kernel notifications were lost; reading all of the kernel's tables")
				r.mustCompare = true
			} else if err != nil || datagram == nil {
				break
			} else if l.protocol == unix.NETLINK_ROUTE {
				r.handle(datagram)
			} else {
				r.mustCompare = true
			}
		}
		select {
		case l.drained <- struct{}{}:
		default:
		}
	}
}

// handle takes note of one datagram of rtnetlink's notifications.
func (r *Reconciler) handle(datagram []byte) {
	err := rtnl.EachMessage(datagram, func(h unix.NlMsghdr, body []byte) error {
		if h.Type == unix.NLMSG_OVERRUN {
			r.mustCompare = true
		}
		for k := range kindTable {
			d := &kindTable[k]
			gone := h.Type == d.del
			switch {
			case d.protocol != unix.NETLINK_ROUTE || h.Type != d.set && !gone:
			case d.handle != nil:
				d.handle(r, gone, body)
			default:
				o := d.decode(body, r.devices)
				o.behind = !gone && h.Flags&unix.NLM_F_APPEND != 0
				o.replaced = !gone && h.Flags&unix.NLM_F_REPLACE != 0
				r.observe(o, gone)
				if Kind(k) == KindAddr && gone {
					r.foreignMayBeGone(o.dev)
				}
				if d.notified != nil && r.uses[o.dev] > 0 {
					d.notified(r, o, gone)
				}
			}
		}
		return nil
	})
	if err != nil {
		r.mustCompare = true
	}
}

// observe takes note of an object that the kernel holds, or does not hold any more.
func (r *Reconciler) observe(d decoded, gone bool) {
	if d.Object == nil {
		return
	}
	k := d.Key()
	kind := &kindTable[k.Kind]
	switch k.Kind {
	case KindRoute:
		r.noteForeign(d, gone)
	case KindNexthop: // routes go with it without a notification
		r.mustCompare = r.mustCompare || gone && len(r.foreign) > 0
	}
	e := r.entries.Get(k)
	if e == nil {
		if gone || !kind.ours(r, d.Object) {
			return
		}
		e = &entry{kind: k.Kind} // left over: to be removed
		r.entries.Add(k, e)
	}
	if k.Kind == KindRoute {
		_, theirs := d.Object.(foreign)
		e.held = e.held || !theirs && !gone
		if r.beside(e, d, gone) {
			return
		}
	}
	r.changed = true
	before := e.have
	e.have, e.via, e.round = d.Object, d.via, r.round
	switch {
	case gone:
		e.have = nil
	case d.Object == e.want:
		e.have = e.want // so that there is one copy in memory
	}
	switch {
	case e.want == nil && e.have == nil:
		r.drop(k, e)
	case e.want == e.have:
	case kind.bestEffort && e.want != nil:
		// The objects that use it went or changed with it, mostly without a notification.
		r.mustCompare = r.mustCompare || before == e.want
	default:
		r.drifted(e, before)
	}
}

// drifted queues what another program changed, or lets it wait for a retry where the program does so without end.
func (r *Reconciler) drifted(e *entry, before Object) {
	e.drift = e.drift || e.have != before // else it is late news of what we did ourselves
	switch {
	case e.state == paced:
	case e.want == before && r.fights.Undone(e.key(), e.change()):
		e.state = paced
		r.paced = append(r.paced, e)
	default:
		r.queue(e)
	}
}

// forgetObjectsOn makes the next apply set all objects on a device again: they may be gone, or may now be possible.
func (r *Reconciler) forgetObjectsOn(dev string) {
	on := func(o Object) bool { return o != nil && o.device() == dev }
	for e := range r.entries.All() {
		if e.kind == KindLink || !on(e.have) && !on(e.want) {
			continue
		}
		k := e.key()
		e.drift = e.drift || e.have != nil
		e.have, r.changed = nil, true
		switch {
		case e.want == nil:
			r.drop(k, e)
		case !kindTable[e.kind].bestEffort:
			r.queue(e)
		}
	}
}

// compare reads the kernel's tables and queues every difference from what is desired.
func (r *Reconciler) compare() error {
	r.round++
	r.mustCompare, r.changed = false, true
	foreignBefore := r.foreign
	r.foreign = map[foreign]struct{}{}
	err := r.readAll()
	r.compareForeign(foreignBefore, err)
	if err != nil {
		r.mustCompare = true
		if !errors.Is(err, errInterrupted) {
			return err
		}
		// What was read is true, and what was missed is only set again.
	}
	for e := range r.entries.All() {
		if e.have != nil && e.round != r.round {
			k, before := e.key(), e.have
			e.have = nil
			switch {
			case e.want == nil:
				r.drop(k, e)
			case !kindTable[e.kind].bestEffort:
				r.drifted(e, before)
			}
		}
	}
	r.fights.Forget()
	return nil
}

// readAll observes everything in the kernel that could be ours, in the order of the kinds: devices come first, since
// all else refers to them by index.
func (r *Reconciler) readAll() error {
	var interrupted error
	for k := range kindTable {
		if !r.supported[k] {
			continue
		}
		err := r.read(&kindTable[k])
		if errors.Is(err, errInterrupted) {
			interrupted = err
		} else if err != nil {
			return err
		}
	}
	return interrupted
}

// hasSeen tells whether this comparison has seen an object with the same key. The kernel lists first what counts.
func (r *Reconciler) hasSeen(d decoded) bool {
	if d.Object == nil {
		return false
	}
	e := r.entries.Get(d.Key())
	return e != nil && e.have != nil && e.round == r.round
}

// read observes the objects of one kind.
func (r *Reconciler) read(d *descriptor) error {
	if d.read != nil {
		return d.read(r)
	}
	var interrupted error
	for _, request := range d.dumps(r) {
		err := r.sockets[d.protocol].dump(d.get, request, func(_ uint16, body []byte) {
			o := d.decode(body, r.devices)
			o.behind = r.hasSeen(o)
			r.observe(o, false)
		})
		if errors.Is(err, errInterrupted) {
			interrupted = err
		} else if err != nil {
			return err
		}
	}
	return interrupted
}
