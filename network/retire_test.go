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

// TestRetireBeforePeersAreKnown: a configuration that loses a network before the leases of the peers are known cuts none
// of them off.
func TestRetireBeforePeersAreKnown(t *testing.T) {
	m := newManager(`{"Network": "10.5.0.0/16", "Networks": ["10.6.0.0/16"], "Backend": {"Type": "vxlan"}}`)
	begin(t, m, nil)
	<-m.wants
	m.configure(t, vxlanConfig)
	<-m.wants
	m.grants <- lease("10.5.1.0-24", "")
	other := peer2
	other.Subnets = lease("10.6.2.0-24", "").Subnets
	m.updates <- snapshot(other)
	eventually(t, "a route to the peer in the network that is gone", func() bool { return route("10.6.2.0/24") != "" })
}

// TestRetiredEvent: neither a network that is part of another one now is told of as gone, nor one of a configuration that
// is refused.
func TestRetiredEvent(t *testing.T) {
	const two = `{"Network": "10.5.0.0/16", "Networks": ["10.6.0.0/16"], "Backend": {"Type": "vxlan"}}`
	m := &eventManager{newManager(two), make(chan string, 10)}
	begin(t, m.manager, func(o *Options) { o.Manager = m })
	<-m.wants
	m.grants <- lease("10.5.1.0-24", "")
	other := peer2
	other.Subnets = lease("10.6.2.0-24", "").Subnets
	m.updates <- snapshot(other)
	eventually(t, "ready", ready)
	for _, step := range []struct{ config, want string }{
		{`{"Network": "10.4.0.0/15", "Networks": ["10.6.0.0/16"], "Backend": {"Type": "vxlan"}}`, ""},
		{`{"Network": "10.4.0.0/15", "Backend": {"Type": "vxlan", "VNI": -1}}`, "refused"},
		{`{"Network": "10.4.0.0/15", "Networks": ["10.7.0.0/16"], "Backend": {"Type": "vxlan"}}`, "longer has 10.6.0.0/16, in"},
	} {
		m.configure(t, step.config)
		if step.want == "refused" {
			continue
		}
		<-m.wants
		m.grants <- lease("10.5.1.0-24", "")
		for {
			event := m.next(t)
			if !strings.HasPrefix(event, "retired ") {
				continue
			}
			if step.want == "" && event != "retired NetworkRetired " || !strings.Contains(event, step.want) {
				t.Errorf("with %s: %s", step.config, event)
			}
			break
		}
	}
	select {
	case event := <-m.events:
		t.Errorf("one more event: %s", event)
	default:
	}
}
