package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/test/lab"
)

// A fault is something that another program on the host does to a node. The clock starts with inject or, where
// nothing can be repaired before, with undo.
type fault struct {
	name    string
	on      func(scenario) bool // where the fault can happen; nil: everywhere
	daemon  daemonState         // in which the fault may happen
	inject  action
	undo    action
	restore action // for a fault after which pods talk again, but not all is as before
	memory  bool   // the daemon's memory must have a limit
}

// daemonState is what the daemon does while a fault is injected.
type daemonState int

const (
	running daemonState = iota
	either
	frozen // a running daemon would be faster than the fault
)

// An action changes a testbed.
type action func(context.Context, *testbed) error

var everyFault = slices.Concat(deviceFaults, routeFaults, neighbourFaults, uplinkFaults, ruleFaults,
	daemonFaults, etcdFaults)

var deviceFaults = []fault{
	{name: "device deleted", on: hasDevice, daemon: either, inject: commands("ip link del {dev}")},
	{name: "device down", on: hasDevice, daemon: either, inject: commands("ip link set {dev} down")},
	{name: "device's addresses flushed", on: hasDevice, daemon: either, inject: commands("ip addr flush dev {dev}")},
	{name: "device's MTU changed", on: hasDevice, daemon: either, inject: commands("ip link set {dev} mtu 1280")},
	// systemd's MACAddressPolicy does this, NetworkManager did.
	{name: "device's MAC changed", on: isVXLAN, daemon: either,
		inject: commands("ip link set {dev} address 0e:00:00:00:00:99")},
	{name: "device renamed", on: hasDevice, daemon: frozen,
		inject: commands("ip link set {dev} down", "ip link set {dev} name flannel-lost{4}",
			"ip link set flannel-lost{4} up")},
	{name: "device of another kind", on: hasDevice, daemon: frozen,
		inject: commands("ip link del {dev}", "ip link add {dev} type bridge", "ip link set {dev} up")},
	{name: "device of another port", on: isVXLAN, daemon: frozen,
		inject: commands("ip link del {dev}", "ip link add {dev} type vxlan id {4} dstport 4789 dev eth0",
			"ip link set {dev} up")},
	{name: "device with another's address", on: hasDevice, daemon: either,
		inject: commands("ip addr add {extra} dev {dev}")},
}

var routeFaults = []fault{
	// ip cannot flush routes that go through nexthop objects.
	{name: "routes flushed", on: fewPeers, daemon: either, inject: commands("ip -{4} route flush proto 70")},
	{name: "a route deleted", daemon: either, inject: commands("ip route del {subnet}")},
	{name: "a route to another gateway", daemon: either,
		inject: commands("ip route replace {subnet} via {nobody} dev eth0 proto static")},
	{name: "a route put before ours", daemon: either,
		inject: commands("ip route prepend {subnet} via {nobody} dev eth0 proto static")},
	{name: "a route to another device", daemon: either, inject: commands("ip route replace {subnet} dev lo proto static")},
	{name: "a route into a black hole", daemon: either,
		inject: commands("ip route replace blackhole {subnet} proto static")},
	// Only the host's own programs can restore its other routes.
	{name: "all routes flushed", on: fewPeers, daemon: frozen, inject: flushRoutes, undo: restoreRoutes},
	{name: "nexthops flushed", on: manyPeers, daemon: either, inject: commands("ip nexthop flush proto 70")},
}

var neighbourFaults = []fault{
	{name: "neighbours flushed", on: isVXLAN, daemon: frozen, inject: commands("ip -{4} neigh flush dev {dev} nud all")},
	{name: "a neighbour of another MAC", on: isVXLAN, daemon: either,
		inject: commands("ip neigh replace {vtep} lladdr 0e:00:00:00:00:99 dev {dev} nud permanent")},
	{name: "a neighbour that ages", on: isVXLAN, daemon: either,
		inject: commands("ip neigh replace {vtep} lladdr 0e:00:00:00:00:99 dev {dev} nud stale")},
	{name: "FDB flushed", on: isVXLAN, daemon: either, inject: commands("bridge fdb flush dev {dev}")},
	{name: "an FDB entry deleted", on: isVXLAN, daemon: either, inject: commands("bridge fdb del {mac} dev {dev}")},
	{name: "an FDB entry to another host", on: isVXLAN, daemon: either,
		inject: commands("bridge fdb replace {mac} dev {dev} dst {nobody}")},
}

