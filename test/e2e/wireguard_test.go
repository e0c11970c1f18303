package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// A wireguardTestbed is two nodes with the wireguard backend, in the kernel or in user space.
type wireguardTestbed struct {
	*proxyTestbed
	key  string // the peer's public key
	kept string // what the node's devices hold of WireGuard, without a fault
}

func newWireGuardTestbed(ctx context.Context, t *testing.T) *wireguardTestbed {
	t.Helper()
	s := &wireguardTestbed{proxyTestbed: newProxyTestbed(ctx, t, `{"Type": "wireguard"}`, "flannel-wg", "flannel-wg-v6")}
	if tun := labtest.Must(s.node.Run(ctx, "ip tuntap show dev flannel-wg"))(t); tun == "" {
		t.Log("packets are encrypted by the kernel")
	} else {
		t.Log("packets are encrypted by flanneld")
	}
	s.key = labtest.Must(s.node.Run(ctx, "wg show flannel-wg peers"))(t)
	s.kept = labtest.Must(s.keeps(ctx))(t)
	return s
}

// keeps returns what the node's devices hold of WireGuard, each line with its device before it.
// wg itself, asked for all devices, names the device of a first peer's endpoint alone.
func (s *wireguardTestbed) keeps(ctx context.Context) (string, error) {
	var lines []string
	for _, device := range []string{"flannel-wg", "flannel-wg-v6"} {
		for _, what := range []string{"public-key", "listen-port", "allowed-ips", "endpoints", "preshared-keys",
			"persistent-keepalive"} {
			out, err := s.node.Run(ctx, "wg show "+device+" "+what)
			if err != nil {
				return "", err
			}
			for line := range strings.Lines(out) {
				lines = append(lines, device+"\t"+strings.TrimSpace(line))
			}
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n") + "\n", nil
}

// waitRestored waits until everything is as it was without a fault.
func (s *wireguardTestbed) waitRestored(ctx context.Context, t *testing.T) {
	t.Helper()
	s.proxyTestbed.waitRestored(ctx, t)
	labtest.Do(t, lab.Poll(ctx, "WireGuard to hold what it should", func() error {
		now, err := s.keeps(ctx)
		if err == nil && now != s.kept {
			err = errors.New(difference(s.kept, now))
		}
		return err
	}))
}

// try checks that pods reach each other, with packets of the full MTU.
func (s *wireguardTestbed) try(ctx context.Context) error {
	for i, from := range s.pods {
		for _, dst := range s.pods[1-i].Addrs() {
			if _, err := from.Ping(ctx, dst, lab.PingOptions{Packet: from.MTU, DF: true}); err != nil {
				return err
			}
		}
	}
	return nil
}

// TestWireGuardFaults: whatever happens to the devices, inside and outside of WireGuard, pods talk again, and all is
// as before.
func TestWireGuardFaults(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 5*time.Minute)
	s := newWireGuardTestbed(ctx, t)
	defer func() {
		if t.Failed() {
			out, _ := s.node.Run(t.Context(), "wg show all")
			t.Logf("%s\n%s", out, s.node.Log())
		}
	}()
	for _, want := range []string{"51820", "51821", "198.18.0.2:51820", "[fd18::2]:51821"} {
		if !strings.Contains(s.kept, want) {
			t.Errorf("there is no %s in\n%s", want, s.kept)
		}
	}
	secrets := filepath.Join(s.node.Dir, "other")
	other := labtest.Must(wgtypes.GeneratePrivateKey())(t)
	labtest.Do(t, os.WriteFile(secrets, []byte(other.String()+"\n"), 0o600))
	subnet := labtest.Must(s.Nodes()[1].SubnetEnv())(t).Subnets.IPv4.String()
	peer := "wg set flannel-wg peer " + s.key
	stranger := "wg set flannel-wg peer " + other.PublicKey().String()
	for _, commands := range [][]string{
		{"ip link del flannel-wg"},
		{"ip link del flannel-wg", "ip link del flannel-wg-v6"},
		{"ip link set flannel-wg down"},
		{"ip link set flannel-wg-v6 down"},
		{"ip link set flannel-wg mtu 1300"},
		{"ip link set flannel-wg down", "ip link set flannel-wg name lost", "ip link del lost"},
		{"ip link del flannel-wg", "ip link add flannel-wg type bridge"},
		{"ip link del flannel-wg", "ip tuntap add flannel-wg mode tun"},
		{"ip addr flush dev flannel-wg"},
		{"ip route flush proto 70", "ip -6 route flush proto 70"},
		{peer + " remove"},
		{peer + " allowed-ips 10.9.0.0/16"},
		{peer + " endpoint 198.18.0.250:9"},
		{peer + " persistent-keepalive 9"},
		{peer + " preshared-key " + secrets},
		{stranger + " endpoint 198.18.0.250:9 allowed-ips " + subnet},
		{"wg set flannel-wg private-key " + secrets},
		{"wg set flannel-wg listen-port 1000"},
		{"ip link set eth0 down", "ip link set eth0 up", "ip addr replace fd18::1/64 dev eth0 nodad",
			"ip route add default via 198.18.0.254"},
		{"ip -4 addr flush dev eth0", "ip addr add 198.18.0.77/24 dev eth0", "ip route add default via 198.18.0.254"},
		{"ip -4 addr flush dev eth0", "ip addr add 198.18.0.1/24 dev eth0", "ip route add default via 198.18.0.254"},
	} {
		name := strings.Join(commands, ", ")
		begun := time.Now()
		for i, command := range commands {
			// The daemon may be faster than the command that follows.
			if _, err := s.node.Run(ctx, command); err != nil && i == 0 {
				t.Errorf("%s: %v", name, err)
			}
		}
		s.proxyTestbed.waitRestored(ctx, t) // first: a pod that has met a smaller MTU remembers it for minutes
		// The first to answer may be what was there before.
		labtest.Do(t, lab.Poll(ctx, "pods to talk", func() error { return s.try(ctx) }))
		s.waitRestored(ctx, t)
		t.Logf("%v after %s", time.Since(begun).Round(time.Millisecond), name)
		if t.Failed() {
			t.Fatalf("after %s", name)
		}
	}
	if log := s.node.Log(); strings.Contains(log, other.String()) || strings.Contains(log, readKey(t, s.node)) {
		t.Error("the log tells a private key")
	}
}

func readKey(t *testing.T, n *lab.Node) string {
	t.Helper()
	return strings.TrimSpace(string(labtest.Must(os.ReadFile(n.KeyFile()))(t)))
}

// TestWireGuardRestart: a daemon that comes back has its key and its subnet, and
// pods talk.
func TestWireGuardRestart(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 3*time.Minute)
	s := newWireGuardTestbed(ctx, t)
	_, lease := leaseOf(ctx, t, s.Lab, s.node)
	private := labtest.Must(wgtypes.ParseKey(readKey(t, s.node)))(t)
	if want := fmt.Sprintf(`{"PublicKey":"%s","Port":51820}`,
		private.PublicKey()); string(lease.Attrs.BackendData) != want || lease.Attrs.BackendType != "wireguard" {
		t.Errorf("the lease is %+v, want data %s", lease.Attrs, want)
	}
	if mode := labtest.Must(os.Stat(s.node.KeyFile()))(t).Mode(); mode != 0o600 {
		t.Errorf("the mode of the key's file is %v", mode)
	}
	s.restart(ctx, t, s.waitRestored)
	if _, after := leaseOf(ctx, t, s.Lab, s.node); !after.Attrs.Equal(lease.Attrs) {
		t.Errorf("the lease said %s, says %s", lease.Attrs.BackendData, after.Attrs.BackendData)
	}
}

