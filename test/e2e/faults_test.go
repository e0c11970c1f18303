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

// A fault is something that happens to a node, mostly by way of others on the
// same host. The clock starts with it or, where nobody can mend anything before
// it is undone, with undo.
type fault struct {
	name  string
	on    func(ground) bool // where it can happen; nil: everywhere
	while moment            // it may happen
	harm  deed
	undo  deed
	tidy  deed // where pods talk again, but not all is as before
}

// moment tells what the daemon does meanwhile.
type moment int

const (
	awake  moment = iota // looks on
	both                 // looks on, or stands still
	asleep               // stands still, or else it would be faster
)

// A deed is done to a scene.
type deed func(context.Context, *scene) error

var everyFault = slices.Concat(deviceFaults, routeFaults, neighbourFaults, uplinkFaults, ruleFaults, daemonFaults, etcdFaults)

var deviceFaults = []fault{
	{name: "device deleted", on: hasDevice, while: both, harm: commands("ip link del {dev}")},
	{name: "device down", on: hasDevice, while: both, harm: commands("ip link set {dev} down")},
	{name: "device's addresses flushed", on: hasDevice, while: both, harm: commands("ip addr flush dev {dev}")},
	{name: "device's MTU changed", on: hasDevice, while: both, harm: commands("ip link set {dev} mtu 1280")},
	// systemd's MACAddressPolicy does this, NetworkManager did.
	{name: "device's MAC changed", on: isVXLAN, while: both, harm: commands("ip link set {dev} address 0e:00:00:00:00:99")},
	{name: "device renamed", on: hasDevice, while: asleep,
		harm: commands("ip link set {dev} down", "ip link set {dev} name flannel-lost{4}", "ip link set flannel-lost{4} up")},
	{name: "device of another kind", on: hasDevice, while: asleep,
		harm: commands("ip link del {dev}", "ip link add {dev} type bridge", "ip link set {dev} up")},
	{name: "device of another port", on: isVXLAN, while: asleep,
		harm: commands("ip link del {dev}", "ip link add {dev} type vxlan id {4} dstport 4789 dev eth0", "ip link set {dev} up")},
	{name: "device with another's address", on: hasDevice, while: both, harm: commands("ip addr add {extra} dev {dev}")},
}

var routeFaults = []fault{
	// ip cannot flush routes that go through nexthop objects.
	{name: "routes flushed", on: fewPeers, while: both, harm: commands("ip -{4} route flush proto 70")},
	{name: "a route deleted", while: both, harm: commands("ip route del {subnet}")},
	{name: "a route to another gateway", while: both, harm: commands("ip route replace {subnet} via {nobody} dev eth0 proto static")},
	{name: "a route put before ours", while: both, harm: commands("ip route prepend {subnet} via {nobody} dev eth0 proto static")},
	{name: "a route to another device", while: both, harm: commands("ip route replace {subnet} dev lo proto static")},
	{name: "a route into a black hole", while: both, harm: commands("ip route replace blackhole {subnet} proto static")},
	// Nobody but the host's own programs can bring its other routes back.
	{name: "all routes flushed", on: fewPeers, while: asleep, harm: flushRoutes, undo: restoreRoutes},
	{name: "nexthops flushed", on: manyPeers, while: both, harm: commands("ip nexthop flush proto 70")},
}

var neighbourFaults = []fault{
	{name: "neighbours flushed", on: isVXLAN, while: asleep, harm: commands("ip -{4} neigh flush dev {dev} nud all")},
	{name: "a neighbour of another MAC", on: isVXLAN, while: both, harm: commands("ip neigh replace {vtep} lladdr 0e:00:00:00:00:99 dev {dev} nud permanent")},
	{name: "a neighbour that ages", on: isVXLAN, while: both, harm: commands("ip neigh replace {vtep} lladdr 0e:00:00:00:00:99 dev {dev} nud stale")},
	{name: "FDB flushed", on: isVXLAN, while: both, harm: commands("bridge fdb flush dev {dev}")},
	{name: "an FDB entry deleted", on: isVXLAN, while: both, harm: commands("bridge fdb del {mac} dev {dev}")},
	{name: "an FDB entry to another host", on: isVXLAN, while: both, harm: commands("bridge fdb replace {mac} dev {dev} dst {nobody}")},
}

