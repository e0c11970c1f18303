package kernel

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/fight"
	"github.com/flanneld/flanneld/pkg/multimap"
	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/pkg/rtnl"
)

// A Reconciler keeps the desired objects of one network namespace, by owner, and knows what the kernel holds of them.
// Set changes what is desired, and Reconcile makes the kernel hold it. Reconcile changes only what is ours:
//
//   - links that are desired, or that carry the alias of our Network because an earlier process made them;
//   - what is on these links, except what the kernel put there itself;
//   - routes, in any table, nexthop objects, and rules that carry RouteProtocol, unless they are another network's (see
//     SetNetworks);
//   - gateway routes inside the networks that carry no protocol of their own (RTPROT_BOOT), and are there at the start:
//     upstream flannel leaves these;
//   - IPsec policies with PolicyID between subnets inside the networks.
//
// A route of the kernel or of another program that was there before ours is never replaced: ours is refused while the
// other is there. What another program puts in the place of ours later is replaced.
//
// A Reconciler is for one goroutine. To reconcile after each receive from Wake and after each Set is always right.
type Reconciler struct {
	// Network is the name of the network on this host, where there are several. "" is a name.
	Network string

	// Table is the routing table that the desired routes are in; zero: the main table.
	Table uint32

	// Devices may be nil. It tells from the name of a device that the device is ours although it lacks our alias: the
	// devices of upstream flannel have none.
	Devices func(name string) bool

	log       klog.Logger
	sock      *socket         // of rtnetlink
	sockets   map[int]*socket // by netlink protocol; nil: the kernel does not have the protocol
	supported [kinds]bool     // whether the kernel has the kind
	links     *netlink.Handle

	listeners []*listener
	watchers  sync.WaitGroup // the listeners' goroutines
	closed    chan struct{}
	buf       []byte // for one notification
	wake      chan struct{}

	networks []netip.Prefix       // see SetNetworks
	within   []netip.Prefix       // see SetNetworks
	overlays []netip.Prefix       // see SetOverlays
	foreign  map[foreign]struct{} // that concern the overlays

	entries multimap.Keyed[Key, *entry]
	owners  map[string][]*entry // what an owner claims
	others  map[*entry][]claim  // of other owners than the first: the first of these is next when the claim is dropped
	dirty   []*entry            // may differ from the kernel
	failed  []refusal           // to be retried
	paced   []*entry            // fought over: to be set again by the next retry
	fights  *fight.Detector[Key, Object]

	err     error // what Reconcile returned
	backoff retry.Backoff
	retryAt time.Time // zero: no retry is due
	timer   *time.Timer

	devices     devices
	uses        map[string]int // how many desired objects need the device of this name
	round       uint32         // of comparisons
	mustCompare bool           // the kernel's tables must be read before anything is changed
	applied     bool           // all was as desired once

	nexthops    bool // routes may go through nexthops
	fewGateways int  // up to this many gateways, routes are plain

	wanted  [kinds]int // how many objects are desired
	repairs [kinds][causes]uint64
	stats   Stats // as of the last call of Stats
	changed bool  // since then
}

// An entry is the desired and the actual object under one key. An entry with neither is not in Reconciler.entries.
type entry struct {
	claim
	have Object // nil: nothing
	via  uint32 // the nexthop that have, a route, goes through; 0: none

	round uint32 // the comparison that saw have
	kind  Kind
	state state
	drift bool // the kernel changed, not what is desired
	held  bool // routes: the kernel has held ours; a route that another program puts in its place is replaced
	seen  bool // by Stats, while it counts

	claimed bool // it is desired, or was
}

// state says which list an entry counts in.
type state uint8

const (
	idle   state = iota
	dirty        // in Reconciler.dirty
	failed       // in Reconciler.failed
	paced        // in Reconciler.paced
)

func (e *entry) key() Key {
	if e.want != nil {
		return e.want.Key()
	}
	return e.have.Key()
}

// A claim is what an owner desires under one key. A nil Object: nothing.
type claim struct {
	owner string
	want  Object
}

// A refusal is an entry that could not be applied, and why.
type refusal struct {
	*entry
	err error
}

// A listener receives the notifications of one netlink protocol.
type listener struct {
	*rtnl.Listener
	protocol int
	drained  chan struct{} // Reconcile has read all that had come
}

// New returns a Reconciler for the calling thread's network namespace, which keeps the kernel's notifications from
// now on. Close ends it.
func New(log klog.Logger) (*Reconciler, error) {
	links, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	r := &Reconciler{
		log: log, links: links, sockets: map[int]*socket{},
		closed: make(chan struct{}), buf: make([]byte, 1<<16), wake: make(chan struct{}, 1),
		foreign: map[foreign]struct{}{},
		entries: multimap.NewKeyed((*entry).key), owners: map[string][]*entry{}, others: map[*entry][]claim{},
		fights:  newFights(log),
		devices: newDevices(), uses: map[string]int{}, fewGateways: fewGateways,
	}
	for k := range kindTable {
		protocol := kindTable[k].protocol
		if _, tried := r.sockets[protocol]; tried {
			continue
		}
		err := r.open(protocol)
		if err != nil && protocol == unix.NETLINK_ROUTE {
			r.Close()
			return nil, err
		}
		if err != nil {
			log.V(1).Info("The kernel does not support a netlink protocol", "protocol", protocol, "err", err)
		}
	}
	r.sock = r.sockets[unix.NETLINK_ROUTE]
	r.Compare()
	return r, nil
}