// TestWireGuardMixed: the kernel's and our own in one cluster.
func TestWireGuardMixed(t *testing.T) {
	t.Parallel()
	if exec.Command("modprobe", "wireguard").Run() != nil {
		t.Skip("this kernel has no WireGuard: both nodes would have our own")
	}
	ctx := labtest.Context(t, 2*time.Minute)
	l := labtest.New(ctx, t, fmt.Sprintf(`{%s, %s, "Backend": {"Type": "wireguard"}}`, ipv4Network, ipv6Network),
		make([]lab.NodeOptions, 2)...)
	l.Nodes()[1].Env = []string{"WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD=1"}
	labtest.Start(ctx, t, l)
	for i, ours := range []bool{false, true} {
		tun := labtest.Must(l.Nodes()[i].Run(ctx, "ip tuntap show dev flannel-wg"))(t)
		if (tun != "") != ours {
			t.Errorf("node %d: a TUN is %q", i+1, tun)
		}
	}
	s := &proxyTestbed{Lab: l, pods: addPods(ctx, t, l)}
	s.talk(ctx, t)
	for _, n := range l.Nodes() { // each may have begun the session
		labtest.Do(t, n.Restart(ctx))
		labtest.Do(t, n.WaitReady(ctx))
		s.talk(ctx, t)
	}
}

