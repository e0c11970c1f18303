package network

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/nstest"
	"github.com/flanneld/flanneld/subnet"
)

// A node without an IPv6 address works with IPv4, says that IPv6 does not, and publishes its IPv6 address as soon as it
// has one. When it loses the address, it stays as it is.
func TestFamilyThatDoesNotWork(t *testing.T) {
	m := newManager(`{"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "fd05::/48", "Backend": {"Type": "vxlan"}}`)
	begin(t, m, nil)
	defer nstest.Try("ip link del flannel-v6.1")
	if want := <-m.wants; want.Attrs.PublicIP.String() != "198.18.0.1" || want.Attrs.PublicIPv6.IsValid() ||
		want.Attrs.BackendV6Data != nil {
		t.Errorf("to be published: %+v", want.Attrs)
	}
	const own = "10.5.1.0-24&fd05:0:0:1::-64"
	m.grants <- lease(own, "")
	both := lease("10.5.2.0-24&fd05:0:0:2::-64", `{"PublicIP":"198.18.0.2","PublicIPv6":"fd18::2","BackendType":"vxlan",`+
		`"BackendData":{"VNI":1,"VtepMAC":"0e:00:00:00:00:02"},"BackendV6Data":{"VNI":1,"VtepMAC":"0e:00:00:00:06:02"}}`)
	m.updates <- snapshot(both)
	eventually(t, "ready", ready)
	if route("10.5.2.0/24") == "" {
		t.Error("there is no route to the peer")
	}
	if out, err := nstest.Try("ip link show flannel-v6.1"); err == nil {
		t.Errorf("IPv6 does not work, and there is %s", out)
	}
	if _, text := get("/readyz"); !strings.HasPrefix(text, "ok\nIPv6 does not work on this node") ||
		!strings.Contains(text, "eth0") {
		t.Errorf("readyz says %q", text)
	}
	nstest.Run(t, "ip addr add fd18::1/64 dev eth0 nodad")
	if want := <-m.wants; want.Attrs.PublicIPv6.String() != "fd18::1" || want.Key() != own {
		t.Errorf("to be published: %s %+v", want.Key(), want.Attrs)
	}
	m.grants <- lease(own, "")
	eventually(t, "IPv6 works", func() bool {
		_, text := get("/readyz")
		out, _ := nstest.Try("ip -6 route show fd05:0:0:2::/64")
		return text == "ok" && strings.Contains(out, "flannel-v6.1")
	})
	nstest.Run(t, "ip addr del fd18::1/64 dev eth0")
	select {
	case want := <-m.wants:
		t.Errorf("to be published: %+v", want.Attrs)
	default:
	}
}

