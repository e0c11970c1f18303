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

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// TestIPsec: what pods say to each other crosses the underlay in ESP and in no
// other way, and whatever befalls policies, associations, charon or the daemon, it
// goes on.
func TestIPsec(t *testing.T) {
	labtest.NeedKernel(t, "ip xfrm state add src 198.18.0.1 dst 198.18.0.2 proto esp spi 1 mode tunnel aead rfc4106(gcm(aes)) 0x0123456789abcdef0123456789abcdef01234567 128")
	if _, err := os.Stat("/usr/lib/ipsec/charon"); err != nil {
		t.Skipf("needs strongSwan: %v", err)
	}
	psk := strings.Repeat("0123456789abcdef", 6)
	config := `{` + ipv4Network + `, "EnableNFTables": true, "Backend": {"Type": "ipsec", "PSK": "` + psk + `"}}`
	ctx := labtest.Context(t, 5*time.Minute)
	l := labtest.New(ctx, t, config, lab.NodeOptions{}, lab.NodeOptions{Routed: true})
	first, second := l.Nodes()[0], l.Nodes()[1]
	for _, n := range l.Nodes() {
		charonRun(ctx, t, n)
	}
	t.Cleanup(func() {
		for _, n := range l.Nodes() {
			if strings.Contains(n.Log(), psk) {
				t.Errorf("the log of %s has the key", n.Hostname)
			}
			if t.Failed() {
				for _, line := range []string{"ip xfrm policy", "ip xfrm state", "ip route", "swanctl --list-sas --uri unix:///run/charon.vici"} {
					out, err := n.Run(context.Background(), line)
					t.Logf("%s: %s: %v\n%s", n.Hostname, line, err, out)
				}
			}
		}
	})
	labtest.Start(ctx, t, l, "--ip-masq")
	pods := addPods(ctx, t, l)
	talk := func(why string) {
		t.Helper()
		t.Log(why)
		labtest.Do(t, pods[0].WaitPing(ctx, pods[1].IPv4))
		labtest.Do(t, pods[1].WaitPing(ctx, pods[0].IPv4))
	}
	talk("at first")
	if pods[0].MTU != 1500-77 {
		t.Errorf("the MTU for pods is %d", pods[0].MTU)
	}

	seen := capture(ctx, t, first, "ip proto 50 or net 10.5.0.0/16")
	for _, p := range pods {
		labtest.Do(t, p.Mirror())
	}
	labtest.Must(pods[0].Ping(ctx, pods[1].IPv4, lab.PingOptions{Packet: pods[0].MTU, DF: true}))(t)
	expectSeenAs(ctx, t, pods[0].Namespace, pods[1].IPv4, pods[0].IPv4)
	expectSeenAs(ctx, t, pods[1].Namespace, pods[0].IPv4, pods[1].IPv4)
	if text := seen(); !strings.Contains(text, "ESP(") || strings.Contains(text, "10.5.") {
		t.Errorf("these left eth0, wanted ESP only:\n%s", text)
	}

	key, peer := leaseOf(ctx, t, l, second)
	_, own := leaseOf(ctx, t, l, first)
	ends := fmt.Sprintf("tmpl src %s dst %s proto esp reqid 11 mode tunnel", first.IPv4, second.IPv4)
	stray := fmt.Sprintf("src %s dst 10.5.254.0/24 dir out ", own.IPv4)
	others := "src 198.19.7.0/24 dst 198.19.8.0/24 dir out tmpl src 198.18.0.1 dst 198.18.0.2 proto esp reqid 7 mode tunnel"
	policies := fmt.Sprintf("src %s dst %s dir out", own.IPv4, peer.IPv4)
	labtest.Must(first.Run(ctx, "ip xfrm policy add "+others))(t)

	labtest.Must(first.Run(ctx, "ip xfrm policy delete "+policies))(t)
	waitPolicies(ctx, t, first, 4)
	talk("after a policy was deleted")
	labtest.Must(first.Run(ctx, "ip xfrm policy flush"))(t)
	waitPolicies(ctx, t, first, 3)
	talk("after all policies were flushed")
	labtest.Must(first.Run(ctx, "ip xfrm policy add "+others))(t)
	labtest.Must(first.Run(ctx, "ip xfrm policy add "+stray+ends))(t)
	waitPolicies(ctx, t, first, 4)
	labtest.Must(first.Run(ctx, "ip xfrm policy update "+policies+" "+strings.Replace(ends, "tunnel", "transport", 1)))(t)
	talk("after a policy was changed")

	before := charons(ctx, t, first)
	lossless := startPings(ctx, t, pods)
	labtest.Do(t, first.Stop(ctx))
	labtest.Do(t, first.Start("--ip-masq"))
	labtest.Do(t, first.WaitReady(ctx))
	lossless()
	if after := charons(ctx, t, first); strings.Join(after, " ") != strings.Join(before, " ") {
		t.Errorf("charon was %v, and is %v after a restart", before, after)
	}

	labtest.Must(first.Run(ctx, "kill -KILL "+strings.Join(before, " ")))(t)
	labtest.Must(first.Run(ctx, "ip xfrm state flush"))(t)
	talk("after charon was killed and its associations flushed")

	labtest.Must(first.Run(ctx, "ip link set eth0 down"))(t)
	labtest.Do(t, first.ConfigureUplink(ctx, first.IPv4))
	talk("after the uplink was down")
	for _, ip := range []netip.Addr{netip.MustParseAddr("198.18.0.77"), first.IPv4} {
		labtest.Must(first.Run(ctx, "ip -4 addr flush dev eth0"))(t)
		labtest.Do(t, first.ConfigureUplink(ctx, ip))
		labtest.Do(t, lab.Poll(ctx, "policies to follow", func() error {
			out, err := second.Run(ctx, "ip xfrm policy list nosock")
			there, back := fmt.Sprintf("tmpl src %s dst %s", second.IPv4, ip), fmt.Sprintf("tmpl src %s dst %s", ip, second.IPv4)
			if err == nil && strings.Count(out, there)+strings.Count(out, back) != 3 {
				err = errors.New(out)
			}
			return err
		}))
		talk("after the uplink's address became " + ip.String())
	}

	// The peer leaves, comes back, and at last there is another backend.
	labtest.Do(t, second.Stop(ctx))
	labtest.Do(t, l.Etcd.Delete(ctx, key))
	waitPolicies(ctx, t, first, 1)
	labtest.Do(t, second.Start("--ip-masq"))
	waitPolicies(ctx, t, first, 4)
	talk("after the peer had left")
	labtest.Do(t, l.Etcd.Configure(ctx, `{`+ipv4Network+`, "EnableNFTables": true, "Backend": {"Type": "vxlan"}}`))
	waitPolicies(ctx, t, first, 1)
	waitPolicies(ctx, t, second, 0)
	// The second's was there when its daemon started: it is not the daemon's.
	labtest.Do(t, lab.Poll(ctx, "charon to end", func() error {
		if pids := charons(ctx, t, first); len(pids) > 0 {
			return fmt.Errorf("there are %v", pids)
		}
		return nil
	}))
	talk("with vxlan")
}

// charonRun gives a node a /run of its own, where charon has its socket.
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

// charons are the processes of charon on a node.
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

// waitPolicies waits until a node has so many IPsec policies.
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

// capture has tcpdump look at what leaves a node's eth0, until its result is asked
// for.
func capture(ctx context.Context, t *testing.T, n *lab.Node, filter string) func() string {
	t.Helper()
	file := labtest.Must(os.Create(filepath.Join(n.Dir, "capture")))(t)
	defer file.Close()
	said := labtest.Must(os.Create(filepath.Join(n.Dir, "capture.log")))(t)
	defer said.Close()
	cmd := exec.Command("tcpdump", append([]string{"-n", "-l", "--immediate-mode", "-Q", "out", "-i", "eth0"}, strings.Fields(filter)...)...)
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