// TestWireGuardPeers: a peer of upstream's comes, changes its key and its address,
// and goes, and the devices follow. Those that are no good are told of.
func TestWireGuardPeers(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 2*time.Minute)
	s := newWireGuardTestbed(ctx, t)
	holds := func(what string, want ...string) {
		t.Helper()
		labtest.Do(t, lab.Poll(ctx, what, func() error {
			now, err := s.keeps(ctx)
			if err != nil {
				return err
			}
			for _, w := range want {
				line, absent := strings.CutPrefix(w, "no ")
				if strings.Contains(now, line) == absent {
					return fmt.Errorf("want %s in\n%s", w, now)
				}
			}
			return nil
		}))
	}
	var keys []string
	for range 2 {
		keys = append(keys, labtest.Must(wgtypes.GeneratePrivateKey())(t).PublicKey().String())
	}
	const key = "10.5.200.0-24&fd00:5:0:200::-64"
	put := func(public, ip string) {
		t.Helper()
		data := fmt.Sprintf(`{"PublicKey":"%s"}`, public)
		labtest.Do(t, s.Etcd.Put(ctx, lab.Prefix+"/subnets/"+key,
			fmt.Sprintf(`{"PublicIP":"198.18.0.%s","PublicIPv6":"fd18::%s","BackendType":"wireguard","BackendData":%s,"BackendV6Data":%s}`, ip, ip, data, data)))
	}
	put(keys[0], "200")
	holds("a peer that comes", "flannel-wg\t"+keys[0]+"\t10.5.200.0/24", "flannel-wg-v6\t"+keys[0]+"\tfd00:5:0:200::/64",
		"flannel-wg\t"+keys[0]+"\t198.18.0.200:51820", "flannel-wg-v6\t"+keys[0]+"\t[fd18::200]:51821")
	put(keys[0], "201")
	holds("its new address", "flannel-wg\t"+keys[0]+"\t198.18.0.201:51820",
		"flannel-wg-v6\t"+keys[0]+"\t[fd18::201]:51821")
	put(keys[1], "201")
	holds("its new key", "flannel-wg\t"+keys[1]+"\t10.5.200.0/24", "flannel-wg-v6\t"+keys[1]+"\tfd00:5:0:200::/64",
		"no "+keys[0])
	put("", "201")
	holds("no key", "no "+keys[1])
	labtest.Do(t, lab.Poll(ctx, "the log to tell", func() error {
		if log := s.node.Log(); !strings.Contains(log, "PublicKey must be 32 bytes") {
			return errors.New(log)
		}
		return nil
	}))
	labtest.Do(t, s.Etcd.Delete(ctx, lab.Prefix+"/subnets/"+key))
	s.talk(ctx, t)
	s.waitRestored(ctx, t)
}