var uplinkFaults = []fault{
	{name: "uplink down and up", daemon: either, inject: commands("ip link set eth0 down"), undo: startNetwork},
	{name: "cable out and in", inject: func(ctx context.Context, s *testbed) error { return s.node.PullCable(ctx) },
		undo: func(ctx context.Context, s *testbed) error { return s.node.PlugCable(ctx) }},
	{name: "uplink replaced by another", daemon: either,
		inject: func(ctx context.Context, s *testbed) error { return s.node.RemoveUplink(ctx) },
		undo: func(ctx context.Context, s *testbed) error {
			return errors.Join(s.node.ReplaceUplink(ctx), startNetwork(ctx, s))
		}},
	{name: "network restarted", daemon: either, undo: startNetwork,
		inject: commands("ip -{4} addr flush dev eth0", "ip -{4} route flush dev eth0", "ip link set eth0 down")},
	{name: "uplink's addresses flushed", daemon: either, inject: commands("ip -{4} addr flush dev eth0 scope global"),
		undo: startNetwork},
	{name: "uplink's MTU changed", inject: commands("ip link set eth0 mtu 1400"),
		undo: commands("ip link set eth0 mtu 1500")},
	{name: "uplink's address changed",
		inject: func(ctx context.Context, s *testbed) error {
			return errors.Join(stopIPv4(ctx, s), s.node.ConfigureUplink(ctx, netip.MustParseAddr("198.18.0.77")))
		},
		restore: func(ctx context.Context, s *testbed) error {
			return errors.Join(stopIPv4(ctx, s), startNetwork(ctx, s))
		}},
	{name: "IPv6 off and on", on: func(g scenario) bool { return !g.ipv4 },
		inject: func(ctx context.Context, s *testbed) error {
			return s.waitError(ctx, commands("sysctl -qw net/ipv6/conf/eth0/disable_ipv6=1",
				"sysctl -qw net/ipv6/conf/{dev}/disable_ipv6=1"))
		},
		undo: func(ctx context.Context, s *testbed) error {
			on := commands("sysctl -qw net/ipv6/conf/eth0/disable_ipv6=0", "sysctl -qw net/ipv6/conf/{dev}/disable_ipv6=0")
			return s.all(ctx, on, startNetwork)
		}},
}

var ruleFaults = []fault{
	{name: "iptables flushed", on: usesIPTables, daemon: either,
		inject: commands("{iptables} -F", "{iptables} -t nat -F")},
	{name: "iptables chains deleted", on: usesIPTables, daemon: frozen,
		inject: commands("{iptables} -F", "{iptables} -X", "{iptables} -t nat -F", "{iptables} -t nat -X",
			"{iptables} -P FORWARD DROP")},
	{name: "iptables jumps deleted", on: usesIPTables, daemon: either,
		inject: commands("{iptables} -F FORWARD", "{iptables} -t nat -F POSTROUTING")},
	{name: "iptables ruleset replaced", on: usesIPTables, daemon: either, inject: replaceIPTables(":FORWARD DROP\n")},
	{name: "iptables ruleset that ends in REJECT", on: usesIPTables,
		inject: replaceIPTables(":FORWARD ACCEPT\n-A FORWARD -j REJECT\n")},
	{name: "iptables rule among ours", on: usesIPTables, daemon: either,
		inject: commands("{iptables} -I FLANNEL-FWD -j DROP")},
	{name: "nftables flushed, and iptables", on: usesIPTablesNFT, daemon: either,
		inject: commands("nft flush ruleset", "{iptables} -P FORWARD DROP")},
	{name: "nftables flushed", on: usesNFTables, daemon: either, inject: commands("nft flush ruleset")},
	{name: "nftables tables deleted", on: usesNFTables, daemon: either,
		inject: commands("nft delete table {nft} flannel-ipv{4}")},
	{name: "nftables rules deleted", on: usesNFTables, daemon: either,
		inject: commands("nft flush chain {nft} flannel-ipv{4} postrouting")},
	{name: "nftables rule among ours", on: usesNFTables, daemon: either,
		inject: commands("nft insert rule {nft} flannel-ipv{4} forward drop")},
}

