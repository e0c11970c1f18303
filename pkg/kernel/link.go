package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"net"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/pkg/rtnl"
)

// A Link is a device that is ours: the reconciler creates it, replaces one of another type, and sets it up.
type Link struct {
	Name string
	MAC  MAC // zero: any
	MTU  int // in bytes
	Type LinkType

	// TXChecksumOff makes the kernel compute the checksums of what it sends, instead of the hardware. False leaves
	// the setting as it is.
	TXChecksumOff bool

	down bool // read from the kernel: the device is there, but not up
}

// A LinkType is what makes a device the sort of device it is. It cannot be changed once the device exists: VXLAN,
// TUN, IPIP or WireGuard.
type LinkType interface {
	String() string // as it follows "type" in "ip link add"
	lower() string  // the device that it sits on, "" if none
}

func (l Link) Key() Key       { return Key{Kind: KindLink, Dev: l.Name} }
func (l Link) device() string { return l.Name }
func (l Link) Undo() string   { return "ip link del " + plain.Shell(l.Name) }
func (l Link) String() string {
	var b strings.Builder
	name := plain.Shell(l.Name)
	if _, ok := l.Type.(TUN); ok {
		fmt.Fprintf(&b, "ip tuntap add %s mode %v && ip link set %s mtu %d", name, l.Type, name, l.MTU)
		if !l.down {
			b.WriteString(" up")
		}
		return b.String()
	}
	fmt.Fprintf(&b, "ip link add %s", name)
	if l.MAC != (MAC{}) {
		fmt.Fprintf(&b, " address %s", l.MAC)
	}
	fmt.Fprintf(&b, " mtu %d", l.MTU)
	if !l.down {
		b.WriteString(" up")
	}
	fmt.Fprintf(&b, " type %v", l.Type)
	if l.TXChecksumOff {
		fmt.Fprintf(&b, " && ethtool -K %s tx-checksum-ip-generic off", name)
	}
	return b.String()
}

// describe names a device that is not as desired.
func (l Link) describe() string {
	switch {
	case l.Type == nil:
		return "a device of another type"
	case l.down:
		return l.String() + " down"
	}
	return l.String()
}

// lowerDevice returns the name of the device that a link sits on, "" if none.
func lowerDevice(o Object) string { return o.(Link).Type.lower() }

// changeCommand returns the commands that make a device the desired one.
func changeCommand(have, desired Object) string {
	h, exists := have.(Link)
	want := desired.(Link)
	switch {
	case !exists:
		return want.String()
	case h.Type != want.Type:
		return want.Undo() + " && " + want.String()
	}
	command := "ip link set " + plain.Shell(want.Name)
	if want.MAC != h.MAC {
		command += fmt.Sprintf(" address %s", want.MAC)
	}
	if want.MTU != h.MTU {
		command += fmt.Sprintf(" mtu %d", want.MTU)
	}
	return command + " up"
}

// linkAlias marks the devices that we made (IFLA_IFALIAS, shown by "ip link"), together with the name of the network.
// After a restart it tells that a device which is no longer desired is ours.
const linkAlias = "flanneld"

// alias returns the alias of our devices. The kernel allows 255 bytes (IFALIASZ, linux/if.h), as do names of files.
func (r *Reconciler) alias() string {
	if r.Network == "" {
		return linkAlias
	}
	return (linkAlias + " " + r.Network)[:min(len(linkAlias)+1+len(r.Network), 255)]
}

// devices are all links of the namespace, ours and others.
type devices struct {
	at     map[int]device // by index
	number map[string]int // by name
}

type device struct {
	name    string
	enabled bool // set up by the program that manages the device
	up      bool // and has a carrier
	bridge  bool
}

func newDevices() devices { return devices{map[int]device{}, map[string]int{}} }

func (d devices) name(index int) string { return d.at[index].name }

func (d devices) put(index int, dev device) {
	d.delete(index)
	d.at[index], d.number[dev.name] = dev, index
}

func (d devices) delete(index int) {
	if name := d.at[index].name; d.number[name] == index {
		delete(d.number, name)
	}
	delete(d.at, index)
}

// ownDevices returns the indexes of the devices that we are to hold.
func (r *Reconciler) ownDevices() iter.Seq[int] {
	return func(yield func(int) bool) {
		for index, d := range r.devices.at {
			if r.ownsDevice(d.name) && !yield(index) {
				return
			}
		}
	}
}

// ownsDevice tells whether a device is one that we are to hold.
func (r *Reconciler) ownsDevice(dev string) bool {
	e := r.entries.Get(Key{Kind: KindLink, Dev: dev})
	return e != nil && e.want != nil
}

// ownsLink tells whether a link is ours. readLinks and linkNotified observe no others.
func (r *Reconciler) ownsLink(Object) bool { return true }

