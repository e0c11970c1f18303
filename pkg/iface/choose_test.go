package iface

import (
	"errors"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// withOverlay has the selector know the devices of an overlay.
func withOverlay(sel Selector) Selector {
	sel.Overlay = func(device string) bool { return strings.HasPrefix(device, "flannel") }
	return sel
}

// parseHost reads lines such as "eth0 down 198.18.0.1/24 2001:db8::5/64,tentative".
func parseHost(t *testing.T, text string) host {
	t.Helper()
	var h host
	for i, line := range strings.Split(strings.TrimSpace(text), "\n") {
		f := strings.Fields(line)
		l := link{index: i + 1, mtu: 1500, name: f[0], up: true, carrier: true}
		for _, word := range f[1:] {
			name, note, _ := strings.Cut(word, ",")
			switch {
			case word == "down":
				l.up = false
				continue
			case strings.HasPrefix(word, "alt="):
				l.altNames = append(l.altNames, word[4:])
				continue
			}
			local, peer, _ := strings.Cut(name, "->") // a point-to-point link
			p := netip.MustParsePrefix(local)
			a := addr{ip: p.Addr(), bits: p.Bits(), onLink: p.Masked()}
			if peer != "" {
				a.onLink = netip.MustParsePrefix(peer)
			}
			switch note {
			case "link":
				a.scope = unix.RT_SCOPE_LINK
			case "host":
				a.scope = unix.RT_SCOPE_HOST
			default:
				a.flags = map[string]int{
					"": 0, "tentative": unix.IFA_F_TENTATIVE, "dadfailed": unix.IFA_F_DADFAILED | unix.IFA_F_TENTATIVE,
					"temporary": unix.IFA_F_TEMPORARY, "secondary": unix.IFA_F_SECONDARY, "deprecated": unix.IFA_F_DEPRECATED,
				}[note]
			}
			l.addrs = append(l.addrs, a)
		}
		h.links = append(h.links, l)
	}
	return h
}

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

func regexps(patterns ...string) (out []*regexp.Regexp) {
	for _, p := range patterns {
		out = append(out, regexp.MustCompile(p))
	}
	return out
}

func TestChoose(t *testing.T) {
	const two = `
lo 127.0.0.1/8,host ::1/128,host
eth0 198.18.0.1/24 198.18.0.9/24,secondary fe80::1/64,link 2001:db8::2/64 2001:db8::1/64
eth1 alt=enp3s0 198.18.5.1/24 2001:db8:5::1/64`
	for _, c := range []struct {
		name    string
		host    string
		gateway int
		reach   route
		sel     Selector
		v4, v6  bool
		want    string // Uplink.String
		on      string // its prefixes
	}{
		{name: "default route", host: two, gateway: 3, v4: true, want: "eth1 198.18.5.1, mtu 1500", on: "198.18.5.0/24"},
		{name: "both families", host: two, gateway: 2, v4: true, v6: true, want: "eth0 198.18.0.1, 2001:db8::2, mtu 1500",
			on: "198.18.0.0/24 2001:db8::/64"},
		{name: "IPv6 alone", host: two, gateway: 2, v6: true, want: "eth0 2001:db8::2, mtu 1500", on: "2001:db8::/64"},
		{name: "an address in use stays", host: two, gateway: 2, v4: true, v6: true,
			sel:  Selector{Prefer: []netip.Addr{ip("198.18.0.1"), ip("2001:db8::1")}},
			want: "eth0 198.18.0.1, 2001:db8::1, mtu 1500"},
		{name: "an address in use goes when deprecated", host: "eth0 2001:db8::2/64 2001:db8::1/64,deprecated", gateway: 1,
			v6:  true,
			sel: Selector{Prefer: []netip.Addr{ip("2001:db8::1")}}, want: "eth0 2001:db8::2, mtu 1500"},
		{name: "first name that exists", host: two, sel: Selector{Criteria: Criteria{Names: []string{"eth9", "eth1", "eth0"}}}, v4: true,
			want: "eth1 198.18.5.1, mtu 1500"},
		{name: "first name that can serve", host: "eth0 down 198.18.0.1/24\neth1 fe80::1/64,link\neth2 198.18.2.1/24",
			sel: Selector{Criteria: Criteria{Names: []string{"eth0", "eth1", "eth2"}}}, v4: true, want: "eth2 198.18.2.1, mtu 1500"},
		{name: "alternative name", host: two, sel: Selector{Criteria: Criteria{Names: []string{"enp3s0"}}}, v4: true,
			want: "eth1 198.18.5.1, mtu 1500"},
		{name: "an address names its interface and is used", host: two, sel: Selector{Criteria: Criteria{Names: []string{"198.18.0.9"}}},
			v4: true, v6: true,
			want: "eth0 198.18.0.9, 2001:db8::2, mtu 1500"},
		{name: "an IPv6 address does so too", host: two, sel: Selector{Criteria: Criteria{Names: []string{"2001:db8::1"}}}, v4: true, v6: true,
			want: "eth0 198.18.0.1, 2001:db8::1, mtu 1500"},
		{name: "an address of a family that is off still names", host: two, sel: Selector{Criteria: Criteria{Names: []string{"2001:db8::1"}}},
			v4: true, want: "eth0 198.18.0.1, mtu 1500"},
		{name: "a deprecated address will do when named", host: "eth0 2001:db8::2/64 2001:db8:7::1/64,deprecated",
			sel: Selector{Criteria: Criteria{Names: []string{"2001:db8:7::1"}}}, v6: true,
			want: "eth0 2001:db8:7::1, mtu 1500", on: "2001:db8::/64 2001:db8:7::/64"},
		{name: "names before patterns", host: two, sel: Selector{Criteria: Criteria{Names: []string{"eth1"}, Regexps: regexps("eth0")}}, v4: true,
			want: "eth1 198.18.5.1, mtu 1500"},
		{name: "patterns after names", host: two, sel: Selector{Criteria: Criteria{Names: []string{"eth9"}, Regexps: regexps("eth0")}}, v4: true,
			want: "eth0 198.18.0.1, mtu 1500"},
		{name: "a pattern's address is used", host: two, sel: Selector{Criteria: Criteria{Regexps: regexps(`^198\.18\..*\.9$`)}}, v4: true,
			want: "eth0 198.18.0.9, mtu 1500"},
		{name: "addresses before names", host: "eth18 198.19.0.1/24\neth1 198.18.0.1/24",
			sel: Selector{Criteria: Criteria{Regexps: regexps("18")}}, v4: true, want: "eth1 198.18.0.1, mtu 1500"},
		{name: "the first pattern that matches", host: two, sel: Selector{Criteria: Criteria{Regexps: regexps("wlan", "eth1", "eth0")}}, v4: true,
			want: "eth1 198.18.5.1, mtu 1500"},
		{name: "a pattern skips what cannot serve", host: two, sel: Selector{Criteria: Criteria{Regexps: regexps(".*")}}, v4: true,
			want: "eth0 198.18.0.1, mtu 1500"},
		{name: "a pattern skips addresses of a family that is off",
			host: "eth0 198.18.0.1/24 2001:db8::5/64\neth5 198.18.5.1/24",
			sel:  Selector{Criteria: Criteria{Regexps: regexps("5")}}, v4: true, want: "eth5 198.18.5.1, mtu 1500"},
		{name: "a pattern skips unusable addresses",
			host: "eth0 198.18.0.1/24 2001:db8::5/64,temporary 2001:db8::6/64\neth5 198.18.5.1/24 2001:db8::55/64",
			sel:  Selector{Criteria: Criteria{Regexps: regexps("::5")}}, v4: true, v6: true, want: "eth5 198.18.5.1, 2001:db8::55, mtu 1500"},
		{name: "a pattern never means the overlay",
			host: "flannel.1 198.18.1.0/32\nflannel0 198.18.2.0/32\nflannel-wg 198.18.3.0/32\neth0 198.18.0.1/24",
			sel:  Selector{Criteria: Criteria{Regexps: regexps("^198", ".*")}}, v4: true, want: "eth0 198.18.0.1, mtu 1500"},
		{name: "a pattern means a container bridge last",
			host: "lo 198.18.9.9/32\ncni0 198.18.1.1/24\ndocker0 198.18.2.1/24\nbr-0123456789ab 198.18.3.1/24\neth1 198.18.0.1/24",
			sel:  Selector{Criteria: Criteria{Regexps: regexps("^198")}}, v4: true, want: "eth1 198.18.0.1, mtu 1500"},
		{name: "but it may mean one", host: two + "\ndocker0 198.18.2.1/24", sel: Selector{Criteria: Criteria{Regexps: regexps("^docker0$")}},
			v4: true, want: "docker0 198.18.2.1, mtu 1500"},
		{name: "an ordinary bridge is an interface like any", host: "br0 198.18.1.1/24\neth0 198.18.0.1/24",
			sel: Selector{Criteria: Criteria{Regexps: regexps("^198")}}, v4: true, want: "br0 198.18.1.1, mtu 1500"},
		{name: "can reach", host: two, reach: route{index: 2, src: ip("198.18.0.9")},
			sel: Selector{Criteria: Criteria{CanReach: ip("203.0.113.1")}}, v4: true, want: "eth0 198.18.0.9, mtu 1500"},
		{name: "can reach from a temporary address", host: "eth0 2001:db8::7/64,temporary 2001:db8::1/64",
			reach: route{index: 1, src: ip("2001:db8::7")},
			sel:   Selector{Criteria: Criteria{CanReach: ip("2001:db8:99::1")}}, v6: true, want: "eth0 2001:db8::1, mtu 1500"},
		{name: "can reach itself", host: two, reach: route{index: 1, src: ip("198.18.5.1"), local: true},
			sel: Selector{Criteria: Criteria{CanReach: ip("198.18.5.1")}}, v4: true, want: "eth1 198.18.5.1, mtu 1500"},
		{name: "can reach comes last", host: two, reach: route{index: 2},
			sel: Selector{Criteria: Criteria{Names: []string{"eth1"}, CanReach: ip("203.0.113.1")}}, v4: true, want: "eth1 198.18.5.1, mtu 1500"},
		{name: "public address held by an interface", host: two, gateway: 3, sel: Selector{PublicIP: ip("198.18.0.9")},
			v4: true, want: "eth0 198.18.0.9, mtu 1500"},
		{name: "public IPv6 address held by an interface", host: two, gateway: 3,
			sel: Selector{PublicIPv6: ip("2001:db8::1")}, v6: true, want: "eth0 2001:db8::1, mtu 1500"},
		{name: "public address held by lo", host: "lo 203.0.113.7/32\neth0 198.18.0.1/24", gateway: 2,
			sel: Selector{PublicIP: ip("203.0.113.7")}, v4: true,
			want: "eth0 198.18.0.1 (known to peers as 203.0.113.7), mtu 1500"},
		{name: "public address of a NAT", host: two, gateway: 2,
			sel: Selector{PublicIP: ip("203.0.113.7"), PublicIPv6: ip("2001:db8::1")}, v4: true, v6: true,
			want: "eth0 198.18.0.1 (known to peers as 203.0.113.7), 2001:db8::1, mtu 1500"},
		{name: "public address of a family that is off", host: two, gateway: 2, sel: Selector{PublicIPv6: ip("2001:db8::1")},
			v4: true, want: "eth0 198.18.0.1, mtu 1500"},
		{name: "public address on the interface named", host: two,
			sel: Selector{Criteria: Criteria{Names: []string{"eth0"}}, PublicIP: ip("198.18.0.9")}, v4: true, want: "eth0 198.18.0.9, mtu 1500"},
		{name: "public address beside the address named", host: two,
			sel: Selector{Criteria: Criteria{Names: []string{"198.18.0.1"}}, PublicIP: ip("198.18.0.9")}, v4: true,
			want: "eth0 198.18.0.1 (known to peers as 198.18.0.9), mtu 1500"},
		{name: "point-to-point", host: "ppp0 198.18.0.1/32->198.18.0.2/32", gateway: 1, v4: true,
			want: "ppp0 198.18.0.1, mtu 1500", on: "198.18.0.2/32"},
		{name: "only usable addresses count", v4: true, v6: true, gateway: 1, on: "198.18.0.0/24 2001:db8:9::/64",
			host: "eth0 169.254.1.1/16 198.18.9.1/24,link 198.18.8.1/24,deprecated 198.18.0.1/24 fe80::1/64,link 2001:db8:1::1/64,tentative 2001:db8:2::1/64,dadfailed 2001:db8:3::1/64,temporary 2001:db8:4::1/64,deprecated 2001:db8:9::1/64",
			want: "eth0 198.18.0.1, 2001:db8:9::1, mtu 1500"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := parseHost(t, c.host)
			h.gateway, h.reach = c.gateway, map[netip.Addr]route{c.sel.CanReach: c.reach}
			u, err := h.chooseEach(withOverlay(c.sel), c.v4, c.v6)
			if err != nil {
				t.Fatal(err)
			}
			if u.String() != c.want {
				t.Errorf("got  %s\nwant %s", u, c.want)
			}
			var on []string
			for _, l := range u.Links() {
				for _, p := range l.Prefixes {
					on = append(on, p.String())
				}
			}
			if got := strings.Join(on, " "); c.on != "" && got != c.on {
				t.Errorf("on link: %s, want %s", got, c.on)
			}
		})
	}
}

