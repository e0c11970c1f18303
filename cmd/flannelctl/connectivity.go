package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/network"
	"github.com/flanneld/flanneld/pkg/family"
)

// A connectivity is what connectivity finds on this node.
type connectivity struct {
	Subnets   []netip.Prefix `json:"subnets"` // this node's
	PublicIPs []netip.Addr   `json:"publicIPs"`
	Peers     []peerPaths    `json:"peers"`
	Findings  []finding      `json:"findings"` // on this node
}

// A peerPaths is what connectivity finds on the paths to a peer.
type peerPaths struct {
	Subnets   []netip.Prefix `json:"subnets"`
	PublicIPs []netip.Addr   `json:"publicIPs"`
	Paths     []path         `json:"paths"`
	Findings  []finding      `json:"findings"`
	Notes     []string       `json:"notes,omitempty"` // on what is not known, and no fault
}

// A path is what was measured on the ways to a peer in one family. What was not tried is missing.
type path struct {
	Underlay leg `json:"underlay"`         // from host to host
	Overlay  leg `json:"overlay,omitzero"` // between the devices of the backend, or else between the bridges
	Bridge   leg `json:"bridge,omitzero"`  // between the bridges, if there are devices
}

// A leg is what was measured between two addresses. What was not tried is missing.
type leg struct {
	From    netip.Addr    `json:"from"`
	To      netip.Addr    `json:"to"`
	Device  string        `json:"device,omitempty"` // on which From's packets leave the host
	via     netip.Addr    // the next hop; invalid: the link
	Ping    outcome       `json:"ping,omitempty"`
	RTT     time.Duration `json:"rttNanoseconds,omitempty"`
	UDP     outcome       `json:"udp,omitempty"`            // to a closed port
	OwnUDP  outcome       `json:"udpOwnChecksum,omitempty"` // the same with a checksum that no kernel and device computes
	TCP     outcome       `json:"tcp,omitempty"`            // to a closed port
	Forward outcome       `json:"forward,omitempty"`        // to a pod, at the point where the node forwards it
	SeenAs  netip.Addr    `json:"seenAs,omitzero"`          // the source of From's packets as the peer receives them
	Size    int           `json:"size,omitempty"`           // bytes of the largest packet that must get through
	Carries int           `json:"carries,omitempty"`        // bytes of the largest packet that does
	OneMore outcome       `json:"oneByteMore,omitempty"`    // a packet of Size+1 bytes
	Heard   bool          `json:"heard,omitempty"`          // a request of To arrived here in the meantime
}

// An outcome is what became of a packet: answered, silent, or the error of sending it.
type outcome string

const (
	answered outcome = "answered"
	silent   outcome = "silent"
)

// outcomeOf returns the outcome that an error means.
func outcomeOf(err error) outcome {
	var errno syscall.Errno
	switch {
	case err == nil:
		return answered
	case errors.Is(err, errNoReply):
		return silent
	case errors.As(err, &errno):
		return outcome(errno.Error())
	}
	return outcome(err.Error())
}

// alive reports whether anything has come back.
func (l leg) alive() bool { return l.replies() || l.Forward == answered }

// replies reports whether the host replies for itself.
func (l leg) replies() bool { return l.Ping == answered || l.UDP == answered || l.TCP == answered }

func (t *tool) connectivityCommand() *cobra.Command {
	return t.outputFlag(&cobra.Command{
		Use:   "connectivity [PEER...]",
		Short: "Send packets to peers, and find why packets get lost",
		Long: `connectivity sends packets from this node to one peer, some peers, or all peers, through the underlay and
through the overlay. It finds what gets lost, and why: a firewall, the MTU of a device on the way, wrong checksums,
masquerading. PEER is a subnet, the public address of a node, or any address in its subnet. Each problem is printed with
commands that help. The command changes nothing. It needs no listener on the peer: the kernel there replies to pings,
and refuses packets to closed ports. Exit status 1: problems were found. Documentation/troubleshooting.md explains each
finding.`,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			return t.withSource(func(ctx context.Context, src source) (result, error) {
				c, err := t.connectivity(ctx, src, args)
				found := len(c.Findings) > 0
				for _, p := range c.Peers {
					found = found || len(p.Findings) > 0
				}
				return result{c, func() { t.printConnectivity(c) }, found}, err
			})(cmd, args)
		},
	})
}

// atOnce is the number of peers to which packets are sent at the same time.
const atOnce = 64

func (t *tool) connectivity(ctx context.Context, src source, names []string) (c connectivity, err error) {
	s, err := src.Status(ctx)
	if err != nil {
		return c, err
	}
	if s.Lease == nil || len(s.Uplinks) == 0 {
		return c, fmt.Errorf("this node has no lease yet: waiting for %s", s.Waiting)
	}
	leases, err := src.Leases(ctx)
	if err != nil {
		return c, err
	}
	peers, err := selectPeers(leases, names)
	if err != nil {
		return c, err
	}
	c = connectivity{Subnets: s.Lease.Subnets, PublicIPs: s.Lease.PublicIPs, Peers: make([]peerPaths, len(peers)),
		Findings: []finding{}}
	d := &diagnosis{tool: t, ctx: ctx, status: s}
	for _, f := range rpFilter(d) {
		c.Findings = append(c.Findings, finding{"rp-filter", f.text, f.fix})
	}
	if len(names) == 0 {
		for _, f := range peerLeftOut(d) {
			c.Findings = append(c.Findings, finding{"peer-left-out", f.text, f.fix})
		}
	}
	m := measurement{status: s, local: localAddresses(), blackhole: hasBlackhole(s.Lease.Subnets)}
	for _, f := range family.All {
		p, err := openProber(f)
		if err != nil {
			return c, err
		}
		defer p.close()
		*m.probers.At(f) = p
	}
	progress := t.progress(len(peers))
	var all sync.WaitGroup
	free := make(chan struct{}, atOnce)
	for i, l := range peers {
		free <- struct{}{}
		all.Go(func() {
			p := peerPaths{Subnets: l.Subnets, PublicIPs: l.PublicIPs, Paths: m.paths(ctx, l)}
			p.Findings, p.Notes = judge(s, p.Paths)
			c.Peers[i] = p
			progress()
			<-free
		})
	}
	all.Wait()
	return c, ctx.Err()
}

