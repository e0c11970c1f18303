// Package bridge finds the bridges of containers, such as cni0 and docker0, in the calling thread's network namespace.
package bridge

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/pkg/rtnl"
)

// A Bridge is a bridge device.
type Bridge struct {
	Name  string
	Addrs []netip.Prefix // of global scope, as they are configured: 10.5.1.1/24
	Ports int            // devices that are attached, one for each container
	index int
}

// All returns all bridges.
func All() ([]Bridge, error) {
	links, err := rtnl.Dump(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("listing the bridges: %w", err)
	}
	addrs, err := rtnl.Dump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("listing the addresses of bridges: %w", err)
	}
	ports := map[int]int{}
	for _, l := range links {
		ports[l.Attrs().MasterIndex]++
	}
	var found []Bridge
	for _, l := range links {
		if l.Type() != "bridge" {
			continue
		}
		b := Bridge{Name: l.Attrs().Name, Ports: ports[l.Attrs().Index], index: l.Attrs().Index}
		for _, a := range addrs {
			ip, _ := netip.AddrFromSlice(a.IP)
			if bits, _ := a.Mask.Size(); a.LinkIndex == b.index && a.Scope == unix.RT_SCOPE_UNIVERSE {
				b.Addrs = append(b.Addrs, netip.PrefixFrom(ip.Unmap(), bits))
			}
		}
		found = append(found, b)
	}
	return found, nil
}

// Stale returns the addresses of the bridge that are left from another subnet of the node than its present ones: each
// IPv4 address outside of the subnets, since the bridge plugin puts up with no second one, and each IPv6 address that is
// in one of the networks, but outside of the subnets. An address of a family without a subnet is not stale.
func (b Bridge) Stale(networks, subnets []netip.Prefix) (stale []netip.Prefix) {
	in := func(all []netip.Prefix, ip netip.Addr) bool {
		return slices.ContainsFunc(all, func(p netip.Prefix) bool { return p.Contains(ip) })
	}
	for _, a := range b.Addrs {
		sameFamily := func(p netip.Prefix) bool { return p.Addr().Is4() == a.Addr().Is4() }
		if slices.ContainsFunc(subnets, sameFamily) && !in(subnets, a.Addr()) && (a.Addr().Is4() || in(networks, a.Addr())) {
			stale = append(stale, a)
		}
	}
	return stale
}

// Describe returns what is wrong with a bridge that has addresses of another subnet than this node's, which is now.
func (b Bridge) Describe(stale []netip.Prefix, now string) string {
	return fmt.Sprintf("the bridge %s has %s, and this node's subnet is %s: no other node reaches containers with such "+
		"addresses (containers on the bridge: %d)", b.Name, join(stale), now, b.Ports)
}

// Remedy returns the commands that let new containers start, and find those to restart.
func (b Bridge) Remedy(stale []netip.Prefix) (commands []string) {
	if strings.HasPrefix(b.Name, "docker") {
		return []string{"systemctl restart docker    # then restart the containers"}
	}
	for _, p := range stale {
		commands = append(commands, fmt.Sprintf("ip address del %s dev %s    # new pods can start then", p, plain.Shell(b.Name)))
	}
	if b.Ports > 0 {
		commands = append(commands, "kubectl get pods -A -o wide --field-selector spec.nodeName=$(hostname)    "+
			"# delete those with addresses of "+join(stale))
	}
	return commands
}

func join(prefixes []netip.Prefix) string {
	var texts []string
	for _, p := range prefixes {
		texts = append(texts, p.String())
	}
	return strings.Join(texts, " and ")
}

// RemoveAddr removes an address from the bridge. It is no error if the address is gone already.
func (b Bridge) RemoveAddr(p netip.Prefix) error {
	link := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Index: b.index}}
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
	if err := netlink.AddrDel(link, addr); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
		return fmt.Errorf("ip address del %s dev %s: %w", p, b.Name, err)
	}
	return nil
}
