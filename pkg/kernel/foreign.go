package kernel

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/plain"
)

// foreign is a route that the kernel or another program made. It may have the key of a route of ours.
type foreign struct {
	Route
	protocol  uint8
	kind      uint8      // RTN_UNREACHABLE, RTN_PROHIBIT or RTN_THROW; 0: the Route says what the route does
	connected bool       // the destination is on the link of Dev: there is no gateway
	src       netip.Addr // source of what is sent from this host
}

func (f foreign) Undo() string   { return f.command("del", f.protocol) }
func (f foreign) String() string { return f.command("replace", f.protocol) }

// routeKinds are the names of the kinds of foreign.
var routeKinds = map[uint8]string{
	unix.RTN_UNREACHABLE: "unreachable", unix.RTN_PROHIBIT: "prohibit", unix.RTN_THROW: "throw",
}

// protocols are the names of the usual route protocols (/etc/iproute2/rt_protos).
var protocols = map[uint8]string{
	unix.RTPROT_KERNEL: "kernel", unix.RTPROT_BOOT: "boot", unix.RTPROT_STATIC: "static", unix.RTPROT_RA: "ra",
	unix.RTPROT_DHCP: "dhcp", unix.RTPROT_BIRD: "bird",
}

// show returns the route as ip route shows it: "10.5.3.0/24 via 198.18.0.9 dev eth0 proto static".
func (f foreign) show() string {
	var b strings.Builder
	switch {
	case f.kind != 0:
		b.WriteString(routeKinds[f.kind] + " ")
	case f.Blackhole:
		b.WriteString("blackhole ")
	}
	b.WriteString(f.Dst.String())
	if f.Via.IsValid() {
		fmt.Fprintf(&b, " via %s", f.Via)
	}
	if f.Dev != "" {
		fmt.Fprintf(&b, " dev %s", plain.Shell(f.Dev))
	}
	name, ok := protocols[f.protocol]
	if !ok {
		name = fmt.Sprint(f.protocol)
	}
	fmt.Fprintf(&b, " proto %s", name)
	if f.Metric != 0 {
		fmt.Fprintf(&b, " metric %d", f.Metric)
	}
	return b.String()
}

// A ForeignRoute is a route of the main table that the kernel or another program made: inside an overlay, or a default
// route whose gateway is inside an overlay.
type ForeignRoute struct {
	Dst netip.Prefix
	Via netip.Addr // zero: none
	Dev string     // "": none

	Kernel    bool // the kernel made the route, for an address of Dev
	Connected bool // Dst is on the link of Dev; otherwise the route leads through a gateway, or nowhere
	Beside    bool // a route of ours to Dst can stand beside it: it has another metric, and is IPv4
	Bridge    bool // Dev is a bridge, and has the first address of Dst, as far as the route shows: so does the pods' bridge

	Text string // as ip route shows the route
}

// SetOverlays sets the networks whose foreign routes Foreign returns.
func (r *Reconciler) SetOverlays(overlays []netip.Prefix) {
	if !slices.Equal(r.overlays, overlays) {
		r.overlays, r.mustCompare = slices.Clone(overlays), true
	}
}

// Foreign takes the notifications that have come, and returns the routes of others that ours must not displace or hide,
// sorted. These are, inside the overlays (but not equal to one, or wider),
//
//   - connected routes: all that the kernel made, and those that other programs made for more than one address;
//   - other routes, if they were there before a route of ours with the same destination;
//
// and default routes whose gateway is inside. A route that another program puts in the place of ours later is not among
// them: it is removed, and ours restored. The kernel's own routes always are.
func (r *Reconciler) Foreign() []ForeignRoute {
	pending := r.pending()
	r.receive()
	if r.mustCompare {
		if err := r.compare(); err != nil {
			r.log.V(1).Info("Cannot read the routes of other programs; trying again", "err", err)
		}
	}
	// What was heard or read is left to Reconcile. Where the tables cannot be read, Reconcile has a pause.
	if !pending && r.pending() || len(r.dirty) > 0 && !r.mustCompare {
		r.signal()
	}
	var all []ForeignRoute
	for f := range r.foreign {
		if !r.ownsRoute(f) && !r.ownsDevice(f.Dev) && r.precedes(f) {
			d := r.devices.at[r.devices.number[f.Dev]]
			all = append(all, ForeignRoute{
				Dst: f.Dst, Via: f.Via, Dev: f.Dev,
				Kernel:    f.protocol == unix.RTPROT_KERNEL,
				Connected: f.connected && (f.protocol == unix.RTPROT_KERNEL || !f.Dst.IsSingleIP()),
				Beside:    f.Metric != 0 && f.Dst.Addr().Is4(),                            // IPv6 refuses a gateway inside Dst
				Bridge:    d.bridge && (!f.src.IsValid() || f.src == f.Dst.Addr().Next()), // IPv6 does not name it
				Text:      f.show(),
			})
		}
	}
	slices.SortFunc(all, func(a, b ForeignRoute) int {
		if c := a.Dst.Compare(b.Dst); c != 0 {
			return c
		}
		return strings.Compare(a.Text, b.Text)
	})
	return all
}