// open opens the sockets of a netlink protocol and finds out which of its kinds the kernel has. The listener ignores
// the notifications of our own changes.
func (r *Reconciler) open(protocol int) error {
	r.sockets[protocol] = nil
	sock, err := newSocket(protocol)
	if err != nil {
		return err
	}
	var groups []int
	var supported [kinds]bool
	for k := range kindTable {
		d := &kindTable[k]
		if d.protocol != protocol {
			continue
		}
		if d.probe != nil {
			if err := d.probe(sock); err != nil {
				r.log.V(1).Info("The kernel does not have "+d.plural, "err", err)
				continue
			}
		}
		supported[k] = true
		groups = append(groups, d.groups...)
	}
	raw, err := rtnl.ListenTo(protocol, ignore(sock.pid), groups...)
	if err != nil {
		sock.close()
		return err
	}
	for k, ok := range supported {
		r.supported[k] = r.supported[k] || ok
	}
	l := &listener{raw, protocol, make(chan struct{}, 1)}
	r.sockets[protocol], r.listeners = sock, append(r.listeners, l)
	r.watchers.Go(func() { r.watch(l) })
	return nil
}

// Close stops listening. The kernel keeps what it holds.
func (r *Reconciler) Close() {
	select {
	case <-r.closed:
		return
	default:
		close(r.closed)
	}
	for _, l := range r.listeners {
		l.Close()
	}
	r.watchers.Wait()
	if r.timer != nil {
		r.timer.Stop()
	}
	r.links.Close()
	for _, s := range r.sockets {
		if s != nil {
			s.close()
		}
	}
}

// Wake signals that there is something for Reconcile to do: notifications have come, a retry is due, or Set, Compare
// or Diff leave something to do. Signals that nobody has received are merged into one.
func (r *Reconciler) Wake() <-chan struct{} { return r.wake }

func (r *Reconciler) signal() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Reconcile takes the notifications that have come, and makes the kernel hold what is desired. It returns what the
// kernel refuses: the same error value again until it has tried again, nil when the kernel holds everything. What is
// refused is retried with backoff: Wake signals when a retry is due.
func (r *Reconciler) Reconcile() error {
	r.receive()
	if !r.retryAt.IsZero() && !time.Now().Before(r.retryAt) {
		r.retryAt = time.Time{}
		r.retry()
	}
	if r.pending() {
		r.err = r.apply()
		r.applied = r.applied || r.err == nil && !r.pending()
	}
	if len(r.dirty) > 0 && !r.mustCompare {
		r.signal()
	}
	switch {
	case !r.pending() && !r.waiting():
		r.backoff.Reset()
		r.retryAt = time.Time{}
	case r.retryAt.IsZero():
		pause := r.backoff.Next()
		r.retryAt = time.Now().Add(pause)
		r.timer = time.AfterFunc(pause, r.signal)
	}
	return r.err
}

// Run calls Reconcile whenever there is something to do, and then done with the error, until ctx ends. It is for
// callers that have nothing else to do.
func (r *Reconciler) Run(ctx context.Context, done func(error)) {
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-r.wake:
			done(r.Reconcile())
		}
	}
}

// pending tells whether there is something to apply.
func (r *Reconciler) pending() bool { return r.mustCompare || len(r.dirty) > 0 }

// waiting tells whether something waits for a retry.
func (r *Reconciler) waiting() bool { return len(r.failed) > 0 || len(r.paced) > 0 }

// retry queues all that waits for a retry.
func (r *Reconciler) retry() {
	r.retryFailed()
	for _, e := range r.paced {
		if e.state == paced {
			r.queue(e)
		}
	}
	r.paced = nil
}

// retryFailed queues what the kernel refused.
func (r *Reconciler) retryFailed() {
	for _, f := range r.failed {
		if f.state == failed {
			r.queue(f.entry)
		}
	}
	r.failed = nil
}

// Compare makes the next Reconcile read all of the kernel's tables first, as after a gap in the notifications.
func (r *Reconciler) Compare() {
	r.mustCompare = true
	r.signal()
}

// SetNetworks sets the networks that upstream flannel's routes and our policies lead to, and within, the prefixes that
// our routes lead to, now or before; nil: any. Of routes with RouteProtocol to other prefixes, and of blackholes, only
// those on our own devices are ours.
func (r *Reconciler) SetNetworks(networks, within []netip.Prefix) {
	if !slices.Equal(r.networks, networks) || !slices.Equal(r.within, within) {
		r.networks, r.within = networks, within
		r.Compare() // what the kernel holds is ours, or is not, in another way
	}
}

