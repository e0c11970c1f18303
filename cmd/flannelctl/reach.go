package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"github.com/vishvananda/netlink"

	"github.com/flanneld/flanneld/pkg/family"
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
		if all[i].err = checkNeighbour(ip); all[i].err == nil && len(replied) > 0 {
			all[i].err = errSilent
		}
	}
	return all
}

// checkNeighbour returns an error if the kernel has no route to the address, or no neighbour for the next hop.
func checkNeighbour(ip netip.Addr) error {
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

const pings = 3 // each

// ping sends echo requests to all addresses at once, and returns the addresses that reply.
func ping(ctx context.Context, ips []netip.Addr) map[netip.Addr]bool {
	var mu sync.Mutex
	replied := map[netip.Addr]bool{}
	var all sync.WaitGroup
	for _, f := range family.All {
		p, err := openProber(f)
		if err != nil {
			continue // the host does not have the family, or the user is not root
		}
		defer p.close()
		for _, ip := range ips {
			if !f.Has(ip) {
				continue
			}
			all.Go(func() {
				if _, err := p.echo(ctx, netip.Addr{}, ip, smallPacket, pings, patience); err == nil {
					mu.Lock()
					replied[ip] = true
					mu.Unlock()
				}
			})
		}
	}
	all.Wait()
	return replied
}