var daemonFaults = []fault{
	{name: "daemon killed", inject: kill, undo: restart},
	{name: "daemon killed, all of its state gone",
		inject: func(ctx context.Context, s *testbed) error {
			s.node.Kill()
			do := []action{commands("ip -{4} route flush proto 70", "nft flush ruleset")}
			if hasDevice(s.scenario) {
				do = append(do, commands("ip link del {dev}"))
			}
			if usesIPTables(s.scenario) {
				do = append(do, commands("{iptables} -P FORWARD DROP"))
			}
			return s.all(ctx, do...)
		}, undo: restart},
	{name: "daemon killed, peers change", undo: restart, restore: peersBack,
		inject: func(ctx context.Context, s *testbed) error { return s.all(ctx, kill, peersChange) }},
	{name: "daemon killed while many peers join", on: fewPeers, inject: killWhileJoining, undo: restart,
		restore: othersLeave(someOthers)},
	{name: "few descriptors, routes and rules flushed",
		inject: func(ctx context.Context, s *testbed) (err error) {
			if s.unlimit, err = s.node.LimitFiles(0); err != nil {
				return err
			}
			return s.all(ctx, commands("ip -{4} route flush proto 70"), flushRules)
		},
		undo: func(_ context.Context, s *testbed) error { return s.unlimit() }},
	// Elsewhere, so many strangers are not on the link, or leave nexthop objects behind.
	{name: "memory limited, many peers join, a route deleted, rules flushed", memory: true,
		on:     func(g scenario) bool { return isVXLAN(g) && fewPeers(g) },
		inject: joinWithinLimit, restore: othersLeave(manyOthers)},
	{name: "daemon frozen, peers change", restore: peersBack,
		inject: func(ctx context.Context, s *testbed) error {
			return errors.Join(s.node.Freeze(ctx), peersChange(ctx, s))
		},
		undo: func(_ context.Context, s *testbed) error { return s.node.Thaw() }},
	{name: "notifications lost", inject: loseNotifications,
		undo: func(_ context.Context, s *testbed) error { return s.node.Thaw() }},
	{name: "subnet file deleted", daemon: either,
		inject: func(_ context.Context, s *testbed) error { return os.Remove(s.node.SubnetFile()) }},
	{name: "subnet file emptied", daemon: either,
		inject: func(_ context.Context, s *testbed) error { return os.Truncate(s.node.SubnetFile(), 0) }},
}

