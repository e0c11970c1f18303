package vxlan

import (
	"testing"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/backend/backendtest"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/subnet"
)

func TestGolden(t *testing.T) { backendtest.Golden(t) }

func TestReference(t *testing.T) { backendtest.Keys(t, defaults) }

// A VTEP that is new has a MAC of its own; one that was known keeps it.
func TestMAC(t *testing.T) {
	cfg, err := subnet.ParseConfig([]byte(`{"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "fd05::/48", "Backend": {"Type": "vxlan"}}`))
	if err != nil {
		t.Fatal(err)
	}
	link := iface.Link{Name: "eth0", MTU: 1500}
	b, err := New(cfg, iface.Uplink{IPv4: link, IPv6: link})
	if err != nil {
		t.Fatal(err)
	}
	seen := map[kernel.MAC]bool{}
	for range 50 {
		a := attrs(t, b, subnet.Attrs{})
		for _, text := range [][]byte{a.BackendData, a.BackendV6Data} {
			d, err := parse(text)
			if err != nil {
				t.Fatal(err)
			}
			if d.VtepMAC[0]&3 != 2 {
				t.Errorf("%s is not a locally administered unicast address", d.VtepMAC)
			}
			seen[d.VtepMAC] = true
		}
		if again := attrs(t, b, a); !again.Equal(a) {
			t.Errorf("%s became %s", a.BackendData, again.BackendData)
		}
	}
	if len(seen) != 100 {
		t.Errorf("%d different MACs in 100", len(seen))
	}
}

func attrs(t *testing.T, b backend.Backend, previous subnet.Attrs) subnet.Attrs {
	t.Helper()
	a, err := b.Attrs(t.Context(), previous)
	if err != nil {
		t.Fatal(err)
	}
	return a
}
