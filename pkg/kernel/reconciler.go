package kernel

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/fight"
	"github.com/flanneld/flanneld/pkg/rtnl"
)

// A Reconciler holds what the kernel of one network namespace is wanted to
// hold, by owner, and what it does hold as far as is known. Set changes the
// former, Handle and Compare learn the latter, Apply removes the difference.
// It touches only what is ours:
//
//   - links that it was told to hold, or made in an earlier life;
//   - what sits on these links, but for what the kernel put there itself;
//   - routes, and nexthop objects, that carry RouteProtocol;
//   - gateway routes inside Networks that carry no protocol of their own
//     (RTPROT_BOOT): upstream's daemon leaves these;
//   - IPsec policies with PolicyID between subnets inside Networks.
//
// It is for one goroutine.
type Reconciler struct {
	Networks []netip.Prefix

	// Devices, where it is set, tells of a device's name that it is ours,
	// though it may lack our mark: upstream's devices have none.
	Devices func(name string) bool

	sock   *socket
	xfrm   *socket // nil: the kernel has no IPsec
	links  *netlink.Handle
	notify []*rtnl.Listener
	events chan Event

	entries map[Key]*entry
	owners  map[string][]*entry // what an owner claims
	dirty   []*entry            // may differ from the kernel
	failed  []*entry            // the kernel refused; tried again by Retry
	held    []*entry            // somebody undoes them at once; set again by Retry
	fights  *fight.Detector[Key, Object]

	devices devices
	uses    map[string]int // how many wanted objects need the device of this name
	round   uint           // of comparisons
	unknown bool           // the kernel must be read before anything is done

	nexthopsKnown bool // the kernel has nexthop objects
	nexthops      bool // and our routes may go through them
	fewGateways   int  // up to so many gateways, routes are plain

	wanted  [kinds]int // how many objects are
	repairs [kinds][causes]uint64
	stats   Stats // as of the last time
	moved   bool  // and something has changed since
}

// An entry is what is wanted, and what there is, under one key.
type entry struct {
	claim
	others []claim // that come to their turn when the claim is dropped
	have   Object  // nil: nothing
	via    uint32  // the nexthop that have, a route, goes through; 0: none

	round uint // the comparison that saw have
	state state
	drift bool // the kernel changed, not our wishes
	seen  bool // by Stats, while it counts
}

// state tells which list an entry counts in.
type state uint8

const (
	idle   state = iota
	dirty        // in Reconciler.dirty
	failed       // in Reconciler.failed
	held         // in Reconciler.held
)

// key returns what the entry is filed under. An entry that stands for nothing
// is not filed.
func (e *entry) key() Key {
	if e.want != nil {
		return e.want.Key()
	}
	return e.have.Key()
}

// A claim is an owner's wish. A nil Object wishes for nothing.
type claim struct {
	owner string
	want  Object
}

// New returns a Reconciler for the calling thread's network namespace. It
// listens to the kernel from now on: Events must be received and handed to
// Handle. Close ends it.
func New() (*Reconciler, error) {
	sock, err := newSocket(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	groups := []int{unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH,
		unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE}
	known := nexthopsKnown(sock)
	if known {
		groups = append(groups, unix.RTNLGRP_NEXTHOP)
	}
	notify, err := rtnl.Listen(ignore(sock.pid), groups...)
	if err != nil {
		sock.close()
		return nil, err
	}
	links, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		sock.close()
		notify.Close()
		return nil, fmt.Errorf("netlink: %w", err)
	}
	r := &Reconciler{
		sock: sock, links: links, notify: []*rtnl.Listener{notify}, events: make(chan Event),
		entries: map[Key]*entry{}, owners: map[string][]*entry{},
		devices: newDevices(), uses: map[string]int{},
		unknown: true, fights: newFights(klog.Background()), nexthopsKnown: known, fewGateways: fewGateways,
	}
	if err := r.listenXFRM(); err != nil {
		klog.V(1).Infof("The kernel has no IPsec: %v", err)
	}
	var readers sync.WaitGroup
	for i, l := range r.notify {
		readers.Go(func() { r.read(l, i == 0) })
	}
	go func() {
		readers.Wait()
		close(r.events)
	}()
	return r, nil
}