var etcdFaults = []fault{
	{name: "lease deleted", daemon: either, inject: func(ctx context.Context,
		s *testbed) error {
		return s.Etcd.Delete(ctx, s.key)
	}},
	{name: "lease changed", daemon: either, inject: func(ctx context.Context, s *testbed) error {
		text, err := s.Etcd.Get(ctx, s.key)
		if err != nil {
			return err
		}
		return s.Etcd.Put(ctx, s.key, strings.Replace(text, `"BackendType":"`, `"BackendType":"no-`, 1))
	}},
	{name: "all leases deleted", restore: joinAll,
		inject: func(ctx context.Context, s *testbed) error {
			_, err := s.Etcd.Client.Delete(ctx, lab.Prefix+"/subnets/", clientv3.WithPrefix())
			return err
		}},
	{name: "all of etcd's keys deleted but the configuration", restore: joinAll,
		inject: func(ctx context.Context, s *testbed) error {
			for _, prefix := range []string{"/subnets/", "/nodes/"} {
				if _, err := s.Etcd.Client.Delete(ctx, lab.Prefix+prefix, clientv3.WithPrefix()); err != nil {
					return err
				}
			}
			return nil
		}},
	{name: "etcd killed", inject: killEtcd, undo: startEtcd},
	{name: "etcd away, device deleted", on: hasDevice, restore: startEtcd,
		inject: func(ctx context.Context, s *testbed) error {
			return s.all(ctx, killEtcd, commands("ip link del {dev}"))
		}},
	{name: "etcd away, routes flushed", restore: startEtcd,
		inject: func(ctx context.Context, s *testbed) error {
			return s.all(ctx, killEtcd, commands("ip -{4} route flush proto 70"))
		}},
	{name: "etcd cut off, peers change", restore: peersBack,
		inject: func(ctx context.Context, s *testbed) error {
			return errors.Join(s.Etcd.Cut(ctx), peersChange(ctx, s), s.Etcd.Compact(ctx))
		},
		undo: func(ctx context.Context, s *testbed) error { return s.Etcd.Restore(ctx) }},
	{name: "etcd slow, peers change", restore: peersBack,
		inject: func(ctx context.Context, s *testbed) error {
			defer s.Etcd.Slow()()
			return s.all(ctx, peersChange, commands("ip route del {subnet}"), func(ctx context.Context, s *testbed) error {
				return lab.Poll(ctx, "the nodes to follow their peers", func() error { return s.followed(ctx) })
			})
		}},
	{name: "etcd killed, peers change", restore: peersBack,
		inject: func(ctx context.Context, s *testbed) error {
			if err := errors.Join(s.Etcd.Cut(ctx), peersChange(ctx, s), s.Etcd.Compact(ctx)); err != nil {
				return err
			}
			s.Etcd.Kill()
			return nil
		},
		undo: func(ctx context.Context, s *testbed) error {
			return errors.Join(s.Etcd.Start(ctx), s.Etcd.Restore(ctx))
		}},
}

// flushRules removes all firewall rules.
func flushRules(ctx context.Context, s *testbed) error {
	if usesNFTables(s.scenario) {
		return commands("nft flush ruleset")(ctx, s)
	}
	return commands("{iptables} -F", "{iptables} -t nat -F")(ctx, s)
}

// The leases of other strangers, from firstOther on, appear and go while the daemon is killed or limited. So many others
// are enough for a change that takes a while; so many are most of the peers up to which no nexthop objects are used: later
// such objects would stay.
const firstOther, someOthers, manyOthers = 10, 60, 200

// joinOthers writes the leases of so many other strangers.
func joinOthers(number int) action {
	return func(ctx context.Context, s *testbed) error {
		for i := range number {
			if err := s.join(ctx, s.stranger(firstOther+i, false)); err != nil {
				return err
			}
		}
		return nil
	}
}

// waitOthers waits until the kernel holds the first so many other strangers.
func waitOthers(number int) action {
	return func(ctx context.Context, s *testbed) error {
		last := s.stranger(firstOther+number-1, false).IPv4.String()
		return lab.Poll(ctx, fmt.Sprintf("%d new peers", number), func() error {
			out, err := s.node.Run(ctx, "ip route show "+last)
			if err == nil && out == "" {
				err = errors.New("there is no route to " + last)
			}
			return err
		})
	}
}

// othersLeave removes the leases of other strangers, and waits until the node has followed.
func othersLeave(number int) action {
	return func(ctx context.Context, s *testbed) error {
		for i := range number {
			if err := s.Etcd.Delete(ctx, subnetKey(s.stranger(firstOther+i, false).Key())); err != nil {
				return err
			}
		}
		last := s.stranger(firstOther+number-1, false).IPv4.String()
		return lab.Poll(ctx, "the peers to be gone", func() error {
			out, err := s.node.Run(ctx, "ip route show "+last)
			if err == nil && out != "" {
				err = errors.New(out)
			}
			return err
		})
	}
}

