package kernel

import (
	"fmt"
	"net/netip"
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
					a := netip.AddrFrom4([4]byte{10, 6 + byte(i>>8), byte(i), 0})
					m := MAC{0x0e, 1, 0, 0, byte(i >> 8), byte(i)}
					r.Set(a.String(), []Object{
						Neighbor{Dev: "flannel.1", IP: a, MAC: m},
						FDBEntry{Dev: "flannel.1", MAC: m, Dst: netip.AddrFrom4([4]byte{198, 19, byte(i >> 8), byte(i)})},
						Route{Dst: netip.PrefixFrom(a, 24), Via: a, Dev: "flannel.1", Onlink: true},
					})
				}
				if err := r.Apply(); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				for i := range n {
					r.Set(netip.AddrFrom4([4]byte{10, 6 + byte(i>>8), byte(i), 0}).String(), nil)
				}
				if err := r.Apply(); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}
