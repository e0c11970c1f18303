package e2e

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// A proxyTestbed is two nodes with a backend that forwards packets in user space, and a pod on each.
type proxyTestbed struct {
	*lab.Lab
	devices []string
	node    *lab.Node
	pods    []*lab.Pod
	held    string // by the node's kernel, without a fault
}

func newUDPTestbed(ctx context.Context, t *testing.T) *proxyTestbed {
	t.Helper()
	return newProxyTestbed(ctx, t, `{"Type": "udp"}`, "flannel0")
}

func newProxyTestbed(ctx context.Context, t *testing.T, backend string, devices ...string) *proxyTestbed {
	t.Helper()
	l := labtest.New(ctx, t, fmt.Sprintf(`{%s, %s, "Backend": %s}`, ipv4Network, ipv6Network, backend),
		make([]lab.NodeOptions, 2)...)
	labtest.Start(ctx, t, l, "--ip-masq")
	s := &proxyTestbed{Lab: l, devices: devices, node: l.Nodes()[0], pods: addPods(ctx, t, l)}
	s.talk(ctx, t)
	s.held = labtest.Must(s.holds(ctx))(t)
	return s
}

// talk waits until pods reach each other, with small packets and whole ones.
func (s *proxyTestbed) talk(ctx context.Context, t *testing.T) {
	t.Helper()
	for i, from := range s.pods {
		for _, dst := range s.pods[1-i].Addrs() {
			labtest.Do(t, from.WaitPing(ctx, dst))
			labtest.Must(from.Ping(ctx, dst, lab.PingOptions{Packet: from.MTU, DF: true}))(t)
		}
	}
}

// holds returns what the node's kernel holds of the backend.
func (s *proxyTestbed) holds(ctx context.Context) (string, error) {
	var all []string
	commands := []string{"ip route show proto 70", "ip -6 route show proto 70"}
	for _, d := range s.devices {
		commands = append(commands, "ip -o -4 addr show dev "+d+" scope global", "ip -o -6 addr show dev "+d+" scope global",
			"cat /sys/class/net/"+d+"/mtu", "ip tuntap show dev "+d)
	}
	for _, command := range commands {
		out, err := s.node.Run(ctx, command)
		if err != nil {
			return "", err
		}
		all = append(all, strings.Split(transient.ReplaceAllString(out, ""), "\n")...)
	}
	slices.Sort(all)
	return strings.Join(all, "\n"), nil
}

// transient matches the device's number, and the sign that the daemon does not run.
var transient = regexp.MustCompile(`(?m)^[0-9]+: | linkdown`)

// waitRestored waits until the kernel holds what it should.
func (s *proxyTestbed) waitRestored(ctx context.Context, t *testing.T) {
	t.Helper()
	labtest.Do(t, lab.Poll(ctx, "the kernel to hold what it should", func() error {
		now, err := s.holds(ctx)
		if err == nil && now != s.held {
			err = errors.New(difference(s.held, now))
		}
		return err
	}))
}

// restart ends the node's daemon, first with SIGTERM and then with SIGKILL, and starts it again. Meanwhile the kernel
// holds what it should, and subnet and devices stay the same. waitRestored waits for the state afterwards.
func (s *proxyTestbed) restart(ctx context.Context, t *testing.T, waitRestored func(context.Context, *testing.T)) {
	t.Helper()
	subnet := labtest.Must(s.node.SubnetEnv())(t)
	numbers := "cat /sys/class/net/" + strings.Join(s.devices, "/ifindex /sys/class/net/") + "/ifindex"
	before := labtest.Must(s.node.Run(ctx, numbers))(t)
	for _, end := range []func() error{
		func() error { return s.node.Stop(ctx) },
		func() error { s.node.Kill(); return nil },
	} {
		labtest.Do(t, end())
		s.waitRestored(ctx, t)
		labtest.Do(t, s.node.Restart(ctx))
		labtest.Do(t, s.node.WaitReady(ctx))
		s.talk(ctx, t)
		waitRestored(ctx, t)
	}
	if after := labtest.Must(s.node.SubnetEnv())(t); !after.Equal(subnet) {
		t.Errorf("the subnet file said %+v, says %+v", subnet, after)
	}
	if after := labtest.Must(s.node.Run(ctx, numbers))(t); after != before {
		t.Errorf("the devices were %s, are %s", before, after)
	}
}