// Set makes objects all that the owner desires. An object that several owners desire stays until the last of them
// drops it; where their objects differ, the owner that was first decides.
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
	} else {
		claimed := make([]*entry, len(wants))
		for i, o := range wants {
			claimed[i] = r.claim(keys[i], claim{owner, o})
		}
		r.owners[owner] = claimed
	}
	if r.pending() {
		r.signal()
	}
}

// claim puts, changes or (with a nil want) drops one owner's claim to a key, and returns the entry.
func (r *Reconciler) claim(k Key, c claim) *entry {
	e := r.entries.Get(k)
	if e == nil {
		if c.want == nil {
			return nil
		}
		e = &entry{kind: k.Kind}
		r.entries.Add(k, e)
	}
	e.claimed = e.claimed || c.want != nil
	before := e.want
	if e.want == nil || e.owner == c.owner {
		e.claim = c
	} else {
		r.claimLater(e, c)
	}
	if others := r.others[e]; e.want == nil && len(others) > 0 {
		e.claim = others[0]
		r.setOthers(e, others[1:])
	}
	if e.want == before {
		return e
	}
	r.changed = true
	switch {
	case before == nil:
		r.wanted[k.Kind]++
	case e.want == nil:
		r.wanted[k.Kind]--
	}
	r.use(k.Kind, before, -1)
	r.use(k.Kind, e.want, +1)
	e.drift = false
	switch {
	case e.want == nil && e.have == nil:
		r.drop(k, e)
	case !kindTable[k.Kind].bestEffort || e.want == nil:
		r.queue(e)
	}
	return e
}

// claimLater puts, changes or drops the claim of an owner that is not the first.
func (r *Reconciler) claimLater(e *entry, c claim) {
	others := r.others[e]
	i := slices.IndexFunc(others, func(o claim) bool { return o.owner == c.owner })
	switch {
	case i >= 0 && c.want == nil:
		r.setOthers(e, slices.Delete(others, i, i+1))
	case i >= 0:
		others[i] = c
	case c.want != nil:
		r.setOthers(e, append(others, c))
		if c.want != e.want && !kindTable[e.kind].bestEffort {
			r.log.Error(nil, "Two owners desire different objects with one key; the first owner's object stays",
				"owner", e.owner, "command", e.want.String(), "otherOwner", c.owner, "otherCommand", c.want.String())
		}
	}
}

func (r *Reconciler) setOthers(e *entry, others []claim) {
	if len(others) == 0 {
		delete(r.others, e)
	} else {
		r.others[e] = others
	}
}

// use counts the devices that an object needs.
func (r *Reconciler) use(k Kind, o Object, n int) {
	if o == nil {
		return
	}
	r.useDevice(o.device(), n)
	if lower := kindTable[k].lower; lower != nil {
		r.useDevice(lower(o), n)
	}
}

func (r *Reconciler) useDevice(name string, n int) {
	if name == "" {
		return
	}
	if r.uses[name] += n; r.uses[name] == 0 {
		delete(r.uses, name)
	}
}

// queue makes the next apply compare the desired and the actual object of an entry.
func (r *Reconciler) queue(e *entry) {
	if e.state != dirty {
		e.state = dirty
		r.dirty = append(r.dirty, e)
	}
}

// drop removes an entry that has neither a desired nor an actual object.
func (r *Reconciler) drop(k Key, e *entry) {
	r.entries.Remove(k, e)
	if e.state == failed {
		r.queue(e) // so that the failure is forgotten
	}
}

// Has tells whether the kernel holds all that an owner desires.
func (r *Reconciler) Has(owner string) bool {
	for _, e := range r.owners[owner] {
		if kindTable[e.kind].bestEffort {
			continue
		}
		decides := e.owner == owner ||
			slices.ContainsFunc(r.others[e], func(c claim) bool { return c == claim{owner, e.want} })
		if !decides || e.want != e.have {
			return false
		}
	}
	return true
}

// insideNetworks tells whether a prefix is part of one of the networks.
func (r *Reconciler) insideNetworks(p netip.Prefix) bool {
	return slices.ContainsFunc(r.networks, func(n netip.Prefix) bool {
		return n.Bits() < p.Bits() && n.Contains(p.Addr())
	})
}

// onOwnDevice tells whether an object is on one of our devices.
func (r *Reconciler) onOwnDevice(o Object) bool { return r.ownsDevice(o.device()) }

// refused returns what the kernel refuses, as one error of one line: there may be a refusal for each peer.
func (r *Reconciler) refused(lostAnswers bool) error {
	const most = 3
	var err error
	count := 0
	add := func(next error) {
		if err == nil {
			err = next
		} else {
			err = fmt.Errorf("%w; %w", err, next)
		}
	}
	for _, f := range r.failed {
		// A device takes its objects with it: the notification that the device is gone will come, and queues the
		// entry.
		if f.state != failed || errors.Is(f.err, unix.ENODEV) {
			continue
		}
		if count++; count <= most {
			add(fmt.Errorf("%s: %w", command(f.entry), f.err))
		}
	}
	if count > most {
		err = fmt.Errorf("%w; and %d more", err, count-most)
	}
	if lostAnswers {
		add(errors.New("some of the kernel's answers were lost: its tables will be read again"))
	}
	return err
}