var uplinkFaults = []fault{
	{name: "uplink down and up", while: both, harm: commands("ip link set eth0 down"), undo: startNetwork},
	{name: "cable out and in", harm: func(ctx context.Context, s *scene) error { return s.node.PullCable(ctx) },
		undo: func(ctx context.Context, s *scene) error { return s.node.PlugCable(ctx) }},
	{name: "uplink replaced by another", while: both, harm: func(ctx context.Context, s *scene) error { return s.node.RemoveUplink(ctx) },
		undo: func(ctx context.Context, s *scene) error {
			return errors.Join(s.node.ReplaceUplink(ctx), startNetwork(ctx, s))
		}},
	{name: "network restarted", while: both, undo: startNetwork,
		harm: commands("ip -{4} addr flush dev eth0", "ip -{4} route flush dev eth0", "ip link set eth0 down")},
	{name: "uplink's addresses flushed", while: both, harm: commands("ip -{4} addr flush dev eth0 scope global"), undo: startNetwork},
	{name: "uplink's MTU changed", harm: commands("ip link set eth0 mtu 1400"), undo: commands("ip link set eth0 mtu 1500")},
	{name: "uplink's address changed",
		harm: func(ctx context.Context, s *scene) error {
			return errors.Join(stopIPv4(ctx, s), s.node.ConfigureUplink(ctx, netip.MustParseAddr("198.18.0.77")))
		},
		tidy: func(ctx context.Context, s *scene) error { return errors.Join(stopIPv4(ctx, s), startNetwork(ctx, s)) }},
	{name: "IPv6 off and on", on: func(g ground) bool { return !g.ipv4 },
		harm: func(ctx context.Context, s *scene) error {
			return s.complains(ctx, commands("sysctl -qw net/ipv6/conf/eth0/disable_ipv6=1", "sysctl -qw net/ipv6/conf/{dev}/disable_ipv6=1"))
		},
		undo: func(ctx context.Context, s *scene) error {
			on := commands("sysctl -qw net/ipv6/conf/eth0/disable_ipv6=0", "sysctl -qw net/ipv6/conf/{dev}/disable_ipv6=0")
			return s.all(ctx, on, startNetwork)
		}},
}

var ruleFaults = []fault{
	{name: "iptables flushed", on: usesIPTables, while: both, harm: commands("{iptables} -F", "{iptables} -t nat -F")},
	{name: "iptables chains deleted", on: usesIPTables, while: asleep,
		harm: commands("{iptables} -F", "{iptables} -X", "{iptables} -t nat -F", "{iptables} -t nat -X", "{iptables} -P FORWARD DROP")},
	{name: "iptables jumps deleted", on: usesIPTables, while: both, harm: commands("{iptables} -F FORWARD", "{iptables} -t nat -F POSTROUTING")},
	{name: "iptables ruleset replaced", on: usesIPTables, while: both, harm: replaceIPTables},
	{name: "iptables rule among ours", on: usesIPTables, while: both, harm: commands("{iptables} -I FLANNEL-FWD -j DROP")},
	{name: "nftables flushed, and iptables", on: usesIPTablesNFT, while: both, harm: commands("nft flush ruleset", "{iptables} -P FORWARD DROP")},
	{name: "nftables flushed", on: usesNFTables, while: both, harm: commands("nft flush ruleset")},
	{name: "nftables tables deleted", on: usesNFTables, while: both, harm: commands("nft delete table {nft} flannel-ipv{4}")},
	{name: "nftables rules deleted", on: usesNFTables, while: both, harm: commands("nft flush chain {nft} flannel-ipv{4} postrouting")},
	{name: "nftables rule among ours", on: usesNFTables, while: both, harm: commands("nft insert rule {nft} flannel-ipv{4} forward drop")},
}

var daemonFaults = []fault{
	{name: "daemon killed", harm: kill, undo: restart},
	{name: "daemon killed, all of its state gone",
		harm: func(ctx context.Context, s *scene) error {
			s.node.Kill()
			do := []deed{commands("ip -{4} route flush proto 70", "nft flush ruleset")}
			if hasDevice(s.ground) {
				do = append(do, commands("ip link del {dev}"))
			}
			if usesIPTables(s.ground) {
				do = append(do, commands("{iptables} -P FORWARD DROP"))
			}
			return s.all(ctx, do...)
		}, undo: restart},
	{name: "daemon killed, peers change", undo: restart, tidy: peersBack,
		harm: func(ctx context.Context, s *scene) error { return s.all(ctx, kill, peersChange) }},
	{name: "daemon asleep, peers change", tidy: peersBack,
		harm: func(ctx context.Context, s *scene) error { return errors.Join(s.node.Freeze(ctx), peersChange(ctx, s)) },
		undo: func(_ context.Context, s *scene) error { return s.node.Thaw() }},
	{name: "notifications lost", harm: loseNotifications, undo: func(_ context.Context, s *scene) error { return s.node.Thaw() }},
	{name: "subnet file deleted", while: both, harm: func(_ context.Context, s *scene) error { return os.Remove(s.node.SubnetFile()) }},
	{name: "subnet file emptied", while: both, harm: func(_ context.Context, s *scene) error { return os.Truncate(s.node.SubnetFile(), 0) }},
}

