package kernel

import (
	"fmt"
	"testing"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/nstest"
)

// BenchmarkPeers sets n VXLAN peers in an empty namespace, as routes through
// nexthops and as plain ones.
func BenchmarkPeers(b *testing.B) {
	for _, n := range []int{100, 1000, 5000, 20000} {
		for _, few := range []int{0, fewGateways, n} {
			b.Run(fmt.Sprintf("n=%d/plain=%d", n, few), func(b *testing.B) {
				nstest.New(b)
				nstest.Need(b, "ip")
				nstest.Run(b, "ip link add eth0 type veth peer name far")
				r, err := New(klog.Background())
				if err != nil {
					b.Fatal(err)
				}
				defer r.Close()
				r.fewGateways = few
				r.Set("node", node())
				if err := r.Reconcile(); err != nil {
					b.Fatal(err)
				}
				b.ResetTimer()
				for range b.N {
					for i := range n {
						r.Set(fmt.Sprint(i), vxlanPeer(i))
					}
					if err := r.Reconcile(); err != nil {
						b.Fatal(err)
					}
					b.StopTimer()
					for i := range n {
						r.Set(fmt.Sprint(i), nil)
					}
					if err := r.Reconcile(); err != nil {
						b.Fatal(err)
					}
					r.receive() // notifications of our own FDB entries, which the filter cannot tell
					b.StartTimer()
				}
				b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N*n), "µs/peer")
			})
		}
	}
}
