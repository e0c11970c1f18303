package kernel

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/rtnl"
)

// An Event is one datagram of the kernel's notifications; a nil one says that
// some were lost, an empty one that there was one of IPsec policies.
type Event []byte

// Events delivers the kernel's notifications, to be handed to Handle. It is
// closed by Close.
func (r *Reconciler) Events() <-chan Event { return r.events }

// read feeds Events from one socket until that is closed.
func (r *Reconciler) read(from *rtnl.Listener, whole bool) {
	buf := make([]byte, 1<<16)
	for {
		datagram, err := from.Next(buf)
		switch {
		case err == nil && !whole:
			r.events <- Event{}
		case err == nil:
			r.events <- slices.Clone(datagram)
		case errors.Is(err, rtnl.ErrLost):
			r.events <- nil
		default:
			return
		}
	}
}

// Handle takes note of what the kernel tells. Pending then tells whether it
// calls for an Apply.
func (r *Reconciler) Handle(ev Event) {
	if ev == nil {
		klog.V(1).Info("Kernel notifications were lost: comparing all of its tables")
		r.unknown = true
		return
	}
	r.unknown = r.unknown || len(ev) == 0
	err := rtnl.EachMessage(ev, func(h unix.NlMsghdr, body []byte) error {
		switch h.Type {
		case unix.RTM_NEWLINK, unix.RTM_DELLINK:
			r.handleLink(h, body)
		case unix.RTM_NEWADDR, unix.RTM_NEWNEIGH, unix.RTM_NEWROUTE, unix.RTM_NEWNEXTHOP:
			d := decode(h.Type, body, r.devices.name)
			r.observe(d, false)
			if r.uses[d.dev] > 0 && (h.Type == unix.RTM_NEWADDR || d.connects()) {
				r.again() // what failed for want of a way to the gateway
			}
		case unix.RTM_DELADDR:
			d := decode(h.Type, body, r.devices.name)
			r.observe(d, true)
			if r.uses[d.dev] > 0 {
				// With a device's last IPv4 address go, unsaid, all of its routes.
				r.unknown = true
			}
		case unix.RTM_DELNEIGH, unix.RTM_DELROUTE, unix.RTM_DELNEXTHOP:
			r.observe(decode(h.Type, body, r.devices.name), true)
		case unix.NLMSG_OVERRUN:
			r.unknown = true
		}
		return nil
	})
	if err != nil {
		r.unknown = true
	}
}

// observe takes note of an object that is there, or is gone.
func (r *Reconciler) observe(d decoded, gone bool) {
	if d.Object == nil {
		return
	}
	k := d.Key()
	e := r.entries[k]
	if e == nil {
		if gone || !r.ours(d.Object) {
			return
		}
		e = &entry{} // left over by somebody: to be removed
		r.entries[k] = e
	}
	r.moved = true
	before := e.have
	e.have, e.via, e.round = d.Object, d.via, r.round
	switch {
	case gone:
		e.have = nil
	case d.Object == e.want:
		e.have = e.want // one copy is enough
	}
	if e.want == nil && e.have == nil {
		delete(r.entries, k)
		return
	}
	switch {
	case e.want == e.have:
	case k.Kind == KindNexthop && e.want != nil:
		// The routes through it went or changed with it, mostly unsaid.
		r.unknown = r.unknown || before == e.want
	default:
		r.drifted(e, before)
	}
}

// drifted queues what somebody changed, or holds it where he does that without
// end.
func (r *Reconciler) drifted(e *entry, before Object) {
	e.drift = true
	switch {
	case e.state == held:
	case e.want != nil && e.want == before && r.fights.Undone(e.want.Key(), e.want):
		e.state = held
		r.held = append(r.held, e)
	default:
		r.queue(e)
	}
}

