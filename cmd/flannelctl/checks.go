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
	"github.com/flanneld/flanneld/pkg/bridge"
	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/pkg/proc"
)

// showLog is the command that shows the daemon's log.
var showLog = []string{
	"journalctl -u flanneld -n 50    # in Kubernetes: kubectl -n kube-flannel logs ds/kube-flannel-ds",
}

func daemonDown(d *diagnosis) []problem {
	pids := proc.Find("flanneld")
	switch {
	case d.daemonErr == nil || d.direct && len(pids) > 0:
		return nil
	case len(pids) == 0:
		return []problem{{"flanneld does not run on this node: changes on this node and on other nodes have no effect",
			[]string{"systemctl restart flanneld    # in Kubernetes: kubectl -n kube-flannel get pods -o wide"}}}
	case proc.State(pids[0]) == 'T':
		return []problem{{fmt.Sprintf("flanneld, process %d, is stopped by a signal", pids[0]),
			[]string{fmt.Sprintf("kill -CONT %d", pids[0])}}}
	case d.options.StatusSocket == "":
		return nil
	}
	var refusal network.Refusal
	if errors.As(d.daemonErr, &refusal) {
		return []problem{{fmt.Sprintf("flanneld, process %d, cannot report its state: %v", pids[0], refusal), showLog}}
	}
	return []problem{{fmt.Sprintf("flanneld runs, process %d, but does not reply: %v", pids[0], d.daemonErr),
		[]string{"systemctl restart flanneld"}}}
}

func daemonWaiting(d *diagnosis) []problem {
	if !d.status.Daemon || d.status.Ready {
		return nil
	}
	return []problem{{"flanneld is not ready: it waits for " + d.status.Waiting, showLog}}
}

func daemonError(d *diagnosis) []problem {
	var found []problem
	for _, duty := range slices.Sorted(maps.Keys(d.status.Errors)) {
		text := d.status.Errors[duty]
		if !strings.HasPrefix(text, duty) {
			text = duty + ": " + text
		}
		found = append(found, problem{text, showLog})
	}
	if d.status.Daemon && d.status.Ready && !d.status.Rules.InPlace {
		found = append(found, problem{"the rules of " + d.status.Rules.Mode + " cannot be set: the log has the reason",
			showLog})
	}
	return found
}

func storeUnreachable(d *diagnosis) []problem {
	s := d.status.Store
	if s.Trouble == "" {
		return nil
	}
	return []problem{{s.Name + " cannot be used: " + s.Trouble + ". Pods still communicate, but changes have no effect, " +
		"and the lease may end", []string{s.Check}}}
}

func leaseMissing(d *diagnosis) []problem {
	s := d.status
	switch {
	case s.Lease != nil || s.Store.Trouble != "" || s.Daemon: // daemon-waiting and daemon-error cover the daemon
		return nil
	case len(s.Uplinks) == 0:
		return []problem{{"it is unknown whether this node has a lease: waiting for " + s.Waiting, nil}}
	}
	return []problem{{"this node has no lease: another node may get its subnet", []string{"systemctl restart flanneld"}}}
}

func leaseExpired(d *diagnosis) []problem {
	l := d.status.Lease
	if l == nil || l.Expires.IsZero() || time.Until(l.Expires) > 0 {
		return nil
	}
	return []problem{{fmt.Sprintf("the lease of %s expired %s ago: another node may get the subnet", join(l.Subnets),
		ago(l.Expires)), []string{"systemctl restart flanneld"}}}
}

func peerLeftOut(d *diagnosis) []problem {
	var found []problem
	for _, l := range d.status.LeftOut {
		found = append(found, problem{fmt.Sprintf("%s at %s: %s", join(l.Subnets), join(l.PublicIPs), l.Problem),
			[]string{"flannelctl leases"}})
	}
	return found
}

func peerBlocked(d *diagnosis) []problem {
	var found []problem
	for _, l := range d.status.Unreached {
		for _, r := range l.Reachability {
			if r.Problem != "" {
				found = append(found, problem{fmt.Sprintf("%s, since %s: %s", join(l.Subnets),
					r.Since.Format(time.DateTime), r.Problem), []string{"flannelctl connectivity " + join(l.Subnets[:1])}})
			}
		}
	}
	return found
}

