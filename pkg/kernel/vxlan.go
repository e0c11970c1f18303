package kernel

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"

	"github.com/flanneld/flanneld/pkg/plain"
)

// VXLAN is the type of a VTEP (RFC 7348).
type VXLAN struct {
	VNI      int
	Port     int        // UDP, of the peers as well as our own
	Local    netip.Addr // outer source address
	Dev      string     // the uplink
	Learning bool       // learn peers' MACs from what they send
	GBP      bool       // group based policy extension
}

func (v VXLAN) lower() string { return v.Dev }

func (v VXLAN) String() string {
	s := fmt.Sprintf("vxlan id %d local %s dev %s dstport %d", v.VNI, v.Local, plain.Shell(v.Dev), v.Port)
	if !v.Learning {
		s += " nolearning"
	}
	if v.GBP {
		s += " gbp"
	}
	return s
}

// readVXLAN returns the type of a VTEP that the kernel has, nil if it has options that we would not set.
func readVXLAN(v *netlink.Vxlan, devices devices) LinkType {
	if v.Group != nil || v.L2miss || v.L3miss || v.Proxy || v.RSC || v.FlowBased {
		return nil
	}
	local, _ := netip.AddrFromSlice(v.SrcAddr)
	return VXLAN{
		VNI: v.VxlanId, Port: v.Port, Local: local.Unmap(), Dev: devices.name(v.VtepDevIndex),
		Learning: v.Learning, GBP: v.GBP,
	}
}
