package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// TestRestart: daemons that end, well or badly, and start again drop no packet.
func TestRestart(t *testing.T) {
	t.Parallel()
	for name, backend := range map[string]string{
		"vxlan":        `{"Type": "vxlan"}`,
		"vxlan direct": `{"Type": "vxlan", "DirectRouting": true}`,
		"host-gw":      `{"Type": "host-gw"}`,
	} {
		for _, rules := range []string{"iptables", "nftables"} {
			if !labtest.Selected(name == "vxlan" && rules == "iptables" || name == "host-gw" && rules == "nftables") {
				continue
			}
			t.Run(name+"/"+rules, func(t *testing.T) {
				t.Parallel()
				ctx := labtest.Context(t, 2*time.Minute)
				l := labtest.New(ctx, t, fmt.Sprintf(`{%s, %s, "EnableNFTables": %v, "Backend": %s}`,
					ipv4Network, ipv6Network, rules == "nftables", backend), make([]lab.NodeOptions, 2)...)
				labtest.Start(ctx, t, l, "--ip-masq")
				pods := addPods(ctx, t, l)
				labtest.Do(t, l.Outside.Mirror())
				lossless := startPings(ctx, t, pods)
				for _, n := range l.Nodes() {
					before := labtest.Must(n.SubnetEnv())(t)
					labtest.Do(t, n.Restart(ctx)) // by SIGTERM
					labtest.Do(t, n.WaitReady(ctx))
					n.Kill()
					labtest.Do(t, n.Restart(ctx))
					labtest.Do(t, n.WaitReady(ctx))
					if after := labtest.Must(n.SubnetEnv())(t); !after.Equal(before) {
						t.Errorf("%s: the subnet file said %+v, says %+v", n.Hostname, before, after)
					}
				}
				lossless()
				expectSeenAs(ctx, t, pods[0].Namespace, lab.Outside, l.Nodes()[0].IPv4)
				expectSeenAs(ctx, t, pods[0].Namespace, lab.OutsideV6, l.Nodes()[0].IPv6)
			})
		}
	}
}

// startPings has the first two pods ping each other in all families. What it
// returns waits for another half second of answers, and fails the test if any
// was lost.
func startPings(ctx context.Context, t *testing.T, pods []*lab.Pod) (lossless func()) {
	t.Helper()
	var pings []*lab.Pinging
	for i, from := range pods[:2] {
		for _, dst := range pods[1-i].Addrs() {
			pings = append(pings, labtest.Must(from.StartPing(ctx, dst))(t))
		}
	}
	return func() {
		t.Helper()
		for _, dst := range pods[1].Addrs() {
			labtest.Must(pods[0].Ping(ctx, dst, lab.PingOptions{Count: 25}))(t)
		}
		for _, p := range pings {
			got := labtest.Must(p.Stop())(t)
			if len(got.Lost) > 0 {
				t.Errorf("%s: lost %d of %d packets, numbers %v", p, len(got.Lost), got.Sent, got.Lost)
			}
		}
	}
}

// TestReboot: a node that loses its power and comes back has its subnet again,
// at once, and its peers reach it.
func TestReboot(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, time.Minute)
	l := labtest.New(ctx, t, vxlanConfig, lab.NodeOptions{}, lab.NodeOptions{})
	labtest.Start(ctx, t, l)
	n := l.Nodes()[1]
	before := labtest.Must(n.SubnetEnv())(t)
	labtest.Do(t, n.Reboot(ctx))
	labtest.Do(t, n.Start())
	labtest.Do(t, n.WaitReady(ctx))
	if after := labtest.Must(n.SubnetEnv())(t); !after.Equal(before) {
		t.Errorf("the subnet file said %+v, says %+v", before, after)
	}
	pods := addPods(ctx, t, l)
	labtest.Do(t, pods[0].WaitPing(ctx, pods[1].IPv4))
	labtest.Do(t, pods[1].WaitPing(ctx, pods[0].IPv4))
}

