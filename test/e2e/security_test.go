package e2e

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// securityPage is Documentation/security.md.
func securityPage(t *testing.T) string {
	t.Helper()
	return string(labtest.Must(os.ReadFile("../../Documentation/security.md"))(t))
}

// TestListens: nothing listens on a node but what Documentation/security.md lists.
func TestListens(t *testing.T) {
	t.Parallel()
	page := securityPage(t)
	for backend, want := range map[string][]string{
		"vxlan":     {"udp *:8472"},
		"udp":       {"udp 198.18.0.1:8285", "udp [fd18::1]:8285"},
		"wireguard": {"udp *:51820", "udp *:51821"},
		"host-gw":   nil,
		"alloc":     nil,
		"extension": nil,
	} {
		t.Run(backend, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t, time.Minute)
			l := labtest.New(ctx, t, fmt.Sprintf(`{%s, %s, "Backend": {"Type": %q}}`, ipv4Network, ipv6Network, backend),
				make([]lab.NodeOptions, 2)...)
			for i, n := range l.Nodes() {
				// The first as many people run it: without the health server.
				labtest.Do(t, n.Start([][]string{{"--healthz-port=0"}, {"--healthz-ip=127.0.0.1", "--healthz-port=10246"}}[i]...))
			}
			labtest.Do(t, lab.Poll(ctx, "the daemons to be ready", func() error {
				for _, n := range l.Nodes() {
					if !strings.Contains(n.Log(), `"Ready" after=`) {
						return errors.New(n.Log())
					}
				}
				return nil
			}))
			if got := listeners(ctx, t, l.Nodes()[0]); !slices.Equal(got, want) {
				t.Errorf("these listen: %q, want %q", got, want)
			}
			second := []string{"tcp 127.0.0.1:10246"}
			for _, address := range want {
				second = append(second, strings.NewReplacer("198.18.0.1", "198.18.0.2", "fd18::1", "fd18::2").Replace(address))
			}
			if got := listeners(ctx, t, l.Nodes()[1]); !slices.Equal(got, second) {
				t.Errorf("with a health server, these listen: %q, want %q", got, second)
			}
			for _, address := range want {
				port := address[strings.LastIndex(address, ":")+1:]
				if !regexp.MustCompile(`\| UDP [\d, ]*` + port).MatchString(page) {
					t.Errorf("Documentation/security.md does not list %s", address)
				}
			}
		})
	}
}

// listeners returns the sockets of a node that others can send to: "tcp ADDRESS:PORT" or "udp ADDRESS:PORT". * is all
// addresses of both families.
func listeners(ctx context.Context, t *testing.T, n *lab.Node) []string {
	t.Helper()
	var found []string
	for line := range strings.Lines(labtest.Must(n.Run(ctx, "ss -Hlntu"))(t)) {
		f := strings.Fields(line) // protocol, state, queues, local address, peer
		found = append(found, f[0]+" "+strings.NewReplacer("0.0.0.0:", "*:", "[::]:", "*:").Replace(f[4]))
	}
	slices.Sort(found)
	return slices.Compact(found)
}

// A forger is a lab of two nodes with a pod each, where packets in the name of the second pod are sent to the first.
type forger struct {
	*lab.Lab
	victim, other *lab.Pod
	inbox         *net.UDPConn
}

func newForger(ctx context.Context, t *testing.T, backend string) *forger {
	t.Helper()
	l := labtest.New(ctx, t, fmt.Sprintf(`{%s, "Backend": {"Type": %q}}`, ipv4Network, backend),
		make([]lab.NodeOptions, 2)...)
	labtest.Start(ctx, t, l, "--ip-masq")
	pods := addPods(ctx, t, l)
	return &forger{l, pods[0], pods[1], listenInbox(t, pods[0].Namespace)}
}

// packet returns a packet from the other pod to the victim.
func (f *forger) packet(text string) []byte {
	return udpPacket(f.other.IPv4, f.victim.IPv4, 4000, inboxPort, []byte(text))
}

// arrives checks that the next datagram that the victim gets is this one, from the other pod as it seems.
func (f *forger) arrives(t *testing.T, text string) {
	t.Helper()
	if from, got := receive(t, f.inbox); got != text || from != f.other.IPv4 {
		t.Errorf("%q from %s arrived, want %q from %s", got, from, text, f.other.IPv4)
	}
}

