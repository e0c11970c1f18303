package all

import (
	"testing"

	"github.com/flanneld/flanneld/backend"
)

// The names of the devices that backends make, upstream's among them, and of others.
func TestDevice(t *testing.T) {
	for name, want := range map[string]bool{
		"flannel.1": true, "flannel-v6.4096": true, "flannel0": true, "flannel12": true, "flannel.ipip": true,
		"flannel-wg": true, "flannel-wg-v6": true,
		"eth0": false, "cni0": false, "flannel": false, "flannel.": false, "flannel.x": false, "flannelxipip": false,
		"myflannel.1": false, "flannel.1.10": false, "flannel0-peer": false, "flannel-wg2": false, "flannel-v6": false,
	} {
		if got := backend.Device(name); got != want {
			t.Errorf("%s is a device of a backend: %t, want %t", name, got, want)
		}
	}
}

// All types of backends can be registered: they have a name and a constructor, and their checks are complete.
func TestTypes(t *testing.T) {
	for _, b := range backend.Types() {
		if b.Name == "" || b.New == nil {
			t.Errorf("%+v lacks a name or a constructor", b)
		}
		for _, c := range b.Checks {
			if c.Name == "" || c.About == "" || c.Run == nil {
				t.Errorf("%s: %+v is not complete", b.Name, c)
			}
		}
	}
}