// Close stops listening. The kernel keeps what it holds.
func (r *Reconciler) Close() {
	for _, l := range r.notify {
		l.Close()
	}
	for range r.events { // until read has ended
	}
	r.links.Close()
	r.sock.close()
	if r.xfrm != nil {
		r.xfrm.close()
	}
}

// Set makes objects all that the owner wants. An object that several owners
// want stays until the last of them gives it up; where they differ, who came
// first has it.
func (r *Reconciler) Set(owner string, objects []Object) {
	wants, keys := make([]Object, 0, 2*len(objects)), make([]Key, 0, 2*len(objects))
	want := func(o Object) {
		if k := o.Key(); !slices.Contains(keys, k) { // two routes may have one gateway
			wants, keys = append(wants, o), append(keys, k)
		}
	}
	for _, o := range objects {
		if n, ok := nexthopOf(o); ok {
			want(n)
		}
		want(o)
	}
	for _, e := range r.owners[owner] {
		if k := e.key(); !slices.Contains(keys, k) {
			r.claim(k, claim{owner: owner})
		}
	}
	if len(wants) == 0 {
		delete(r.owners, owner)
		return
	}
	claimed := make([]*entry, len(wants))
	for i, o := range wants {
		claimed[i] = r.claim(keys[i], claim{owner, o})
	}
	r.owners[owner] = claimed
}

// claim puts, changes or (with a nil want) drops one owner's claim to a key,
// and returns the entry.
func (r *Reconciler) claim(k Key, c claim) *entry {
	e := r.entries[k]
	if e == nil {
		if c.want == nil {
			return nil
		}
		e = &entry{}
		r.entries[k] = e
	}
	before := e.want
	switch {
	case e.want == nil || e.owner == c.owner:
		e.claim = c
	default:
		i := slices.IndexFunc(e.others, func(o claim) bool { return o.owner == c.owner })
		switch {
		case i >= 0 && c.want == nil:
			e.others = slices.Delete(e.others, i, i+1)
		case i >= 0:
			e.others[i] = c
		case c.want != nil:
			e.others = append(e.others, c)
			if c.want != e.want && k.Kind != KindNexthop {
				klog.Warningf("%s and %s cannot both have their way: %s stays, instead of %s", e.owner, c.owner, e.want, c.want)
			}
		}
	}
	if e.want == nil && len(e.others) > 0 {
		e.claim, e.others = e.others[0], e.others[1:]
	}
	if e.want == before {
		return e
	}
	r.moved = true
	switch {
	case before == nil:
		r.wanted[k.Kind]++
	case e.want == nil:
		r.wanted[k.Kind]--
	}
	r.use(before, -1)
	r.use(e.want, +1)
	e.drift = false
	if e.want == nil && e.have == nil {
		delete(r.entries, k)
		return e
	}
	if k.Kind != KindNexthop || e.want == nil {
		r.queue(e)
	}
	return e
}

// use counts the devices that an object needs.
func (r *Reconciler) use(o Object, n int) {
	if o == nil {
		return
	}
	names := []string{o.device()}
	if l, ok := o.(Link); ok {
		names = append(names, l.Type.lower())
	}
	for _, name := range names {
		if name == "" {
			continue
		}
		if r.uses[name] += n; r.uses[name] == 0 {
			delete(r.uses, name)
		}
	}
}

// queue has the next Apply look at an entry.
func (r *Reconciler) queue(e *entry) {
	if e.state != dirty {
		e.state = dirty
		r.dirty = append(r.dirty, e)
	}
}

