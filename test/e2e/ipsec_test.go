package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

const charon = "/usr/lib/ipsec/charon"

// psk is the pre-shared key of the tests' configurations.
var psk = strings.Repeat("0123456789abcdef", 6)

// needCharon is for a test that runs charon, which the VM of make test-vm has.
func needCharon(t *testing.T) {
	t.Helper()
	if _, err := os.Stat(charon); err != nil {
		t.Skipf("needs strongSwan: %v", err)
	}
}

// An ipsecTestbed is two nodes with the ipsec backend, on two links, with a pod each. Faults happen to the first node.
type ipsecTestbed struct {
	*lab.Lab
	first, second *lab.Node
	pods          []*lab.Pod
	peerKey       string // of the second node's lease
	own, peer     subnet.Lease
}

// TestIPsec: what pods send to each other crosses the underlay in ESP and in no other way. Traffic recovers from
// whatever happens to policies, associations, charon, the daemon and the uplink.
func TestIPsec(t *testing.T) {
	t.Parallel()
	labtest.NeedKernel(t, "ip xfrm state add src 198.18.0.1 dst 198.18.0.2 proto esp spi 1 mode tunnel "+
		"aead rfc4106(gcm(aes)) 0x0123456789abcdef0123456789abcdef01234567 128")
	needCharon(t)
	config := `{` + ipv4Network + `, "EnableNFTables": true, "Backend": {"Type": "ipsec", "PSK": "` + psk + `"}}`
	ctx := labtest.Context(t, 5*time.Minute)
	l := labtest.New(ctx, t, config, lab.NodeOptions{}, lab.NodeOptions{Routed: true})
	s := &ipsecTestbed{Lab: l, first: l.Nodes()[0], second: l.Nodes()[1]}
	for _, n := range l.Nodes() {
		charonRun(ctx, t, n)
	}
	t.Cleanup(func() { s.checkLogs(t) })
	labtest.Start(ctx, t, l, "--ip-masq", "--probe-interval=1")
	s.pods = addPods(ctx, t, l)
	s.talk(ctx, t, "at first")
	if mtu := s.pods[0].MTU; mtu != 1500-77 {
		t.Errorf("the MTU for pods is %d", mtu)
	}
	s.checkESP(ctx, t)
	labtest.Do(t, waitReached(ctx, s.first, true))

	s.peerKey, s.peer = leaseOf(ctx, t, l, s.second)
	_, s.own = leaseOf(ctx, t, l, s.first)
	s.changePolicies(ctx, t)
	s.endCharon(ctx, t)
	s.changeUplink(ctx, t)
	s.leave(ctx, t)
}

// checkLogs looks for the pre-shared key in the logs. When the test has failed, it shows the state of the nodes.
func (s *ipsecTestbed) checkLogs(t *testing.T) {
	for _, n := range s.Nodes() {
		if strings.Contains(n.Log(), psk) {
			t.Errorf("the log of %s has the key", n.Hostname)
		}
		if !t.Failed() {
			continue
		}
		for _, line := range []string{"ip xfrm policy", "ip xfrm state", "ip route",
			"swanctl --list-sas --uri unix:///run/charon.vici"} {
			out, err := n.Run(context.Background(), line)
			t.Logf("%s: %s: %v\n%s", n.Hostname, line, err, out)
		}
	}
}

// talk waits until the pods reach each other.
func (s *ipsecTestbed) talk(ctx context.Context, t *testing.T, why string) {
	t.Helper()
	t.Log(why)
	labtest.Do(t, s.pods[0].WaitPing(ctx, s.pods[1].IPv4))
	labtest.Do(t, s.pods[1].WaitPing(ctx, s.pods[0].IPv4))
}

