package iface

import (
	"net/netip"
	"testing"
)

func TestCheckPeer(t *testing.T) {
	prefix := netip.MustParsePrefix
	usual := Uplink{
		IPv4: Link{Name: "eth0", Addr: netip.MustParseAddr("198.18.0.1"),
			Prefixes: []netip.Prefix{prefix("198.18.0.1/24"), prefix("198.18.7.0/31")}},
		IPv6: Link{Name: "eth1", Addr: netip.MustParseAddr("fd18::1"),
			Prefixes: []netip.Prefix{prefix("fd18::/64"), prefix("fe80::/64")}},
	}
	linkLocal := Uplink{
		IPv4: Link{Name: "eth0", Addr: netip.MustParseAddr("169.254.0.1")},
		IPv6: Link{Name: "eth0", Addr: netip.MustParseAddr("fe80::1")},
	}
	for _, c := range []struct {
		uplink Uplink
		peer   string
		ok     bool
	}{
		{usual, "198.18.0.2", true}, {usual, "10.0.0.255", true}, {usual, "8.8.8.8", true}, {usual, "fd18::", true},
		{usual, "198.18.7.0", true}, {usual, "198.18.7.1", true}, {usual, "223.255.255.255", true},
		{usual, "0.0.0.0", false}, {usual, "0.1.2.3", false}, {usual, "127.0.0.1", false}, {usual, "224.0.0.5", false},
		{usual, "239.1.2.3", false}, {usual, "240.0.0.1", false}, {usual, "255.255.255.255", false},
		{usual, "198.18.0.0", false}, {usual, "198.18.0.255", false}, {usual, "169.254.169.254", false},
		{usual, "::", false}, {usual, "::1", false}, {usual, "ff02::1", false}, {usual, "fe80::2", false},
		{linkLocal, "169.254.0.2", true}, {linkLocal, "fe80::2", true}, {linkLocal, "198.18.0.2", true},
	} {
		if err := c.uplink.CheckPeer(netip.MustParseAddr(c.peer)); (err == nil) != c.ok {
			t.Errorf("from %s to %s: %v", c.uplink.IPv4.Addr, c.peer, err)
		}
	}
}
