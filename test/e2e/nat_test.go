package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// A natTestbed is a node that can be reached, two nodes behind one NAT, and one behind another, with wireguard.
type natTestbed struct {
	*lab.Lab
	open, near, far, other *lab.Node // near and far are in one home network, other in another
	pods                   map[*lab.Node]*lab.Pod
	keys                   map[*lab.Node]string // public keys
}

const natConfig = `{` + ipv4Network + `, "Backend": {"Type": "wireguard"}}`

var natNodes = []lab.NodeOptions{{}, {Home: 1}, {Home: 1}, {Home: 2}}

// newNATTestbed starts the daemons of natNodes, each with the arguments that args has for it.
func newNATTestbed(ctx context.Context, t *testing.T, l *lab.Lab, args func(*lab.Node) []string) *natTestbed {
	t.Helper()
	n := l.Nodes()
	s := &natTestbed{l, n[0], n[1], n[2], n[3], map[*lab.Node]*lab.Pod{}, map[*lab.Node]string{}}
	for _, n := range n {
		// The probes would keep sessions alive that nothing else does.
		labtest.Do(t, n.Start(append(args(n), "--probe-peers=false")...))
	}
	for _, n := range n {
		labtest.Do(t, n.WaitReady(ctx))
		s.pods[n] = labtest.Must(n.AddPod(ctx, "pod"))(t)
		s.keys[n] = labtest.Must(n.Run(ctx, "wg show flannel-wg public-key"))(t)
	}
	return s
}

// holds returns what a node's device has of a peer: "endpoints", "persistent-keepalive".
func (s *natTestbed) holds(ctx context.Context, what string, n, peer *lab.Node) (string, error) {
	out, err := n.Run(ctx, "wg show flannel-wg "+what)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(out) {
		if key, value, _ := strings.Cut(strings.TrimSpace(line), "\t"); key == s.keys[peer] {
			return value, nil
		}
	}
	return "", fmt.Errorf("%s does not know %s", n.Hostname, peer.Hostname)
}

// waitMapped waits until the open node knows peers behind NAT by their router's address, each by its own port, of a
// range, and until its daemon has noticed, which then sends keepalives.
func (s *natTestbed) waitMapped(ctx context.Context, t *testing.T, first, last uint16, peers ...*lab.Node) {
	t.Helper()
	labtest.Do(t, lab.Poll(ctx, "the open node to know where the others are", func() error {
		seen := map[netip.AddrPort]bool{}
		for _, n := range peers {
			text, err := s.holds(ctx, "endpoints", s.open, n)
			if err != nil {
				return err
			}
			at, err := netip.ParseAddrPort(text)
			if err != nil {
				return err
			}
			home := 1
			if n == s.other {
				home = 2
			}
			if at.Addr() != lab.HomeAddress(home) || at.Port() < first || at.Port() > last {
				return fmt.Errorf("%s is at %s", n.Hostname, at)
			}
			if seen[at] {
				return fmt.Errorf("two nodes are at %s", at)
			}
			seen[at] = true
			if every, err := s.holds(ctx, "persistent-keepalive", s.open, n); err != nil || every != "25" {
				return fmt.Errorf("keepalives to %s: %s, %w", n.Hostname, every, err)
			}
		}
		return nil
	}))
}

// waitTalk waits until the pod of a node reaches that of another.
func (s *natTestbed) waitTalk(ctx context.Context, t *testing.T, from, to *lab.Node) {
	t.Helper()
	labtest.Do(t, s.pods[from].WaitPing(ctx, s.pods[to].IPv4))
}

