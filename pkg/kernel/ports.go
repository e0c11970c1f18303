package kernel

import (
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// A PortUser is a device of the kernel that receives at a UDP port. The kernel's
// sockets belong to no process, so that nothing in /proc names the device.
type PortUser struct {
	Device string
	Type   string // "vxlan" or "wireguard"
	Port   int
	VNI    int // of a vxlan device; -1: any
}

// PortUsers returns the devices of the calling thread's network namespace that
// receive at a UDP port.
func PortUsers() ([]PortUser, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("listing devices: %w", err)
	}
	var users []PortUser
	guards := false
	for _, l := range links {
		if v, ok := l.(*netlink.Vxlan); ok {
			vni := v.VxlanId
			if v.FlowBased {
				vni = -1
			}
			users = append(users, PortUser{v.Name, v.Type(), v.Port, vni})
		}
		guards = guards || l.Type() == "wireguard"
	}
	if !guards { // asking would have the kernel load the module
		return users, nil
	}
	c, err := wgctrl.New()
	if err != nil {
		return users, fmt.Errorf("wireguard: %w", err)
	}
	defer c.Close()
	all, err := c.Devices()
	if err != nil {
		return users, fmt.Errorf("wireguard: %w", err)
	}
	for _, d := range all {
		if d.Type == wgtypes.LinuxKernel {
			users = append(users, PortUser{d.Name, "wireguard", d.ListenPort, 0})
		}
	}
	return users, nil
}