// applyLink creates, changes or removes one device.
func (r *Reconciler) applyLink(e *entry) error {
	name := e.key().Dev
	err := r.changeLink(e, name)
	if err == nil {
		return nil
	}
	at, missing := r.links.LinkByName(name)
	switch {
	case missing == nil: // it may be half done
		e.have = r.readLink(at)
	case e.want != nil:
		e.have = nil
	case isNoDevice(missing): // another program was faster
		return nil
	}
	return err
}

func (r *Reconciler) changeLink(e *entry, name string) error {
	want, wanted := e.want.(Link)
	have, exists := e.have.(Link)
	if exists && (!wanted || have.Type != want.Type) {
		at, err := r.links.LinkByName(name)
		if err == nil {
			err = r.links.LinkDel(at)
		}
		if err != nil && !isNoDevice(err) {
			return err
		}
		r.devices.delete(r.devices.number[name])
		r.forgetObjectsOn(name)
		exists = false
	}
	if !wanted {
		return nil
	}
	if !exists {
		if err := r.addLink(want); err != nil {
			return err
		}
	}
	at, err := r.links.LinkByName(name)
	if err != nil {
		return err
	}
	attrs := at.Attrs()
	if want.MAC != (MAC{}) && string(attrs.HardwareAddr) != string(want.MAC[:]) {
		if err := r.links.LinkSetHardwareAddr(at, want.MAC[:]); err != nil {
			return fmt.Errorf("setting its address: %w", err)
		}
	}
	if attrs.MTU != want.MTU {
		if err := r.links.LinkSetMTU(at, want.MTU); err != nil {
			return fmt.Errorf("setting its MTU: %w", err)
		}
	}
	if want.TXChecksumOff || exists && have.TXChecksumOff {
		if err := r.sock.setTXChecksumOff(name, want.TXChecksumOff); err != nil {
			return err
		}
	}
	if attrs.Alias != r.alias() {
		if err := r.links.LinkSetAlias(at, r.alias()); err != nil {
			return fmt.Errorf("setting its alias: %w", err)
		}
	}
	if err := r.links.LinkSetUp(at); err != nil {
		return fmt.Errorf("setting it up: %w", err)
	}
	r.devices.put(attrs.Index, device{name: name, enabled: true, up: true})
	// A new MAC flushes the neighbours, going down flushes routes and IPv6 addresses: all objects on the device are
	// set again, to be sure.
	r.forgetObjectsOn(name)
	return nil
}

func isNoDevice(err error) bool {
	var notFound netlink.LinkNotFoundError
	return errors.Is(err, unix.ENODEV) || errors.As(err, &notFound)
}

func (r *Reconciler) addLink(l Link) error {
	if _, ok := l.Type.(TUN); ok {
		return addTUN(l.Name)
	}
	link, err := r.netlink(l)
	if err != nil {
		return err
	}
	err = r.links.LinkAdd(link)
	if errors.Is(err, unix.EOPNOTSUPP) {
		module, _, _ := strings.Cut(l.Type.String(), " ")
		err = fmt.Errorf("%w: this kernel has no module %s loaded: run modprobe %s", err, module, module)
	}
	return err
}

// netlink returns the link as the netlink library takes it.
func (r *Reconciler) netlink(l Link) (netlink.Link, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = l.Name, l.MTU
	if l.MAC != (MAC{}) {
		attrs.HardwareAddr = net.HardwareAddr(l.MAC[:])
	}
	lower := 0
	if name := l.Type.lower(); name != "" {
		var ok bool
		if lower, ok = r.devices.number[name]; !ok {
			return nil, fmt.Errorf("there is no device %s", name)
		}
	}
	switch t := l.Type.(type) {
	case VXLAN:
		return &netlink.Vxlan{
			LinkAttrs: attrs, VxlanId: t.VNI, VtepDevIndex: lower, SrcAddr: t.Local.AsSlice(),
			Port: t.Port, Learning: t.Learning, GBP: t.GBP,
		}, nil
	case WireGuard:
		return &netlink.Wireguard{LinkAttrs: attrs}, nil
	case IPIP:
		return t.netlink(attrs), nil
	}
	return nil, fmt.Errorf("no link of type %T can be made", l.Type)
}

