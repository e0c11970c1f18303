package subnettest

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/flanneld/flanneld/subnet"
)

// The Manager of this package passes the suite.
func TestManager(t *testing.T) {
	Run(t, func(*testing.T) Harness {
		s := &Store{}
		name := func(node int) string { return fmt.Sprintf("n%d", node) }
		return Harness{
			Manager:     func(node int) subnet.Manager { return NewManager(s, name(node)) },
			Configure:   s.Configure,
			SetLease:    func(node int, l subnet.Lease) { s.SetLease(name(node), l) },
			DeleteLease: func(_ int, subnets subnet.Subnets) { s.DeleteLease(subnets) },
			Republish:   func(node int, ip netip.Addr) { s.Republish(name(node), ip) },
			Ready:       func(node int) bool { return s.Ready(name(node)) },
			Fail: func() func() {
				s.Fail("the test says so")
				return func() { s.Fail("") }
			},
			Gap: func(change func()) {
				s.Fail("the test says so")
				change()
				s.Gap()
				s.Fail("")
			},
		}
	})
}
