package network

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/pkg/iface"
)

// A second daemon waits for the end of the first, and takes over; another network on the host works beside the first,
// as soon as it has a device of its own.
func TestSecondDaemon(t *testing.T) {
	m := newManager(vxlanConfig)
	first := begin(t, m, nil)
	m.grants <- lease("10.5.1.0-24", "")
	m.updates <- snapshot(peer2)
	eventually(t, "ready", ready)
	start := func(name, config string, port uint16) (*manager, func() string) {
		m, done := newManager(config), make(chan error, 1)
		o := Options{
			Manager: m, Uplink: iface.Selector{Names: []string{"eth0"}}, Name: name,
			SubnetFile: filepath.Join(t.TempDir(), "subnet.env"), Forward: true, RulesResync: time.Minute, KernelResync: time.Minute,
			Health: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port),
		}
		ctx, cancel := context.WithCancel(t.Context())
		go func() { done <- Run(ctx, o) }()
		t.Cleanup(func() { cancel(); <-done })
		return m, func() string { _, text := getAt(port, "/readyz"); return text }
	}
	same, sameReady := start("", vxlanConfig, healthPort+1)
	holder := fmt.Sprintf("process %d", os.Getpid())
	eventually(t, "the second daemon waits", func() bool {
		return strings.HasPrefix(sameReady(), "waiting for another flanneld") && strings.Contains(sameReady(), holder)
	})
	other, otherReady := start("blue", `{"Network": "10.6.0.0/16", "Backend": {"Type": "vxlan"}}`, healthPort+2)
	other.grants <- lease("10.6.1.0-24", "")
	other.updates <- snapshot()
	eventually(t, "the other network waits for a device", func() bool {
		return strings.Contains(otherReady(), holder) && strings.Contains(otherReady(), "flannel.1")
	})
	first.stop()
	first.done <- nil
	// Either gets the device now.
	same.grants <- lease("10.5.1.0-24", "")
	same.updates <- snapshot(peer2)
	eventually(t, "one is ready", func() bool { return sameReady() == "ok" || otherReady() == "ok" })
	if code, _ := getAt(healthPort+1, "/healthz"); code != http.StatusOK {
		t.Errorf("healthz: %d", code)
	}
}