// An address whose duplicate address detection runs, as while a machine boots, is waited for. Without a carrier the
// detection does not end, and the node goes on.
func TestFamilyThatSettles(t *testing.T) {
	nstest.Need(t, "sysctl")
	m := newManager(`{"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "fd05::/48", "Backend": {"Type": "vxlan"}}`)
	begin(t, m, func(*Options) { nstest.Run(t, "ip addr add fd18::1/64 dev eth0") })
	defer nstest.Try("ip link del flannel-v6.1")
	defer nstest.Try("ip link del eth1")
	if want := <-m.wants; want.Attrs.PublicIPv6.String() != "fd18::1" {
		t.Errorf("to be published: %+v", want.Attrs)
	}
	nstest.Run(t, "ip link add eth1 type veth peer name far1")
	nstest.Run(t, "ip link set eth1 up")
	nstest.Run(t, "ip addr add 198.18.1.1/24 dev eth1")
	nstest.Run(t, "ip addr add fd18:1::1/64 dev eth1")
	cfg, err := m.Config(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	u, missing, err := findUplink(iface.Selector{Criteria: iface.Criteria{Names: []string{"eth1"}}}, cfg, iface.Uplink{}, true)
	if err != nil || u.IPv4.Addr.String() != "198.18.1.1" || missing[family.IPv6] == nil {
		t.Errorf("without a carrier: %v, %v, %v", u, missing, err)
	}

	// The same of an interface that is IPv6's alone: it is waited for while its address settles, here for a minute.
	each := iface.Selector{Criteria: iface.Criteria{Names: []string{"eth0"}}, IPv6: iface.Criteria{Names: []string{"eth1"}}}
	u, missing, err = findUplink(each, cfg, iface.Uplink{}, true)
	if err != nil || u.IPv4.Name != "eth0" || u.IPv6.IsValid() || missing[family.IPv6] == nil {
		t.Errorf("IPv6's without a carrier: %v, %v, %v", u, missing, err)
	}
	nstest.Run(t, "sysctl -qw net.ipv6.conf.eth1.dad_transmits=60")
	nstest.Run(t, "ip link set far1 up")
	if u, missing, err := findUplink(each, cfg, iface.Uplink{}, true); !errors.Is(err, iface.ErrSettling) {
		t.Errorf("IPv6's while it settles: %v, %v, %v", u, missing, err)
	}
}

// apart is a node whose IPv6 has an interface of its own, eth1, which is not there yet.
type apart struct {
	*manager
	*testing.T
	socket string
}

const apartSubnets = "10.5.1.0-24&fd05:0:0:1::-64"

func beginApart(t *testing.T) apart {
	t.Helper()
	n := apart{
		newManager(`{"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "fd05::/48", "Backend": {"Type": "vxlan"}}`),
		t, filepath.Join(t.TempDir(), "flanneld.sock"),
	}
	t.Cleanup(func() {
		nstest.Try("ip link del flannel-v6.1")
		nstest.Try("ip link del eth1")
	})
	begin(t, n.manager, func(o *Options) {
		nstest.Run(t, "ip addr add fd18:9::1/64 dev eth0 nodad") // not chosen
		o.Uplink.IPv6.Names = []string{"eth1"}
		o.StatusSocket = n.socket
	})
	n.published("198.18.0.1", "invalid IP")
	n.updates <- snapshot(apartPeer("2"))
	eventually(t, "ready", ready)
	return n
}

func apartPeer(n string) subnet.Lease {
	return lease(strings.ReplaceAll("10.5.#.0-24&fd05:0:0:#::-64", "#", n), strings.ReplaceAll(`{"PublicIP":"198.18.0.#",`+
		`"PublicIPv6":"fd18::#","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:00:00:00:00:0#"},`+
		`"BackendV6Data":{"VNI":1,"VtepMAC":"0e:00:00:00:06:0#"}}`, "#", n))
}

// plug makes eth1, with an address.
func (n apart) plug(mtu int, address string) {
	n.Helper()
	nstest.Run(n.T, fmt.Sprintf("ip link add eth1 mtu %d type veth peer name far1", mtu))
	nstest.Run(n.T, "ip link set far1 up")
	nstest.Run(n.T, "ip link set eth1 up")
	nstest.Run(n.T, "ip addr add "+address+" dev eth1")
}

// published waits until the node wants to publish other addresses, which must be these.
func (n apart) published(four, six string) {
	n.Helper()
	if want := <-n.wants; want.Attrs.PublicIP.String() != four || want.Attrs.PublicIPv6.String() != six {
		n.Errorf("to be published: %s and %s, want %s and %s", want.Attrs.PublicIP, want.Attrs.PublicIPv6, four, six)
	}
	n.grants <- lease(apartSubnets, "")
}

func (n apart) status() Status {
	n.Helper()
	s, err := NewClient(n.socket).Status(n.Context())
	if err != nil {
		n.Fatal(err)
	}
	return s
}

// says waits until readyz has a line beside "ok".
func (n apart) says(line string) {
	n.Helper()
	eventually(n.T, "readyz: "+line, func() bool {
		_, text := get("/readyz")
		return text == strings.TrimSpace("ok\n"+line)
	})
}

// shows waits until a command shows words.
func (n apart) shows(command string, words ...string) {
	n.Helper()
	eventually(n.T, fmt.Sprint(command, words), func() bool {
		out, _ := nstest.Try(command)
		return !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(out, w+" ") })
	})
}