// precedes tells whether a foreign route has precedence over ours: see Foreign.
func (r *Reconciler) precedes(f foreign) bool {
	held := func(k Key) bool { e := r.entries.Get(k); return e != nil && e.held }
	switch {
	case f.protocol == unix.RTPROT_KERNEL:
		return true
	case f.connected && !f.Dst.IsSingleIP():
		// With another metric, it would be hidden, but not displaced.
		return !held(Route{Dst: f.Dst, Metric: f.Metric, Table: r.Table}.Key())
	}
	return !held(Route{Dst: f.Dst, Table: r.Table}.Key())
}

// blockedRoute returns why a route is not to be set: a route of the kernel has its key, or a route of another program
// had it first.
func (r *Reconciler) blockedRoute(e *entry) error {
	f, ok := e.have.(foreign)
	if !ok || r.ownsRoute(f) || r.ownsDevice(f.Dev) || f.protocol != unix.RTPROT_KERNEL && e.held {
		return nil
	}
	return fmt.Errorf("the route %s is not ours, and stays in its place", f.show())
}

// noteForeign takes note of a foreign route that the kernel holds, or does not hold any more.
func (r *Reconciler) noteForeign(d decoded, gone bool) {
	if d.replaced {
		k := d.Key()
		maps.DeleteFunc(r.foreign, func(f foreign, _ struct{}) bool { return f.Key() == k })
	}
	f, ok := d.Object.(foreign)
	switch {
	case !ok:
	case gone:
		delete(r.foreign, f)
	case r.concernsOverlays(f):
		r.foreign[f] = struct{}{}
	}
}

// concernsOverlays tells whether a route leads into a part of an overlay, or is a default route through an address in
// an overlay.
func (r *Reconciler) concernsOverlays(f foreign) bool {
	return f.Table == 0 && slices.ContainsFunc(r.overlays, func(o netip.Prefix) bool {
		return o.Bits() < f.Dst.Bits() && o.Contains(f.Dst.Addr()) || f.Dst.Bits() == 0 && o.Contains(f.Via)
	})
}

// compareForeign is called with the foreign routes before a comparison, which has found the present ones.
func (r *Reconciler) compareForeign(before map[foreign]struct{}, err error) {
	if err != nil {
		maps.Copy(r.foreign, before) // some may not have been read
	}
	if !maps.Equal(r.foreign, before) {
		r.signal()
	}
}

// foreignMayBeGone is called when a device, or its last address, may have gone: routes go with them without a
// notification.
func (r *Reconciler) foreignMayBeGone(dev string) {
	for f := range r.foreign {
		if f.Dev == dev {
			r.mustCompare = true
			return
		}
	}
}

// beside tells whether a notification (or a dump) is about a route that does not count: IPv4 can have several routes
// with one key, of which the first counts. A route of ours that is to be removed counts wherever it is.
func (r *Reconciler) beside(e *entry, d decoded, gone bool) bool {
	_, theirs := d.Object.(foreign)
	if e.have == nil {
		return false
	}
	_, hadTheirs := e.have.(foreign)
	switch {
	case gone:
		return theirs != hadTheirs
	case !theirs:
		return d.behind && hadTheirs && e.want != nil
	}
	return !hadTheirs && (d.behind || e.want == nil && !r.ownsRoute(d.Object))
}