// killWhileJoining kills the daemon in the middle of a change: when the kernel holds the first of many new peers.
func killWhileJoining(ctx context.Context, s *testbed) error {
	err := s.all(ctx, joinOthers(someOthers), waitOthers(1))
	s.node.Kill()
	return err
}

// joinWithinLimit lets many peers join, and removes what the daemon must restore. The daemon stays within its
// limit of memory.
func joinWithinLimit(ctx context.Context, s *testbed) error {
	pid := s.node.PID()
	kills, err := s.node.OOMKills()
	if err != nil {
		return err
	}
	err = s.all(ctx, joinOthers(manyOthers), waitOthers(1), commands("ip route del {subnet}"), flushRules,
		waitOthers(manyOthers))
	now, errNow := s.node.OOMKills()
	if err = errors.Join(err, errNow); err == nil && (now > kills || s.node.PID() != pid || s.node.Exited()) {
		err = fmt.Errorf("the OOM killer has killed %d processes: flanneld or its programs", now-kills)
	}
	return err
}

func hasDevice(g scenario) bool       { return len(g.devices) > 0 }
func isVXLAN(g scenario) bool         { return strings.Contains(g.backend, `"vxlan"`) }
func usesIPTables(g scenario) bool    { return !g.nftables }
func usesNFTables(g scenario) bool    { return g.nftables }
func usesIPTablesNFT(g scenario) bool { return !g.nftables && !g.legacy }
func fewPeers(g scenario) bool        { return !manyPeers(g) }
func manyPeers(g scenario) bool       { return g.strangers > 256 }

// all runs actions in turn, until one fails.
func (s *testbed) all(ctx context.Context, actions ...action) error {
	for _, d := range actions {
		if err := d(ctx, s); err != nil {
			return err
		}
	}
	return nil
}

// commands runs lines on the node, for each family in turn. A word in braces differs between the families:
//
//	{4}         4 or 6
//	{dev}       the daemon's device
//	{subnet}    the peer's subnet
//	{vtep}      the peer's address on the device
//	{mac}       the peer's MAC there
//	{nobody}    an unused address of the uplink's subnet
//	{extra}     an address of the network that is not the node's
//	{iptables}  iptables or ip6tables
//	{nft}       ip or ip6
//
// A line that is the same for both families is run once.
func commands(lines ...string) action {
	return func(ctx context.Context, s *testbed) error {
		for _, line := range lines {
			done := ""
			for i, words := range s.words() {
				if i >= len(s.devices) && strings.Contains(line, "{dev}") {
					continue // one device for both families
				}
				command := strings.NewReplacer(words...).Replace(line)
				if command == done {
					continue
				}
				if _, err := s.node.Run(ctx, command); err != nil {
					return err
				}
				done = command
			}
		}
		return nil
	}
}

// words returns the words in braces and their values, for each family.
func (s *testbed) words() [][]string {
	var all [2][]string
	iptables := s.iptables()
	for i, f := range []struct {
		four, nobody, extra, nft string
		subnet                   netip.Prefix
		data                     json.RawMessage
	}{
		{"4", "198.18.0.250", "10.4.0.99/32", "ip", s.theirs.IPv4, s.theirs.Attrs.BackendData},
		{"6", "fd18::250", "fd00:5::99/128", "ip6", s.theirs.IPv6, s.theirs.Attrs.BackendV6Data},
	} {
		var vtep struct{ VtepMAC string }
		_ = json.Unmarshal(f.data, &vtep) // not every backend has one
		all[i] = []string{"{4}", f.four, "{subnet}", f.subnet.String(), "{vtep}", f.subnet.Addr().String(), "{mac}",
			vtep.VtepMAC,
			"{nobody}", f.nobody, "{extra}", f.extra, "{iptables}", iptables[i], "{nft}", f.nft}
		if i < len(s.devices) {
			all[i] = append(all[i], "{dev}", s.devices[i])
		}
	}
	if s.ipv4 {
		return all[:1]
	}
	return all[:]
}

