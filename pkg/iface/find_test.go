package iface

import (
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/flanneld/flanneld/pkg/nstest"
)

// setup makes a namespace and runs the lines of ip(8) commands in it.
func setup(t *testing.T, script string) {
	t.Helper()
	nstest.Need(t, "ip")
	nstest.New(t)
	for line := range strings.Lines(script) {
		if line = strings.TrimSpace(line); line != "" {
			nstest.Run(t, "ip "+line)
		}
	}
}

func find(t *testing.T, sel Selector, ipv4, ipv6 bool, want string) Uplink {
	t.Helper()
	u, err := Find(sel, ipv4, ipv6)
	if err != nil {
		t.Fatal(err)
	}
	if u.String() != want {
		t.Errorf("got  %s\nwant %s", u, want)
	}
	return u
}

func TestFind(t *testing.T) {
	setup(t, `
		link add eth0 address 02:00:00:00:00:10 mtu 1400 type veth peer name far0
		link add eth1 type veth peer name far1
		link set far0 up
		link set far1 up
		link set eth0 up
		link set eth1 up
		link property add dev eth1 altname enp3s0
		addr add 198.18.0.1/24 dev eth0
		addr add 198.18.0.9/24 dev eth0
		addr add 2001:db8::1/64 dev eth0 nodad
		addr add 198.18.5.1/24 dev eth1
		addr add 198.18.6.1/24 dev eth1 scope link
		addr add 2001:db8:5::1/64 dev eth1 nodad
		addr add 2001:db8:6::1/64 dev eth1 preferred_lft 0 nodad
		route add default via 198.18.0.254 metric 200
		route add default via 198.18.5.254 metric 100
		route add default via 2001:db8::fe metric 10
		route add unreachable default metric 5
		-6 route add unreachable default metric 5
		route add default via 198.18.0.254 table 77
		route add 203.0.113.0/24 via 198.18.0.254 src 198.18.0.9`)

	u := find(t, Selector{}, true, true, "eth1 198.18.5.1, 2001:db8:5::1, mtu 1500")
	if got := slices.Concat(u.IPv4.Prefixes, u.IPv6.Prefixes); len(got) != 2 ||
		got[0] != netip.MustParsePrefix("198.18.5.0/24") || got[1] != netip.MustParsePrefix("2001:db8:5::/64") {
		t.Errorf("on link: %v", got)
	}
	u = find(t, Selector{}, false, true, "eth0 2001:db8::1, mtu 1400")
	if u.IPv6.MAC != "02:00:00:00:00:10" || u.IPv6.Index == 0 {
		t.Errorf("MAC %q, index %d", u.IPv6.MAC, u.IPv6.Index)
	}
	find(t, Selector{Criteria: Criteria{Names: []string{"eth9", "eth0"}}}, true, false, "eth0 198.18.0.1, mtu 1400")
	find(t, Selector{Criteria: Criteria{Names: []string{"enp3s0"}}}, true, false, "eth1 198.18.5.1, mtu 1500")
	find(t, Selector{Criteria: Criteria{Names: []string{"198.18.0.9"}}}, true, false, "eth0 198.18.0.9, mtu 1400") // a secondary address is no temporary one
	find(t, Selector{Criteria: Criteria{Names: []string{"2001:db8:6::1"}}}, true, true, "eth1 198.18.5.1, 2001:db8:6::1, mtu 1500")
	find(t, Selector{Criteria: Criteria{Regexps: regexps(`^198\.18\.0\.`)}}, true, false, "eth0 198.18.0.1, mtu 1400")
	find(t, Selector{Criteria: Criteria{CanReach: ip("203.0.113.5")}}, true, false, "eth0 198.18.0.9, mtu 1400")
	find(t, Selector{Criteria: Criteria{CanReach: ip("198.18.0.1")}}, true, false, "eth0 198.18.0.1, mtu 1400") // the route is lo's
	find(t, Selector{Criteria: Criteria{CanReach: ip("2001:db8:5::99")}}, true, true, "eth1 198.18.5.1, 2001:db8:5::1, mtu 1500")
	find(t, Selector{PublicIP: ip("198.18.0.9")}, true, false, "eth0 198.18.0.9, mtu 1400")
	find(t, Selector{PublicIP: ip("203.0.113.7")}, true, false,
		"eth1 198.18.5.1 (known to peers as 203.0.113.7), mtu 1500")

	// The kernel lists the newest IPv6 address first.
	nstest.Run(t, "ip addr add 2001:db8::2/64 dev eth0 nodad")
	find(t, Selector{Prefer: []netip.Addr{ip("2001:db8::1")}}, false, true, "eth0 2001:db8::1, mtu 1400")

	nstest.Run(t, "ip link set eth1 down")
	find(t, Selector{}, true, false, "eth0 198.18.0.1, mtu 1400") // the better route went with its link
	if _, err := Find(Selector{Criteria: Criteria{Names: []string{"eth1"}}}, true, false); err == nil ||
		err.Error() != "eth1 (--iface=eth1) is down: ip link set eth1 up" {
		t.Errorf("got %v", err)
	}
	want := "no interface matches --iface=eth9: this host has eth0 (198.18.0.1/24, 198.18.0.9/24, 2001:db8::2/64, 2001:db8::1/64), " +
		"eth1 (198.18.6.1/24, 198.18.5.1/24, down), lo (127.0.0.1/8, ::1/128), far0 (no address), far1 (no address); set --iface to the name or an address of one of them"
	// The module of ipip and its like, which another test may load at any time, put a
	// device into each namespace that is made.
	fallback := regexp.MustCompile(`, (tunl0|sit0|ip6tnl0|gre0|gretap0|erspan0|ip_vti0|ip6_vti0) \(no address, down\)`)
	if _, err := Find(Selector{Criteria: Criteria{Names: []string{"eth9"}}}, true, false); err == nil ||
		fallback.ReplaceAllString(err.Error(), "") != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
	want = "no route for --iface-can-reach=2001:db8:99::1 (no route to host): this host has "
	if _, err := Find(Selector{Criteria: Criteria{CanReach: ip("2001:db8:99::1")}}, true, false); err == nil ||
		!strings.HasPrefix(err.Error(), want) {
		t.Errorf("got  %v\nwant %s", err, want)
	}
}