// localAddresses returns the addresses of this host that can be used.
func localAddresses() map[netip.Addr]bool {
	local := map[netip.Addr]bool{}
	addrs, _ := netlink.AddrList(nil, netlink.FAMILY_ALL) // what is missing is not used as a source
	for _, a := range addrs {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && a.Flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) == 0 {
			local[ip.Unmap()] = true
		}
	}
	return local
}

// hasBlackhole reports whether the kernel drops packets to a subnet of this node that it has no other route for
// (--ip-blackhole-route). Other nodes have such routes, too.
func hasBlackhole(subnets []netip.Prefix) bool {
	routes, _ := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Type: unix.RTN_BLACKHOLE},
		netlink.RT_FILTER_TYPE)
	return slices.ContainsFunc(routes, func(r netlink.Route) bool {
		return r.Dst != nil && slices.ContainsFunc(subnets, func(s netip.Prefix) bool { return r.Dst.String() == s.String() })
	})
}

// selectPeers returns the leases of the peers that are named by a subnet, a public address, or an address in the
// subnet. Without names, it returns all peers, except for those that are left out.
func selectPeers(leases []network.Lease, names []string) (peers []network.Lease, err error) {
	if len(names) == 0 {
		for _, l := range leases {
			if !l.Own && l.Problem == "" {
				peers = append(peers, l)
			}
		}
		return peers, nil
	}
	for _, name := range names {
		i := slices.IndexFunc(leases, func(l network.Lease) bool { return isNamed(l, name) })
		switch {
		case i < 0:
			return nil, fmt.Errorf("no lease has %q: flannelctl leases lists the subnets and public addresses", name)
		case leases[i].Own:
			return nil, fmt.Errorf("%s is this node", name)
		case leases[i].Problem != "":
			return nil, fmt.Errorf("%s is left out: %s", name, leases[i].Problem)
		}
		peers = append(peers, leases[i])
	}
	return peers, nil
}

func isNamed(l network.Lease, name string) bool {
	if p, err := netip.ParsePrefix(name); err == nil {
		return slices.Contains(l.Subnets, p.Masked())
	}
	ip, err := netip.ParseAddr(name)
	return err == nil && (slices.Contains(l.PublicIPs, ip) ||
		slices.ContainsFunc(l.Subnets, func(s netip.Prefix) bool { return s.Contains(ip) }))
}

// progress returns a function that shows on a terminal that one more of the peers is done.
func (t *tool) progress(all int) func() {
	if !isTerminal(os.Stderr) {
		return func() {}
	}
	var mu sync.Mutex
	done := -1
	more := func() {
		mu.Lock()
		defer mu.Unlock()
		done++
		text := fmt.Sprintf("%d of %d peers", done, all)
		if done == all {
			text = strings.Repeat(" ", len(text)) + "\r"
		}
		fmt.Fprint(os.Stderr, "\r", text)
	}
	more()
	return more
}

// printConnectivity prints a line for each peer and family, and then what was found.
func (t *tool) printConnectivity(c connectivity) {
	var rows [][]cell
	var found []finding
	var notes []string
	for _, p := range c.Peers {
		for i, path := range p.Paths {
			under, over := path.Underlay, path.Overlay
			rows = append(rows, []cell{
				{p.Subnets[i].String(), nil}, {under.To.String(), nil}, t.outcome(under.Ping, under.RTT),
				t.outcome(over.Ping, over.RTT), t.size(over), t.outcome(over.UDP, 0), t.outcome(over.TCP, 0),
				t.outcome(path.Bridge.Ping, path.Bridge.RTT),
			})
		}
		found = append(found, p.Findings...)
		notes = append(notes, p.Notes...)
	}
	t.table([]string{"PEER", "PUBLIC IP", "UNDERLAY", "OVERLAY", "MTU", "UDP", "TCP", "BRIDGE"}, rows)
	for _, n := range notes {
		t.printf("%s %s\n", t.warn("note:"), n)
	}
	if found = append(c.Findings, found...); len(found) > 0 {
		t.findings(found, 0)
		return
	}
	t.printf("%s\n", t.ok(fmt.Sprintf("No problems found. Peers: %d, paths: %d.", len(c.Peers), len(rows))))
}

// outcome returns how the table shows an outcome.
func (t *tool) outcome(o outcome, rtt time.Duration) cell {
	switch {
	case o == answered && rtt > 0:
		return cell{fmt.Sprintf("%.1fms", float64(rtt)/1e6), t.ok}
	case o == answered:
		return cell{"ok", t.ok}
	}
	return cell{string(o), t.warn}
}

// size returns how the table shows the size of packets that get through.
func (t *tool) size(l leg) cell {
	switch {
	case l.Size == 0:
		return cell{"", nil}
	case l.Carries < l.Size:
		return cell{fmt.Sprintf("%d of %d", l.Carries, l.Size), t.warn}
	}
	return cell{strconv.Itoa(l.Carries), t.ok}
}
