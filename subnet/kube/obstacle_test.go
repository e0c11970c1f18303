package kube

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/subnet"
)

// TestPodCIDRInTheHostsWay: a podCIDR that overlaps the uplink is named, and waited for to change.
func TestPodCIDRInTheHostsWay(t *testing.T) {
	s, m := newOwnServer(t)
	cfg, err := subnet.ParseConfig([]byte(`{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}`))
	if err != nil {
		t.Fatal(err)
	}
	cfg = cfg.Around([]subnet.Obstacle{{Prefix: netip.MustParsePrefix("10.5.1.0/24"), Name: "10.5.1.0/24 of eth0"}})
	want := subnet.Lease{Attrs: subnet.Attrs{PublicIP: netip.MustParseAddr("198.18.0.1"), BackendType: "vxlan"}}
	s.frames <- frame("ADDED", ownNodeWith("10.5.1.0/24"))
	s.frames <- lastBookmark
	acquired := result(t, func() (subnet.Lease, error) { return m.Acquire(t.Context(), cfg, want) })
	const missing = "spec.podCIDR of Node n1 that does not overlap 10.5.1.0/24 of eth0"
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		m.mu.Lock()
		waits := ""
		for what := range m.waits {
			waits = what
		}
		m.mu.Unlock()
		if strings.Contains(waits, missing) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("it waits for %q", waits)
		}
	}
	s.frames <- frame("MODIFIED", ownNodeWith("10.5.2.0/24"))
	s.answer(t, takenAs(publishedAs(want.Attrs, "10.5.2.0/24")))
	if l, err := acquired(); err != nil || l.IPv4 != netip.MustParsePrefix("10.5.2.0/24") {
		t.Errorf("the lease is %v, %v", l.Subnets, err)
	}
}