func TestChooseError(t *testing.T) {
	const node = `
lo 127.0.0.1/8,host
eth0 198.18.0.1/24 fe80::1/64,link 2001:db8::1/64
eth1 down 198.18.5.1/24
eth2 fe80::2/64,link 2001:db8:2::1/64,tentative`
	const has = "this host has eth0 (198.18.0.1/24, 2001:db8::1/64), eth1 (198.18.5.1/24, down), eth2 (2001:db8:2::1/64), lo (127.0.0.1/8); set --iface to the name or an address of one of them"
	for _, c := range []struct {
		name   string
		host   string
		reach  route
		sel    Selector
		v4, v6 bool
		want   string
	}{
		{name: "no such name", host: node, sel: Selector{Criteria: Criteria{Names: []string{"eth9"}}}, v4: true,
			want: "no interface matches --iface=eth9: " + has},
		{name: "nothing matches", host: node, sel: Selector{Criteria: Criteria{Names: []string{"eth9", "192.0.2.1"}, Regexps: regexps(`^wlan`)}},
			v4:   true,
			want: "no interface matches --iface=eth9 or --iface=192.0.2.1 or --iface-regex=^wlan: " + has},
		{name: "down", host: node, sel: Selector{Criteria: Criteria{Names: []string{"eth1"}}}, v4: true,
			want: "eth1 (--iface=eth1) is down: ip link set eth1 up"},
		{name: "a name that a shell would obey", host: "e;reboot down 198.18.5.1/24", sel: Selector{Criteria: Criteria{Names: []string{"e;reboot"}}},
			v4: true, want: "e;reboot (--iface=e;reboot) is down: ip link set 'e;reboot' up"},
		{name: "one is down, one is not there", host: node, sel: Selector{Criteria: Criteria{Names: []string{"eth9", "eth1"}}}, v4: true,
			want: "eth1 (--iface=eth1) is down: ip link set eth1 up; no interface matches --iface=eth9: " + has},
		{name: "no address of a family", host: node, sel: Selector{Criteria: Criteria{Names: []string{"eth2"}}}, v4: true, v6: true,
			want: "eth2 (--iface=eth2) has no usable IPv4 address: add an address, or set EnableIPv4 to false in the network configuration"},
		{name: "IPv6 is elsewhere", v4: true, v6: true, sel: Selector{Criteria: Criteria{Names: []string{"eth0"}}},
			host: "eth0 198.18.0.1/24\nflannel-v6.1 2001:db8:1::1/64\ncni0 2001:db8:2::1/64\neth1 down 2001:db8:3::1/64\neth2 2001:db8:4::1/64",
			want: "eth0 (--iface=eth0) has no usable IPv6 address: add an address, set --iface-v6=eth2 if IPv6 comes in there, or set EnableIPv6 to false in the network configuration"},
		{name: "none that is usable", host: node, sel: Selector{Criteria: Criteria{Names: []string{"eth2"}}}, v6: true,
			want: "eth2 (--iface=eth2) has no usable IPv6 address (fe80::2/64 is link-local, 2001:db8:2::1/64 is tentative): add an address, or set EnableIPv6 to false in the network configuration"},
		{name: "a tentative address", host: node, sel: Selector{Criteria: Criteria{Names: []string{"2001:db8:2::1"}}}, v6: true,
			want: "eth2 (--iface=2001:db8:2::1) cannot be reached at 2001:db8:2::1: the address is tentative"},
		{name: "loopback", host: node, sel: Selector{Criteria: Criteria{Names: []string{"127.0.0.1"}}}, v4: true,
			want: "lo (--iface=127.0.0.1) cannot be reached at 127.0.0.1: the address is loopback"},
		{name: "no default route", host: node, v4: true, v6: true, want: "there is no IPv4 default route: " + has},
		{name: "no IPv6 default route", host: node, v6: true, want: "there is no IPv6 default route: " + has},
		{name: "no route", host: node, sel: Selector{Criteria: Criteria{CanReach: ip("203.0.113.9")}}, reach: route{err: unix.ENETUNREACH},
			v4:   true,
			want: "no route for --iface-can-reach=203.0.113.9 (network is unreachable): " + has},
		{name: "can reach a loopback address", host: node, sel: Selector{Criteria: Criteria{CanReach: ip("127.0.0.2")}},
			reach: route{index: 1, local: true}, v4: true,
			want: "no interface matches --iface-can-reach=127.0.0.2: " + has},
		{name: "over the overlay", host: "flannel.1 198.18.1.0/32", sel: Selector{Criteria: Criteria{CanReach: ip("198.18.2.1")}},
			reach: route{index: 1}, v4: true,
			want: "the only route for --iface-can-reach=198.18.2.1 is in the overlay network itself: this host has flannel.1 (198.18.1.0/32); set --iface to the name or an address of one of them"},
		{name: "many", host: "v1\nv2\nv3\nv4\nv5 down\nv6\nv7",
			sel: Selector{Criteria: Criteria{Names: []string{"eth0"}, Regexps: regexps("^v")}}, v4: true,
			want: "v1 (--iface-regex=^v) has no usable IPv4 address: add an address, or set EnableIPv4 to false in the network configuration; " +
				"v2 (--iface-regex=^v) has no usable IPv4 address: add an address, or set EnableIPv4 to false in the network configuration; " +
				"v3 (--iface-regex=^v) has no usable IPv4 address: add an address, or set EnableIPv4 to false in the network configuration; " +
				"4 more interfaces cannot be used either; no interface matches --iface=eth0: this host has v1 (no address), v2 (no address), v3 (no address), v4 (no address), 3 more without an address; " +
				"set --iface to the name or an address of one of them"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := parseHost(t, c.host)
			h.reach = map[netip.Addr]route{c.sel.CanReach: c.reach}
			u, err := h.chooseEach(withOverlay(c.sel), c.v4, c.v6)
			if err == nil {
				t.Fatalf("got %s", u)
			}
			if err.Error() != c.want {
				t.Errorf("got  %s\nwant %s", err, c.want)
			}
		})
	}
}

