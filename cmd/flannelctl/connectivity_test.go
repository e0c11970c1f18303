package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/flanneld/flanneld/network"
	"github.com/flanneld/flanneld/pkg/family"
)

// The node of the tests, with vxlan, and healthy paths to a peer.
var (
	here = network.Status{
		Backend: "vxlan", MTU: 1450, Overhead: family.Pair[int]{IPv4: 50}, Uplinks: []network.Uplink{{Name: "eth0", MTU: 1500}},
		Devices: []network.Device{
			{Name: "flannel.1", VNI: 1, Addresses: []netip.Prefix{netip.MustParsePrefix("10.5.1.0/32")}},
		},
		Endpoints: []network.Endpoint{{Address: netip.MustParseAddr("198.18.0.1"), Protocol: "udp", Port: 8472}},
	}
	hostLeg    = leg{From: netip.MustParseAddr("198.18.0.1"), To: netip.MustParseAddr("198.18.0.2"), Device: "eth0"}
	deviceLeg  = leg{From: netip.MustParseAddr("10.5.1.0"), To: netip.MustParseAddr("10.5.2.0"), Device: "flannel.1"}
	bridgeLeg  = leg{From: netip.MustParseAddr("10.5.1.1"), To: netip.MustParseAddr("10.5.2.1"), Device: "flannel.1"}
	healthyLeg = leg{Ping: answered, RTT: 400 * time.Microsecond, UDP: answered, TCP: answered, Size: 1450, Carries: 1450}
)

// healthy returns a leg between the addresses of another, with nothing wrong.
func healthy(l leg) leg {
	h := healthyLeg
	h.From, h.To, h.Device, h.SeenAs = l.From, l.To, l.Device, l.From
	return h
}

// mute returns a leg between the addresses of another from which nothing comes back.
func mute(l leg) leg {
	l.Ping, l.UDP, l.TCP, l.Forward = silent, silent, silent, silent
	return l
}

var judgements = []struct {
	name   string
	change func(s *network.Status, p *path)
}{
	{"healthy", func(*network.Status, *path) {}},
	{"the port is blocked", func(_ *network.Status, p *path) { p.Overlay, p.Bridge = mute(deviceLeg), mute(bridgeLeg) }},
	{"the port is blocked, packets of the peer arrive", func(_ *network.Status, p *path) {
		p.Overlay, p.Bridge = mute(deviceLeg), mute(bridgeLeg)
		p.Overlay.Heard = true
	}},
	{"a protocol is blocked", func(s *network.Status, p *path) {
		s.Devices, s.Endpoints = nil, append(s.Endpoints, network.Endpoint{Address: s.Endpoints[0].Address, Protocol: "esp"})
		p.Overlay, p.Bridge = mute(bridgeLeg), leg{}
	}},
	{"blocked without encapsulation", func(_ *network.Status, p *path) {
		p.Overlay = mute(deviceLeg)
		p.Overlay.Device = "eth0"
	}},
	{"nothing comes back", func(_ *network.Status, p *path) { p.Underlay, p.Overlay = mute(hostLeg), mute(deviceLeg) }},
	{"the host is off", func(_ *network.Status, p *path) {
		p.Underlay, p.Overlay = mute(hostLeg), mute(deviceLeg)
		p.Underlay.Ping = "no host on the link replies for 198.18.0.2"
	}},
	{"a rule here drops", func(_ *network.Status, p *path) {
		p.Overlay = mute(deviceLeg)
		p.Overlay.Ping = "operation not permitted"
	}},
	{"a hop carries less", func(_ *network.Status, p *path) {
		p.Overlay.Carries, p.Underlay.Size, p.Underlay.Carries = 1350, 1500, 1400
	}},
	{"a hop carries less, and the host does not reply to ping", func(_ *network.Status, p *path) {
		p.Overlay.Carries, p.Underlay.Ping = 1350, silent
	}},
	{"wrong checksums", func(_ *network.Status, p *path) {
		p.Overlay.UDP, p.Overlay.TCP, p.Overlay.OwnUDP, p.Overlay.SeenAs = silent, silent, answered, netip.Addr{}
	}},
	{"wrong checksums, without a device of VXLAN", func(s *network.Status, p *path) {
		s.Devices = nil
		p.Overlay.UDP, p.Overlay.OwnUDP, p.Overlay.SeenAs = silent, answered, netip.Addr{}
	}},
	{"closed ports are silent", func(_ *network.Status, p *path) {
		p.Overlay.UDP, p.Overlay.TCP, p.Overlay.OwnUDP, p.Overlay.SeenAs = silent, silent, silent, netip.Addr{}
	}},
	{"TCP is silent", func(_ *network.Status, p *path) { p.Overlay.TCP = silent }},
	{"a firewall refuses TCP", func(_ *network.Status, p *path) { p.Overlay.TCP = "no route to host" }},
	{"masquerading", func(_ *network.Status, p *path) { p.Bridge.SeenAs = p.Overlay.From }},
	{"ICMP is dropped", func(_ *network.Status, p *path) {
		p.Underlay.Ping, p.Overlay.Ping, p.Overlay.Size, p.Overlay.Carries = silent, silent, 0, 0
	}},
	{"all for the host is dropped", func(_ *network.Status, p *path) {
		p.Underlay, p.Overlay = mute(hostLeg), mute(deviceLeg)
		p.Overlay.Forward = answered
	}},
	{"no pod has run there", func(s *network.Status, p *path) {
		s.Devices, s.Endpoints = nil, nil
		p.Overlay, p.Bridge = mute(bridgeLeg), leg{}
		p.Overlay.Forward = answered
	}},
	{"no pod has run there, or packets get lost", func(s *network.Status, p *path) {
		s.Devices, s.Endpoints = nil, nil
		p.Overlay, p.Bridge = mute(bridgeLeg), leg{}
		p.Overlay.Forward = ""
	}},
	{"no pod has run here", func(s *network.Status, p *path) { s.Devices, p.Overlay, p.Bridge = nil, leg{}, leg{} }},
}