// TestUDPFaults: whatever happens to the device, the daemon restores the device and uses it, and pods talk again.
func TestUDPFaults(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 4*time.Minute)
	s := newUDPTestbed(ctx, t)
	if !strings.Contains(s.held, "persist") {
		t.Errorf("the device does not outlive the daemon:\n%s", s.held)
	}
	for _, commands := range [][]string{
		{"ip link del flannel0"},
		{"ip link set flannel0 down"},
		{"ip link set flannel0 mtu 1300"},
		{"ip link set flannel0 down", "ip link set flannel0 name lost", "ip link del lost"},
		{"ip link del flannel0", "ip link add flannel0 type bridge"},
		{"ip link del flannel0", "ip tuntap add flannel0 mode tun"},
		{"ip addr flush dev flannel0"},
		{"ip route flush proto 70", "ip -6 route flush proto 70"},
		{"ip -4 addr flush dev eth0", "ip addr add 198.18.0.1/24 dev eth0", "ip route add default via 198.18.0.254"},
	} {
		name := strings.Join(commands, ", ")
		for i, command := range commands {
			// The daemon may be faster than the command that follows.
			if _, err := s.node.Run(ctx, command); err != nil && i == 0 {
				t.Errorf("%s: %v", name, err)
			}
		}
		s.waitRestored(ctx, t) // first: a pod that meets a smaller MTU remembers it for minutes
		s.talk(ctx, t)
		if t.Failed() {
			t.Fatalf("after %s", name)
		}
	}

	// The device follows the uplink's MTU, there and back.
	labtest.Must(s.node.Run(ctx, "ip link set eth0 mtu 1400"))(t)
	labtest.Do(t, lab.Poll(ctx, "the device to have a smaller MTU", func() error {
		got, err := s.node.Run(ctx, "cat /sys/class/net/flannel0/mtu")
		if err == nil && got != "1352" { // 48 bytes are IPv6's and UDP's
			err = errors.New("it is " + got)
		}
		return err
	}))
	labtest.Must(s.node.Run(ctx, "ip link set eth0 mtu 1500"))(t)
	s.waitRestored(ctx, t)
	s.talk(ctx, t)
}

// TestUDPRestart: the device and the routes stay while the daemon is away, and
// pods talk as soon as it is back.
func TestUDPRestart(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 2*time.Minute)
	s := newUDPTestbed(ctx, t)
	s.restart(ctx, t, s.waitRestored)
}

// TestUDPPeers: a node that comes, goes and comes with another address is
// followed, and etcd's absence changes nothing.
func TestUDPPeers(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 2*time.Minute)
	s := newUDPTestbed(ctx, t)
	third := labtest.Must(s.AddNode(ctx, lab.NodeOptions{Routed: true}))(t)
	labtest.Do(t, third.Start("--ip-masq"))
	labtest.Do(t, third.WaitReady(ctx))
	pod := labtest.Must(third.AddPod(ctx, "pod"))(t)
	for _, other := range s.pods {
		for i, dst := range pod.Addrs() {
			labtest.Do(t, other.WaitPing(ctx, dst))
			labtest.Do(t, pod.WaitPing(ctx, other.Addrs()[i]))
		}
	}
	lossless := startPings(ctx, t, s.pods)
	s.Etcd.Kill()
	labtest.Must(pod.Ping(ctx, s.pods[0].IPv4, lab.PingOptions{Count: 50}))(t)
	labtest.Do(t, s.Etcd.Start(ctx))
	key, _ := leaseOf(ctx, t, s.Lab, third)
	labtest.Do(t, third.Stop(ctx))
	labtest.Do(t, s.Etcd.Delete(ctx, key))
	labtest.Do(t, lab.Poll(ctx, "the third node to be unreachable", func() error {
		out, err := s.pods[0].Run(ctx, "ping -c 1 -W 1 "+pod.IPv4.String())
		if err == nil || !strings.Contains(out, "Destination Net Unreachable") {
			return fmt.Errorf("ping says\n%s", out)
		}
		return nil
	}))
	labtest.Do(t, third.Start("--ip-masq"))
	labtest.Do(t, third.WaitReady(ctx))
	lossless()
}
