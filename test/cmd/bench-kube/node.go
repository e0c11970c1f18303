package main

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"

	"github.com/flanneld/flanneld/test/kubelet"
	"github.com/flanneld/flanneld/test/lab"
)

// maxPeers have addresses below.
const maxPeers = 1<<15 - 1

// peer is one that nobody runs.
func peer(i int) kubelet.Node {
	b := binary.BigEndian.AppendUint16(nil, uint16(i))
	ip := netip.AddrFrom4([4]byte{198, 18, 128 + b[0], b[1]})
	return kubelet.Node{
		Name:   fmt.Sprintf("ip-198-18-%d-%d.eu-central-1.compute.internal", 128+b[0], b[1]),
		IP:     ip,
		Subnet: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 64 + b[0], b[1], 0}), 24),
		MAC:    net.HardwareAddr{0x0e, 0x5a, 0, 0, b[0], b[1]},
	}
}

func peers(from, to int) []kubelet.Node {
	var all []kubelet.Node
	for i := from; i < to; i++ {
		all = append(all, peer(i))
	}
	return all
}

// ownNode is the one that the daemon runs on.
func ownNode(n *lab.Node) kubelet.Node {
	return kubelet.Node{Name: n.Hostname, IP: n.IPv4, Subnet: netip.MustParsePrefix("10.1.0.0/24")}
}
