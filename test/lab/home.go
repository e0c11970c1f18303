package lab

import (
	"context"
	"fmt"
	"net/netip"
)

// homePorts are the ports outside of UDP of a home network's router: the second range, once all mappings are new.
var homePorts = [2]string{"20000-29999", "30000-39999"}

// homeRouter returns the router of a home network: wan on the underlay's bridge, lan with the nodes. It translates
// addresses, and gives UDP another port. The first node of the network brings it.
func (l *Lab) homeRouter(ctx context.Context, number int) (*Namespace, error) {
	port := fmt.Sprintf("home%d", number)
	if ns := l.owned(l.Name + "-" + port); ns != nil {
		return ns, nil
	}
	ns, err := l.namespace(ctx, port, nil)
	if err != nil {
		return nil, err
	}
	if err := ns.sysctl("net.ipv4.ip_forward=1"); err != nil {
		return nil, err
	}
	err = l.net.Script(ctx,
		fmt.Sprintf("link add %s type veth peer name wan netns %s", port, ns.Name),
		"link set "+port+" master br0",
		"link set "+port+" up")
	if err != nil {
		return nil, err
	}
	err = ns.Script(ctx,
		"link add lan type bridge mcast_snooping 0",
		"link set lan up",
		fmt.Sprintf("addr add %s/24 dev lan", homeGateway(number)),
		fmt.Sprintf("addr add %s/24 dev wan", HomeAddress(number)),
		"link set wan up",
		"route add default via "+Gateway.String())
	if err != nil {
		return nil, err
	}
	if err := mapPorts(ctx, ns, homePorts[0]); err != nil {
		return nil, err
	}
	return ns, ns.WaitPing(ctx, Gateway)
}

// mapPorts sets the ports outside of UDP that new mappings get.
func mapPorts(ctx context.Context, router *Namespace, ports string) error {
	_, err := router.run(ctx, fmt.Sprintf(`
		table ip home
		delete table ip home
		table ip home {
			chain post {
				type nat hook postrouting priority srcnat
				oifname wan meta l4proto udp masquerade to :%s
				oifname wan masquerade
			}
		}`, ports), "nft", "-f", "-")
	return err
}

// HomeAddress returns the address of a home network outside, which its router has.
func HomeAddress(number int) netip.Addr {
	return netip.AddrFrom4([4]byte{198, 18, 0, byte(200 + number)})
}

func homeGateway(number int) netip.Addr {
	return netip.AddrFrom4([4]byte{192, 168, byte(number), 254})
}

// RestartRouter restarts the router of a home network: it forgets all mappings, and new ones get other ports.
func (l *Lab) RestartRouter(ctx context.Context, number int) error {
	router, err := l.homeRouter(ctx, number)
	if err != nil {
		return err
	}
	if err := mapPorts(ctx, router, homePorts[1]); err != nil {
		return err
	}
	// The kernel forgets what was masqueraded on a device that goes down.
	err = router.Script(ctx, "link set wan down", "link set wan up", "route add default via "+Gateway.String())
	if err != nil {
		return err
	}
	return router.WaitPing(ctx, Gateway) // the device drops packets at first
}

// ForwardPort has the router of a node's home network forward a UDP port to the node.
func (n *Node) ForwardPort(ctx context.Context, port int) error {
	_, err := n.far.run(ctx, fmt.Sprintf(`
		table ip forward {
			chain pre {
				type nat hook prerouting priority dstnat
				iifname wan udp dport %d dnat to %s
			}
		}`, port, n.IPv4), "nft", "-f", "-")
	return err
}