// TestEtcdOutage: without etcd, traffic goes on and a new node waits. Afterwards the daemons follow changes that
// happened meanwhile and were compacted away.
func TestEtcdOutage(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 3*time.Minute)
	l := labtest.New(ctx, t, vxlanConfig, make([]lab.NodeOptions, 3)...)
	nodes := l.Nodes()
	old, fresh := subnetKey("10.5.200.0-24"), subnetKey("10.5.201.0-24")
	labtest.Do(t, l.Etcd.Put(ctx, old, strangerLease("198.18.0.200", "0e:00:00:00:00:c8")))
	for _, n := range nodes[:2] {
		labtest.Do(t, n.Start())
	}
	var pods []*lab.Pod
	for _, n := range nodes[:2] {
		labtest.Do(t, n.WaitReady(ctx))
		pods = append(pods, labtest.Must(n.AddPod(ctx, "pod"))(t))
		waitTraces(ctx, t, n, []trace{{"ip route show dev flannel.1", "10.5.200.0/24 via "}}, true)
	}
	lossless := startPings(ctx, t, pods)

	l.Etcd.Kill()
	labtest.Do(t, nodes[2].Start())
	// Ten seconds of outage are five hundred packets.
	labtest.Must(pods[0].Ping(ctx, pods[1].IPv4, lab.PingOptions{Count: 500}))(t)
	if nodes[2].Exited() || nodes[2].Ready(ctx) == nil {
		t.Error("without etcd a new node has exited or is ready, and should wait")
	}
	for _, n := range nodes {
		if !regexp.MustCompile(`(?m)^[WE].*` + regexp.QuoteMeta(lab.Gateway.String())).MatchString(n.Log()) {
			t.Errorf("%s says nothing of etcd being away", n.Hostname)
		}
	}

	labtest.Do(t, l.Etcd.Cut(ctx))
	labtest.Do(t, l.Etcd.Start(ctx))
	labtest.Do(t, l.Etcd.Delete(ctx, old))
	labtest.Do(t, l.Etcd.Put(ctx, fresh, strangerLease("198.18.0.201", "0e:00:00:00:00:c9")))
	labtest.Do(t, l.Etcd.Compact(ctx))
	labtest.Do(t, l.Etcd.Restore(ctx))
	restored := time.Now()

	labtest.Do(t, nodes[2].WaitReady(ctx))
	for _, n := range nodes {
		waitTraces(ctx, t, n, []trace{{"ip route show dev flannel.1", "10.5.201.0/24 via "}}, true)
		waitTraces(ctx, t, n, []trace{{"ip route show dev flannel.1", "10.5.200.0/24 via "}}, false)
	}
	pods = append(pods, labtest.Must(nodes[2].AddPod(ctx, "pod"))(t))
	for _, p := range pods[:2] {
		labtest.Do(t, p.WaitPing(ctx, pods[2].IPv4))
		labtest.Do(t, pods[2].WaitPing(ctx, p.IPv4))
	}
	t.Logf("pods reached the new node's %v after etcd was back", time.Since(restored).Round(time.Millisecond))
	lossless()
}

// TestFrozenForLong: while a daemon stands still, as in a virtual machine that is paused, its lease ends, and another
// node gets the subnet. When the daemon goes on, it takes another subnet, says so, and all nodes reach it.
func TestFrozenForLong(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 3*time.Minute)
	l := labtest.New(ctx, t, vxlanConfig, oneLink...)
	labtest.Start(ctx, t, l)
	n, peer := l.Nodes()[0], l.Nodes()[1]
	key, lease := leaseOf(ctx, t, l, n)
	labtest.Do(t, n.Freeze(ctx))
	// As long as it takes until the node's claim on its public address has ended, too.
	labtest.Do(t, lab.Poll(ctx, "the claim to end", func() error {
		claims, err := l.Etcd.List(ctx, lab.Prefix+"/nodes/"+n.IPv4.String())
		if err == nil && len(claims) > 0 {
			err = errors.New("it is there")
		}
		return err
	}))
	labtest.Do(t, l.Etcd.Put(ctx, key, strangerLease("198.18.0.200", "0e:00:00:00:00:c8")))
	labtest.Do(t, n.Thaw())

	waitLog(ctx, t, n, "This node's subnet changed")
	var now subnet.Lease
	labtest.Do(t, lab.Poll(ctx, "another subnet", func() error {
		env, err := n.SubnetEnv()
		if err == nil && env.Subnets == lease.Subnets {
			err = errors.New("the subnet file has the old one")
		}
		return err
	}))
	_, now = leaseOf(ctx, t, l, n)
	waitTraces(ctx, t, peer, vxlanTraces(now), true)
	waitTraces(ctx, t, n, []trace{{"ip route show dev flannel.1", lease.IPv4.String() + " via "}}, true)
	pods := addPods(ctx, t, l)
	labtest.Do(t, pods[0].WaitPing(ctx, pods[1].IPv4))
	labtest.Do(t, waitDiff(ctx, n, ""))
}