// TestForgedPackets: who can send packets to a backend that does not encrypt, can send packets to pods in the name of
// other pods, as Documentation/security.md warns.
func TestForgedPackets(t *testing.T) {
	t.Parallel()
	t.Run("vxlan", func(t *testing.T) {
		t.Parallel()
		ctx := labtest.Context(t, time.Minute)
		f := newForger(ctx, t, "vxlan")
		n := f.Nodes()[0]
		mac := labtest.Must(net.ParseMAC(labtest.Must(n.Run(ctx, "cat /sys/class/net/flannel.1/address"))(t)))(t)
		send := func(from *lab.Namespace, to netip.Addr, text string) {
			t.Helper()
			sendUDP(ctx, t, from, to, 8472, vxlanFrame(mac, f.packet(text)))
		}
		for _, from := range []*lab.Namespace{f.Outside, f.victim.Namespace, f.other.Namespace} {
			if conn, err := from.Dial(ctx, "tcp", net.JoinHostPort(n.IPv4.String(), healthPort(n))); err == nil {
				conn.Close()
				t.Errorf("%s reaches the health server on 127.0.0.1 of %s", from.Name, n.Name)
			}
		}
		send(f.Outside, n.IPv4, "from outside")
		f.arrives(t, "from outside")
		send(f.other.Namespace, n.IPv4, "from a pod")
		f.arrives(t, "from a pod")

		// The page has commands that keep pods from that, and from nothing else.
		_, commands, _ := strings.Cut(securityPage(t), "these commands on each node drop such packets")
		_, commands, _ = strings.Cut(commands, "```\n")
		commands, _, found := strings.Cut(commands, "```")
		if !found {
			t.Fatal("Documentation/security.md has no commands")
		}
		for _, n := range f.Nodes() {
			for line := range strings.Lines(strings.TrimSpace(commands)) {
				labtest.Must(n.Run(ctx, strings.TrimSpace(line)))(t)
			}
		}
		send(f.other.Namespace, n.IPv4, "from a pod again")
		send(f.victim.Namespace, n.IPv4, "from a pod of the same node")
		sendUDP(ctx, t, f.other.Namespace, f.victim.IPv4, inboxPort, []byte("honest"))
		f.arrives(t, "honest")
	})
	t.Run("udp", func(t *testing.T) {
		t.Parallel()
		ctx := labtest.Context(t, time.Minute)
		f := newForger(ctx, t, "udp")
		n, peer := f.Nodes()[0], f.Nodes()[1]
		sendUDP(ctx, t, f.Outside, n.IPv4, 8285, f.packet("from outside"))
		labtest.Do(t, lab.Poll(ctx, "the packet from outside to be dropped", func() error {
			text, err := getFrom(ctx, n, "http://"+n.Health()+"/metrics")
			if err == nil && !regexp.MustCompile(`(?m)^flannel_\w+{.*reason="not_from_peer".*} 1$`).MatchString(text) {
				err = errors.New(text)
			}
			return err
		}))
		sendRaw(t, f.Outside, n.IPv4, udpPacket(peer.IPv4, n.IPv4, 8285, 8285, f.packet("as a peer")))
		f.arrives(t, "as a peer")
	})
	t.Run("ipip", func(t *testing.T) {
		t.Parallel()
		labtest.NeedDevice(t, "ipip local 198.18.0.1")
		ctx := labtest.Context(t, time.Minute)
		f := newForger(ctx, t, "ipip")
		n, outside := f.Nodes()[0], lab.Outside
		sendRaw(t, f.Outside, n.IPv4, ipPacket(outside, n.IPv4, unix.IPPROTO_IPIP, f.packet("from outside")))
		f.arrives(t, "from outside")
	})
}

// healthPort is the port of a node's health server.
func healthPort(n *lab.Node) string {
	_, port, _ := net.SplitHostPort(n.Health())
	return port
}

// inboxPort is where listenInbox listens.
const inboxPort = 4001

func listenInbox(t *testing.T, ns *lab.Namespace) *net.UDPConn {
	t.Helper()
	var conn *net.UDPConn
	labtest.Do(t, ns.Do(func() (err error) {
		conn, err = net.ListenUDP("udp4", &net.UDPAddr{Port: inboxPort})
		return err
	}))
	t.Cleanup(func() { conn.Close() })
	return conn
}

// receive waits for a datagram, and returns its sender and text.
func receive(t *testing.T, conn *net.UDPConn) (netip.Addr, string) {
	t.Helper()
	labtest.Do(t, conn.SetReadDeadline(time.Now().Add(lab.Patiently(20*time.Second))))
	b := make([]byte, 1500)
	n, from, err := conn.ReadFromUDPAddrPort(b)
	labtest.Do(t, err)
	return from.Addr().Unmap(), string(b[:n])
}

func sendUDP(ctx context.Context, t *testing.T, from *lab.Namespace, to netip.Addr, port int, payload []byte) {
	t.Helper()
	conn := labtest.Must(from.Dial(ctx, "udp", netip.AddrPortFrom(to, uint16(port)).String()))(t)
	defer conn.Close()
	labtest.Must(conn.Write(payload))(t)
}

