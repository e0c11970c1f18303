package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// TestWhatTheHostUses: the network has the uplink's own prefix, a LAN, a bridge of containers and a static route of the
// host in it. Peers with these subnets are left out, by name, until the host uses the prefix no more; this node leases
// none of them; and nothing of the host is changed.
func TestWhatTheHostUses(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 2*time.Minute)
	const config = `{"Network": "198.18.0.0/15", "SubnetMin": "198.19.1.0", "SubnetMax": "198.19.2.0", "Backend": {"Type": "vxlan"}}`
	l := labtest.New(ctx, t, config, lab.NodeOptions{})
	n := l.Nodes()[0]
	labtest.Do(t, n.Script(ctx,
		"link add eth1 type veth peer name far1", "link set far1 up", "addr add 198.19.1.11/24 dev eth1", "link set eth1 up",
		"link add docker0 type bridge", "addr add 198.19.3.1/24 dev docker0", "link set docker0 up",
		"route add 198.19.5.0/24 via 198.18.0.254 dev eth0 proto static"))
	reasons := map[string]string{
		"198.18.0.0/24": "overlaps 198.18.0.0/24 of eth0",
		"198.19.1.0/24": "overlaps 198.19.1.0/24 of eth1",
		"198.19.3.0/24": "overlaps 198.19.3.0/24 of docker0",
		"198.19.5.0/24": "overlaps another program's route (198.19.5.0/24 via 198.18.0.254 dev eth0 proto static)",
	}
	peers := []string{"198.18.0.0/24", "198.19.1.0/24", "198.19.3.0/24", "198.19.4.0/24", "198.19.5.0/24"}
	for i, p := range peers {
		labtest.Do(t, l.Etcd.Put(ctx, subnetKey(strings.Replace(p, "/", "-", 1)),
			strangerLease(fmt.Sprintf("198.18.7.%d", 100+i), fmt.Sprintf("0e:00:00:00:00:%02x", i))))
	}
	before := hostRoutes(ctx, t, n)
	labtest.Start(ctx, t, l)

	// The LAN would have been the first choice.
	own := labtest.Must(n.SubnetEnv())(t).Subnets.IPv4.String()
	if own != "198.19.2.0/24" {
		t.Errorf("the node leased %s", own)
	}
	waitRoutes(ctx, t, n, "198.19.4.0/24")
	if after := hostRoutes(ctx, t, n); after != before {
		t.Errorf("the host's routes were\n%s\nand are\n%s", before, after)
	}
	leftOut(ctx, t, n, reasons)
	for s, text := range reasons {
		if got := strings.Count(n.Log(), "its subnet "+s+" "+text); got != 1 {
			t.Errorf("logged %d times: %s %s", got, s, text)
		}
	}
	if !strings.Contains(n.Log(), "Network 198.18.0.0/15 overlaps 198.18.0.0/24 of eth0, the uplink") {
		t.Error("the log does not warn of the Network")
	}
	text, _, err := n.Ctl(ctx, "doctor")
	labtest.Do(t, err)
	for _, want := range []string{
		"network-overlap: Network 198.18.0.0/15 overlaps 198.18.0.0/24 of eth0, the uplink",
		"peer-left-out: 198.19.1.0/24 at 198.18.7.101: left out, since its subnet 198.19.1.0/24 overlaps 198.19.1.0/24 of eth1",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("doctor does not find %q:\n%s", want, text)
		}
	}
	if strings.Contains(text, "out-of-sync") {
		t.Errorf("doctor finds\n%s", text)
	}

	// A bridge comes later. Its route comes behind ours, which goes.
	labtest.Do(t, n.Script(ctx, "link add docker1 type bridge", "addr add 198.19.4.1/24 dev docker1", "link set docker1 up"))
	reasons["198.19.4.0/24"] = "overlaps 198.19.4.0/24 of docker1"
	waitRoutes(ctx, t, n)
	leftOut(ctx, t, n, reasons)
	labtest.Do(t, waitDiff(ctx, n, ""))
	if routes := hostRoutes(ctx, t, n); !strings.Contains(routes, "198.19.4.0/24 dev docker1 proto kernel") {
		t.Errorf("the bridge's route is gone:\n%s", routes)
	}

	// Peers come in as the host stops using their subnets.
	labtest.Do(t, n.Script(ctx, "link del docker0", "link set docker1 down", "route del 198.19.5.0/24",
		"addr del 198.19.1.11/24 dev eth1"))
	waitRoutes(ctx, t, n, peers[1:]...)
	leftOut(ctx, t, n, map[string]string{peers[0]: reasons[peers[0]]})

	// After a restart, the bridge of the node's own pods is not in the way; a LAN with the node's subnet is.
	labtest.Do(t, n.Script(ctx, "link add cni0 type bridge", "addr add 198.19.2.1/24 dev cni0", "link set cni0 up"))
	labtest.Do(t, n.Restart(ctx))
	labtest.Do(t, n.WaitReady(ctx))
	if now := labtest.Must(n.SubnetEnv())(t).Subnets.IPv4.String(); now != own {
		t.Errorf("after a restart, the node has %s", now)
	}
	labtest.Do(t, l.Etcd.Delete(ctx, subnetKey("198.19.1.0-24")))
	labtest.Do(t, n.Script(ctx, "link del cni0", "addr add 198.19.2.11/24 dev eth1"))
	waitLog(ctx, t, n, "this node's own subnet 198.19.2.0/24 overlaps 198.19.2.0/24 of eth1")
	labtest.Do(t, n.Restart(ctx))
	waitLog(ctx, t, n, "Giving up a lease that overlaps what this host uses")
	labtest.Do(t, n.WaitReady(ctx))
	labtest.Do(t, lab.Poll(ctx, "another subnet", func() error {
		env, err := n.SubnetEnv()
		if err == nil && env.Subnets.IPv4.String() != "198.19.1.0/24" {
			err = fmt.Errorf("it is %s", env.Subnets)
		}
		return err
	}))
}