// iptables are the programs for the two families.
func (s *testbed) iptables() [2]string {
	if s.legacy {
		return [2]string{"iptables-legacy", "ip6tables-legacy"}
	}
	return [2]string{"iptables", "ip6tables"}
}

func startNetwork(ctx context.Context, s *testbed) error {
	return s.node.ConfigureUplink(ctx, s.node.IPv4)
}

func stopIPv4(ctx context.Context, s *testbed) error {
	_, err := s.node.Run(ctx, "ip -4 addr flush dev eth0")
	return err
}

func flushRoutes(ctx context.Context, s *testbed) error {
	s.others = nil
	for _, words := range s.words() {
		family := "-" + words[1]
		out, err := s.node.Run(ctx, "ip "+family+" route show")
		if err != nil {
			return err
		}
		for line := range strings.Lines(out) {
			if !strings.Contains(line, "proto 70") && !strings.Contains(line, "fe80:") {
				s.others = append(s.others, "route replace "+strings.TrimSpace(line))
			}
		}
		if _, err := s.node.Run(ctx, "ip "+family+" route flush table main"); err != nil {
			return err
		}
	}
	// Those without a gateway first: the others need them.
	slices.SortStableFunc(s.others, func(a, b string) int { return strings.Count(a, " via ") - strings.Count(b, " via ") })
	return nil
}

func restoreRoutes(ctx context.Context, s *testbed) error { return s.node.Script(ctx, s.others...) }

// replaceIPTables returns an action that does what a restart of the firewall does, or iptables-restore of rules that
// were saved before flannel was installed. FORWARD gets a policy, and rules at its end.
func replaceIPTables(forward string) action {
	return func(ctx context.Context, s *testbed) error {
		file := s.node.Dir + "/saved"
		policy, rest, _ := strings.Cut(forward, "\n")
		rules := "*nat\n:PREROUTING ACCEPT\n:INPUT ACCEPT\n:OUTPUT ACCEPT\n:POSTROUTING ACCEPT\nCOMMIT\n" +
			"*filter\n:INPUT ACCEPT\n" + policy + "\n:OUTPUT ACCEPT\n-A FORWARD -m conntrack --ctstate INVALID -j DROP\n" +
			rest + "COMMIT\n"
		if err := os.WriteFile(file, []byte(rules), 0o644); err != nil {
			return err
		}
		return commands("{iptables}-restore "+file)(ctx, s)
	}
}

func kill(_ context.Context, s *testbed) error {
	s.node.Kill()
	return nil
}

func restart(ctx context.Context, s *testbed) error { return s.node.Restart(ctx) }

func killEtcd(_ context.Context, s *testbed) error {
	s.Etcd.Kill()
	return nil
}

func startEtcd(ctx context.Context, s *testbed) error { return s.Etcd.Start(ctx) }

// loseNotifications freezes the daemon until its sockets have overflowed. One of the lost notifications is that a
// route was deleted.
func loseNotifications(ctx context.Context, s *testbed) error {
	before, err := s.node.NetlinkDrops(ctx)
	if err != nil {
		return err
	}
	if err := s.node.Freeze(ctx); err != nil {
		return err
	}
	lines := make([]string, 0, 20000)
	for i := range cap(lines) {
		lines = append(lines, fmt.Sprintf("route add 198.19.%d.%d dev eth0 table 100", i/256, i%256))
	}
	after := before
	for after == before {
		if err := s.node.Script(ctx, lines...); err != nil {
			return err
		}
		if _, err := s.node.Run(ctx, "ip route flush table 100"); err != nil {
			return err
		}
		if after, err = s.node.NetlinkDrops(ctx); err != nil {
			return err
		}
	}
	return commands("ip route del {subnet}")(ctx, s)
}