var etcdFaults = []fault{
	{name: "lease deleted", while: both, harm: func(ctx context.Context, s *scene) error { return s.Etcd.Delete(ctx, s.key) }},
	{name: "lease changed", while: both, harm: func(ctx context.Context, s *scene) error {
		text, err := s.Etcd.Get(ctx, s.key)
		if err != nil {
			return err
		}
		return s.Etcd.Put(ctx, s.key, strings.Replace(text, `"BackendType":"`, `"BackendType":"no-`, 1))
	}},
	{name: "all leases deleted", tidy: joinAll,
		harm: func(ctx context.Context, s *scene) error {
			_, err := s.Etcd.Client.Delete(ctx, lab.Prefix+"/subnets/", clientv3.WithPrefix())
			return err
		}},
	{name: "all of etcd's keys deleted but the configuration", tidy: joinAll,
		harm: func(ctx context.Context, s *scene) error {
			for _, prefix := range []string{"/subnets/", "/nodes/"} {
				if _, err := s.Etcd.Client.Delete(ctx, lab.Prefix+prefix, clientv3.WithPrefix()); err != nil {
					return err
				}
			}
			return nil
		}},
	{name: "etcd killed", harm: killEtcd, undo: startEtcd},
	{name: "etcd away, device deleted", on: hasDevice, tidy: startEtcd,
		harm: func(ctx context.Context, s *scene) error { return s.all(ctx, killEtcd, commands("ip link del {dev}")) }},
	{name: "etcd away, routes flushed", tidy: startEtcd,
		harm: func(ctx context.Context, s *scene) error {
			return s.all(ctx, killEtcd, commands("ip -{4} route flush proto 70"))
		}},
	{name: "etcd cut off, peers change", tidy: peersBack,
		harm: func(ctx context.Context, s *scene) error {
			return errors.Join(s.Etcd.Cut(ctx), peersChange(ctx, s), s.Etcd.Compact(ctx))
		},
		undo: func(ctx context.Context, s *scene) error { return s.Etcd.Mend(ctx) }},
	{name: "etcd killed, peers change", tidy: peersBack,
		harm: func(ctx context.Context, s *scene) error {
			if err := errors.Join(s.Etcd.Cut(ctx), peersChange(ctx, s), s.Etcd.Compact(ctx)); err != nil {
				return err
			}
			s.Etcd.Kill()
			return nil
		},
		undo: func(ctx context.Context, s *scene) error { return errors.Join(s.Etcd.Start(ctx), s.Etcd.Mend(ctx)) }},
}

func hasDevice(g ground) bool       { return len(g.devices) > 0 }
func isVXLAN(g ground) bool         { return strings.Contains(g.backend, `"vxlan"`) }
func usesIPTables(g ground) bool    { return !g.nftables }
func usesNFTables(g ground) bool    { return g.nftables }
func usesIPTablesNFT(g ground) bool { return !g.nftables && !g.legacy }
func fewPeers(g ground) bool        { return !manyPeers(g) }
func manyPeers(g ground) bool       { return g.strangers > 256 }

// all does several deeds, until one fails.
func (s *scene) all(ctx context.Context, deeds ...deed) error {
	for _, d := range deeds {
		if err := d(ctx, s); err != nil {
			return err
		}
	}
	return nil
}