// ours tells whether an object in the kernel is ours to remove.
func (r *Reconciler) ours(o Object) bool {
	switch o := o.(type) {
	case transient:
		return false
	case Link:
		return true // readLinks looks at no others
	case Route:
		return true
	case nexthop:
		return !o.foreign
	case Policy:
		return !o.other && r.inside(o.Src) && r.inside(o.Dst)
	case foreign:
		if o.protocol == unix.RTPROT_KERNEL {
			return false
		}
		return r.own(o.Dev) || o.protocol == unix.RTPROT_BOOT && o.Via.IsValid() && r.inside(o.Dst)
	}
	return r.own(o.device())
}

// inside tells whether a prefix is part of one of the networks.
func (r *Reconciler) inside(p netip.Prefix) bool {
	return slices.ContainsFunc(r.Networks, func(n netip.Prefix) bool { return n.Bits() < p.Bits() && n.Contains(p.Addr()) })
}

// own tells whether a device is one that we are to hold.
func (r *Reconciler) own(dev string) bool {
	e := r.entries[Key{Kind: KindLink, Dev: dev}]
	return e != nil && e.want != nil
}

// handleLink takes note of a device that came, changed or went.
func (r *Reconciler) handleLink(h unix.NlMsghdr, body []byte) {
	index, now, _, ok := linkHeader(body)
	if !ok {
		return
	}
	if h.Type == unix.RTM_DELLINK {
		now = device{}
	}
	var own Object
	if r.own(now.name) {
		// While we made or changed it, it was down: what counts is how it is
		// by now, not how it was then.
		l, err := r.links.LinkByIndex(index)
		if err != nil {
			return // a message to come says that it is gone
		}
		own = r.readLink(l)
		now.up = usable(l.Attrs().RawFlags)
	}
	before := r.devices.at[index]
	if now.name == "" {
		r.devices.delete(index)
	} else {
		r.devices.put(index, now)
	}
	if before.name != now.name && r.uses[before.name] > 0 {
		r.observe(decoded{Object: Link{Name: before.name}}, true)
		r.lost(before.name)
	}
	if r.uses[now.name] == 0 {
		return
	}
	if own != nil {
		r.observe(decoded{Object: own}, false)
	}
	if !now.up && before.up {
		// IPv4 routes go with a device that goes down, those through nexthops
		// with its carrier too, and nobody says so.
		r.lost(now.name)
	}
	if now != before {
		r.again() // what failed for want of the device
	}
}

// lost notes that what is on a device may have gone, or could now be put there.
func (r *Reconciler) lost(dev string) {
	on := func(o Object) bool { return o != nil && o.device() == dev }
	for k, e := range r.entries {
		if k.Kind == KindLink || !on(e.have) && !on(e.want) {
			continue
		}
		e.drift = e.drift || e.have != nil
		e.have, r.moved = nil, true
		switch {
		case e.want == nil:
			delete(r.entries, k)
		case k.Kind != KindNexthop:
			r.queue(e)
		}
	}
}

// linkHeader reads what matters of any device from a struct ifinfomsg with
// attributes. ok is false for messages that are not about the device itself.
func linkHeader(body []byte) (index int, d device, alias string, ok bool) {
	if len(body) < unix.SizeofIfInfomsg || body[0] == unix.AF_BRIDGE {
		return 0, device{}, "", false
	}
	index = int(int32(binary.NativeEndian.Uint32(body[4:])))
	d.up = usable(binary.NativeEndian.Uint32(body[8:]))
	rtnl.EachAttr(body[unix.SizeofIfInfomsg:], func(kind uint16, value []byte) {
		switch kind {
		case unix.IFLA_IFNAME:
			d.name = strings.TrimRight(string(value), "\x00")
		case unix.IFLA_IFALIAS:
			alias = strings.TrimRight(string(value), "\x00")
		}
	})
	return index, d, alias, d.name != ""
}

// usable tells of a device's flags whether it is up and has a carrier.
func usable(flags uint32) bool {
	return flags&unix.IFF_UP != 0 && flags&(unix.IFF_RUNNING|unix.IFF_LOWER_UP) != 0
}

