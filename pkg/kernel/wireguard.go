package kernel

import "github.com/vishvananda/netlink"

// WireGuard is the type of a device of the kernel's WireGuard. Its keys and
// peers are not the reconciler's: rtnetlink knows nothing of them.
type WireGuard struct{}

func (WireGuard) lower() string { return "" }

func (WireGuard) String() string { return "wireguard" }

// HasWireGuard tells whether the kernel can make such devices. To ask has it load
// the module, if there is one.
func HasWireGuard() bool {
	_, err := netlink.GenlFamilyGet("wireguard")
	return err == nil
}
