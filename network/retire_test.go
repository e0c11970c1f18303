package network

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/pkg/nstest"
	"github.com/flanneld/flanneld/subnet"
)

// TestRetire: a network that the configuration loses stays in force while a node has a subnet of it, and no longer; the
// subnet file keeps it over a restart. Networks that replace all others do so at once.
func TestRetire(t *testing.T) {
	const two = `{"Network": "10.5.0.0/16", "Networks": ["10.6.0.0/16"], "Backend": {"Type": "vxlan"}}`
	other := lease("10.6.2.0-24", `{"PublicIP":"198.18.0.2","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:00:00:00:00:02"}}`)
	m := newManager(two)
	d := begin(t, m, func(o *Options) {
		o.KernelResync = 50 * time.Millisecond
		env := subnet.Env{Networks: subnet.NetworksOf(netip.MustParsePrefix("10.5.0.0/16"), netip.MustParsePrefix("10.7.0.0/16")),
			Subnets: lease("10.7.1.0-24", "").Subnets, MTU: 1450}
		if err := env.WriteFile(o.SubnetFile); err != nil {
			t.Fatal(err)
		}
	})
	networks := func(want string) func() bool {
		return func() bool {
			env, _ := subnet.ReadEnv(d.file)
			rules, _ := nstest.Try("iptables -t nat -S FLANNEL-POSTRTG")
			for network := range strings.SplitSeq(want, ",") {
				if !strings.Contains(rules, network) {
					return false
				}
			}
			return env.Networks.String() == want
		}
	}
	if want := <-m.wants; want.Subnets.Key() != "10.7.1.0-24" {
		t.Errorf("of a network that only the subnet file has, the node wants %s", want.Subnets)
	}
	m.grants <- lease("10.7.1.0-24", "")
	m.updates <- snapshot(other)
	eventually(t, "three networks", networks("10.5.0.0/16,10.6.0.0/16,10.7.0.0/16"))

	m.configure(t, `{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}`)
	<-m.wants
	m.grants <- lease("10.7.1.0-24", "")
	eventually(t, "the networks of both nodes", networks("10.5.0.0/16,10.6.0.0/16,10.7.0.0/16"))
	if route("10.6.2.0/24") == "" {
		t.Error("there is no route to the peer in the network that is gone")
	}

	m.updates <- subnet.Update{Gone: map[subnet.Subnets]bool{other.Subnets: true}}
	<-m.wants
	m.grants <- lease("10.7.1.0-24", "")
	eventually(t, "the node's own network alone", networks("10.5.0.0/16,10.7.0.0/16"))

	m.configure(t, `{"Network": "10.9.0.0/16", "Backend": {"Type": "vxlan"}}`)
	<-m.wants
	m.grants <- lease("10.9.1.0-24", "")
	eventually(t, "another network", networks("10.9.0.0/16"))
}