// Each family may have an interface of its own. The node starts without IPv6's, and takes it up when it comes.
func TestUplinkForEachFamily(t *testing.T) {
	n := beginApart(t)
	if _, text := get("/readyz"); !strings.HasPrefix(text, "ok\nIPv6 does not work on this node, which goes on without: "+
		"no interface matches --iface-v6=eth1: this host has ") {
		t.Errorf("readyz says %q", text)
	}
	n.plug(1400, "fd18::1/64")
	n.published("198.18.0.1", "fd18::1")
	n.says("")
	n.shows("ip -d link show flannel.1", "mtu 1450", "local 198.18.0.1 dev eth0")
	n.shows("ip -d link show flannel-v6.1", "mtu 1330", "local fd18::1 dev eth1")
	s := n.status()
	four, six := []netip.Addr{netip.MustParseAddr("198.18.0.1")}, []netip.Addr{netip.MustParseAddr("fd18::1")}
	if want := []Uplink{{"eth0", 1500, four, four}, {"eth1", 1400, six, six}}; !reflect.DeepEqual(s.Uplinks, want) {
		t.Errorf("uplinks: %+v, want %+v", s.Uplinks, want)
	}
	if u := s.UplinkOf(family.IPv6); u == nil || u.Name != "eth1" || s.MTU != 1330 {
		t.Errorf("IPv6's uplink: %+v; the MTU of pods: %d", u, s.MTU)
	}
}

// A family stays as it is while its own interface is away, and the other one follows its own.
func TestUplinkOfOneFamilyGoes(t *testing.T) {
	n := beginApart(t)
	n.plug(1500, "fd18::1/64 nodad")
	n.published("198.18.0.1", "fd18::1")
	nstest.Run(t, "ip link set eth1 down")
	const away = "IPv6 stays as it is, with fd18::1 of eth1: eth1 (--iface-v6=eth1) is down: ip link set eth1 up"
	n.says(away)
	nstest.Run(t, "ip addr add 198.18.9.77/24 dev eth0")
	nstest.Run(t, "ip addr del 198.18.0.1/24 dev eth0")
	n.published("198.18.9.77", "fd18::1")
	n.shows("ip -d link show flannel.1", "local 198.18.9.77 dev eth0")
	if s := n.status(); s.Errors["IPv6"] != away || s.Errors["Uplink"] != "" {
		t.Errorf("errors: %v", s.Errors)
	}
	nstest.Run(t, "ip link set eth0 down")
	eventually(t, "the loss of both is an error", func() bool {
		return strings.HasPrefix(n.status().Errors["Uplink"], "staying with eth0 and eth1: IPv4: eth0 (--iface=eth0) is down")
	})

	// Both come back, IPv6's with another address.
	nstest.Run(t, "ip link set eth0 up")
	nstest.Run(t, "ip link set eth1 up")
	nstest.Run(t, "ip addr replace fd18::77/64 dev eth1 nodad")
	n.published("198.18.9.77", "fd18::77")
	n.says("")
	n.shows("ip -d link show flannel-v6.1", "local fd18::77 dev eth1")
	n.shows("ip -6 route show fd05:0:0:2::/64", "dev flannel-v6.1")

	// IPv6's vanishes with the device on it. IPv4 goes on, also with a new peer.
	nstest.Run(t, "ip link del eth1")
	eventually(t, "the device is gone", func() bool {
		_, err := nstest.Try("ip link show flannel-v6.1")
		return err != nil
	})
	more := snapshot(apartPeer("3"))
	more.Snapshot = false
	n.updates <- more
	eventually(t, "the new peer's IPv4 route", func() bool { return route("10.5.3.0/24") != "" })
	n.plug(1500, "fd18::77/64 nodad")
	n.shows("ip -d link show flannel-v6.1", "mtu 1430", "local fd18::77 dev eth1")
	n.shows("ip -6 route show fd05:0:0:2::/64", "dev flannel-v6.1")
	n.shows("ip -6 route show fd05:0:0:3::/64", "dev flannel-v6.1")
}
