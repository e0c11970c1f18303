package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/nstest"
)

// beside starts another daemon beside that of begin. ready returns what its /readyz answers.
func beside(t *testing.T, name, config string, port uint16) (m *manager, o Options, ready func() string) {
	m, done := newManager(config), make(chan error, 1)
	o = Options{
		Manager: m, Uplink: iface.Selector{Criteria: iface.Criteria{Names: []string{"eth0"}}}, Name: name,
		SubnetFile: filepath.Join(t.TempDir(), "subnet.env"), Forward: true, RulesResync: time.Minute, KernelResync: time.Minute,
		Health: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port), StatusSocket: filepath.Join(t.TempDir(), "sock"),
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() { done <- Run(ctx, o) }()
	t.Cleanup(func() { cancel(); <-done })
	return m, o, func() string { _, text := getAt(port, "/readyz"); return text }
}

// thisProcess is how a daemon of these tests names another one.
var thisProcess = fmt.Sprintf("process %d", os.Getpid())

// A second daemon waits for the end of the first, and takes over; another network on the host works beside the first,
// as soon as it has a device of its own. Until then it has published and written nothing.
func TestSecondDaemon(t *testing.T) {
	m := newManager(vxlanConfig)
	first := begin(t, m, nil)
	m.grants <- lease("10.5.1.0-24", "")
	m.updates <- snapshot(peer2)
	eventually(t, "ready", ready)
	same, _, sameReady := beside(t, "", vxlanConfig, healthPort+1)
	eventually(t, "the second daemon waits", func() bool {
		return strings.HasPrefix(sameReady(), "waiting for another flanneld") && strings.Contains(sameReady(), thisProcess)
	})
	other, _, otherReady := beside(t, "blue", `{"Network": "10.6.0.0/16", "Backend": {"Type": "vxlan"}}`, healthPort+2)
	eventually(t, "the other network waits for a device", func() bool {
		return strings.Contains(otherReady(), thisProcess) && strings.Contains(otherReady(), "flannel.1")
	})
	if rules := nstest.Run(t, "iptables -S"); len(other.wants) > 0 || strings.Contains(rules, "blue") {
		t.Errorf("without its device, the other network wants %d leases, and has the rules:\n%s", len(other.wants), rules)
	}
	first.stop()
	first.done <- nil
	// Either gets the device now.
	select {
	case <-same.wants:
		same.grants <- lease("10.5.1.0-24", "")
		same.updates <- snapshot(peer2)
	case <-other.wants:
		other.grants <- lease("10.6.1.0-24", "")
		other.updates <- snapshot()
	}
	eventually(t, "one is ready", func() bool { return sameReady() == "ok" || otherReady() == "ok" })
	if code, _ := getAt(healthPort+1, "/healthz"); code != http.StatusOK {
		t.Errorf("healthz: %d", code)
	}
}

// A network that overlaps another one of the host waits until that one is gone.
func TestOverlappingNetworks(t *testing.T) {
	m := newManager(vxlanConfig)
	first := begin(t, m, nil)
	m.grants <- lease("10.5.1.0-24", "")
	m.updates <- snapshot(peer2)
	eventually(t, "ready", ready)
	// A socket that does not accept connections may be anybody's: it does not count.
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: "@flanneld/prefix/0.0.0.0/0"}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", "@flanneld/prefix/0.0.0.0/0")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	other, _, otherReady := beside(t, "blue", `{"Network": "10.5.0.0/17", "Backend": {"Type": "host-gw"}}`, healthPort+2)
	eventually(t, "the other network waits", func() bool {
		return strings.Contains(otherReady(), thisProcess+", has the network 10.5.0.0/16") &&
			strings.Contains(otherReady(), "overlaps 10.5.0.0/17")
	})
	if len(other.wants) > 0 || route("10.5.2.0/24") == "" {
		t.Error("the other network is in force")
	}
	first.stop()
	first.done <- nil
	<-other.wants
	other.grants <- lease("10.5.3.0-24", "")
	other.updates <- snapshot()
	eventually(t, "the other network is ready", func() bool { return otherReady() == "ok" })
}

// A new configuration that needs what another network has is refused, until the other network does not have it any more.
func TestReconfigureBesideOther(t *testing.T) {
	m := newManager(vxlanConfig)
	begin(t, m, nil)
	m.grants <- lease("10.5.1.0-24", "")
	m.updates <- snapshot(peer2)
	<-m.wants
	eventually(t, "ready", ready)
	other, o, otherReady := beside(t, "blue", `{"Network": "10.6.0.0/16", "Backend": {"Type": "vxlan", "VNI": 2}}`, healthPort+1)
	other.grants <- lease("10.6.1.0-24", "")
	other.updates <- snapshot()
	<-other.wants
	eventually(t, "the other network is ready", func() bool { return otherReady() == "ok" })

	refusal := func(config, want string) {
		t.Helper()
		other.configure(t, config)
		eventually(t, "the refusal of "+config, func() bool {
			s, err := NewClient(o.StatusSocket).Status(t.Context())
			text := s.Errors["Configuration"]
			return err == nil && strings.Contains(text, "the old one stays in force") &&
				strings.Contains(text, thisProcess) && strings.Contains(text, want)
		})
	}
	refusal(`{"Network": "10.5.128.0/17", "Backend": {"Type": "vxlan", "VNI": 2}}`, "overlaps 10.5.128.0/17")
	refusal(`{"Network": "10.6.0.0/16", "Backend": {"Type": "vxlan", "VNI": 1}}`, "the device flannel.1")
	if text := otherReady(); len(other.wants) > 0 || text != "ok" {
		t.Errorf("the node wants %d leases, and is ready: %s", len(other.wants), text)
	}
	nstest.Run(t, "ip link show flannel.2")

	// The first network moves: to the other's device, in vain, and then away.
	m.configure(t, `{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "VNI": 2}}`)
	m.configure(t, `{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "VNI": 3}}`)
	if want := <-m.wants; !strings.Contains(string(want.Attrs.BackendData), `"VNI":3`) {
		t.Errorf("the first network wants %s", want.Attrs.BackendData)
	}
	m.grants <- lease("10.5.1.0-24", "")
	if want := <-other.wants; !strings.Contains(string(want.Attrs.BackendData), `"VNI":1`) {
		t.Errorf("the other network wants %s", want.Attrs.BackendData)
	}
	other.grants <- lease("10.6.1.0-24", "")
	eventually(t, "both devices", func() bool {
		links, _ := nstest.Try("ip -br link")
		return strings.Contains(links, "flannel.1 ") && strings.Contains(links, "flannel.3 ") && !strings.Contains(links, "flannel.2 ")
	})
}
