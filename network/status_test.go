package network

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/flanneld/flanneld/backend"
	_ "github.com/flanneld/flanneld/backend/all"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/subnet"
)

// What each backend puts around packets, whatever MTU it is told, and where
// peers' packets arrive.
func TestOverheadAndEndpoints(t *testing.T) {
	const four, six, both = "", `"EnableIPv4": false, "EnableIPv6": true, `, `"EnableIPv6": true, `
	psk := `"PSK": "` + strings.Repeat("0123456789abcdef", 6) + `"`
	for _, c := range []struct {
		families, backend string
		overhead          int
		endpoints         string
	}{
		{four, `{"Type": "vxlan"}`, 50, "198.18.0.1 udp 8472"},
		{both, `{"Type": "vxlan", "Port": 4789, "mtu": 1400}`, 70, "198.18.0.1 udp 4789, fd18::1 udp 4789"},
		{six, `{"Type": "vxlan", "MTU": 9000}`, 70, "fd18::1 udp 8472"},
		{four, `{"Type": "udp"}`, 28, "198.18.0.1 udp 8285"},
		{both, `{"Type": "udp", "Port": 1}`, 48, "198.18.0.1 udp 1, fd18::1 udp 1"},
		{four, `{"Type": "ipip"}`, 20, "198.18.0.1 4 0"},
		{four, `{"Type": "ipsec", ` + psk + `}`, 77, "198.18.0.1 udp 500, 198.18.0.1 udp 4500, 198.18.0.1 esp 0"},
		{six, `{"Type": "ipsec", "UDPEncap": true, ` + psk + `}`, 105, "fd18::1 udp 500, fd18::1 udp 4500"},
		{four, `{"Type": "wireguard", "MTU": 1400}`, 80, "198.18.0.1 udp 51820"},
		{both, `{"Type": "wireguard"}`, 80, "198.18.0.1 udp 51820, fd18::1 udp 51821"},
		{six, `{"Type": "wireguard", "ListenPortV6": 7}`, 80, "fd18::1 udp 7"},
		{both, `{"Type": "wireguard", "Mode": "auto"}`, 80, "198.18.0.1 udp 51820"},
		{both, `{"Type": "wireguard", "Mode": "ipv6"}`, 80, "fd18::1 udp 51820"},
		{four, `{"Type": "extension", "MTU": 1400}`, 0, ""},
		{both, `{"Type": "host-gw"}`, 0, ""},
		{four, `{"Type": "alloc"}`, 0, ""},
		{four, `{"Type": "aws-vpc"}`, 0, ""},
	} {
		uplink := iface.Uplink{Name: "eth0", MTU: 1500}
		families := c.families
		if c.families != six {
			families += `"Network": "10.5.0.0/16", `
			uplink.IPv4, uplink.PublicIP = netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("198.18.0.1")
		}
		if c.families != four {
			families += `"IPv6Network": "fd05::/48", `
			uplink.IPv6, uplink.PublicIPv6 = netip.MustParseAddr("fd18::1"), netip.MustParseAddr("fd18::1")
		}
		cfg, err := subnet.ParseConfig([]byte("{" + families + `"Backend": ` + c.backend + "}"))
		if err != nil {
			t.Errorf("%s: %v", c.backend, err)
			continue
		}
		b, err := backend.New(cfg, uplink)
		if err != nil {
			t.Errorf("%s: %v", c.backend, err)
			continue
		}
		var endpoints []string
		if tunnel, ok := b.(backend.Tunnel); ok {
			for _, e := range tunnel.Endpoints() {
				endpoints = append(endpoints, fmt.Sprint(e.Addr, " ", e.Protocol, " ", e.Port))
			}
		}
		if got := strings.Join(endpoints, ", "); got != c.endpoints {
			t.Errorf("%s: peers send to %q, want %q", c.backend, got, c.endpoints)
		}
		if got := overhead(cfg, uplink); got != c.overhead {
			t.Errorf("%s: it puts %d bytes around packets, want %d", c.backend, got, c.overhead)
		}
	}
	cfg, err := subnet.ParseConfig([]byte(`{"Network": "10.5.0.0/16"}`)) // which has no Backend
	if err != nil {
		t.Fatal(err)
	}
	if got := overhead(cfg, iface.Uplink{Name: "eth0", MTU: 1500}); got != 28 {
		t.Errorf("of no Backend it is %d", got)
	}
}