func networkOverlap(d *diagnosis) []problem {
	var found []problem
	for _, text := range d.status.Overlaps {
		found = append(found, problem{text, []string{"ip route show proto kernel    # the prefixes of this host"}})
	}
	return found
}

func outOfSync(d *diagnosis) []problem {
	if d.status.Lease == nil {
		return nil
	}
	commands, err := d.source.Diff(d.ctx)
	if len(commands) > 0 && d.status.Daemon {
		// The daemon may be repairing the difference now.
		select {
		case <-time.After(time.Second):
		case <-d.ctx.Done():
		}
		commands, err = d.source.Diff(d.ctx)
	}
	switch {
	case err != nil:
		return []problem{{fmt.Sprintf("actual and desired state cannot be compared: %v", err), showLog}}
	case len(commands) == 0:
		return nil
	}
	text := fmt.Sprintf("the actual state differs from the desired state: %d commands repair it", len(commands))
	const few = 10
	if len(commands) > few {
		commands = append(commands[:few:few], "flannelctl diff    # shows all")
	}
	return []problem{{text, commands}}
}

func subnetFile(d *diagnosis) []problem {
	if d.status.Lease == nil || d.status.SubnetFile.Written {
		return nil
	}
	text := d.status.SubnetFile.Path + " has wrong contents"
	if d.envErr != nil {
		text = d.envErr.Error()
	}
	return []problem{{text + ": new pods get no address, or a wrong MTU", []string{"systemctl restart flanneld"}}}
}

// bridgeSubnet finds bridges with an address that is in the network, but in no subnet of this node: the bridge of the
// CNI plugin or Docker's, after the subnet has changed. Other addresses of bridges are no business of flanneld's.
func bridgeSubnet(d *diagnosis) []problem {
	if d.status.Lease == nil {
		return nil
	}
	bridges, _ := bridge.All() // out-of-sync reports that the kernel does not answer
	var found []problem
	for _, b := range bridges {
		stale := slices.DeleteFunc(b.Stale(d.status.Network, d.status.Lease.Subnets), func(p netip.Prefix) bool {
			return !slices.ContainsFunc(d.status.Network, func(n netip.Prefix) bool { return n.Contains(p.Addr()) })
		})
		if len(stale) > 0 {
			found = append(found, problem{b.Describe(stale, join(d.status.Lease.Subnets)), b.Remedy(stale)})
		}
	}
	return found
}

// setting returns the contents of a file below /proc/sys, "" if there is no such file.
func setting(name string) string {
	text, err := os.ReadFile("/proc/sys/" + name)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}

func (d *diagnosis) has(family func(netip.Addr) bool) bool {
	return slices.ContainsFunc(d.status.Network, func(n netip.Prefix) bool { return family(n.Addr()) })
}

func ipForward(d *diagnosis) []problem {
	var found []problem
	for _, f := range []struct {
		family        string
		is            func(netip.Addr) bool
		file, setting string
	}{
		{"IPv4", netip.Addr.Is4, "net/ipv4/ip_forward", "net.ipv4.ip_forward"},
		{"IPv6", netip.Addr.Is6, "net/ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding"},
	} {
		if d.has(f.is) && setting(f.file) != "1" {
			found = append(found, problem{fmt.Sprintf("this host does not forward %s: pods reach only their own node",
				f.family), []string{"sysctl -w " + f.setting + "=1"}})
		}
	}
	return found
}

func brNetfilter(d *diagnosis) []problem {
	if d.status.Rules.Mode != "iptables" {
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
		if d.has(f.is) && setting("net/bridge/bridge-nf-call-"+f.name) != "1" {
			fix = append(fix, "sysctl -w net.bridge.bridge-nf-call-"+f.name+"=1")
		}
	}
	if fix == nil {
		return nil
	}
	return []problem{{"iptables does not see packets between pods of this node: services do not work between these pods",
		fix}}
}

