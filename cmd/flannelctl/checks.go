package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/network"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/pkg/proc"
)

// showLog is where the daemon says more.
var showLog = []string{"journalctl -u flanneld -n 50    # in Kubernetes: kubectl -n kube-flannel logs ds/kube-flannel-ds"}

func daemonDown(p *patient) []problem {
	pids := proc.Find("flanneld")
	switch {
	case p.daemonless == nil || p.direct && len(pids) > 0:
		return nil
	case len(pids) == 0:
		return []problem{{"flanneld does not run on this node: what changes, here or on other nodes, is not followed",
			[]string{"systemctl restart flanneld    # in Kubernetes: kubectl -n kube-flannel get pods -o wide"}}}
	case proc.State(pids[0]) == 'T':
		return []problem{{fmt.Sprintf("flanneld, process %d, is stopped by a signal", pids[0]), []string{fmt.Sprintf("kill -CONT %d", pids[0])}}}
	case p.options.StatusSocket == "":
		return nil
	}
	return []problem{{fmt.Sprintf("flanneld runs, process %d, but does not answer: %v", pids[0], p.daemonless), []string{"systemctl restart flanneld"}}}
}

func daemonWaiting(p *patient) []problem {
	if !p.status.Daemon || p.status.Ready {
		return nil
	}
	return []problem{{"flanneld is not ready, it waits for " + p.status.Waiting, showLog}}
}

func daemonError(p *patient) []problem {
	var found []problem
	for _, duty := range slices.Sorted(maps.Keys(p.status.Errors)) {
		found = append(found, problem{duty + ": " + p.status.Errors[duty], showLog})
	}
	if p.status.Daemon && p.status.Ready && !p.status.Rules.InPlace {
		found = append(found, problem{"the rules of " + p.status.Rules.Mode + " cannot be set: the log says why", showLog})
	}
	return found
}

func storeUnreachable(p *patient) []problem {
	s := p.status.Store
	if s.Trouble == "" {
		return nil
	}
	return []problem{{s.Name + " cannot be used: " + s.Trouble + ". Pods go on talking; changes are not followed, and the lease may end", []string{s.Check}}}
}

func leaseMissing(p *patient) []problem {
	s := p.status
	switch {
	case s.Lease != nil || s.Store.Trouble != "" || s.Daemon: // which waits for it, or has an error
		return nil
	case s.Uplink == nil:
		return []problem{{"whether this node has a lease cannot be told: waiting for " + s.Waiting, nil}}
	}
	return []problem{{"this node has no lease: its subnet may be given to another", []string{"systemctl restart flanneld"}}}
}

func leaseExpired(p *patient) []problem {
	l := p.status.Lease
	if l == nil || l.Expires.IsZero() || time.Until(l.Expires) > 0 {
		return nil
	}
	return []problem{{fmt.Sprintf("the lease of %s has expired, %s ago: another node may get the subnet", join(l.Subnets), ago(l.Expires)), []string{"systemctl restart flanneld"}}}
}

func peerLeftOut(p *patient) []problem {
	var found []problem
	for _, l := range p.status.LeftOut {
		found = append(found, problem{fmt.Sprintf("%s at %s: %s", join(l.Subnets), join(l.PublicIPs), l.Problem), []string{"flannelctl leases"}})
	}
	return found
}

func outOfSync(p *patient) []problem {
	if p.status.Lease == nil {
		return nil
	}
	commands, err := p.source.Diff(p.ctx)
	if len(commands) > 0 && p.status.Daemon {
		// It mends that now.
		select {
		case <-time.After(time.Second):
		case <-p.ctx.Done():
		}
		commands, err = p.source.Diff(p.ctx)
	}
	switch {
	case err != nil:
		return []problem{{fmt.Sprintf("what the host lacks cannot be told: %v", err), showLog}}
	case len(commands) == 0:
		return nil
	}
	text := fmt.Sprintf("%d things differ from what is wanted", len(commands))
	const few = 10
	if len(commands) > few {
		commands = append(commands[:few:few], "flannelctl diff    # shows all")
	}
	return []problem{{text, commands}}
}

func subnetFile(p *patient) []problem {
	if p.status.Lease == nil || p.status.SubnetFile.Written {
		return nil
	}
	text := p.status.SubnetFile.Path + " does not say what it should"
	if p.envErr != nil {
		text = p.envErr.Error()
	}
	return []problem{{text + ": new pods get no address, or a wrong MTU", []string{"systemctl restart flanneld"}}}
}

// setting returns a file below /proc/sys, "" where there is none.
func setting(name string) string {
	text, err := os.ReadFile("/proc/sys/" + name)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}

