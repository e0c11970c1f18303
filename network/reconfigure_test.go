package network

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/pkg/nstest"
	"github.com/flanneld/flanneld/subnet"
)

// configure has the manager tell of another configuration.
func (m *manager) configure(t *testing.T, text string) {
	t.Helper()
	m.config = text
	cfg, err := m.Config(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	m.configs <- cfg
}

func peerOfVNI(vni int) subnet.Lease {
	return lease("10.5.2.0-24", fmt.Sprintf(`{"PublicIP":"198.18.0.2","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":%d,"VtepMAC":"0e:00:00:00:00:02"}}`, vni))
}

func TestReconfigure(t *testing.T) {
	m := newManager(vxlanConfig)
	d := begin(t, m, nil)
	m.grants <- lease("10.5.1.0-24", "")
	first := <-m.wants
	m.updates <- snapshot(peer2)
	eventually(t, "ready", ready)
	mac := strings.TrimPrefix(string(first.Attrs.BackendData), `{"VNI":1,`)

	// What cannot work changes nothing.
	m.configure(t, `{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "VNI": -1}}`)
	m.configure(t, `{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "VNI": 7}}`)
	want := <-m.wants
	if want.Subnets.Key() != "10.5.1.0-24" || string(want.Attrs.BackendData) != `{"VNI":7,`+mac {
		t.Errorf("with VNI 7, the node wants %s with %s", want.Subnets, want.Attrs.BackendData)
	}
	if route("10.5.2.0/24") == "" {
		t.Error("the old configuration is given up before there is a lease for the new one")
	}
	m.grants <- lease("10.5.1.0-24", "")
	m.updates <- snapshot(peerOfVNI(7))
	eventually(t, "the device of VNI 7 in place of the other", func() bool {
		links, _ := nstest.Try("ip -br link")
		return !strings.Contains(links, "flannel.1 ") && strings.Contains(route("10.5.2.0/24"), "dev flannel.7")
	})

	// Another backend, other rules.
	m.configure(t, `{"Network": "10.5.0.0/16", "EnableNFTables": true, "Backend": {"Type": "host-gw"}}`)
	<-m.wants
	m.grants <- lease("10.5.1.0-24", "")
	m.updates <- snapshot(lease("10.5.2.0-24", `{"PublicIP":"198.18.0.2","PublicIPv6":null,"BackendType":"host-gw"}`))
	eventually(t, "host-gw and nftables", func() bool {
		links, _ := nstest.Try("ip -br link")
		old, _ := nstest.Try("iptables -t nat -S")
		rules, _ := nstest.Try("nft list tables")
		env, _ := subnet.ReadEnv(d.file)
		return !strings.Contains(links, "flannel.") && strings.Contains(route("10.5.2.0/24"), "via 198.18.0.2 dev eth0") &&
			!strings.Contains(old, "FLANNEL") && strings.Contains(rules, "flannel-ipv4") && env.MTU == 1500
	})

	// Another network.
	m.configure(t, `{"Network": "10.9.0.0/16", "EnableNFTables": true, "Backend": {"Type": "host-gw"}}`)
	<-m.wants
	m.grants <- lease("10.9.1.0-24", "")
	m.updates <- snapshot(lease("10.9.2.0-24", `{"PublicIP":"198.18.0.2","PublicIPv6":null,"BackendType":"host-gw"}`))
	eventually(t, "another network", func() bool {
		rules, _ := nstest.Try("nft list ruleset")
		env, _ := subnet.ReadEnv(d.file)
		return route("10.5.2.0/24") == "" && route("10.9.2.0/24") != "" && env.Subnets.Key() == "10.9.1.0-24" &&
			strings.Contains(rules, "10.9.0.0/16") && !strings.Contains(rules, "10.5.0.0/16")
	})
}

// An uplink without IPv6 does not carry a network with IPv6: until it does, the
// old configuration is in force.
func TestReconfigureWaitsForUplink(t *testing.T) {
	m := newManager(vxlanConfig)
	begin(t, m, nil)
	m.grants <- lease("10.5.1.0-24", "")
	<-m.wants
	m.updates <- snapshot(peer2)
	eventually(t, "ready", ready)
	m.configure(t, `{"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "fd05::/48", "Backend": {"Type": "vxlan"}}`)
	nstest.Run(t, "ip link del flannel.1")
	eventually(t, "what is in force is kept", func() bool { return route("10.5.2.0/24") != "" })
	nstest.Run(t, "ip addr add fd18::1/64 dev eth0 nodad")
	if want := <-m.wants; want.Attrs.PublicIPv6.String() != "fd18::1" {
		t.Errorf("the lease is wanted for %s", want.Attrs.PublicIPv6)
	}
}

// A toy is a backend that works.
type toy struct {
	hostname string
	works    chan work
}

type work struct {
	own   subnet.Lease
	peers <-chan subnet.Update
	ctx   context.Context
	end   chan error
}

var toys = make(chan work, 10)

func init() {
	backend.Register(backend.Type{Name: "toy", New: func(cfg *subnet.Config, _ iface.Uplink) (backend.Backend, error) {
		t := &toy{works: toys}
		return t, backend.Options(cfg, &struct{ Name *string }{&t.hostname})
	}})
	backend.Register(backend.Type{Name: "alone",
		New: func(*subnet.Config, iface.Uplink) (backend.Backend, error) { return &alone{}, nil }})
}

func (*toy) Attrs(context.Context, subnet.Attrs) (subnet.Attrs, error) {
	return subnet.Attrs{BackendType: "toy"}, nil
}
func (*toy) Local(subnet.Lease) []kernel.Object                                 { return nil }
func (*toy) Peer(subnet.Lease, subnet.Lease) (objects []kernel.Object, _ error) { return nil, nil }
func (*toy) Info() backend.Info                                                 { return backend.Info{MTU: 1400} }

func (y *toy) Work(ctx context.Context, own subnet.Lease, peers <-chan subnet.Update) error {
	w := work{own, peers, ctx, make(chan error, 1)}
	y.works <- w
	select {
	case err := <-w.end:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

type alone struct{ toy }

func (*alone) Info() backend.Info { return backend.Info{MTU: 1400, NoPeers: true} }
func (*alone) Attrs(context.Context, subnet.Attrs) (subnet.Attrs, error) {
	return subnet.Attrs{}, nil
}
func (*alone) Work(context.Context, subnet.Lease, <-chan subnet.Update) error { return nil }

func TestWorker(t *testing.T) {
	m := newManager(`{"Network": "10.5.0.0/16", "Backend": {"Type": "toy"}}`)
	d := begin(t, m, nil)
	m.grants <- lease("10.5.1.0-24", "")
	peer := func(key, ip string) subnet.Lease {
		return lease(key, `{"PublicIP":"`+ip+`","PublicIPv6":null,"BackendType":"toy"}`)
	}
	m.updates <- snapshot(peer("10.5.1.0-24", "198.18.0.1"), peer("10.5.2.0-24", "198.18.0.2"),
		peer("10.5.3.0-24", "198.18.0.1"),
		lease("10.5.6.0-24", `{"PublicIP":"198.18.0.6","PublicIPv6":null,"BackendType":"vxlan"}`))
	eventually(t, "ready", ready)
	w := <-toys
	if w.own.Subnets.Key() != "10.5.1.0-24" || w.own.Attrs.PublicIP.String() != "198.18.0.1" {
		t.Errorf("it works for %+v", w.own)
	}
	if u := <-w.peers; !u.Snapshot || len(u.Leases) != 1 ||
		u.Leases[peer2.Subnets].Attrs.PublicIP.String() != "198.18.0.2" {
		t.Errorf("its peers are %+v", u)
	}

	// What it has not read yet is merged.
	var join, leave, other subnet.Update
	join.Put(new(peer("10.5.4.0-24", "198.18.0.4")))
	leave.Delete(peer2.Subnets)
	other.Put(new(lease("10.5.5.0-24", `{"PublicIP":"198.18.0.5","PublicIPv6":null,"BackendType":"vxlan"}`)))
	for _, u := range []subnet.Update{join, leave, other} {
		m.updates <- u
	}
	seen := subnet.Update{}
	eventually(t, "the changes", func() bool {
		select {
		case u := <-w.peers:
			for _, l := range u.Leases {
				seen.Put(l)
			}
			for s := range u.Gone {
				seen.Delete(s)
			}
		default:
		}
		return len(seen.Leases) == 1 && len(seen.Gone) == 2
	})

	// Another configuration: first one ends, then the other begins.
	m.configure(t, `{"Network": "10.5.0.0/16", "Backend": {"Type": "toy", "Name": "b"}}`)
	m.grants <- lease("10.5.1.0-24", "")
	<-w.ctx.Done()
	if cause := context.Cause(w.ctx); cause == backend.ErrStopping {
		t.Error("it is told that flanneld ends")
	}
	again := <-toys
	if u := <-again.peers; !u.Snapshot || len(u.Leases) != 1 {
		t.Errorf("at the second start, its peers are %+v", u)
	}
	d.stop()
	d.done <- nil
	if cause := context.Cause(again.ctx); cause != backend.ErrStopping {
		t.Errorf("at the end, the cause is %v", cause)
	}
}

func TestWorkerFails(t *testing.T) {
	m := newManager(`{"Network": "10.5.0.0/16", "Backend": {"Type": "toy"}}`)
	d := begin(t, m, nil)
	m.grants <- lease("10.5.1.0-24", "")
	w := <-toys
	w.end <- fmt.Errorf("no such table")
	if err := <-d.done; err == nil || err.Error() != "no such table" {
		t.Errorf("Run returned %v", err)
	}
	d.done <- nil
}

// A backend without peers is ready without anybody's leases.
func TestNoPeers(t *testing.T) {
	m := newManager(`{"Network": "10.5.0.0/16", "Backend": {"Type": "alone"}}`)
	begin(t, m, nil)
	m.grants <- lease("10.5.1.0-24", "")
	eventually(t, "ready", ready)
}