// nexthop returns the entry of the nexthop that an entry's route could go
// through, nil if there is none.
func (r *Reconciler) nexthop(e *entry) *entry {
	if n, ok := nexthopOf(e.want); ok {
		return r.entries[n.Key()]
	}
	return nil
}

// Pending tells whether Apply has anything to do.
func (r *Reconciler) Pending() bool { return r.unknown || len(r.dirty) > 0 }

// Failed tells whether there is anything that the kernel refused, or that
// somebody undoes as soon as it is done. It waits for Retry.
func (r *Reconciler) Failed() bool { return len(r.failed) > 0 || len(r.held) > 0 }

// Retry queues what Failed tells of, for the next Apply.
func (r *Reconciler) Retry() {
	r.again()
	for _, e := range r.held {
		if e.state == held {
			r.queue(e)
		}
	}
	r.held = nil
}

// again queues what the kernel refused.
func (r *Reconciler) again() {
	for _, e := range r.failed {
		if e.state == failed {
			r.queue(e)
		}
	}
	r.failed = nil
}

// Compare makes the next Apply read all of the kernel's tables first, as after
// a gap in the notifications.
func (r *Reconciler) Compare() { r.unknown = true }

// Apply makes the kernel hold what is wanted. What it refuses is reported and
// stays for Retry; the rest is done all the same. Pending tells afterwards whether
// there is more to do, such as to read tables again that changed meanwhile.
func (r *Reconciler) Apply() error {
	var failures failures
	r.fights.LogNew()
	if r.unknown {
		if err := r.compare(); err != nil {
			return fmt.Errorf("reading the kernel's tables: %w", err)
		}
	}
	interrupted := r.unknown // the tables changed while they were read, which is no failure
	var log changes
	todo := r.take()
	for _, k := range []Kind{KindRoute, KindLink} {
		r.apply(k, todo, false, &log, &failures)
	}
	r.apply(KindLink, todo, true, &log, &failures)
	for _, e := range todo {
		if e.want != e.have && e.state == idle {
			r.queue(e)
		}
	}
	todo = r.take() // with what went when a link was replaced
	for _, e := range todo {
		if n := r.nexthop(e); n != nil {
			r.queue(n)
		}
	}
	todo = append(todo, r.take()...)
	for k := KindAddr; k < kinds; k++ {
		r.apply(k, todo, true, &log, &failures)
	}
	// Last, what routes may have needed until they were replaced; with a nexthop
	// the kernel even removes the routes that still go through it.
	for _, k := range []Kind{KindPolicy, KindNexthop, KindFDB, KindNeighbor, KindAddr} {
		r.apply(k, todo, false, &log, &failures)
	}
	log.write()
	if r.unknown && !interrupted { // the kernel lost track of the requests
		failures.add(errors.New("some of the kernel's answers were lost: its tables will be read again"))
	}
	return failures.err()
}

// take empties the queue.
func (r *Reconciler) take() []*entry {
	todo := r.dirty
	r.dirty = nil
	for _, e := range todo {
		e.state = idle
	}
	return todo
}

