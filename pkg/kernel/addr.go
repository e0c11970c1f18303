package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/pkg/rtnl"
)

// An Addr is an address on one of our own devices.
type Addr struct {
	Dev    string
	Prefix netip.Prefix // the address itself, with its prefix length
}

func (a Addr) Key() Key       { return Key{Kind: KindAddr, Dev: a.Dev, Dst: keyPrefix(a.Prefix)} }
func (a Addr) device() string { return a.Dev }
func (a Addr) Undo() string {
	return fmt.Sprintf("ip addr del %s dev %s", a.Prefix, plain.Shell(a.Dev))
}
func (a Addr) String() string {
	s := fmt.Sprintf("ip addr replace %s dev %s", a.Prefix, plain.Shell(a.Dev))
	if a.Prefix.Addr().Is6() {
		s += " nodad" // no other host can have the address, and it must work at once
	}
	return s
}

// addrBody is a struct ifaddrmsg with attributes.
func addrBody(o Object, dev int, _ uint32, _ bool) []byte {
	prefix := o.(Addr).Prefix
	ip := prefix.Addr()
	flags := uint8(0)
	if ip.Is6() {
		flags = unix.IFA_F_NODAD
	}
	b := []byte{family(ip), uint8(prefix.Bits()), flags, unix.RT_SCOPE_UNIVERSE}
	b = binary.NativeEndian.AppendUint32(b, uint32(dev))
	b = appendAttr(b, unix.IFA_LOCAL, ip.AsSlice())
	return appendAttr(b, unix.IFA_ADDRESS, ip.AsSlice())
}

func decodeAddr(body []byte, devices devices) decoded {
	if len(body) < unix.SizeofIfAddrmsg {
		return decoded{}
	}
	d := decoded{dev: devices.name(int(binary.NativeEndian.Uint32(body[4:])))}
	var local, address netip.Addr
	rtnl.EachAttr(body[unix.SizeofIfAddrmsg:], func(kind uint16, value []byte) {
		switch kind {
		case unix.IFA_LOCAL:
			local, _ = netip.AddrFromSlice(value)
		case unix.IFA_ADDRESS:
			address, _ = netip.AddrFromSlice(value)
		}
	})
	if !local.IsValid() {
		local = address // IPv6 has IFA_LOCAL only on point-to-point links
	}
	if d.dev == "" || !local.IsValid() || local.IsLinkLocalUnicast() {
		return d // a link-local address is the kernel's own
	}
	d.Object = Addr{Dev: d.dev, Prefix: netip.PrefixFrom(local, int(body[1]))}
	return d
}

func dumpAddrs(*Reconciler) [][]byte { return [][]byte{make([]byte, unix.SizeofIfAddrmsg)} }

// addrNotified follows up on a notification of an address on a device that is in use.
func (r *Reconciler) addrNotified(_ decoded, gone bool) {
	if gone {
		// With the last IPv4 address of a device go all of its routes, without a notification.
		r.mustCompare = true
	} else {
		r.retryFailed() // routes that failed because there was no way to the gateway
	}
}

// enableIPv6 turns on IPv6 on one of our devices. New devices inherit net.ipv6.conf.default.disable_ipv6, which is 1 on
// hardened hosts, and the kernel then refuses addresses (EACCES; before Linux 4.16 EPERM).
func (r *Reconciler) enableIPv6(o Object, refused error) bool {
	a := o.(Addr)
	if !a.Prefix.Addr().Is6() || !errors.Is(refused, unix.EACCES) && !errors.Is(refused, unix.EPERM) || !r.ownsDevice(a.Dev) {
		return false
	}
	file := "/proc/sys/net/ipv6/conf/" + a.Dev + "/disable_ipv6"
	if text, err := os.ReadFile(file); err != nil || strings.TrimSpace(string(text)) == "0" {
		return false
	}
	if err := os.WriteFile(file, []byte("0\n"), 0); err != nil {
		r.log.Error(err, "Cannot turn on IPv6 on a device of flannel", "device", a.Dev)
		return false
	}
	r.log.Info("Applied", "command", "sysctl -w "+plain.Shell("net/ipv6/conf/"+a.Dev+"/disable_ipv6=0"),
		"reason", "IPv6 was disabled on the device")
	return true
}

// addrRemoved follows up on the removal of an address.
func (r *Reconciler) addrRemoved(o Object) {
	r.forgetObjectsOn(o.device()) // if it was the last address, routes went with it
}