// TestJudge: what is measured means what testdata/connectivity.golden says.
func TestJudge(t *testing.T) {
	var got strings.Builder
	for _, j := range judgements {
		s, p := here, path{Underlay: healthy(hostLeg), Overlay: healthy(deviceLeg), Bridge: healthy(bridgeLeg)}
		p.Underlay.Size, p.Underlay.Carries = 0, 0
		j.change(&s, &p)
		peer := peerPaths{Subnets: []netip.Prefix{netip.MustParsePrefix("10.5.2.0/24")}, Paths: []path{p}}
		peer.Findings, peer.Notes = judge(s, peer.Paths)
		fmt.Fprintf(&got, "# %s\n", j.name)
		(&tool{printer: printer{out: &got}}).printConnectivity(connectivity{Peers: []peerPaths{peer}})
		got.WriteByte('\n')
	}
	const golden = "testdata/connectivity.golden"
	if *update {
		if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if want, err := os.ReadFile(golden); err != nil || got.String() != string(want) {
		t.Errorf("%v: got\n%s", err, &got)
	}
}

// TestSelectPeers: a peer has the names that an operator may have of it.
func TestSelectPeers(t *testing.T) {
	lease := func(subnet, ip string) network.Lease {
		return network.Lease{
			Subnets: []netip.Prefix{netip.MustParsePrefix(subnet)}, PublicIPs: []netip.Addr{netip.MustParseAddr(ip)},
		}
	}
	leases := []network.Lease{lease("10.5.1.0/24", "198.18.0.1"), lease("10.5.2.0/24", "198.18.0.2"),
		lease("fd00:5:0:3::/64", "fd18::3"), lease("10.5.4.0/24", "198.18.0.4")}
	leases[0].Own, leases[3].Problem = true, "another backend"
	for names, want := range map[string]string{
		"":                                 "10.5.2.0/24 fd00:5:0:3::/64",
		"10.5.2.0/24":                      "10.5.2.0/24",
		"10.5.2.7/24":                      "10.5.2.0/24",
		"198.18.0.2":                       "10.5.2.0/24",
		"10.5.2.17 fd18::3":                "10.5.2.0/24 fd00:5:0:3::/64",
		"fd00:5:0:3::9":                    "fd00:5:0:3::/64",
		"10.5.2.0/25":                      "error",
		"198.18.0.9":                       "error",
		"10.5.2.0/24 n2":                   "error",
		"198.18.0.1":                       "error",
		"10.5.4.0/24":                      "error",
		"fd00:5:0:3::/64 fd00:5:0:3::1/64": "fd00:5:0:3::/64 fd00:5:0:3::/64",
	} {
		peers, err := selectPeers(leases, strings.Fields(names))
		var got []string
		for _, p := range peers {
			got = append(got, join(p.Subnets))
		}
		if err != nil {
			got = []string{"error"}
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%q: got %q, %v, want %s", names, got, err, want)
		}
	}
}

// TestUDPPacket: the sum over a datagram and its pseudo header is 0xffff, and no checksum is 0, which is none.
func TestUDPPacket(t *testing.T) {
	zeroes := 0
	for _, ips := range [][2]string{{"198.18.0.1", "198.18.0.2"}, {"fd00::1", "fd00::2"}} {
		from, to := netip.MustParseAddr(ips[0]), netip.MustParseAddr(ips[1])
		for port := range 1 << 16 {
			packet := udpPacket(from, to, uint16(port))
			sum := 17 + uint32(len(packet))
			for _, part := range [][]byte{from.AsSlice(), to.AsSlice(), append(packet, make([]byte, len(packet)%2)...)} {
				for i := 0; i < len(part); i += 2 {
					sum += uint32(binary.BigEndian.Uint16(part[i:]))
				}
			}
			for sum > 0xffff {
				sum = sum>>16 + sum&0xffff
			}
			switch binary.BigEndian.Uint16(packet[6:]) {
			case 0:
				t.Fatalf("port %d: there is no checksum", port)
			case 0xffff:
				zeroes++
			}
			if sum != 0xffff || int(binary.BigEndian.Uint16(packet[4:])) != len(packet) {
				t.Fatalf("port %d: the sum is %x of %x", port, sum, packet)
			}
		}
	}
	if zeroes == 0 {
		t.Error("no port has a checksum that would be 0")
	}
}

// TestOutcomeOf: an error of the kernel is shown without what the program did.
func TestOutcomeOf(t *testing.T) {
	for _, c := range []struct {
		err  error
		want outcome
	}{
		{nil, "answered"},
		{errNoReply, "silent"},
		{fmt.Errorf("write ip: %w", os.NewSyscallError("sendmsg", syscall.EPERM)), "operation not permitted"},
		{errors.New("there is no route"), "there is no route"},
	} {
		if got := outcomeOf(c.err); got != c.want {
			t.Errorf("%v: got %q, want %q", c.err, got, c.want)
		}
	}
}