// compare reads the kernel's tables and queues every difference from what is
// wanted.
func (r *Reconciler) compare() error {
	r.round++
	r.unknown, r.moved = false, true
	err := r.readAll()
	if err != nil {
		r.unknown = true
		if !errors.Is(err, errInterrupted) {
			return err
		}
		// What was read is true, and what was missed is only set again.
	}
	for k, e := range r.entries {
		if e.have != nil && e.round != r.round {
			before := e.have
			e.have = nil
			switch {
			case e.want == nil:
				delete(r.entries, k)
			case k.Kind != KindNexthop:
				r.drifted(e, before)
			}
		}
	}
	r.fights.Forget()
	return nil
}

// readAll observes everything in the kernel that could be ours.
func (r *Reconciler) readAll() error {
	interrupted := false
	dump := func(kind uint16, body []byte, each func(kind uint16, body []byte)) error {
		err := r.sock.dump(kind, body, each)
		if errors.Is(err, errInterrupted) {
			interrupted = true
			return nil
		}
		return err
	}
	observe := func(kind uint16, body []byte) { r.observe(decode(kind, body, r.devices.name), false) }

	// Devices come first, since all else refers to them by number. The mask
	// leaves out statistics (RTEXT_FILTER_SKIP_STATS, linux/rtnetlink.h).
	r.devices = newDevices()
	var own [][]byte
	err := dump(unix.RTM_GETLINK, appendAttr32(make([]byte, unix.SizeofIfInfomsg), unix.IFLA_EXT_MASK, 1<<3), func(kind uint16, body []byte) {
		index, d, alias, ok := linkHeader(body)
		if !ok {
			return
		}
		r.devices.put(index, d)
		if r.own(d.name) || alias == linkAlias || r.Devices != nil && r.Devices(d.name) {
			own = append(own, slices.Clone(body))
		}
	})
	if err != nil {
		return err
	}
	for _, body := range own {
		if l, err := netlink.LinkDeserialize(&unix.NlMsghdr{Type: unix.RTM_NEWLINK}, body); err == nil {
			r.observe(decoded{Object: r.readLink(l)}, false)
		}
	}
	if err := dump(unix.RTM_GETADDR, make([]byte, unix.SizeofIfAddrmsg), observe); err != nil {
		return err
	}
	r.nexthops = r.nexthopsKnown && nexthopsTold()
	if r.nexthopsKnown { // before the routes that go through them
		if err := dump(unix.RTM_GETNEXTHOP, make([]byte, unix.SizeofNhmsg), observe); err != nil {
			return err
		}
	}
	if r.xfrm != nil {
		if err := r.readPolicies(); err != nil {
			return err
		}
	}
	for _, fam := range []uint8{unix.AF_INET, unix.AF_INET6} {
		if err := dump(unix.RTM_GETROUTE, append([]byte{fam}, make([]byte, unix.SizeofRtMsg-1)...), observe); err != nil {
			return err
		}
	}
	for index, d := range r.devices.at {
		if !r.own(d.name) {
			continue
		}
		for _, fam := range []uint8{unix.AF_INET, unix.AF_INET6} {
			request := appendAttr32(ndmsg(fam, 0, 0, 0), unix.NDA_IFINDEX, uint32(index))
			if err := dump(unix.RTM_GETNEIGH, request, observe); err != nil {
				return err
			}
		}
		// Of FDB entries the kernel filters by device only when asked with
		// the older struct ifinfomsg (rtnl_fdb_dump, net/core/rtnetlink.c).
		request := make([]byte, unix.SizeofIfInfomsg)
		request[0] = unix.AF_BRIDGE
		binary.NativeEndian.PutUint32(request[4:], uint32(index))
		if err := dump(unix.RTM_GETNEIGH, request, observe); err != nil {
			return err
		}
	}
	if interrupted {
		return errInterrupted
	}
	return nil
}