func (p *patient) has(family func(netip.Addr) bool) bool {
	return slices.ContainsFunc(p.status.Network, func(n netip.Prefix) bool { return family(n.Addr()) })
}

func ipForward(p *patient) []problem {
	var found []problem
	for _, f := range []struct {
		family        string
		is            func(netip.Addr) bool
		file, setting string
	}{
		{"IPv4", netip.Addr.Is4, "net/ipv4/ip_forward", "net.ipv4.ip_forward"},
		{"IPv6", netip.Addr.Is6, "net/ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding"},
	} {
		if p.has(f.is) && setting(f.file) != "1" {
			found = append(found, problem{fmt.Sprintf("this host does not forward %s: pods reach nothing but their node", f.family), []string{"sysctl -w " + f.setting + "=1"}})
		}
	}
	return found
}

func brNetfilter(p *patient) []problem {
	if p.status.Rules.Mode != "iptables" {
		return nil
	}
	var fix []string
	if setting("net/bridge/bridge-nf-call-iptables") == "" {
		fix = append(fix, "modprobe br_netfilter")
	}
	for _, f := range []struct {
		is   func(netip.Addr) bool
		name string
	}{{netip.Addr.Is4, "iptables"}, {netip.Addr.Is6, "ip6tables"}} {
		if p.has(f.is) && setting("net/bridge/bridge-nf-call-"+f.name) != "1" {
			fix = append(fix, "sysctl -w net.bridge.bridge-nf-call-"+f.name+"=1")
		}
	}
	if fix == nil {
		return nil
	}
	return []problem{{"iptables does not see what pods of this node send each other: services do not work among them", fix}}
}

func rpFilter(p *patient) []problem {
	if !p.has(netip.Addr.Is4) || p.status.Uplink == nil {
		return nil
	}
	devices := []string{p.status.Uplink.Name}
	for _, d := range p.status.Devices {
		if slices.ContainsFunc(d.Addresses, func(a netip.Prefix) bool { return a.Addr().Is4() }) { // others carry no IPv4
			devices = append(devices, d.Name)
		}
	}
	var found []problem
	for _, d := range devices {
		own := setting("net/ipv4/conf/" + d + "/rp_filter")
		if own == "" || max(own, setting("net/ipv4/conf/all/rp_filter")) != "1" {
			continue // 2 is loose, and the higher one counts
		}
		found = append(found, problem{fmt.Sprintf("strict filtering of source addresses (rp_filter) on %s drops what comes in by another way than answers go out", d),
			[]string{fmt.Sprintf("sysctl -w net/ipv4/conf/%s/rp_filter=2", d)}})
	}
	return found
}

// bridge returns the device that holds this node's end of the subnet, as
// subnet.env says; nil if there is none yet.
func (p *patient) bridge() netlink.Link {
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil || p.envErr != nil {
		return nil
	}
	for _, a := range addrs {
		ip, _ := netip.AddrFromSlice(a.IP)
		for _, s := range p.env.Subnets.Each() {
			if s.Addr().Next() == ip.Unmap() {
				if l, err := netlink.LinkByIndex(a.LinkIndex); err == nil {
					return l
				}
			}
		}
	}
	return nil
}

func forwardDrop(p *patient) []problem {
	if p.status.Lease == nil {
		return nil
	}
	inner, outer := "cni0", p.status.Uplink.Name
	if l := p.bridge(); l != nil {
		inner = l.Attrs().Name
	}
	if len(p.status.Devices) > 0 {
		outer = p.status.Devices[0].Name
	}
	var found []problem
	for _, s := range p.status.Lease.Subnets {
		i := slices.IndexFunc(p.status.Network, func(n netip.Prefix) bool { return n.Contains(s.Addr()) })
		if i < 0 {
			continue
		}
		network := p.status.Network[i]
		here, there := s.Addr().Next(), network.Addr().Next()
		out := packet{proto: "tcp", port: 40000, in: inner, out: outer, src: here, dst: there}
		in := packet{proto: "tcp", port: 40000, in: outer, out: inner, src: there, dst: here}
		ip := "ip"
		if network.Addr().Is6() {
			ip = "ip6"
		}
		for _, r := range p.rulesets {
			if !r.filters(network.Addr()) || r.passes("forward", in) && r.passes("forward", out) {
				continue
			}
			found = append(found, problem{fmt.Sprintf("%s drops what is forwarded from and to %s", r, network), []string{
				r.insertAccept("forward", "-s "+network.String(), ip+" saddr "+network.String()),
				r.insertAccept("forward", "-d "+network.String(), ip+" daddr "+network.String()),
			}})
		}
	}
	return found
}