// The order in which the kernel lists links must not matter for the outcome.
func TestChooseIsStable(t *testing.T) {
	h := parseHost(t, "docker0 198.18.2.1/24\neth0 198.18.0.1/24\neth1 198.18.1.1/24")
	slices.Reverse(h.links)
	u, err := h.choose(Selector{Criteria: Criteria{Regexps: regexps("^198")}}, true, false)
	if err != nil || u.IPv4.Name != "eth0" {
		t.Errorf("got %v, %v", u, errors.Join(err))
	}
}

// IPv6 may have an interface of its own.
func TestChooseApart(t *testing.T) {
	const two = `
eth0 198.18.0.1/24 2001:db8::1/64
eth1 198.18.5.1/24 2001:db8:5::1/64 2001:db8:5::2/64
eth2 2001:db8:2::1/64
eth3 198.18.3.1/24
eth4 down 2001:db8:4::1/64
eth5 2001:db8:6::1/64,tentative
flannel.1 2001:db8:9::1/64`
	const noSix = "add an address, or set EnableIPv6 to false in the network configuration"
	reach := map[netip.Addr]route{ip("2000::"): {index: 2, src: ip("2001:db8:5::2")}, ip("203.0.113.1"): {index: 1}}
	for _, c := range []struct {
		name   string
		sel    Selector
		v4, v6 bool
		want   string
	}{
		{"by name", Selector{IPv6: Criteria{Names: []string{"eth2"}}}, true, true,
			"eth0 198.18.0.1, mtu 1500; eth2 2001:db8:2::1, mtu 1500"},
		{"both named", Selector{Criteria: Criteria{Names: []string{"eth3"}}, IPv6: Criteria{Names: []string{"eth9", "eth2"}}}, true, true,
			"eth3 198.18.3.1, mtu 1500; eth2 2001:db8:2::1, mtu 1500"},
		{"by address", Selector{IPv6: Criteria{Names: []string{"2001:db8:5::2"}}}, true, true,
			"eth0 198.18.0.1, mtu 1500; eth1 2001:db8:5::2, mtu 1500"},
		{"by pattern", Selector{IPv6: Criteria{Regexps: regexps("^2001:db8:5:")}}, true, true,
			"eth0 198.18.0.1, mtu 1500; eth1 2001:db8:5::1, mtu 1500"},
		{"a pattern never means the overlay", Selector{IPv6: Criteria{Regexps: regexps("^2001:db8:[92]:")}}, true, true,
			"eth0 198.18.0.1, mtu 1500; eth2 2001:db8:2::1, mtu 1500"},
		{"by a route", Selector{Criteria: Criteria{CanReach: ip("203.0.113.1")}, IPv6: Criteria{CanReach: ip("2000::")}}, true, true,
			"eth0 198.18.0.1, mtu 1500; eth1 2001:db8:5::2, mtu 1500"},
		{"another address of the same interface", Selector{Criteria: Criteria{Names: []string{"eth1"}},
			IPv6: Criteria{CanReach: ip("2000::")}}, true, true, "eth1 198.18.5.1, 2001:db8:5::2, mtu 1500"},
		{"public addresses", Selector{PublicIP: ip("203.0.113.7"), PublicIPv6: ip("2001:db8:99::1"),
			IPv6: Criteria{Names: []string{"eth2"}}}, true, true,
			"eth0 198.18.0.1 (known to peers as 203.0.113.7), mtu 1500; eth2 2001:db8:2::1 (known to peers as 2001:db8:99::1), mtu 1500"},
		{"the holder of a public address is IPv4's alone", Selector{PublicIP: ip("198.18.3.1"), PublicIPv6: ip("2001:db8::1"),
			IPv6: Criteria{Names: []string{"eth1"}}}, true, true,
			"eth3 198.18.3.1, mtu 1500; eth1 2001:db8:5::1 (known to peers as 2001:db8::1), mtu 1500"},
		{"an address in use stays", Selector{Prefer: []netip.Addr{ip("2001:db8:5::2")}, IPv6: Criteria{Names: []string{"eth1"}}},
			true, true, "eth0 198.18.0.1, mtu 1500; eth1 2001:db8:5::2, mtu 1500"},
		{"IPv4 alone", Selector{Criteria: Criteria{Names: []string{"eth1"}}, IPv6: Criteria{Names: []string{"eth2"}}}, true, false,
			"eth1 198.18.5.1, mtu 1500"},
		{"IPv6 alone", Selector{Criteria: Criteria{Names: []string{"eth1"}}, IPv6: Criteria{Names: []string{"eth2"}}}, false, true,
			"eth2 2001:db8:2::1, mtu 1500"},
		{"IPv6 alone, by the flags for both", Selector{Criteria: Criteria{Names: []string{"eth1"}}}, false, true,
			"eth1 2001:db8:5::1, mtu 1500"},

		{"IPv6's is down", Selector{IPv6: Criteria{Names: []string{"eth4"}}}, true, true,
			"eth4 (--iface-v6=eth4) is down: ip link set eth4 up"},
		{"IPv6's has none", Selector{IPv6: Criteria{Regexps: regexps("eth3")}}, true, true,
			"eth3 (--iface-regex-v6=eth3) has no usable IPv6 address: " + noSix},
		{"neither", Selector{Criteria: Criteria{Names: []string{"eth2"}}, IPv6: Criteria{Names: []string{"eth4"}}}, true, true,
			"IPv4: eth2 (--iface=eth2) has no usable IPv4 address: add an address, or set EnableIPv4 to false in the " +
				"network configuration; IPv6: eth4 (--iface-v6=eth4) is down: ip link set eth4 up"},
		{"tentative", Selector{IPv6: Criteria{Names: []string{"eth5"}}}, true, true,
			"settling: eth5 (--iface-v6=eth5) has no usable IPv6 address (2001:db8:6::1/64 is tentative): " + noSix},
		{"tentative, by address", Selector{IPv6: Criteria{Names: []string{"2001:db8:6::1"}}}, true, true,
			"settling: eth5 (--iface-v6=2001:db8:6::1) cannot be reached at 2001:db8:6::1: the address is tentative"},
		{"one interface, and IPv6 is elsewhere", Selector{Criteria: Criteria{Names: []string{"eth3"}}}, true, true,
			"eth3 (--iface=eth3) has no usable IPv6 address: add an address, set --iface-v6=eth0 if IPv6 comes in there, " +
				"or set EnableIPv6 to false in the network configuration"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := parseHost(t, two)
			h.gateway, h.reach = 1, reach
			u, err := h.chooseEach(withOverlay(c.sel), c.v4, c.v6)
			got := u.String()
			if err != nil {
				got = err.Error()
			}
			if errors.Is(err, ErrSettling) {
				got = "settling: " + got
			}
			if got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
		})
	}
}

