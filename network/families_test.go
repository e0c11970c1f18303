package network

import (
	"strings"
	"testing"

	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/nstest"
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
	u, missing, err := findUplink(iface.Selector{Names: []string{"eth1"}}, cfg, true)
	if err != nil || u.IPv4.String() != "198.18.1.1" || missing[family.IPv6] == nil {
		t.Errorf("without a carrier: %v, %v, %v", u, missing, err)
	}
}