func rpFilter(d *diagnosis) []problem {
	uplink := d.status.UplinkOf(family.IPv4)
	if !d.has(netip.Addr.Is4) || uplink == nil {
		return nil
	}
	devices := []string{uplink.Name}
	for _, dev := range d.status.Devices {
		if slices.ContainsFunc(dev.Addresses,
			func(a netip.Prefix) bool { return a.Addr().Is4() }) { // other devices carry no IPv4
			devices = append(devices, dev.Name)
		}
	}
	var found []problem
	for _, dev := range devices {
		own := setting("net/ipv4/conf/" + dev + "/rp_filter")
		if own == "" || max(own, setting("net/ipv4/conf/all/rp_filter")) != "1" {
			continue // 2 is loose mode, and the kernel uses the higher of the two values
		}
		found = append(found,
			problem{fmt.Sprintf("strict reverse path filtering (rp_filter) on %s "+
				"drops packets that arrive by another device than the route back",
				dev),
				[]string{"sysctl -w " + plain.Shell("net/ipv4/conf/"+dev+"/rp_filter=2")}})
	}
	return found
}

// bridge returns the device with the first address of this node's subnet, which subnet.env names; nil if there is no
// such device yet.
func (d *diagnosis) bridge() netlink.Link {
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil || d.envErr != nil {
		return nil
	}
	for _, a := range addrs {
		ip, _ := netip.AddrFromSlice(a.IP)
		for _, s := range d.env.Subnets.Each() {
			if s.Addr().Next() == ip.Unmap() {
				if l, err := netlink.LinkByIndex(a.LinkIndex); err == nil {
					return l
				}
			}
		}
	}
	return nil
}

func forwardDrop(d *diagnosis) []problem {
	if d.status.Lease == nil {
		return nil
	}
	inner := "cni0"
	if l := d.bridge(); l != nil {
		inner = l.Attrs().Name
	}
	var found []problem
	for _, s := range d.status.Lease.Subnets {
		i := slices.IndexFunc(d.status.Network, func(n netip.Prefix) bool { return n.Contains(s.Addr()) })
		if i < 0 {
			continue
		}
		network := d.status.Network[i]
		here, there, outer := s.Addr().Next(), network.Addr().Next(), d.outward(family.Of(s.Addr()))
		out := packet{proto: "tcp", port: 40000, in: inner, out: outer, src: here, dst: there}
		in := packet{proto: "tcp", port: 40000, in: outer, out: inner, src: there, dst: here}
		ip := "ip"
		if network.Addr().Is6() {
			ip = "ip6"
		}
		for _, r := range d.rulesets {
			if !r.filters(network.Addr()) || r.passes("forward", in) && r.passes("forward", out) {
				continue
			}
			found = append(found, problem{fmt.Sprintf("%s drops packets that are forwarded from and to %s", r, network),
				[]string{
					r.insertAccept("forward", "-s "+network.String(), ip+" saddr "+network.String()),
					r.insertAccept("forward", "-d "+network.String(), ip+" daddr "+network.String()),
				}})
		}
	}
	return found
}

// outward returns the device by which packets of pods leave this host.
func (d *diagnosis) outward(f family.Family) string {
	for _, dev := range d.status.Devices {
		if slices.ContainsFunc(dev.Addresses, func(a netip.Prefix) bool { return f.Has(a.Addr()) }) {
			return dev.Name
		}
	}
	return d.uplinkName(f)
}

// uplinkName returns the interface by which peers reach this node in a family, "" if there is none.
func (d *diagnosis) uplinkName(f family.Family) string {
	if u := d.status.UplinkOf(f); u != nil {
		return u.Name
	}
	return ""
}

func portBlocked(d *diagnosis) []problem {
	var found []problem
	for _, e := range d.status.Endpoints {
		protocol := plain.Shell(e.Protocol)
		what, iptables, nft := "IP protocol "+e.Protocol, "-p "+protocol, "meta l4proto "+protocol
		if e.Port != 0 {
			what = fmt.Sprintf("UDP port %d", e.Port)
			iptables += fmt.Sprintf(" --dport %d", e.Port)
			nft = fmt.Sprintf("udp dport %d", e.Port)
		}
		first := packet{proto: e.Protocol, port: e.Port, in: d.uplinkName(family.Of(e.Address)), src: d.somePeer(e.Address),
			dst: e.Address}
		for _, r := range d.rulesets {
			if r.filters(e.Address) && !r.passes("input", first) {
				found = append(found, problem{fmt.Sprintf("%s drops packets of peers to %s, %s", r, e.Address, what),
					[]string{r.insertAccept("input", iptables, nft)}})
			}
		}
	}
	return found
}