// commands runs lines on the node, for each family in turn. In braces stands
// what differs:
//
//	{4}         4 or 6
//	{dev}       the daemon's device
//	{subnet}    the peer's subnet
//	{vtep}      the peer's address on the device
//	{mac}       the peer's MAC there
//	{nobody}    an address on the uplink's link that nobody has
//	{extra}     an address of the network that is not the node's
//	{iptables}  iptables or ip6tables
//	{nft}       ip or ip6
//
// A line that reads the same for both is run once.
func commands(lines ...string) deed {
	return func(ctx context.Context, s *scene) error {
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

// words are what stands for the words in braces, for each family.
func (s *scene) words() [][]string {
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
		all[i] = []string{"{4}", f.four, "{subnet}", f.subnet.String(), "{vtep}", f.subnet.Addr().String(), "{mac}", vtep.VtepMAC,
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
func (s *scene) iptables() [2]string {
	if s.legacy {
		return [2]string{"iptables-legacy", "ip6tables-legacy"}
	}
	return [2]string{"iptables", "ip6tables"}
}

func startNetwork(ctx context.Context, s *scene) error {
	return s.node.ConfigureUplink(ctx, s.node.IPv4)
}

func stopIPv4(ctx context.Context, s *scene) error {
	_, err := s.node.Run(ctx, "ip -4 addr flush dev eth0")
	return err
}

func flushRoutes(ctx context.Context, s *scene) error {
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

func restoreRoutes(ctx context.Context, s *scene) error { return s.node.Script(ctx, s.others...) }

// replaceIPTables is what restarting a firewall does, or iptables-restore of
// what was saved before flannel came.
func replaceIPTables(ctx context.Context, s *scene) error {
	file := s.node.Dir + "/saved"
	rules := "*nat\n:PREROUTING ACCEPT\n:INPUT ACCEPT\n:OUTPUT ACCEPT\n:POSTROUTING ACCEPT\nCOMMIT\n" +
		"*filter\n:INPUT ACCEPT\n:FORWARD DROP\n:OUTPUT ACCEPT\n-A FORWARD -m conntrack --ctstate INVALID -j DROP\nCOMMIT\n"
	if err := os.WriteFile(file, []byte(rules), 0o644); err != nil {
		return err
	}
	return commands("{iptables}-restore "+file)(ctx, s)
}

func kill(_ context.Context, s *scene) error {
	s.node.Kill()
	return nil
}

func restart(ctx context.Context, s *scene) error { return s.node.Restart(ctx) }

func killEtcd(_ context.Context, s *scene) error {
	s.Etcd.Kill()
	return nil
}

func startEtcd(ctx context.Context, s *scene) error { return s.Etcd.Start(ctx) }

// loseNotifications has the daemon stand still while more happens than its
// sockets have room for, the end of a route among the rest.
func loseNotifications(ctx context.Context, s *scene) error {
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

// complains does a deed and waits until the daemon logs an error.
func (s *scene) complains(ctx context.Context, d deed) error {
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

// stranger is the lease of a node that is not there, at the first of its
// addresses or, moved, at the second.
func (s *scene) stranger(i int, moved bool) subnet.Lease {
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
	if isVXLAN(s.ground) {
		l.Attrs.BackendType = "vxlan"
		l.Attrs.BackendData = fmt.Appendf(nil, `{"VNI":1,"VtepMAC":"0e:00:00:04:%02x:%02x"}`, i/256, i%256)
		l.Attrs.BackendV6Data = fmt.Appendf(nil, `{"VNI":1,"VtepMAC":"0e:00:00:06:%02x:%02x"}`, i/256, i%256)
	}
	return l
}

func (s *scene) join(ctx context.Context, l subnet.Lease) error {
	text, err := json.Marshal(l.Attrs)
	if err != nil {
		return err
	}
	return s.Etcd.Put(ctx, subnetKey(l.Key()), string(text))
}

// joinAll has all strangers join.
func joinAll(ctx context.Context, s *scene) error {
	for i := range s.strangers {
		if err := s.join(ctx, s.stranger(i, false)); err != nil {
			return err
		}
	}
	return nil
}

// peersChange has one stranger leave, and another move.
func peersChange(ctx context.Context, s *scene) error {
	return errors.Join(s.Etcd.Delete(ctx, subnetKey(s.stranger(0, false).Key())), s.join(ctx, s.stranger(1, true)))
}

// peersBack waits until all nodes know of that, and has the strangers return.
func peersBack(ctx context.Context, s *scene) error {
	gone, moved := s.stranger(0, false).IPv4.String(), s.stranger(1, true).Attrs.PublicIP.String()
	for _, n := range s.Nodes() {
		err := lab.Poll(ctx, n.Hostname+" to follow its peers", func() error {
			held, err := n.Holds(ctx)
			switch {
			case err != nil:
				return err
			case strings.Contains(held, gone):
				return fmt.Errorf("%s has left, and is there", gone)
			case !strings.Contains(held, moved):
				return fmt.Errorf("%s is not there", moved)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return joinAll(ctx, s)
}