// hostRoutes returns the routes of a node that are not flanneld's.
func hostRoutes(ctx context.Context, t *testing.T, n *lab.Node) string {
	t.Helper()
	var kept []string
	for line := range strings.Lines(labtest.Must(n.Run(ctx, "ip route show"))(t)) {
		if !strings.Contains(line, "proto 70") {
			kept = append(kept, strings.TrimSpace(line))
		}
	}
	return strings.Join(kept, "\n")
}

// waitRoutes waits until flanneld has routes to these subnets alone.
func waitRoutes(ctx context.Context, t *testing.T, n *lab.Node, subnets ...string) {
	t.Helper()
	labtest.Do(t, lab.Poll(ctx, "routes to "+strings.Join(subnets, ", "), func() error {
		out, err := n.Run(ctx, "ip route show proto 70")
		if err != nil {
			return err
		}
		if strings.Count(out, " via ") != len(subnets) {
			err = errors.New(out)
		}
		for _, s := range subnets {
			if !strings.Contains(out, s+" via ") {
				err = errors.New(out)
			}
		}
		return err
	}))
}

// leftOut waits until the status has these subnets as left out, for these reasons, and no others.
func leftOut(ctx context.Context, t *testing.T, n *lab.Node, reasons map[string]string) {
	t.Helper()
	labtest.Do(t, lab.Poll(ctx, "the status of peers", func() error {
		s := getStatus(ctx, t, n)
		if len(s.LeftOut) != len(reasons) {
			return fmt.Errorf("left out are %v", s.LeftOut)
		}
		for _, l := range s.LeftOut {
			if text := reasons[l.Subnets[0].String()]; text == "" || !strings.Contains(l.Problem, text) {
				return fmt.Errorf("%v: %s", l.Subnets, l.Problem)
			}
		}
		return nil
	}))
}
