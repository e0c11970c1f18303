package kernel

import (
	"fmt"
	"testing"

	"github.com/flanneld/flanneld/pkg/nstest"
)

// BenchmarkPeers sets n VXLAN peers in an empty namespace, compares them with
// the kernel's tables, and removes them.
func BenchmarkPeers(b *testing.B) {
	for _, n := range []int{100, 1000, 5000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			nstest.New(b)
			nstest.Need(b, "ip")
			nstest.Run(b, "ip link add eth0 type veth peer name far")
			r, err := New()
			if err != nil {
				b.Fatal(err)
			}
			defer r.Close()
			r.Set("node", node())
			for range b.N {
				for i := range n {
					r.Set(fmt.Sprint(i), vxlanPeer(i))
				}
				if err := r.Apply(); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				for i := range n {
					r.Set(fmt.Sprint(i), nil)
				}
				if err := r.Apply(); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}