// somePeer returns the address of a peer, or an example if there is no peer.
func (d *diagnosis) somePeer(like netip.Addr) netip.Addr {
	for _, ip := range d.peers() {
		if ip.Is4() == like.Is4() {
			return ip
		}
	}
	return like.Prev()
}

// peers returns the public addresses of all peers.
func (d *diagnosis) peers() []netip.Addr { return publicIPs(d.leases) }

// publicIPs returns the public addresses of the peers among the leases.
func publicIPs(leases []network.Lease) []netip.Addr {
	var ips []netip.Addr
	for _, l := range leases {
		if !l.Own {
			ips = append(ips, l.PublicIPs...)
		}
	}
	return ips
}

// withoutSession returns the leases of peers with which WireGuard or charon has agreed on no keys in the last three
// minutes. The host of a peer with a session can be reached, and a peer behind NAT is not where its lease says.
func withoutSession(leases []network.Lease) []network.Lease {
	return slices.DeleteFunc(slices.Clone(leases), func(l network.Lease) bool { return time.Since(l.Keys) <= 3*time.Minute })
}

func portTaken(d *diagnosis) []problem {
	var found []problem
	var seen []int                 // the endpoints of IPv4 and IPv6 have the same port
	users, _ := kernel.PortUsers() // on errors, the list is incomplete
	for _, u := range users {
		if !backend.Device(u.Device) && d.blockedBy(u) {
			found = append(found, problem{fmt.Sprintf("the %s device %s uses UDP port %d, which flanneld's device needs",
				u.Type, u.Device, u.Port),
				[]string{"ip link del " + plain.Shell(u.Device) + "    # or set another Port in the network configuration, for all nodes"}})
		}
	}
	for _, e := range d.status.Endpoints {
		if e.Port == 0 || slices.Contains(seen, e.Port) {
			continue
		}
		seen = append(seen, e.Port)
		port := e.Port
		for _, owner := range owners(port) {
			if owner.name == "flanneld" || e.Program != "" && strings.HasPrefix(owner.name, e.Program) {
				continue
			}
			found = append(found, problem{fmt.Sprintf("the program %s, process %d, listens on UDP port %d",
				plain.Quote(owner.name), owner.pid, port),
				[]string{fmt.Sprintf("kill %d    # or set another Port in the network configuration, for all nodes", owner.pid)}})
		}
	}
	return found
}

// blockedBy reports whether a device of another program uses a port that flanneld needs. Vxlan devices can share a port
// if their VNIs differ.
func (d *diagnosis) blockedBy(u kernel.PortUser) bool {
	for _, dev := range d.status.Devices {
		if dev.Port != 0 && u.Type == "vxlan" && dev.Port == u.Port {
			return u.VNI < 0 || u.VNI == dev.VNI
		}
	}
	return slices.ContainsFunc(d.status.Endpoints,
		func(e network.Endpoint) bool { return e.Port != 0 && e.Port == u.Port })
}

func (d *diagnosis) devices() []string {
	var names []string
	for _, dev := range d.status.Devices {
		names = append(names, dev.Name)
	}
	return names
}

// An owner is a process that has a socket open.
type owner struct {
	pid  int
	name string
}

// owners returns the processes that listen on a UDP port. Sockets of the kernel (of VXLAN devices) have no process.
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

func mtuUplink(d *diagnosis) []problem {
	var found []problem
	for _, u := range d.status.Uplinks {
		overhead := 0
		for _, f := range family.All {
			if slices.ContainsFunc(u.Addresses, f.Has) {
				overhead = max(overhead, d.status.Overhead.Of(f))
			}
		}
		needed := d.status.MTU + overhead
		if needed <= u.MTU {
			continue
		}
		text := fmt.Sprintf("pods may send packets of %d bytes", d.status.MTU)
		if overhead > 0 {
			text += fmt.Sprintf(" (%d with encapsulation)", needed)
		}
		found = append(found, problem{fmt.Sprintf("%s, but the MTU of the uplink %s is %d", text, u.Name, u.MTU),
			[]string{fmt.Sprintf("ip link set %s mtu %d    # or set a smaller MTU in the Backend of the network configuration",
				plain.Shell(u.Name), needed)}})
	}
	return found
}

