package kernel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// linkAlias marks the devices that we made (IFLA_IFALIAS, shown by "ip link"),
// so that one which is no longer wanted is known for ours after a restart.
const linkAlias = "flanneld"

// devices are the links of the namespace, ours and others'.
type devices struct {
	at     map[int]device // by number
	number map[string]int // by name
}

type device struct {
	name string
	up   bool // and has a carrier
}

func newDevices() devices { return devices{map[int]device{}, map[string]int{}} }

func (d devices) name(number int) string { return d.at[number].name }

func (d devices) put(number int, dev device) {
	d.delete(number)
	d.at[number], d.number[dev.name] = dev, number
}

func (d devices) delete(number int) {
	if name := d.at[number].name; d.number[name] == number {
		delete(d.number, name)
	}
	delete(d.at, number)
}

// link brings one device about, changes or removes it.
func (r *Reconciler) link(e *entry) error {
	name := e.key().Dev
	err := r.changeLink(e, name)
	if err != nil { // it may be half done
		e.have = nil
		if at, err := r.links.LinkByName(name); err == nil {
			e.have = r.readLink(at)
		}
	}
	return err
}

func (r *Reconciler) changeLink(e *entry, name string) error {
	want, wanted := e.want.(Link)
	have, exists := e.have.(Link)
	if exists && (!wanted || have.Type != want.Type) {
		err := r.links.LinkDel(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Name: name}})
		if err != nil && !isNoDevice(err) {
			return err
		}
		r.devices.delete(r.devices.number[name])
		r.lost(name)
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
	if attrs.Alias != linkAlias {
		if err := r.links.LinkSetAlias(at, linkAlias); err != nil {
			return fmt.Errorf("setting its alias: %w", err)
		}
	}
	if err := r.links.LinkSetUp(at); err != nil {
		return fmt.Errorf("setting it up: %w", err)
	}
	r.devices.put(attrs.Index, device{name, true})
	// A new MAC flushes the neighbours, going down flushes routes and IPv6
	// addresses: what is on the device is put there again, to be sure.
	r.lost(name)
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

// readLink returns a device as the kernel has it. Type is nil for one of a type
// that we would never make, MAC zero where any will do, TXChecksumOff looked at
// only where it is wanted, or was.
func (r *Reconciler) readLink(l netlink.Link) Link {
	attrs := l.Attrs()
	have := Link{Name: attrs.Name, MTU: attrs.MTU, down: attrs.Flags&net.FlagUp == 0}
	copy(have.MAC[:], attrs.HardwareAddr)
	if e := r.entries[have.Key()]; e != nil {
		want, _ := e.want.(Link)
		if want.MAC == (MAC{}) {
			have.MAC = MAC{}
		}
		before, _ := e.have.(Link)
		have.TXChecksumOff = (want.TXChecksumOff || before.TXChecksumOff) && r.sock.txChecksumOff(have.Name)
	}
	if v, ok := l.(*netlink.Vxlan); ok && v.Group == nil && !v.L2miss && !v.L3miss && !v.Proxy && !v.RSC && !v.FlowBased {
		local, _ := netip.AddrFromSlice(v.SrcAddr)
		have.Type = VXLAN{
			VNI: v.VxlanId, Port: v.Port, Local: local.Unmap(), Dev: r.devices.name(v.VtepDevIndex),
			Learning: v.Learning, GBP: v.GBP,
		}
	}
	if t, ok := l.(*netlink.Tuntap); ok && isTUN(t) {
		have.Type = TUN{}
	}
	if _, ok := l.(*netlink.Wireguard); ok {
		have.Type = WireGuard{}
	}
	if t, ok := l.(*netlink.Iptun); ok {
		have.Type = readIPIP(t)
	}
	return have
}
