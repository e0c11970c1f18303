package e2e

import (
	"fmt"
	"net/netip"
	"os/exec"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// TestMasqueradeChoice: pods are masqueraded in one family alone, and then, with another configuration, not to one
// prefix, whose hosts have routes to pods.
func TestMasqueradeChoice(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		backend  string
		nftables bool
		long     bool
	}{{"vxlan", false, false}, {"host-gw", true, true}} {
		if !labtest.Selected(!c.long) {
			continue
		}
		t.Run(fmt.Sprintf("%s, nftables %t", c.backend, c.nftables), func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t, time.Minute)
			network := ipv4Network + `, ` + ipv6Network
			backend := fmt.Sprintf(`{"Type": %q}`, c.backend)
			l := labtest.New(ctx, t, configuration(network, backend, c.nftables), lab.NodeOptions{}, lab.NodeOptions{})
			labtest.Start(ctx, t, l, "--ip-masq", "--ip-masq-families=ipv4")
			nodes, pods := l.Nodes(), addPods(ctx, t, l)
			labtest.Do(t, l.Outside.Mirror())
			labtest.Do(t, nodes[1].Mirror())
			labtest.Do(t, pods[1].Mirror())
			for i, n := range nodes {
				for f, s := range labtest.Must(n.SubnetEnv())(t).Subnets.Each() {
					route := []string{"-n", l.Name + "-net", "route", "add", s.String(), "via", nodes[i].Addrs()[f].String()}
					if out, err := exec.CommandContext(ctx, "ip", route...).CombinedOutput(); err != nil {
						t.Fatalf("ip %q: %v: %s", route, err, out)
					}
				}
			}
			from := pods[0]
			expect := func(dst, want netip.Addr) {
				t.Helper()
				labtest.Do(t, lab.Poll(ctx, fmt.Sprintf("%s to see %s", dst, want), func() error {
					return seenAs(ctx, from.Namespace, dst, want)
				}))
			}
			expect(lab.Outside, nodes[0].IPv4)
			expect(lab.OutsideV6, from.IPv6)
			expect(nodes[1].IPv4, nodes[0].IPv4)

			labtest.Do(t, l.Etcd.Configure(ctx, configuration(network+`, "NonMasqueradeCIDRs": ["198.19.0.0/24"]`, backend, c.nftables)))
			expect(lab.Outside, from.IPv4)
			expect(nodes[1].IPv4, nodes[0].IPv4)
			for f, own := range from.Addrs() {
				expect(pods[1].Addrs()[f], own)
			}
			expectNoDiff(ctx, t, nodes...)
		})
	}
}