func TestUplinkEqual(t *testing.T) {
	link := func(own, prefix string) Link {
		return Link{Name: "eth0", Index: 2, MTU: 1500, MAC: "02:00:00:00:00:01", Addr: ip(own), PublicIP: ip(own),
			Prefixes: []netip.Prefix{netip.MustParsePrefix(prefix)}}
	}
	make := func() Uplink {
		return Uplink{IPv4: link("198.18.0.1", "198.18.0.0/24"), IPv6: link("2001:db8::1", "2001:db8::/64")}
	}
	if !make().Equal(make()) {
		t.Error("the same is not equal")
	}
	for name, change := range map[string]func(*Link){
		"Name":     func(l *Link) { l.Name = "eth1" },
		"Index":    func(l *Link) { l.Index = 3 },
		"MTU":      func(l *Link) { l.MTU = 9000 },
		"MAC":      func(l *Link) { l.MAC = "" },
		"Addr":     func(l *Link) { l.Addr = ip("198.18.0.2") },
		"PublicIP": func(l *Link) { l.PublicIP = ip("198.18.0.2") },
		"Prefixes": func(l *Link) { l.Prefixes = nil },
	} {
		four, six := make(), make()
		change(&four.IPv4)
		change(&six.IPv6)
		if four.Equal(make()) || six.Equal(make()) {
			t.Errorf("a change of %s goes unnoticed", name)
		}
	}
	u := make()
	if !u.OnLink(ip("198.18.0.77")) || u.OnLink(ip("198.18.1.1")) || u.OnLink(netip.Addr{}) || !u.OnLink(ip("2001:db8::2")) {
		t.Error("OnLink is wrong")
	}
}