// readLink returns a device as the kernel has it. Type is nil for a type that we would never make, MAC is zero where
// any will do, TXChecksumOff is read only where it is desired, or was.
func (r *Reconciler) readLink(l netlink.Link) Link {
	attrs := l.Attrs()
	have := Link{Name: attrs.Name, MTU: attrs.MTU, down: attrs.Flags&net.FlagUp == 0}
	copy(have.MAC[:], attrs.HardwareAddr)
	if e := r.entries.Get(have.Key()); e != nil {
		want, _ := e.want.(Link)
		if want.MAC == (MAC{}) {
			have.MAC = MAC{}
		}
		before, _ := e.have.(Link)
		have.TXChecksumOff = (want.TXChecksumOff || before.TXChecksumOff) && r.sock.txChecksumOff(have.Name)
	}
	switch l := l.(type) {
	case *netlink.Vxlan:
		have.Type = readVXLAN(l, r.devices)
	case *netlink.Tuntap:
		if isTUN(l) {
			have.Type = TUN{}
		}
	case *netlink.Wireguard:
		have.Type = WireGuard{}
	case *netlink.Iptun:
		have.Type = readIPIP(l)
	}
	return have
}

// readLinks reads all devices of the namespace, and observes ours.
func (r *Reconciler) readLinks() error {
	// The mask leaves out statistics (RTEXT_FILTER_SKIP_STATS, linux/rtnetlink.h).
	request := appendAttr32(make([]byte, unix.SizeofIfInfomsg), unix.IFLA_EXT_MASK, 1<<3)
	r.devices = newDevices()
	var own [][]byte
	err := r.sock.dump(unix.RTM_GETLINK, request, func(_ uint16, body []byte) {
		index, d, alias, ok := linkHeader(body)
		if !ok {
			return
		}
		r.devices.put(index, d)
		if r.ownsDevice(d.name) || alias == r.alias() || r.Devices != nil && r.Devices(d.name) {
			own = append(own, slices.Clone(body))
		}
	})
	if err != nil && !errors.Is(err, errInterrupted) {
		return err
	}
	for _, body := range own {
		if l, err := netlink.LinkDeserialize(&unix.NlMsghdr{Type: unix.RTM_NEWLINK}, body); err == nil {
			r.observe(decoded{Object: r.readLink(l)}, false)
		}
	}
	return err
}

// linkNotified handles the notification of a device that was added, changed or removed.
func (r *Reconciler) linkNotified(gone bool, body []byte) {
	index, now, _, ok := linkHeader(body)
	if !ok {
		return
	}
	if gone {
		now = device{}
	}
	var own Object
	if r.ownsDevice(now.name) {
		// The device was down while we made or changed it: what counts is its present state, not the one at the time
		// of the notification.
		l, err := r.links.LinkByIndex(index)
		if err != nil {
			return // a later notification says that the device is gone
		}
		own = r.readLink(l)
		now.enabled, now.up = l.Attrs().RawFlags&unix.IFF_UP != 0, usable(l.Attrs().RawFlags)
	}
	before := r.devices.at[index]
	if now.name == "" {
		r.devices.delete(index)
	} else {
		r.devices.put(index, now)
	}
	if before.name != now.name || before.enabled && !now.enabled {
		r.foreignMayBeGone(before.name)
	}
	if before.name != now.name && r.uses[before.name] > 0 {
		r.observe(decoded{Object: Link{Name: before.name}}, true)
		r.forgetObjectsOn(before.name)
	}
	if r.uses[now.name] == 0 {
		return
	}
	if own != nil {
		r.observe(decoded{Object: own}, false)
	}
	if !now.up && before.up {
		// IPv4 routes go with a device that goes down, routes through nexthops also with its carrier, and there is no
		// notification of them.
		r.forgetObjectsOn(now.name)
	}
	if now != before {
		r.retryFailed() // what failed because of the device
	}
}

// linkHeader reads what matters of any device from a struct ifinfomsg with attributes. ok is false for messages that
// are not about the device itself.
func linkHeader(body []byte) (index int, d device, alias string, ok bool) {
	if len(body) < unix.SizeofIfInfomsg || body[0] == unix.AF_BRIDGE {
		return 0, device{}, "", false
	}
	index = int(int32(binary.NativeEndian.Uint32(body[4:])))
	flags := binary.NativeEndian.Uint32(body[8:])
	d.enabled, d.up = flags&unix.IFF_UP != 0, usable(flags)
	rtnl.EachAttr(body[unix.SizeofIfInfomsg:], func(kind uint16, value []byte) {
		switch kind {
		case unix.IFLA_IFNAME:
			d.name = strings.TrimRight(string(value), "\x00")
		case unix.IFLA_IFALIAS:
			alias = strings.TrimRight(string(value), "\x00")
		case unix.IFLA_LINKINFO:
			rtnl.EachAttr(value, func(kind uint16, value []byte) {
				if kind == unix.IFLA_INFO_KIND {
					d.bridge = strings.TrimRight(string(value), "\x00") == "bridge"
				}
			})
		}
	})
	return index, d, alias, d.name != ""
}

// usable tells from a device's flags whether the device is up and has a carrier.
func usable(flags uint32) bool {
	return flags&unix.IFF_UP != 0 && flags&(unix.IFF_RUNNING|unix.IFF_LOWER_UP) != 0
}