func portBlocked(p *patient) []problem {
	var found []problem
	for _, e := range p.status.Endpoints {
		what, iptables, nft := "IP protocol "+e.Protocol, "-p "+e.Protocol, "meta l4proto "+e.Protocol
		if e.Port != 0 {
			what = fmt.Sprintf("UDP port %d", e.Port)
			iptables += fmt.Sprintf(" --dport %d", e.Port)
			nft = fmt.Sprintf("udp dport %d", e.Port)
		}
		first := packet{proto: e.Protocol, port: e.Port, in: p.status.Uplink.Name, src: p.somePeer(e.Address), dst: e.Address}
		for _, r := range p.rulesets {
			if r.filters(e.Address) && !r.passes("input", first) {
				found = append(found, problem{fmt.Sprintf("%s drops what peers send to %s by %s", r, e.Address, what),
					[]string{r.insertAccept("input", iptables, nft)}})
			}
		}
	}
	return found
}

// somePeer returns the address of a peer, or one that could be a peer's.
func (p *patient) somePeer(like netip.Addr) netip.Addr {
	for _, ip := range p.peers() {
		if ip.Is4() == like.Is4() {
			return ip
		}
	}
	return like.Prev()
}

// peers returns the public addresses of all peers.
func (p *patient) peers() []netip.Addr {
	var ips []netip.Addr
	for _, l := range p.leases {
		if !l.Own {
			ips = append(ips, l.PublicIPs...)
		}
	}
	return ips
}

func portTaken(p *patient) []problem {
	var found []problem
	var seen []int                 // endpoints of both families have the same port
	users, _ := kernel.PortUsers() // those that can be listed
	for _, u := range users {
		if !backend.Device(u.Device) && p.blockedBy(u) {
			found = append(found, problem{fmt.Sprintf("the %s device %s uses UDP port %d: no device of flanneld can use the port beside it", u.Type, u.Device, u.Port),
				[]string{"ip link del " + u.Device + "    # or set another port in the network configuration, for all nodes"}})
		}
	}
	for _, e := range p.status.Endpoints {
		if e.Port == 0 || slices.Contains(seen, e.Port) {
			continue
		}
		seen = append(seen, e.Port)
		port := e.Port
		for _, owner := range owners(port) {
			if owner.name == "flanneld" || e.Program != "" && strings.HasPrefix(owner.name, e.Program) {
				continue
			}
			found = append(found, problem{fmt.Sprintf("the program %s, process %d, listens on UDP port %d", owner.name, owner.pid, port),
				[]string{fmt.Sprintf("kill %d    # or set another Port in the network configuration, for all nodes", owner.pid)}})
		}
	}
	return found
}

// blockedBy reports whether a device of the kernel takes a port from flanneld. Vxlan
// devices share a port, as long as their VNIs differ.
func (p *patient) blockedBy(u kernel.PortUser) bool {
	for _, d := range p.status.Devices {
		if d.VNI != 0 && u.Type == "vxlan" && d.Port == u.Port {
			return u.VNI == 0 || u.VNI == d.VNI
		}
	}
	return slices.ContainsFunc(p.status.Endpoints, func(e network.Endpoint) bool { return e.Port != 0 && e.Port == u.Port })
}

func (p *patient) devices() []string {
	var names []string
	for _, d := range p.status.Devices {
		names = append(names, d.Name)
	}
	return names
}

// An owner is a process that has a socket.
type owner struct {
	pid  int
	name string
}

// owners returns the processes that listen on a UDP port. Sockets of the kernel,
// as a VXLAN device has, are nobody's.
func owners(port int) []owner {
	sockets := map[string]bool{}
	for _, file := range []string{"/proc/self/net/udp", "/proc/self/net/udp6"} {
		text, _ := os.ReadFile(file) // no IPv6, no file
		for line := range strings.Lines(string(text)) {
			// "1: 00000000:2118 00000000:0000 07 … inode" (proc_net_udp)
			f := strings.Fields(line)
			if len(f) > 9 && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", port)) {
				sockets["socket:["+f[9]+"]"] = true
			}
		}
	}
	if len(sockets) == 0 {
		return nil
	}
	var found []owner
	files, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, file := range files {
		to, err := os.Readlink(file)
		if err != nil || !sockets[to] {
			continue
		}
		dir := filepath.Dir(filepath.Dir(file))
		pid, _ := strconv.Atoi(filepath.Base(dir))
		name, _ := os.ReadFile(dir + "/comm")
		if o := (owner{pid, strings.TrimSpace(string(name))}); !slices.Contains(found, o) {
			found = append(found, o)
		}
	}
	return found
}

