package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/vishvananda/netlink"
)

// maxPinged is the largest number of peers that are pinged.
const maxPinged = 64

// samplePeers returns at most maxPinged of the addresses, spread over all.
func samplePeers(ips []netip.Addr) []netip.Addr {
	if len(ips) <= maxPinged {
		return ips
	}
	var some []netip.Addr
	for i := range maxPinged {
		some = append(some, ips[i*len(ips)/maxPinged])
	}
	return some
}

// A reachability is the result for an address. err is nil if the address replies, or if there is no sign of a problem.
type reachability struct {
	ip  netip.Addr
	err error
}

// reach pings all addresses at once, and checks the kernel's route and neighbour for each address without a reply.
// Firewalls often drop pings: a missing reply alone counts only if other addresses reply.
func reach(ctx context.Context, ips []netip.Addr) []reachability {
	replied := ping(ctx, ips)
	all := make([]reachability, len(ips))
	for i, ip := range ips {
		all[i].ip = ip
		if replied[ip] {
			continue
		}
		if all[i].err = checkRoute(ip); all[i].err == nil && len(replied) > 0 {
			all[i].err = errSilent
		}
	}
	return all
}

// checkRoute returns an error if the kernel has no route to the address, or no neighbour for the next hop.
func checkRoute(ip netip.Addr) error {
	routes, err := netlink.RouteGet(ip.AsSlice())
	if err != nil || len(routes) == 0 {
		return fmt.Errorf("there is no route (%w)", errors.Join(err))
	}
	next := ip
	if gw, ok := netip.AddrFromSlice(routes[0].Gw); ok {
		next = gw.Unmap()
	}
	neighbours, err := netlink.NeighList(routes[0].LinkIndex, netlink.FAMILY_ALL)
	if err != nil {
		return nil
	}
	for _, n := range neighbours {
		at, _ := netip.AddrFromSlice(n.IP)
		if at.Unmap() == next && n.State&(netlink.NUD_FAILED|netlink.NUD_INCOMPLETE) != 0 {
			return fmt.Errorf("no host on the link replies for %s", next)
		}
	}
	return nil
}

const (
	pings    = 3 // each
	pingWait = time.Second
)

// ping sends echo requests (RFC 792, RFC 4443) and returns the addresses that reply.
func ping(ctx context.Context, ips []netip.Addr) map[netip.Addr]bool {
	replied := map[netip.Addr]bool{}
	replies := make(chan netip.Addr)
	ctx, cancel := context.WithTimeout(ctx, pings*pingWait)
	defer cancel()
	conns := map[bool]*net.IPConn{} // key: IPv4
	id := uint16(os.Getpid())
	for _, f := range []struct {
		four           bool
		network        string
		request, reply byte
	}{{true, "ip4:icmp", 8, 0}, {false, "ip6:ipv6-icmp", 128, 129}} {
		c, err := net.ListenIP(f.network, nil)
		if err != nil {
			continue // the host does not have the family, or the user is not root
		}
		defer c.Close()
		conns[f.four] = c
		go func() {
			buf := make([]byte, 1500)
			for {
				n, from, err := c.ReadFromIP(buf)
				if err != nil {
					return
				}
				if n < 8 || buf[0] != f.reply || binary.BigEndian.Uint16(buf[4:]) != id {
					continue
				}
				ip, _ := netip.AddrFromSlice(from.IP)
				select {
				case replies <- ip.Unmap():
				case <-ctx.Done():
					return
				}
			}
		}()
	}
	for round := range uint16(pings) {
		for _, ip := range ips {
			c := conns[ip.Is4()]
			if c == nil || replied[ip] {
				continue
			}
			_, _ = c.WriteTo(echo(ip.Is4(), id, round), &net.IPAddr{IP: ip.AsSlice()}) // on errors, there is no reply
		}
		wait := time.After(pingWait)
		for waiting := true; waiting; {
			if len(replied) == len(ips) {
				return replied
			}
			select {
			case ip := <-replies:
				replied[ip] = true
			case <-wait:
				waiting = false
			case <-ctx.Done():
				return replied
			}
		}
	}
	return replied
}

// echo returns an echo request. The kernel computes the checksum of ICMPv6.
func echo(four bool, id, seq uint16) []byte {
	b := make([]byte, 16)
	b[0] = 128
	if four {
		b[0] = 8
	}
	binary.BigEndian.PutUint16(b[4:], id)
	binary.BigEndian.PutUint16(b[6:], seq)
	if four {
		sum := uint32(0)
		for i := 0; i < len(b); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(b[i:]))
		}
		for sum > 0xffff {
			sum = sum>>16 + sum&0xffff
		}
		binary.BigEndian.PutUint16(b[2:], ^uint16(sum))
	}
	return b
}