// checkKeepalives waits until nodes send keepalives through NAT, and nowhere else.
func (s *natTestbed) checkKeepalives(ctx context.Context, t *testing.T) {
	t.Helper()
	for _, c := range []struct {
		n, peer *lab.Node
		want    string
	}{
		{s.near, s.open, "25"}, {s.far, s.open, "25"}, {s.other, s.open, "25"},
		{s.open, s.near, "25"}, {s.open, s.far, "25"}, {s.open, s.other, "25"},
		{s.near, s.far, "off"}, {s.far, s.near, "off"}, {s.near, s.other, "off"}, {s.other, s.near, "off"},
	} {
		labtest.Do(t, lab.Poll(ctx, fmt.Sprintf("keepalives from %s to %s", c.n.Hostname, c.peer.Hostname), func() error {
			got, err := s.holds(ctx, "persistent-keepalive", c.n, c.peer)
			if err == nil && got != c.want {
				err = fmt.Errorf("the interval is %s, want %s", got, c.want)
			}
			return err
		}))
	}
}

// TestWireGuardNAT: a node behind NAT keeps its session with a node that can be reached, which knows where the others
// are from what arrives, over restarts, and whatever the router does. Nodes that cannot reach each other log why.
func TestWireGuardNAT(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 5*time.Minute)
	s := newNATTestbed(ctx, t, labtest.New(ctx, t, natConfig, natNodes...), func(*lab.Node) []string { return nil })
	behind := []*lab.Node{s.near, s.far, s.other}
	s.waitMapped(ctx, t, 20000, 29999, behind...)
	for _, n := range behind {
		s.waitTalk(ctx, t, s.open, n)
		s.waitTalk(ctx, t, n, s.open)
	}
	s.waitTalk(ctx, t, s.near, s.far) // at the addresses in the leases
	s.checkKeepalives(ctx, t)
	for _, n := range s.Nodes() {
		if out, status, err := n.Ctl(ctx, "diff"); err != nil || status != 0 {
			t.Errorf("%s differs: %s %v", n.Hostname, out, err)
		}
	}

	restarted := len(s.open.Log())
	for _, end := range []func() error{
		func() error { return s.open.Stop(ctx) },
		func() error { s.open.Kill(); return nil },
	} {
		labtest.Do(t, end())
		labtest.Do(t, s.open.Restart(ctx))
		labtest.Do(t, s.open.WaitReady(ctx))
		for _, n := range behind {
			s.waitTalk(ctx, t, s.open, n)
		}
	}
	labtest.Must(s.open.Run(ctx, "wg set flannel-wg peer "+s.keys[s.near]+" endpoint 192.168.1.2:51820"))(t)
	s.waitMapped(ctx, t, 20000, 29999, behind...)
	labtest.Must(s.open.Run(ctx, "ip link del flannel-wg"))(t)
	labtest.Do(t, lab.Poll(ctx, "another device", func() error {
		_, err := s.holds(ctx, "endpoints", s.open, s.near)
		return err
	}))
	for _, n := range behind {
		s.waitTalk(ctx, t, s.open, n)
	}
	s.waitMapped(ctx, t, 20000, 29999, behind...)

	labtest.Do(t, s.RestartRouter(ctx, 1))
	s.waitMapped(ctx, t, 30000, 39999, s.near, s.far) // nothing but keepalives is sent
	for _, n := range behind {
		s.waitTalk(ctx, t, s.open, n)
	}

	if labtest.Must(s.open.Run(ctx, "ip tuntap show dev flannel-wg"))(t) == "" {
		// A node with flannel outside forgets where the others are when it starts.
		labtest.Do(t, s.open.Stop(ctx))
		labtest.Must(s.open.Run(ctx, "wg set flannel-wg peer "+s.keys[s.near]+" endpoint 192.168.1.2:51820"))(t)
		s.waitMapped(ctx, t, 30000, 39999, s.near)
		labtest.Do(t, s.open.Restart(ctx))
		labtest.Do(t, s.open.WaitReady(ctx))
	}

	labtest.Do(t, s.near.Script(ctx, "addr del 192.168.1.2/24 dev eth0", "addr add 192.168.1.77/24 dev eth0",
		"route add default via 192.168.1.254"))
	labtest.Do(t, lab.Poll(ctx, "the new lease", func() error {
		endpoint, err := s.holds(ctx, "endpoints", s.far, s.near)
		if err == nil && endpoint != "192.168.1.77:51820" {
			err = errors.New(endpoint)
		}
		return err
	}))
	s.waitTalk(ctx, t, s.open, s.near)
	s.waitMapped(ctx, t, 30000, 39999, s.near, s.far)
	if log := s.open.Log()[restarted:]; strings.Contains(log, "endpoint 192.168.") {
		t.Errorf("a new daemon, device or lease brought an endpoint that cannot be reached:\n%s", log)
	}
	s.checkReasons(ctx, t)
}