// TestWireGuardSecrecy: the underlay does not see what pods send to each other.
func TestWireGuardSecrecy(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 2*time.Minute)
	s := newWireGuardTestbed(ctx, t)
	file := filepath.Join(s.node.Dir, "capture")
	dump := exec.Command("tcpdump", "-i", "eth0", "-U", "-w", file, "-Z", "root")
	capture := labtest.Must(s.node.Launch(dump))(t)
	seen := func(marker string) error {
		text, err := os.ReadFile(file)
		if err == nil && !strings.Contains(string(text), marker) {
			err = fmt.Errorf("%q is not in %d bytes", marker, len(text))
		}
		return err
	}
	// What nodes tell each other is seen: first and last of all.
	say := func(from *lab.Namespace, to, marker string) {
		t.Helper()
		labtest.Must(from.Run(ctx, fmt.Sprintf("ping -c 3 -i 0.2 -p %x %s", marker, to)))(t)
	}
	labtest.Do(t, lab.Poll(ctx, "the capture to begin", func() error {
		say(s.node.Namespace, "198.18.0.2", "the-nodes-first")
		return seen("the-nodes-first")
	}))
	for _, dst := range s.pods[1].Addrs() {
		say(s.pods[0].Namespace, dst.String(), "between-pods")
		say(s.node.Namespace, dst.String(), "between-pods")
	}
	say(s.node.Namespace, "198.18.0.2", "the-nodes-last")
	labtest.Do(t, lab.Poll(ctx, "the capture to go on", func() error { return seen("the-nodes-last") }))
	labtest.Do(t, capture.Stop(ctx))
	if seen("between-pods") == nil {
		t.Error("the underlay sees what pods say")
	}
	for _, filter := range []string{"udp port 51820", "udp port 51821"} {
		if out := labtest.Must(s.node.Run(ctx, "tcpdump -nr "+file+" "+filter))(t); strings.Count(out, " > ") < 12 {
			t.Errorf("there should be packets to %s:\n%s", filter, out)
		}
	}
	for _, ip := range append(s.pods[0].Addrs(), s.pods[1].Addrs()...) {
		if out := labtest.Must(s.node.Run(ctx, "tcpdump -nr "+file+" host "+ip.String()))(t); strings.Contains(out, " > ") {
			t.Errorf("a pod is seen:\n%s", out)
		}
	}
}