func mtuUplink(p *patient) []problem {
	u := p.status.Uplink
	if u == nil {
		return nil
	}
	most := p.status.MTU + p.status.Overhead
	if most <= u.MTU {
		return nil
	}
	text := fmt.Sprintf("pods may send packets of %d bytes", p.status.MTU)
	if p.status.Overhead > 0 {
		text += fmt.Sprintf(", %d with what is put around them", most)
	}
	return []problem{{fmt.Sprintf("%s, and the uplink %s carries %d", text, u.Name, u.MTU),
		[]string{fmt.Sprintf("ip link set %s mtu %d    # or set a smaller MTU in the Backend of the network configuration", u.Name, most)}}}
}

func mtuBridge(p *patient) []problem {
	var found []problem
	s := p.status
	if p.envErr == nil && s.MTU > 0 && p.env.MTU > s.MTU {
		found = append(found, problem{fmt.Sprintf("%s gives pods an MTU of %d, and the backend carries %d", p.options.SubnetFile, p.env.MTU, s.MTU), []string{"systemctl restart flanneld"}})
	}
	l := p.bridge()
	if l == nil || s.MTU == 0 || l.Attrs().MTU <= s.MTU {
		return found
	}
	name := l.Attrs().Name
	return append(found, problem{fmt.Sprintf("the MTU of %s is %d, and %d is the most that reaches other nodes: large packets vanish", name, l.Attrs().MTU, s.MTU),
		[]string{fmt.Sprintf("ip link set %s mtu %d    # and make the pods on it anew", name, s.MTU)}})
}

// mended are the releases, of each series that was still kept, from which on a
// checksum of zero survives masquerading; all series after the last have it.
var mended = [][3]int{{4, 14, 181}, {4, 19, 123}, {5, 4, 41}, {5, 6, 13}}

// garbles tells whether a kernel of that release gets the outer checksum of
// masqueraded VXLAN packets wrong where the device computes it.
func garbles(release string) bool {
	var v [3]int
	for i, part := range strings.SplitN(release, ".", 3) {
		digits := strings.IndexFunc(part, func(r rune) bool { return r < '0' || r > '9' })
		if digits >= 0 {
			part = part[:digits]
		}
		v[i], _ = strconv.Atoi(part)
	}
	for _, m := range mended {
		if v[0] == m[0] && v[1] == m[1] {
			return v[2] < m[2]
		}
	}
	last := mended[len(mended)-1]
	return slices.Compare(v[:2], last[:2]) < 0
}

func checksumOffload(p *patient) []problem {
	var name unix.Utsname
	if unix.Uname(&name) != nil {
		return nil
	}
	release := unix.ByteSliceToString(name.Release[:])
	if !garbles(release) {
		return nil
	}
	var found []problem
	for _, d := range p.status.Devices {
		if d.VNI == 0 {
			continue
		}
		if on, err := kernel.ComputesTXChecksums(d.Name); err == nil && on {
			found = append(found, problem{fmt.Sprintf("Linux %s gets checksums of masqueraded packets in %s wrong: services time out from other nodes", release, d.Name),
				[]string{fmt.Sprintf("ethtool -K %s tx-checksum-ip-generic off    # Linux 5.6.13, 5.4.41, 4.19.123 and 4.14.181 have it right", d.Name)}})
		}
	}
	return found
}

// clockTolerance is how far clocks may be apart. Certificates and tokens, which
// is what clocks matter for, are made with some minutes to spare.
const clockTolerance = 30 * time.Second

func clockSkew(p *patient) []problem {
	ctx, cancel := context.WithTimeout(p.ctx, daemonPatience)
	defer cancel()
	d, err := p.source.Skew(ctx)
	if err != nil || d.Abs() < clockTolerance {
		return nil // that the store is away is another check's
	}
	way := "ahead of"
	if d < 0 {
		way = "behind"
	}
	return []problem{{fmt.Sprintf("this host's clock is %v %s that of %s: certificates and tokens may count as expired", d.Abs().Round(time.Second), way, p.status.Store.Name),
		[]string{"timedatectl set-ntp true"}}}
}

func peerUnreachable(p *patient) []problem {
	var found []problem
	for _, r := range reach(p.ctx, sample(p.peers())) {
		if r.err != nil {
			found = append(found, problem{fmt.Sprintf("the host of a peer, %s, cannot be reached: %v", r.ip, r.err), []string{fmt.Sprintf("ip route get %s && ping -c 3 %s", r.ip, r.ip)}})
		}
	}
	return found
}

var errSilent = errors.New("it does not answer to ping, as others do")