// TestClockJump: when the clock jumps, as when NTP first sets it, nothing happens to the lease and the network, and the
// status shows times by the new clock. The test needs a machine of its own (LAB_CLOCK=1), whose clock it may set.
func TestClockJump(t *testing.T) {
	if os.Getenv("LAB_CLOCK") != "1" {
		t.Skip("needs a machine whose clock may be set: make test-vm")
	}
	ctx := labtest.Context(t, 2*time.Minute)
	l := labtest.New(ctx, t, vxlanConfig, oneLink...)
	labtest.Start(ctx, t, l)
	pods := addPods(ctx, t, l)
	labtest.Do(t, pods[0].WaitPing(ctx, pods[1].IPv4))
	n := l.Nodes()[0]
	key, lease := leaseOf(ctx, t, l, n)
	_, theirs := leaseOf(ctx, t, l, l.Nodes()[1])
	began := time.Now()
	defer func() { labtest.Do(t, setClock(began.Add(time.Since(began)))) }() // time.Since is of the monotonic clock
	for _, jump := range []time.Duration{time.Hour, -2 * time.Hour, 25 * time.Hour} {
		labtest.Do(t, setClock(time.Now().Round(0).Add(jump)))
		shown := getStatus(ctx, t, n)
		if left := time.Until(shown.Lease.Expires); left < 23*time.Hour || left > 24*time.Hour {
			t.Errorf("after a jump of %v, the status shows that the lease ends in %v", jump, left)
		}
		if ran := time.Since(shown.Started); ran < 0 || ran > time.Hour {
			t.Errorf("after a jump of %v, the status shows that flanneld has run for %v", jump, ran)
		}
		restored := labtest.Must(l.Etcd.Get(ctx, key))(t)
		labtest.Do(t, l.Etcd.Delete(ctx, key))
		labtest.Do(t, lab.Poll(ctx, "the lease to be restored", func() error {
			if now, err := l.Etcd.Get(ctx, key); err != nil || now != restored {
				return fmt.Errorf("it is %q, %w", now, err)
			}
			return nil
		}))
		labtest.Must(n.Run(ctx, "ip link del flannel.1"))(t)
		waitTraces(ctx, t, n, vxlanTraces(theirs), true)
		labtest.Must(pods[0].Ping(ctx, pods[1].IPv4, lab.PingOptions{Count: 25}))(t)
		labtest.Do(t, waitDiff(ctx, n, ""))
		if s := getStatus(ctx, t, n); !s.Ready || s.Lease == nil || s.Lease.Lease().Subnets != lease.Subnets {
			t.Errorf("after a jump of %v, the status is %+v", jump, s)
		}
	}
}

func setClock(to time.Time) error {
	tv := unix.NsecToTimeval(to.UnixNano())
	return unix.Settimeofday(&tv)
}

func subnetKey(name string) string { return lab.Prefix + "/subnets/" + name }

// strangerLease is the record of a node that is not there.
func strangerLease(publicIP, mac string) string {
	return fmt.Sprintf(`{"PublicIP":%q,"PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":%q}}`,
		publicIP, mac)
}