// TestWireGuardPSK: nodes whose preshared keys differ do not talk; once they are the
// same, they do.
func TestWireGuardPSK(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 2*time.Minute)
	var psks []string
	for range 2 {
		psks = append(psks, labtest.Must(wgtypes.GenerateKey())(t).String())
	}
	// Nodes that do not know of each other must not choose one subnet.
	const lower, upper = `"SubnetMax": "10.5.127.0"`, `"SubnetMin": "10.5.128.0"`
	config := func(half, psk string) string {
		return fmt.Sprintf(`{%s, %s, "Backend": {"Type": "wireguard", "PSK": "%s"}}`, ipv4Network, half, psk)
	}
	l := labtest.New(ctx, t, config(lower, psks[0]), make([]lab.NodeOptions, 2)...)
	// The second reads another configuration, and each is told of the other.
	const elsewhere = "/elsewhere"
	labtest.Do(t, l.Etcd.Put(ctx, elsewhere+"/config", config(upper, psks[1])))
	nodes := l.Nodes()
	labtest.Do(t, nodes[0].Start("--ip-masq"))
	labtest.Do(t, nodes[1].Start("--ip-masq", "--etcd-prefix="+elsewhere))
	for i, n := range nodes {
		labtest.Do(t, n.WaitReady(ctx))
		prefixes := []string{lab.Prefix, elsewhere}
		for key, text := range labtest.Must(l.Etcd.List(ctx, prefixes[i]+"/subnets/"))(t) {
			if strings.Contains(text, `"`+n.IPv4.String()+`"`) {
				labtest.Do(t, l.Etcd.Put(ctx, strings.Replace(key, prefixes[i], prefixes[1-i], 1), text))
			}
		}
	}
	pods := addPods(ctx, t, l)
	// Only the first message of a handshake can be read without the preshared
	// key, and who is busy with the other's need not send one.
	handshakes := func() (tried, done bool, err error) {
		for _, n := range nodes {
			out, err := n.Run(ctx, "wg show flannel-wg dump")
			if err != nil {
				return false, false, err
			}
			if lines := strings.Split(out, "\n"); len(lines) > 1 {
				f := strings.Split(lines[1], "\t") // key, PSK, endpoint, subnets, handshake, received, sent, keepalive
				tried, done = tried || f[5] != "0", done || f[4] != "0"
			}
		}
		return tried, done, nil
	}
	labtest.Do(t, lab.Poll(ctx, "handshakes to be tried", func() error {
		pods[0].Ping(ctx, pods[1].IPv4, lab.PingOptions{})
		pods[1].Ping(ctx, pods[0].IPv4, lab.PingOptions{})
		tried, _, err := handshakes()
		if err == nil && !tried {
			err = errors.New("none yet")
		}
		return err
	}))
	if _, done, err := handshakes(); done || err != nil {
		t.Errorf("there was a handshake, or %v", err)
	}
	if _, err := pods[0].Ping(ctx, pods[1].IPv4, lab.PingOptions{Count: 3}); err == nil {
		t.Error("pods talk, with different preshared keys")
	}
	labtest.Do(t, l.Etcd.Put(ctx, elsewhere+"/config", config(upper, psks[0])))
	labtest.Do(t, pods[0].WaitPing(ctx, pods[1].IPv4))
	labtest.Do(t, pods[1].WaitPing(ctx, pods[0].IPv4))
	for _, n := range nodes {
		for _, psk := range psks {
			if strings.Contains(n.Log(), psk) {
				t.Errorf("the log of %s tells a preshared key", n.Hostname)
			}
		}
	}
}

// TestWireGuardStranger: a node answers no host whose key is not that of a peer, even one that knows the node's key.
func TestWireGuardStranger(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, time.Minute)
	const lower, upper = `"SubnetMax": "10.5.127.0"`, `"SubnetMin": "10.5.128.0"`
	config := func(half string) string {
		return fmt.Sprintf(`{%s, %s, "Backend": {"Type": "wireguard"}}`, ipv4Network, half)
	}
	l := labtest.New(ctx, t, config(lower), make([]lab.NodeOptions, 2)...)
	const elsewhere = "/elsewhere"
	labtest.Do(t, l.Etcd.Put(ctx, elsewhere+"/config", config(upper)))
	n, stranger := l.Nodes()[0], l.Nodes()[1]
	labtest.Do(t, n.Start())
	labtest.Do(t, stranger.Start("--etcd-prefix="+elsewhere))
	for _, n := range l.Nodes() {
		labtest.Do(t, n.WaitReady(ctx))
	}
	pods := addPods(ctx, t, l)
	peers := labtest.Must(l.Etcd.List(ctx, lab.Prefix+"/subnets/"))(t)
	for key, text := range peers {
		labtest.Do(t, l.Etcd.Put(ctx, strings.Replace(key, lab.Prefix, elsewhere, 1), text))
	}
	var received string
	labtest.Do(t, lab.Poll(ctx, "the stranger to try some handshakes", func() error {
		pods[1].Ping(ctx, pods[0].IPv4, lab.PingOptions{})
		out, err := stranger.Run(ctx, "wg show flannel-wg transfer") // key, received, sent
		if err != nil {
			return err
		}
		f := strings.Fields(out)
		if len(f) != 3 {
			return fmt.Errorf("the stranger has no peer: %q", out)
		}
		received = f[1]
		if sent, err := strconv.Atoi(f[2]); err != nil || sent < 2*148 { // the size of a handshake's first message
			return fmt.Errorf("%s bytes were sent, %v", f[2], err)
		}
		return nil
	}))
	if received != "0" {
		t.Errorf("the node has answered with %s bytes", received)
	}
}