// The smaller MTU counts where there are two interfaces.
func TestUplinkApart(t *testing.T) {
	four := Link{Name: "eth0", MTU: 1500, Addr: ip("198.18.0.1"), PublicIP: ip("198.18.0.1")}
	six := Link{Name: "eth1", MTU: 1400, Addr: ip("fd18::1"), PublicIP: ip("fd18::99")}
	same := six
	same.Name = "eth0"
	for _, c := range []struct {
		uplink Uplink
		apart  bool
		names  string
		mtu    int
	}{
		{Uplink{IPv4: four, IPv6: six}, true, "eth0 and eth1", 1400},
		{Uplink{IPv4: four, IPv6: same}, false, "eth0", 1400},
		{Uplink{IPv4: four}, false, "eth0", 1500},
		{Uplink{IPv6: six}, false, "eth1", 1400},
	} {
		if u := c.uplink; u.Apart() != c.apart || u.Names() != c.names || u.MTU() != c.mtu {
			t.Errorf("%s: apart %t, names %s, MTU %d", u, u.Apart(), u.Names(), u.MTU())
		}
	}
	want := "fd18::99, which is not an address of eth1 (that is fd18::1): leave out --public-ipv6"
	if err := (Uplink{IPv4: four, IPv6: six}).CheckPublicIPs(); err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
}