// checkReasons waits until the nodes that cannot reach each other have logged why, and checks that no other has.
func (s *natTestbed) checkReasons(ctx context.Context, t *testing.T) {
	t.Helper()
	subnets := map[*lab.Node]string{}
	for _, n := range s.Nodes() {
		subnets[n] = labtest.Must(n.SubnetEnv())(t).Subnets.IPv4.String()
	}
	says := func(n, peer *lab.Node) bool {
		const text = `"There is no session with a peer" device="flannel-wg" peer=%q`
		return strings.Contains(n.Log(), fmt.Sprintf(text, subnets[peer]))
	}
	for _, pair := range [][2]*lab.Node{{s.near, s.other}, {s.far, s.other}, {s.other, s.near}, {s.other, s.far}} {
		labtest.Do(t, lab.Poll(ctx, pair[0].Hostname+" to log that "+pair[1].Hostname+" cannot be reached", func() error {
			if !says(pair[0], pair[1]) || !strings.Contains(pair[0].Log(), "both are behind NAT") {
				return errors.New(pair[0].Log())
			}
			return nil
		}))
	}
	for _, n := range s.Nodes() {
		if says(n, s.open) || says(s.open, n) || n != s.far && says(n, s.far) != (n == s.other) {
			t.Errorf("%s has logged what is not so:\n%s", n.Hostname, n.Log())
		}
	}
}

// TestWireGuardSharedAddress: nodes behind one NAT publish the address outside, in Kubernetes. Nodes outside tell them
// apart by their ports, and a forwarded port lets a node behind one NAT reach a node behind another.
func TestWireGuardSharedAddress(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 2*time.Minute)
	l, k := newKube(ctx, t, "10.5.0.0/16", natNodes)
	args := daemonArgs(t, k, natConfig)
	for _, n := range l.Nodes() {
		labtest.Do(t, k.AddNode(ctx, n))
	}
	labtest.Do(t, l.Nodes()[3].ForwardPort(ctx, 51820))
	s := newNATTestbed(ctx, t, l, func(n *lab.Node) []string {
		switch n.Number {
		case 1:
			return args
		case 4:
			return append(slices.Clone(args), "--public-ip="+lab.HomeAddress(2).String())
		}
		return append(slices.Clone(args), "--public-ip="+lab.HomeAddress(1).String())
	})
	waitAnnotation(ctx, t, k, s.near, "public-ip", lab.HomeAddress(1).String())
	waitAnnotation(ctx, t, k, s.far, "public-ip", lab.HomeAddress(1).String())
	s.waitMapped(ctx, t, 20000, 29999, s.near, s.far)
	for _, pair := range [][2]*lab.Node{
		{s.open, s.near}, {s.open, s.far}, {s.open, s.other}, {s.near, s.other}, {s.far, s.other},
	} {
		s.waitTalk(ctx, t, pair[0], pair[1])
		s.waitTalk(ctx, t, pair[1], pair[0])
	}
	for _, n := range l.Nodes() {
		for _, word := range []string{"conflict", "left out"} {
			if strings.Contains(n.Log(), word) {
				t.Errorf("%s has logged %q:\n%s", n.Hostname, word, n.Log())
			}
		}
	}
}
