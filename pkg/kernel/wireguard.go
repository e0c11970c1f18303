package kernel

import "github.com/vishvananda/netlink"

// WireGuard is the type of a device of the kernel's WireGuard. The reconciler does not set its keys and peers:
// rtnetlink knows nothing of them.
type WireGuard struct{}

func (WireGuard) lower() string { return "" }

func (WireGuard) String() string { return "wireguard" }

// HasWireGuard tells whether the kernel can make such devices. The question makes the kernel load the module, if
// there is one.
func HasWireGuard() bool {
	_, err := netlink.GenlFamilyGet("wireguard")
	return err == nil
}