// apply brings the entries of one kind about (add), or removes them.
func (r *Reconciler) apply(kind Kind, todo []*entry, add bool, log *changes, failures *failures) {
	var batch []*entry
	var requests []request
	var via []uint32 // by which nexthop
	for _, e := range todo {
		if e.want == e.have || e.state == failed || (e.want != nil) != add || e.key().Kind != kind {
			continue // settled or failed meanwhile, or not its turn
		}
		if !add && !r.ours(e.have) {
			delete(r.entries, e.key())
			e.have = nil
			continue
		}
		if kind == KindLink {
			r.done(e, r.link(e), log, failures)
			continue
		}
		if kind == KindPolicy && r.xfrm == nil {
			r.done(e, errNoXFRM, log, failures)
			continue
		}
		if n, ok := e.have.(nexthop); kind == KindNexthop && add && (!r.useNexthops() || ok && n.foreign) {
			continue
		}
		o, by := e.want, uint32(0)
		if !add {
			o, by = e.have, e.via
		} else if n := r.nexthop(e); n != nil && n.have != nil && r.useNexthops() {
			if own, _ := nexthopOf(o); own == n.have {
				by = own.id
			}
		}
		dev := 0
		if name := o.device(); name != "" {
			var ok bool
			if dev, ok = r.devices.number[name]; !ok {
				if add && r.own(name) {
					r.done(e, unix.ENODEV, log, failures) // why has been said
				} else if add {
					r.done(e, fmt.Errorf("there is no device %s", name), log, failures)
				} else {
					r.done(e, nil, log, failures) // it went with its device
				}
				continue
			}
		}
		batch, via = append(batch, e), append(via, by)
		requests = append(requests, encode(o, dev, by, add))
	}
	if len(batch) == 0 {
		return
	}
	sock := r.sock
	if kind == KindPolicy {
		sock = r.xfrm
	}
	results, err := sock.do(requests)
	if err == nil && add && kind == KindRoute {
		err = r.evict(batch, requests, results)
	}
	for i, e := range batch {
		if err != nil {
			r.done(e, err, log, failures)
			r.unknown = true
			continue
		}
		if !add && isGone(results[i]) {
			results[i] = nil
			e.drift = false // late news of what had gone: nothing was left over
		}
		if results[i] == nil {
			e.via = via[i]
		}
		r.done(e, results[i], log, failures)
	}
}

// evict tries again what the kernel refused to put in place of another route,
// after removing that. It does not replace a route when, with the same key, it
// has ours further down (EEXIST), nor in IPv6 when the gateway would be reached
// by that very route (EINVAL).
func (r *Reconciler) evict(batch []*entry, requests []request, results []error) error {
	var tried []int
	var again []request
	for i, e := range batch {
		if e.have == nil || !errors.Is(results[i], unix.EEXIST) && !errors.Is(results[i], unix.EINVAL) {
			continue
		}
		tried = append(tried, i)
		again = append(again, encode(e.have, r.devices.number[e.have.device()], 0, false), requests[i])
	}
	if len(again) == 0 {
		return nil
	}
	answers, err := r.sock.do(again)
	if err != nil {
		return err
	}
	for n, i := range tried {
		results[i] = answers[2*n+1]
	}
	return nil
}

// isGone tells the errors that the kernel answers to the removal of what is
// not there: routes ESRCH, neighbours, FDB entries and policies ENOENT, addresses
// EADDRNOTAVAIL, anything on a vanished device ENODEV.
func isGone(err error) bool {
	return errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.ENODEV)
}

// done takes note of the kernel's answer.
func (r *Reconciler) done(e *entry, err error, log *changes, failures *failures) {
	r.moved = true
	if err != nil && e.key().Kind == KindNexthop {
		klog.V(1).Infof("%s: %v: the route will be plain", command(e), err)
		return
	}
	if err != nil {
		// A device that goes takes its objects first, then itself: news of it
		// is on the way, and brings the entry back.
		if !errors.Is(err, unix.ENODEV) {
			failures.add(fmt.Errorf("%s: %w", command(e), err))
		}
		e.state = failed
		r.failed = append(r.failed, e)
		return
	}
	fought := r.fights.Restored(e.key())
	if !fought {
		log.add(e)
	}
	r.count(e, fought)
	if e.want == nil {
		delete(r.entries, e.key())
	}
	if a, ok := e.have.(Addr); ok && e.want == nil {
		e.have = nil
		r.lost(a.Dev) // if it was the last one, routes went with it
	}
	e.have, e.drift = e.want, false
}

// Has tells whether the kernel holds all that an owner wants.
func (r *Reconciler) Has(owner string) bool {
	for _, e := range r.owners[owner] {
		if e.key().Kind == KindNexthop {
			continue
		}
		if e.owner != owner && !slices.ContainsFunc(e.others, func(c claim) bool { return c == claim{owner, e.want} }) || e.want != e.have {
			return false
		}
	}
	return true
}