// waitError runs an action and waits until the daemon logs an error.
func (s *testbed) waitError(ctx context.Context, d action) error {
	before := len(s.node.Log())
	if err := d(ctx, s); err != nil {
		return err
	}
	return lab.Poll(ctx, "the daemon to log an error", func() error {
		if !regexp.MustCompile(`(?m)^E[0-9]{4} `).MatchString(s.node.Log()[before:]) {
			return errors.New("none yet")
		}
		return nil
	})
}

// stranger is the lease of a node that does not exist, with the first of its addresses or, if moved, the second.
func (s *testbed) stranger(i int, moved bool) subnet.Lease {
	l := subnet.Lease{
		Subnets: subnet.Subnets{
			IPv4: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(5 + i/256), byte(i), 0}), 24),
			IPv6: netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0xfd, 3: 5, 6: byte(0x10 + i/256), 7: byte(i)}), 64),
		},
		Attrs: subnet.Attrs{
			PublicIP:    netip.AddrFrom4([4]byte{198, 18, byte(i / 100), byte(100 + i%100)}),
			PublicIPv6:  netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x18, 14: byte(1 + i/100), 15: byte(100 + i%100)}),
			BackendType: "host-gw",
		},
	}
	if s.ipv4 {
		l.IPv6, l.Attrs.PublicIPv6 = netip.Prefix{}, netip.Addr{}
	}
	if moved {
		l.Attrs.PublicIP = netip.AddrFrom4([4]byte{198, 18, 0, byte(200 + i)})
	}
	if strings.Contains(s.backend, `"ipip"`) {
		l.Attrs.BackendType = "ipip"
	}
	if isVXLAN(s.scenario) {
		l.Attrs.BackendType = "vxlan"
		l.Attrs.BackendData = fmt.Appendf(nil, `{"VNI":1,"VtepMAC":"0e:00:00:04:%02x:%02x"}`, i/256, i%256)
		l.Attrs.BackendV6Data = fmt.Appendf(nil, `{"VNI":1,"VtepMAC":"0e:00:00:06:%02x:%02x"}`, i/256, i%256)
	}
	return l
}

func (s *testbed) join(ctx context.Context, l subnet.Lease) error {
	text, err := json.Marshal(l.Attrs)
	if err != nil {
		return err
	}
	return s.Etcd.Put(ctx, subnetKey(l.Key()), string(text))
}

// joinAll writes the leases of all strangers.
func joinAll(ctx context.Context, s *testbed) error {
	for i := range s.strangers {
		if err := s.join(ctx, s.stranger(i, false)); err != nil {
			return err
		}
	}
	return nil
}

// peersChange removes the lease of one stranger, and changes the address of another.
func peersChange(ctx context.Context, s *testbed) error {
	return errors.Join(s.Etcd.Delete(ctx, subnetKey(s.stranger(0, false).Key())), s.join(ctx, s.stranger(1, true)))
}

// peersBack waits until all nodes have followed peersChange, and then restores the strangers' leases.
func peersBack(ctx context.Context, s *testbed) error {
	if err := lab.Poll(ctx, "the nodes to follow their peers", func() error { return s.followed(ctx) }); err != nil {
		return err
	}
	return joinAll(ctx, s)
}

// followed returns an error if a node has not followed peersChange yet.
func (s *testbed) followed(ctx context.Context) error {
	gone, moved := s.stranger(0, false).IPv4.String(), s.stranger(1, true).Attrs.PublicIP.String()
	for _, n := range s.Nodes() {
		held, err := n.Holds(ctx)
		switch {
		case err != nil:
			return err
		case strings.Contains(held, gone):
			return fmt.Errorf("%s: %s has left, and is there", n.Hostname, gone)
		case !strings.Contains(held, moved):
			return fmt.Errorf("%s: %s is not there", n.Hostname, moved)
		}
	}
	return nil
}