func TestFindMultipath(t *testing.T) {
	setup(t, `
		link add eth0 type veth peer name eth1
		link set eth0 up
		link set eth1 up
		addr add 198.18.0.1/24 dev eth0
		addr add 198.18.1.1/24 dev eth1
		route add default nexthop via 198.18.1.254 nexthop via 198.18.0.254`)
	find(t, Selector{}, true, false, "eth1 198.18.1.1, mtu 1500")
}

// The uplink may be any kind of device.
func TestFindPointToPoint(t *testing.T) {
	setup(t, `
		tuntap add tun0 mode tun
		link set tun0 up mtu 1420
		addr add 198.18.0.1 peer 198.18.0.2/32 dev tun0
		addr add 2001:db8::1 peer 2001:db8::2/128 dev tun0 nodad
		route add default dev tun0`)
	u := find(t, Selector{}, true, true, "tun0 198.18.0.1, 2001:db8::1, mtu 1420")
	if u.IPv4.MAC != "" {
		t.Errorf("MAC %q", u.IPv4.MAC)
	}
	for peer, want := range map[string]bool{"198.18.0.2": true, "2001:db8::2": true, "198.18.0.3": false,
		"2001:db8::3": false} {
		if u.OnLink(ip(peer)) != want {
			t.Errorf("%s on link: %t, want %t", peer, !want, want)
		}
	}
	find(t, Selector{Criteria: Criteria{Names: []string{"198.18.0.1"}}}, true, false, "tun0 198.18.0.1, mtu 1420")
	if _, err := Find(Selector{Criteria: Criteria{Names: []string{"198.18.0.2"}}}, true, false); err == nil {
		t.Error("the peer's address was taken for ours")
	}
}

func TestFindStackedDevices(t *testing.T) {
	for name, devices := range map[string]string{
		"VLAN on a bond": `
			link add low type bond
			link add link low name up.7 type vlan id 7`,
		"MACVLAN on a bridge": `
			link add low type bridge
			link add link low name up.7 type macvlan`,
	} {
		t.Run(name, func(t *testing.T) {
			setup(t, "")
			for line := range strings.Lines(strings.TrimSpace(devices)) {
				if out, err := nstest.Try("ip " + line); err != nil {
					t.Skipf("needs a kernel with these devices: ip %s: %s", strings.TrimSpace(line), out)
				}
			}
			for _, line := range []string{
				"link set low up", "link set up.7 up",
				"addr add 198.18.7.1/24 dev up.7", "addr add 2001:db8:7::1/64 dev up.7 nodad",
			} {
				nstest.Run(t, "ip "+line)
			}
			find(t, Selector{Criteria: Criteria{Regexps: regexps(`^up\.7$`)}}, true, true, "up.7 198.18.7.1, 2001:db8:7::1, mtu 1500")
		})
	}
}

// While the other end of the cable is out, duplicate address detection cannot
// finish, and privacy addresses (RFC 8981) are nothing to publish.
func TestFindTentative(t *testing.T) {
	setup(t, `
		link add eth0 type veth peer name far
		link set eth0 up
		addr add 2001:db8::1/64 dev eth0
		link add eth1 type veth peer name far1
		link set far1 up
		link set eth1 up`)
	nstest.Need(t, "sysctl")
	nstest.Run(t, "sysctl -qw net.ipv6.conf.eth1.use_tempaddr=2")
	nstest.Run(t, "ip addr add 2001:db8:1::1/64 dev eth1 mngtmpaddr nodad")

	_, err := Find(Selector{Criteria: Criteria{Names: []string{"eth0"}}}, false, true)
	if err == nil || !strings.Contains(err.Error(),
		"eth0 (--iface=eth0) has no usable IPv6 address (2001:db8::1/64 is tentative)") {
		t.Errorf("got %v", err)
	}
	if out := nstest.Run(t, "ip -6 addr show dev eth1 temporary"); !strings.Contains(out, "2001:db8:1:") {
		t.Fatalf("the kernel made no temporary address:\n%s", out)
	}
	find(t, Selector{Criteria: Criteria{Names: []string{"eth1"}}}, false, true, "eth1 2001:db8:1::1, mtu 1500")
}
