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

// samples is how many peers are pinged at most.
const samples = 64

// sample returns that many of the addresses, from all over.
func sample(ips []netip.Addr) []netip.Addr {
	if len(ips) <= samples {
		return ips
	}
	var some []netip.Addr
	for i := range samples {
		some = append(some, ips[i*len(ips)/samples])
	}
	return some
}

// A reached is what came of trying to reach an address: nil, if it answers or
// nothing speaks against it.
type reached struct {
	ip  netip.Addr
	err error
}

// reach pings addresses, all at once, and looks at what the kernel knows of the
// way to those that do not answer. Firewalls often drop pings: silence alone
// counts only where others answer.
func reach(ctx context.Context, ips []netip.Addr) []reached {
	answered := ping(ctx, ips)
	all := make([]reached, len(ips))
	for i, ip := range ips {
		all[i].ip = ip
		if answered[ip] {
			continue
		}
		if all[i].err = way(ip); all[i].err == nil && len(answered) > 0 {
			all[i].err = errSilent
		}
	}
	return all
}

// way tells what is wrong with the way to an address, as the kernel knows it.
func way(ip netip.Addr) error {
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
			return fmt.Errorf("nobody on the link answers for %s", next)
		}
	}
	return nil
}

const (
	pings    = 3 // each
	pingWait = time.Second
)

// ping sends echo requests (RFC 792, RFC 4443) and returns who answers.
func ping(ctx context.Context, ips []netip.Addr) map[netip.Addr]bool {
	answered := map[netip.Addr]bool{}
	answers := make(chan netip.Addr)
	ctx, cancel := context.WithTimeout(ctx, pings*pingWait)
	defer cancel()
	conns := map[bool]*net.IPConn{} // by whether it is for IPv4
	id := uint16(os.Getpid())
	for _, f := range []struct {
		four           bool
		network        string
		request, reply byte
	}{{true, "ip4:icmp", 8, 0}, {false, "ip6:ipv6-icmp", 128, 129}} {
		c, err := net.ListenIP(f.network, nil)
		if err != nil {
			continue // no such family, or no right to
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
				case answers <- ip.Unmap():
				case <-ctx.Done():
					return
				}
			}
		}()
	}
	for round := range uint16(pings) {
		for _, ip := range ips {
			c := conns[ip.Is4()]
			if c == nil || answered[ip] {
				continue
			}
			_, _ = c.WriteTo(echo(ip.Is4(), id, round), &net.IPAddr{IP: ip.AsSlice()}) // what fails is not answered
		}
		wait := time.After(pingWait)
		for waiting := true; waiting; {
			if len(answered) == len(ips) {
				return answered
			}
			select {
			case ip := <-answers:
				answered[ip] = true
			case <-wait:
				waiting = false
			case <-ctx.Done():
				return answered
			}
		}
	}
	return answered
}

// echo makes an echo request. The kernel computes the checksum of ICMPv6.
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