func mtuBridge(d *diagnosis) []problem {
	var found []problem
	s := d.status
	if d.envErr == nil && s.MTU > 0 && d.env.MTU > s.MTU {
		found = append(found, problem{fmt.Sprintf("%s gives pods an MTU of %d, but the backend carries at most %d",
			d.options.SubnetFile, d.env.MTU, s.MTU), []string{"systemctl restart flanneld"}})
	}
	l := d.bridge()
	if l == nil || s.MTU == 0 || l.Attrs().MTU <= s.MTU || isUnused(l) { // the first port sets the MTU
		return found
	}
	name := l.Attrs().Name
	return append(found,
		problem{fmt.Sprintf("the MTU of %s is %d, but the backend carries at most %d: large packets are lost", name,
			l.Attrs().MTU, s.MTU),
			[]string{fmt.Sprintf("ip link set %s mtu %d    # then recreate the pods on this node", plain.Shell(name), s.MTU)}})
}

// isUnused tells whether a device is a bridge without ports.
func isUnused(l netlink.Link) bool {
	bridges, _ := bridge.All()
	return slices.ContainsFunc(bridges, func(b bridge.Bridge) bool { return b.Name == l.Attrs().Name && b.Ports == 0 })
}

// fixedIn are the first releases of each maintained series of Linux with the fix for checksums of zero in masqueraded
// packets. All later series have the fix.
var fixedIn = [][3]int{{4, 14, 181}, {4, 19, 123}, {5, 4, 41}, {5, 6, 13}}

// miscomputesChecksums reports whether the kernel release has the bug that the outer checksum of masqueraded VXLAN
// packets is wrong if the device computes the checksum.
func miscomputesChecksums(release string) bool {
	var v [3]int
	for i, part := range strings.SplitN(release, ".", 3) {
		digits := strings.IndexFunc(part, func(r rune) bool { return r < '0' || r > '9' })
		if digits >= 0 {
			part = part[:digits]
		}
		v[i], _ = strconv.Atoi(part)
	}
	for _, m := range fixedIn {
		if v[0] == m[0] && v[1] == m[1] {
			return v[2] < m[2]
		}
	}
	last := fixedIn[len(fixedIn)-1]
	return slices.Compare(v[:2], last[:2]) < 0
}

func checksumOffload(d *diagnosis) []problem {
	var name unix.Utsname
	if unix.Uname(&name) != nil {
		return nil
	}
	release := unix.ByteSliceToString(name.Release[:])
	if !miscomputesChecksums(release) {
		return nil
	}
	var found []problem
	for _, dev := range d.status.Devices {
		if dev.Port == 0 { // no vxlan device
			continue
		}
		if on, err := kernel.ComputesTXChecksums(dev.Name); err == nil && on {
			found = append(found,
				problem{fmt.Sprintf("Linux %s computes wrong checksums of masqueraded packets in %s: "+
					"services time out from other nodes",
					release, dev.Name),
					[]string{fmt.Sprintf("ethtool -K %s tx-checksum-ip-generic off    "+
						"# fixed in Linux 5.6.13, 5.4.41, 4.19.123 and 4.14.181",
						plain.Shell(dev.Name))}})
		}
	}
	return found
}

// clockTolerance is the allowed difference between two clocks. Clocks matter for certificates and tokens, which allow
// for some minutes.
const clockTolerance = 30 * time.Second

func clockSkew(d *diagnosis) []problem {
	ctx, cancel := context.WithTimeout(d.ctx, daemonTimeout)
	defer cancel()
	skew, err := d.source.Skew(ctx)
	if err != nil || skew.Abs() < clockTolerance {
		return nil // store-unreachable reports an unreachable store
	}
	way := "ahead of"
	if skew < 0 {
		way = "behind"
	}
	return []problem{{fmt.Sprintf("this host's clock is %v %s that of %s: certificates and tokens may count as expired",
		skew.Abs().Round(time.Second), way, d.status.Store.Name),
		[]string{"timedatectl set-ntp true"}}}
}

func peerUnreachable(d *diagnosis) []problem {
	var found []problem
	for _, r := range reach(d.ctx, samplePeers(publicIPs(withoutSession(d.leases)))) {
		if r.err != nil {
			found = append(found, problem{fmt.Sprintf("the host of a peer, %s, cannot be reached: %v", r.ip, r.err),
				[]string{fmt.Sprintf("ip route get %s && ping -c 3 %s", r.ip, r.ip)}})
		}
	}
	return found
}

var errSilent = errors.New("no reply to ping, although other peers reply")