// sendRaw sends an IPv4 packet, whatever its source is.
func sendRaw(t *testing.T, from *lab.Namespace, to netip.Addr, packet []byte) {
	t.Helper()
	labtest.Do(t, from.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, packet, 0, &unix.SockaddrInet4{Addr: to.As4()})
	}))
}

// udpPacket returns an IPv4 packet with a datagram without checksum.
func udpPacket(from, to netip.Addr, fromPort, toPort int, payload []byte) []byte {
	var b []byte
	for _, v := range []int{fromPort, toPort, 8 + len(payload), 0} {
		b = binary.BigEndian.AppendUint16(b, uint16(v))
	}
	return ipPacket(from, to, unix.IPPROTO_UDP, append(b, payload...))
}

// ipPacket returns an IPv4 packet.
func ipPacket(from, to netip.Addr, protocol byte, payload []byte) []byte {
	const header = 20
	b := []byte{0x45, 0}
	b = binary.BigEndian.AppendUint16(b, uint16(header+len(payload)))
	b = append(b, 0, 0, 0, 0, 64, protocol, 0, 0)
	b = append(append(b, from.AsSlice()...), to.AsSlice()...)
	var sum uint32
	for i := 0; i < header; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(b[10:], ^uint16(sum))
	return append(b, payload...)
}

// vxlanFrame puts a packet into a frame for a VTEP, and that behind a VXLAN header with VNI 1.
func vxlanFrame(to net.HardwareAddr, packet []byte) []byte {
	b := []byte{8, 0, 0, 0, 0, 0, 1, 0}
	b = append(append(b, to...), 2, 0, 0, 0, 0, 0x99, 8, 0)
	return append(b, packet...)
}

// TestSecretsStayIn: what a node writes, publishes and serves has neither the keys of WireGuard nor what identifies the
// machine, at the highest log level.
func TestSecretsStayIn(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, time.Minute)
	psk := labtest.Must(wgtypes.GenerateKey())(t).String()
	l := labtest.New(ctx, t, fmt.Sprintf(`{%s, "Backend": {"Type": "wireguard", "PSK": %q}}`, ipv4Network, psk),
		make([]lab.NodeOptions, 2)...)
	labtest.Start(ctx, t, l, "--ip-masq", "--pprof", "--v=10")
	pods := addPods(ctx, t, l)
	labtest.Do(t, pods[0].WaitPing(ctx, pods[1].IPv4))
	n := l.Nodes()[0]
	secrets := map[string]string{
		"the PSK":         psk,
		"the private key": strings.TrimSpace(string(labtest.Must(os.ReadFile(n.KeyFile()))(t))),
		"the machine ID":  labtest.Must(n.Run(ctx, "cat /etc/machine-id"))(t),
	}
	for _, file := range []string{"/sys/class/dmi/id/product_uuid", "/sys/class/dmi/id/product_serial"} {
		if text, err := os.ReadFile(file); err == nil && len(text) > 8 {
			secrets[file] = strings.TrimSpace(string(text))
		}
	}
	shown := map[string]string{"subnet.env": string(labtest.Must(os.ReadFile(n.SubnetFile()))(t))}
	for key, record := range labtest.Must(l.Etcd.List(ctx, lab.Prefix+"/"))(t) {
		if key != lab.Prefix+"/config" {
			shown[key] = record
		}
	}
	for _, command := range []string{"status", "leases", "diff", "doctor"} {
		out, _, err := n.Ctl(ctx, command, "-o", "json")
		shown["flannelctl "+command] = out + fmt.Sprint(err)
	}
	for _, path := range []string{"/healthz", "/readyz", "/metrics", "/debug/pprof/", "/debug/pprof/goroutine?debug=2",
		"/debug/pprof/heap?debug=1"} {
		shown[path] = labtest.Must(getFrom(ctx, n, "http://"+n.Health()+path))(t)
	}
	shown["the log"] = n.Log()
	for where, text := range shown {
		if len(text) < 2 {
			t.Errorf("%s is empty", where)
		}
		for what, secret := range secrets {
			if len(secret) < 8 || strings.Contains(text, secret) {
				t.Errorf("%s shows %s, %q", where, what, secret)
			}
		}
	}
	if mode := labtest.Must(os.Stat(n.KeyFile()))(t).Mode().Perm(); mode != 0o600 {
		t.Errorf("the private key has mode %v", mode)
	}
	// Another user of the machine.
	other := "setpriv --reuid=65534 --regid=65534 --clear-groups cat /proc/" + fmt.Sprint(n.PID())
	if out, err := n.Run(ctx, other+"/cmdline"); !strings.Contains(out, "--pprof") {
		t.Errorf("another user cannot read the command line: %s, %v", out, err)
	}
	if out, err := n.Run(ctx, other+"/environ"); err == nil {
		t.Errorf("another user can read the environment: %s", out)
	}
}