// checkESP: whatever leaves the first node for the other pod is ESP.
func (s *ipsecTestbed) checkESP(ctx context.Context, t *testing.T) {
	seen := capture(ctx, t, s.first, "ip proto 50 or net 10.5.0.0/16")
	for _, p := range s.pods {
		labtest.Do(t, p.Mirror())
	}
	one, other := s.pods[0], s.pods[1]
	labtest.Must(one.Ping(ctx, other.IPv4, lab.PingOptions{Packet: one.MTU, DF: true}))(t)
	expectSeenAs(ctx, t, one.Namespace, other.IPv4, one.IPv4)
	expectSeenAs(ctx, t, other.Namespace, one.IPv4, other.IPv4)
	if text := seen(); !strings.Contains(text, "ESP(") || strings.Contains(text, "10.5.") {
		t.Errorf("these left eth0, wanted ESP only:\n%s", text)
	}
}

// changePolicies: the daemon restores its own policies, removes stray ones, and keeps those of other programs.
func (s *ipsecTestbed) changePolicies(ctx context.Context, t *testing.T) {
	first := s.first
	ends := fmt.Sprintf("tmpl src %s dst %s proto esp reqid 11 mode tunnel", first.IPv4, s.second.IPv4)
	stray := fmt.Sprintf("src %s dst 10.5.254.0/24 dir out ", s.own.IPv4)
	others := "src 198.19.7.0/24 dst 198.19.8.0/24 dir out tmpl src 198.18.0.1 dst 198.18.0.2 proto esp reqid 7 mode tunnel"
	policy := fmt.Sprintf("src %s dst %s dir out", s.own.IPv4, s.peer.IPv4)
	run := func(line string) {
		t.Helper()
		labtest.Must(first.Run(ctx, "ip xfrm policy "+line))(t)
	}
	run("add " + others)
	run("delete " + policy)
	waitPolicies(ctx, t, first, 4)
	s.talk(ctx, t, "after a policy was deleted")
	run("flush")
	waitPolicies(ctx, t, first, 3)
	s.talk(ctx, t, "after all policies were flushed")
	run("add " + others)
	run("add " + stray + ends)
	waitPolicies(ctx, t, first, 4)
	run("update " + policy + " " + strings.Replace(ends, "tunnel", "transport", 1))
	s.talk(ctx, t, "after a policy was changed")
}

// endCharon: charon survives a restart of the daemon without loss, and is started again after it was killed.
func (s *ipsecTestbed) endCharon(ctx context.Context, t *testing.T) {
	before := charons(ctx, t, s.first)
	lossless := startPings(ctx, t, s.pods)
	labtest.Do(t, s.first.Stop(ctx))
	labtest.Do(t, s.first.Start("--ip-masq"))
	labtest.Do(t, s.first.WaitReady(ctx))
	lossless()
	if after := charons(ctx, t, s.first); strings.Join(after, " ") != strings.Join(before, " ") {
		t.Errorf("charon was %v, and is %v after a restart", before, after)
	}
	labtest.Must(s.first.Run(ctx, "kill -KILL "+strings.Join(before, " ")))(t)
	labtest.Must(s.first.Run(ctx, "ip xfrm state flush"))(t)
	s.talk(ctx, t, "after charon was killed and its associations flushed")
}

// changeUplink: policies follow the uplink.
func (s *ipsecTestbed) changeUplink(ctx context.Context, t *testing.T) {
	labtest.Must(s.first.Run(ctx, "ip link set eth0 down"))(t)
	labtest.Do(t, s.first.ConfigureUplink(ctx, s.first.IPv4))
	s.talk(ctx, t, "after the uplink was down")
	for _, ip := range []netip.Addr{netip.MustParseAddr("198.18.0.77"), s.first.IPv4} {
		labtest.Must(s.first.Run(ctx, "ip -4 addr flush dev eth0"))(t)
		labtest.Do(t, s.first.ConfigureUplink(ctx, ip))
		labtest.Do(t, lab.Poll(ctx, "policies to follow", func() error {
			out, err := s.second.Run(ctx, "ip xfrm policy list nosock")
			there, back := fmt.Sprintf("tmpl src %s dst %s", s.second.IPv4, ip), fmt.Sprintf("tmpl src %s dst %s", ip,
				s.second.IPv4)
			if err == nil && strings.Count(out, there)+strings.Count(out, back) != 3 {
				err = errors.New(out)
			}
			return err
		}))
		s.talk(ctx, t, "after the uplink's address became "+ip.String())
	}
}

