package kernel

import (
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// IPIP is the type of a device that puts IPv4 packets into IPv4 packets (RFC 2003). The gateways of the device's
// routes say where the packets go.
type IPIP struct {
	Local netip.Addr // outer source address
}

func (i IPIP) lower() string { return "" }

func (i IPIP) String() string { return "ipip local " + i.Local.String() + " nopmtudisc" }

// netlink returns the device as the netlink library takes it. The outer packet may be fragmented if the inner packet
// may (nopmtudisc).
func (i IPIP) netlink(attrs netlink.LinkAttrs) *netlink.Iptun {
	return &netlink.Iptun{LinkAttrs: attrs, Local: i.Local.AsSlice(), Proto: unix.IPPROTO_IPIP}
}

// readIPIP returns the type of a device that the kernel has, nil if the device has only one peer, or options that we
// would not set. The device of upstream flannel carries MPLS as well, which does no harm.
func readIPIP(t *netlink.Iptun) LinkType {
	remote, _ := netip.AddrFromSlice(t.Remote)
	local, ok := netip.AddrFromSlice(t.Local)
	if !ok || remote.IsValid() && !remote.IsUnspecified() || t.Link != 0 || t.FlowBased || t.EncapType != 0 {
		return nil
	}
	return IPIP{local.Unmap()}
}
