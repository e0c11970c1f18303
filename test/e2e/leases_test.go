package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// TestLastSubnets: twelve daemons start in the same instant, and there are
// twelve subnets.
func TestLastSubnets(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 2*time.Minute)
	const nodes = 12
	l := labtest.New(ctx, t, `{"Network": "10.5.0.0/16", "SubnetMin": "10.5.1.0", "SubnetMax": "10.5.12.0", "Backend": {"Type": "vxlan"}}`,
		make([]lab.NodeOptions, nodes)...)
	labtest.Start(ctx, t, l)

	for _, kv := range labtest.Must(l.Etcd.Client.Get(ctx, lab.Prefix+"/subnets/", clientv3.WithPrefix()))(t).Kvs {
		if kv.Version != 1 {
			t.Errorf("%s was written %d times: somebody lost it", kv.Key, kv.Version)
		}
	}
	leases := labtest.Must(l.Etcd.Leases(ctx))(t)
	holder := map[netip.Prefix]netip.Addr{}
	for _, lease := range leases {
		holder[lease.IPv4] = lease.Attrs.PublicIP
	}
	if len(leases) != nodes || len(holder) != nodes {
		t.Errorf("%d leases of %d subnets, want %d", len(leases), len(holder), nodes)
	}
	for _, n := range l.Nodes() {
		if n.Exited() {
			t.Errorf("%s has exited", n.Hostname)
		}
		own := labtest.Must(n.SubnetEnv())(t).Subnets.IPv4
		if holder[own] != n.IPv4 {
			t.Errorf("%s says that it has %s, which is leased to %s", n.Hostname, own, holder[own])
		}
		var peers []trace
		for s := range holder {
			if s != own {
				peers = append(peers, trace{"ip route show dev flannel.1", s.String() + " via "})
			}
		}
		waitTraces(ctx, t, n, peers, true)
	}
}

// TestPeerGone: when a peer's lease is deleted, nothing of the peer stays.
func TestPeerGone(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, time.Minute)
	l := labtest.New(ctx, t, `{`+ipv4Network+`, `+ipv6Network+`, "Backend": {"Type": "vxlan"}}`,
		make([]lab.NodeOptions, 3)...)
	labtest.Start(ctx, t, l)
	peer := l.Nodes()[2]
	key, lease := leaseOf(ctx, t, l, peer)
	for _, n := range l.Nodes()[:2] {
		waitTraces(ctx, t, n, vxlanTraces(lease), true)
	}
	labtest.Do(t, peer.Stop(ctx))
	labtest.Do(t, l.Etcd.Delete(ctx, key))
	deleted := time.Now()
	ctx = labtest.Context(t, 10*time.Second)
	for _, n := range l.Nodes()[:2] {
		waitTraces(ctx, t, n, vxlanTraces(lease), false)
		t.Logf("%s forgot the peer %v after its lease was deleted", n.Hostname, time.Since(deleted).Round(time.Millisecond))
	}
}

// leaseOf returns a node's lease, and its key in etcd.
func leaseOf(ctx context.Context, t *testing.T, l *lab.Lab, n *lab.Node) (string, subnet.Lease) {
	t.Helper()
	for key, lease := range labtest.Must(l.Etcd.Leases(ctx))(t) {
		if lease.Attrs.PublicIP == n.IPv4 {
			return key, lease
		}
	}
	t.Fatalf("%s has no lease", n.Hostname)
	return "", subnet.Lease{}
}

// A trace is a text in what a command prints.
type trace struct{ command, text string }

// vxlanTraces are what a peer leaves in the kernel.
func vxlanTraces(l subnet.Lease) []trace {
	var all []trace
	for _, f := range []struct {
		device   string
		subnet   netip.Prefix
		publicIP netip.Addr
	}{{"flannel.1", l.IPv4, l.Attrs.PublicIP}, {"flannel-v6.1", l.IPv6, l.Attrs.PublicIPv6}} {
		if !f.subnet.IsValid() {
			continue
		}
		family := "-4"
		if f.subnet.Addr().Is6() {
			family = "-6"
		}
		all = append(all,
			trace{fmt.Sprintf("ip %s route show dev %s", family, f.device), f.subnet.String() + " via "},
			trace{fmt.Sprintf("ip %s neigh show dev %s", family, f.device), f.subnet.Addr().String() + " lladdr "},
			trace{"bridge fdb show dev " + f.device, " dst " + f.publicIP.String() + " "})
	}
	return all
}

// waitTraces waits until the node shows all of the traces, or none.
func waitTraces(ctx context.Context, t *testing.T, n *lab.Node, traces []trace, present bool) {
	t.Helper()
	labtest.Do(t, lab.Poll(ctx, "the kernel of "+n.Hostname, func() error {
		shown := map[string]string{} // by command
		for _, tr := range traces {
			out, ok := shown[tr.command]
			if !ok {
				var err error
				if out, err = n.Run(ctx, tr.command); err != nil {
					return err
				}
				shown[tr.command] = out
			}
			if strings.Contains(out+"\n", tr.text) != present {
				return fmt.Errorf("%s: %q should be there: %v\n%s", tr.command, tr.text, present, out)
			}
		}
		return nil
	}))
}