// leave: the peer leaves and returns, and at last there is another backend.
func (s *ipsecTestbed) leave(ctx context.Context, t *testing.T) {
	labtest.Do(t, s.second.Stop(ctx))
	labtest.Do(t, s.Etcd.Delete(ctx, s.peerKey))
	waitPolicies(ctx, t, s.first, 1)
	labtest.Do(t, s.second.Start("--ip-masq"))
	waitPolicies(ctx, t, s.first, 4)
	s.talk(ctx, t, "after the peer had left")
	labtest.Do(t, s.Etcd.Configure(ctx, `{`+ipv4Network+`, "EnableNFTables": true, "Backend": {"Type": "vxlan"}}`))
	waitPolicies(ctx, t, s.first, 1)
	waitPolicies(ctx, t, s.second, 0)
	// The charon of the second node was running before its daemon was started: it is not the daemon's.
	labtest.Do(t, lab.Poll(ctx, "charon to end", func() error {
		if pids := charons(ctx, t, s.first); len(pids) > 0 {
			return fmt.Errorf("there are %v", pids)
		}
		return nil
	}))
	s.talk(ctx, t, "with vxlan")
}

// charonRun gives a node its own /run, where charon has its socket.
func charonRun(ctx context.Context, t *testing.T, n *lab.Node) {
	t.Helper()
	keep := filepath.Join(n.Dir, "netns")
	for _, line := range []string{
		"mkdir " + keep, "mount -o rbind /run/netns " + keep,
		"mount -t tmpfs tmpfs /run", "mkdir /run/netns", "mount -o rbind " + keep + " /run/netns",
	} {
		labtest.Must(n.Run(ctx, line))(t)
	}
}

// charons returns the processes of charon on a node.
func charons(ctx context.Context, t *testing.T, n *lab.Node) []string {
	t.Helper()
	return labtest.Must(charonPIDs(ctx, n))(t)
}

func charonPIDs(ctx context.Context, n *lab.Node) ([]string, error) {
	out, err := exec.CommandContext(ctx, "ip", "netns", "pids", n.Namespace.Name).Output()
	var pids []string
	for _, pid := range strings.Fields(string(out)) {
		if name, err := os.ReadFile("/proc/" + pid + "/comm"); err == nil && strings.TrimSpace(string(name)) == "charon" {
			pids = append(pids, pid)
		}
	}
	return pids, err
}

// waitPolicies waits until a node has that number of IPsec policies.
func waitPolicies(ctx context.Context, t *testing.T, n *lab.Node, want int) {
	t.Helper()
	err := lab.Poll(ctx, fmt.Sprintf("%d policies on %s", want, n.Hostname), func() error {
		out, err := n.Run(ctx, "ip xfrm policy list nosock")
		if got := strings.Count(out, "tmpl"); err == nil && got != want {
			err = fmt.Errorf("there are %d:\n%s", got, out)
		}
		return err
	})
	labtest.Do(t, err)
}

// capture starts tcpdump on what leaves a node's eth0. The result ends tcpdump, and returns what it printed.
func capture(ctx context.Context, t *testing.T, n *lab.Node, filter string) func() string {
	t.Helper()
	file := labtest.Must(os.Create(filepath.Join(n.Dir, "capture")))(t)
	defer file.Close()
	said := labtest.Must(os.Create(filepath.Join(n.Dir, "capture.log")))(t)
	defer said.Close()
	cmd := exec.Command("tcpdump", append([]string{"-n", "-l", "--immediate-mode", "-Q", "out", "-i", "eth0"},
		strings.Fields(filter)...)...)
	cmd.Stdout, cmd.Stderr = file, said
	p := labtest.Must(n.Launch(cmd))(t)
	labtest.Do(t, lab.Poll(ctx, "tcpdump to listen", func() error {
		text, err := os.ReadFile(said.Name())
		if err == nil && !strings.Contains(string(text), "listening on") {
			err = errors.New("not yet")
		}
		return err
	}))
	return func() string {
		t.Helper()
		_ = p.Stop(ctx)
		return string(labtest.Must(os.ReadFile(file.Name()))(t))
	}
}
