package udp

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/pkg/nstest"
	"github.com/flanneld/flanneld/subnet"
)

// A node is a proxy at work in the calling goroutine's namespace, which has the
// addresses of a peer, too: what a test does there is what upstream's proxy does
// on the peer, a packet a datagram.
type node struct {
	t     testing.TB
	udp   *udp
	own   subnet.Lease
	kern  *kernel.Reconciler
	peers chan subnet.Update
	peer  [2]*net.UDPConn // the peer's proxy, in IPv4 and IPv6
	pod   [2]*net.UDPConn // a pod of this node
}

var (
	near     = [2]netip.AddrPort{netip.MustParseAddrPort("198.18.0.1:8285"), netip.MustParseAddrPort("[fd18::1]:8285")}
	far      = [2]netip.AddrPort{netip.MustParseAddrPort("198.18.0.2:8285"), netip.MustParseAddrPort("[fd18::2]:8285")}
	stranger = [2]netip.AddrPort{netip.MustParseAddrPort("198.18.0.3:8285"), netip.MustParseAddrPort("[fd18::3]:8285")}
	nearPod  = [2]netip.AddrPort{netip.MustParseAddrPort("10.5.1.7:1000"), netip.MustParseAddrPort("[fd05:0:0:1::7]:1000")}
	farPod   = [2]netip.AddrPort{netip.MustParseAddrPort("10.5.2.9:2000"), netip.MustParseAddrPort("[fd05:0:0:2::9]:2000")}
	families = [2]string{"IPv4", "IPv6"}
)

const farKey = "10.5.2.0-24&fd05:0:0:2::-64"

// noOffloads has the tests run as on a kernel without any.
var noOffloads = flag.Bool("no-offloads", false, "move packets one by one")

// start starts a proxy.
func start(t testing.TB, use offloads) *node {
	t.Helper()
	if *noOffloads {
		use = offloads{}
	}
	nstest.New(t)
	nstest.Need(t, "ip", "ping")
	if _, err := os.Stat(kernel.TUNClone); err != nil {
		t.Skip(err)
	}
	inOrder(t)
	for _, a := range []string{
		"198.18.0.1/32", "198.18.0.2/32", "198.18.0.3/32", "fd18::1/128", "fd18::2/128", "fd18::3/128",
		"10.5.1.7/32", "fd05:0:0:1::7/128",
	} {
		nstest.Run(t, "ip addr add "+a+" dev lo nodad")
	}
	cfg, err := subnet.ParseConfig([]byte(
		`{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd05::/48","Backend":{"Type":"udp"}}`))
	if err != nil {
		t.Fatal(err)
	}
	b, err := New(cfg, iface.Uplink{
		IPv4: iface.Link{Name: "lo", MTU: 1500, Addr: near[0].Addr()},
		IPv6: iface.Link{Name: "lo", MTU: 1500, Addr: near[1].Addr()},
	})
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, udp: b.(*udp), peers: make(chan subnet.Update, 1)}
	n.udp.offloads = use
	n.own = lease(t, "10.5.1.0-24&fd05:0:0:1::-64", `{"PublicIP":"198.18.0.1","PublicIPv6":"fd18::1"}`)
	if n.kern, err = kernel.New(klog.Background()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.kern.Close)
	for i := range 2 {
		n.peer[i], n.pod[i] = n.listen(far[i]), n.listen(nearPod[i])
	}
	inside(t, func(ctx context.Context) error { return n.udp.Work(ctx, n.own, n.peers) })
	n.tell(lease(t, farKey, `{"PublicIP":"198.18.0.2","PublicIPv6":"fd18::2"}`))
	n.apply()
	n.attached()
	return n
}

// inOrder has one processor receive all that lo is sent (Receive Packet Steering,
// Documentation/networking/scaling.rst of the kernel). Otherwise it is the one that
// the sender happens to run on, and when that is another than before, packets pass
// each other.
func inOrder(t testing.TB) {
	t.Helper()
	// /sys tells of the namespace that it is mounted in.
	steer := exec.Command("sh", "-ec", "mount -t sysfs sys /sys; echo 1 >/sys/class/net/lo/queues/rx-0/rps_cpus")
	steer.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	if out, err := steer.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// inside runs what a proxy or a reconciler does in a goroutine of the calling
// one's namespace, until the test ends.
func inside(t testing.TB, f func(context.Context) error) {
	t.Helper()
	ns, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		err := netns.Set(ns)
		if err == nil {
			err = f(ctx)
		}
		done <- err
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		ns.Close()
	})
}

// tell gives the proxy these peers, and waits until it knows them.
func (n *node) tell(leases ...subnet.Lease) {
	n.t.Helper()
	u := subnet.Update{Snapshot: true}
	for _, l := range leases {
		u.Put(&l)
	}
	n.peers <- u
	n.wait("the peers to be known", func() bool {
		p := n.udp.running.Load()
		return p != nil && len(p.table.Load().known) == 2*len(leases)
	})
}

// apply has the kernel hold what the backend wants.
func (n *node) apply() {
	n.t.Helper()
	n.kern.Set("node", n.udp.Local(n.own))
	n.kern.Compare()
	if err := n.kern.Reconcile(); err != nil {
		n.t.Fatal(err)
	}
}

// attached waits until the proxy is on the device, and the device so far that it
// drops nothing.
func (n *node) attached() {
	n.t.Helper()
	n.wait("the proxy to be attached", func() bool {
		return n.udp.running.Load().tun.Load() != nil
	})
	for i, family := range families {
		n.wait("the device to be ready for "+family, func() bool {
			n.send(n.pod[i], farPod[i], []byte(trial))
			n.peer[i].SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			_, _, err := n.peer[i].ReadFromUDPAddrPort(make([]byte, 1500))
			return err == nil
		})
	}
	// The kernel adds the local route of an IPv6 address a little after the address. Until then, what is sent to the
	// address goes to the proxy.
	for _, own := range []netip.Prefix{n.own.IPv4, n.own.IPv6} {
		n.wait("the route to this node's own address", func() bool {
			return strings.HasPrefix(nstest.Run(n.t, "ip route get "+own.Addr().String()), "local ")
		})
	}
}

// trial is sent until it arrives. That may be more than once, and later.
const trial = "is anybody there?"

func (n *node) wait(what string, condition func() bool) {
	n.t.Helper()
	for began := time.Now(); !condition(); time.Sleep(time.Millisecond) {
		if time.Since(began) > 20*time.Second {
			n.t.Fatalf("waited in vain for %s", what)
		}
	}
}

func (n *node) listen(at netip.AddrPort) *net.UDPConn {
	n.t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { c.Close() })
	return c
}

// receive returns the next datagram.
func (n *node) receive(c *net.UDPConn) ([]byte, netip.AddrPort) {
	n.t.Helper()
	c.SetReadDeadline(time.Now().Add(20 * time.Second))
	b := make([]byte, 65536)
	for {
		got, from, err := c.ReadFromUDPAddrPort(b)
		if err != nil {
			n.t.Fatal(err)
		}
		if !bytes.HasSuffix(b[:got], []byte(trial)) {
			return b[:got], from
		}
	}
}

func (n *node) send(c *net.UDPConn, to netip.AddrPort, b []byte) {
	n.t.Helper()
	if _, err := c.WriteToUDPAddrPort(b, to); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) counters() (sent, received totals) { return n.udp.running.Load().totals() }

// TestWire: a packet is a datagram, and a datagram a packet, with one less to
// live; whatever the kernel can do for us.
func TestWire(t *testing.T) {
	for name, use := range map[string]offloads{
		"all": allOffloads, "no bursts": {}, "no USO": {tso: true, udpSegment: true, udpGRO: true},
		"no UDP_SEGMENT": {tso: true, uso: true, udpGRO: true}, "no UDP_GRO": {tso: true, uso: true, udpSegment: true},
	} {
		t.Run(name, func(t *testing.T) {
			n := start(t, use)
			for i, family := range families {
				// Out: the datagram is what the pod's kernel made of it.
				for _, size := range []int{0, 1, 1000, 1400} {
					data := random(size)
					n.send(n.pod[i], farPod[i], data)
					got, from := n.receive(n.peer[i])
					if from != near[i] {
						t.Errorf("%s: it comes from %v, want %v", family, from, near[i])
					}
					f := flow{nearPod[i], farPod[i], unix.IPPROTO_UDP, 63}
					want := f.finished(0, 0, data)
					if i == 0 {
						copy(want[4:], got[4:8]) // the identification, DF
						want[10], want[11] = 0, 0
						check := ^slowSum(want[:ipv4Header])
						want[10], want[11] = byte(check>>8), byte(check)
					} else {
						copy(want, got[:4]) // the flow label
					}
					if !bytes.Equal(got, want) {
						t.Errorf("%s: %d bytes go out as\n%x, want\n%x", family, size, got, want)
					}
				}
				// In, in bursts too if the kernel makes them of it.
				f := flow{farPod[i], nearPod[i], unix.IPPROTO_UDP, 2}
				for k := range 100 {
					n.send(n.peer[i], near[i], f.finished(0, 0, fmt.Appendf(nil, "packet %d", k%10)))
				}
				for k := range 100 {
					got, from := n.receive(n.pod[i])
					if want := fmt.Sprintf("packet %d", k%10); string(got) != want || from != farPod[i] {
						t.Fatalf("%s: %q of %v comes in, want %q of %v", family, got, from, want, farPod[i])
					}
				}
			}
			n.wait("the last packet to be counted", func() bool { _, r := n.counters(); return r.packets == 200 })
			sent, received := n.counters()
			if sent.packets < 8 || received.drops != [reasons]uint64{} {
				t.Errorf("sent %+v, received %+v", sent, received)
			}
			flows := n.udp.QueueStats()
			if len(flows) != 2 || flows[0].Direction != "sent" || flows[0].Packets < 8 || flows[0].Queue != 0 ||
				flows[1].Direction != "received" || flows[1].Packets != 200 || flows[1].Queue != 0 || flows[1].Bytes == 0 {
				t.Errorf("the metrics are of %+v", flows)
			}
		})
	}
}

// TestOrder: what is sent after something else arrives after it, both ways,
// whatever is made bursts of.
func TestOrder(t *testing.T) {
	n := start(t, allOffloads)
	sizes := []int{20, 20, 20, 900, 900, 50, 1300, 20}
	for i, family := range families {
		f := flow{farPod[i], nearPod[i], unix.IPPROTO_UDP, 64}
		header := len(f.finished(0, 0, nil))
		for round := range 30 { // each fits the queues there are
			var want, in, out []string
			for k := range 100 {
				number := fmt.Sprintf("%08d", round*100+k)
				want = append(want, number)
				data := append([]byte(number), make([]byte, sizes[k%len(sizes)])...)
				n.send(n.pod[i], farPod[i], data)
				n.send(n.peer[i], near[i], f.finished(0, 0, data))
			}
			for range want {
				b, _ := n.receive(n.peer[i])
				out = append(out, string(b[header:][:8]))
				b, _ = n.receive(n.pod[i])
				in = append(in, string(b[:8]))
			}
			if !slices.Equal(out, want) || !slices.Equal(in, want) {
				t.Fatalf("%s: in this order\ngo out  %s\ncome in %s", family, out, in)
			}
		}
	}
}

// TestDrops: nothing gets in that no peer has sent to this node's subnet, and
// what is dropped is counted.
func TestDrops(t *testing.T) {
	n := start(t, allOffloads)
	for i, family := range families {
		good := flow{farPod[i], nearPod[i], unix.IPPROTO_UDP, 64}
		elsewhere, ended := good, good
		elsewhere.to, ended.ttl = stranger[i], 1
		hello := good.finished(0, 0, []byte("hello"))
		bad := n.listen(stranger[i])
		port := n.listen(netip.AddrPortFrom(far[i].Addr(), 0))
		for _, d := range []struct {
			from   *net.UDPConn
			packet []byte
			reason dropReason
		}{
			{bad, hello, dropStranger}, {port, hello, dropStranger}, {bad, nil, dropStranger},
			{n.peer[i], elsewhere.finished(0, 0, nil), dropNotOurs},
			{n.peer[i], ended.finished(0, 0, nil), dropExpired},
			{n.peer[i], nil, dropMalformed}, {n.peer[i], hello[:19], dropMalformed},
			{n.peer[i], hello[:len(hello)-1], dropMalformed},
			{n.peer[i], bytes.Repeat([]byte{0x55}, 100), dropMalformed},
		} {
			_, want := n.counters()
			want.drops[d.reason]++
			n.send(d.from, near[i], d.packet)
			n.wait(fmt.Sprintf("%s, %s: drops %v", family, d.reason, want.drops), func() bool {
				_, now := n.counters()
				return now.drops == want.drops
			})
		}
		n.send(n.peer[i], near[i], append(hello, "and more"...))   // is left out
		if got, _ := n.receive(n.pod[i]); string(got) != "hello" { // the first to get in
			t.Errorf("%q arrives, want hello", got)
		}
	}
}

// TestPeers: a peer that comes is reached and may send, one that went is not and
// may not.
func TestPeers(t *testing.T) {
	n := start(t, allOffloads)
	third := lease(t, "10.5.3.0-24&fd05:0:0:3::-64", `{"PublicIP":"198.18.0.3","PublicIPv6":"fd18::3"}`)
	n.peers <- subnet.Update{Leases: map[subnet.Subnets]*subnet.Lease{third.Subnets: &third}}
	table := func() *table { return n.udp.running.Load().table.Load() }
	n.wait("the third", func() bool { return table().isPeer(stranger[0]) && table().isPeer(stranger[1]) })
	c := n.listen(stranger[0])
	n.send(n.pod[0], netip.MustParseAddrPort("10.5.3.1:5"), []byte("hello"))
	n.receive(c)
	n.send(c, near[0], flow{farPod[0], nearPod[0], unix.IPPROTO_UDP, 64}.finished(0, 0, []byte("hello")))
	n.receive(n.pod[0])
	n.peers <- subnet.Update{Gone: map[subnet.Subnets]bool{third.Subnets: true}}
	n.wait("the third to go", func() bool {
		return !table().isPeer(stranger[0]) && table().lookup(netip.MustParseAddr("10.5.3.1")) == nil
	})
	if table().lookup(farPod[0].Addr()) == nil || table().lookup(farPod[1].Addr()) == nil {
		t.Error("the second went too")
	}
}

// TestICMPErrors: the sender of a packet that cannot be delivered gets an error.
func TestICMPErrors(t *testing.T) {
	n := start(t, allOffloads)
	for _, c := range []struct{ line, want string }{
		{"ping -c 1 -W 20 10.5.9.9", "From 10.5.1.0 icmp_seq=1 Destination Net Unreachable"},
		{"ping -c 1 -W 20 -t 1 10.5.2.9", "From 10.5.1.0 icmp_seq=1 Time to live exceeded"},
		{"ping -c 1 -W 20 fd05:0:0:9::9", "From fd05:0:0:1:: icmp_seq=1 Destination unreachable: No route"},
		{"ping -c 1 -W 20 -t 1 fd05:0:0:2::9", "From fd05:0:0:1:: icmp_seq=1 Time exceeded: Hop limit"},
	} {
		if out, _ := nstest.Try(c.line); !strings.Contains(out, c.want) {
			t.Errorf("%s: want %s\n%s", c.line, c.want, out)
		}
	}
	// What comes from a peer and ends here is the peer's sender's to know: the
	// error goes back the same way.
	ended := flow{farPod[0], nearPod[0], unix.IPPROTO_UDP, 1}.finished(0, 0, []byte("hello"))
	n.send(n.peer[0], near[0], ended)
	got, _ := n.receive(n.peer[0])
	if len(got) < 48 || destination(got) != farPod[0].Addr() || got[20] != 11 || !bytes.Equal(got[28:], ended) ||
		slowSum(got[20:]) != 0xffff {
		t.Errorf("%x comes back, want time exceeded", got)
	}
}

// TestSilence: no errors about errors and the like, and not too many.
func TestSilence(t *testing.T) {
	echo := func(kind uint8) []byte {
		b := flow{nearPod[0], farPod[0], unix.IPPROTO_ICMP, 64}.finished(0, 0, nil)
		b[20] = kind
		return b
	}
	fragment := flow{nearPod[0], farPod[0], unix.IPPROTO_UDP, 64}.finished(0, 0, nil)
	fragment[7] = 1
	to := func(from, to string, protocol uint8) []byte {
		return flow{netip.MustParseAddrPort(from), netip.MustParseAddrPort(to), protocol, 64}.finished(0, 0, nil)
	}
	six := to("[fd05::1]:256", "[fd05::2]:1", unix.IPPROTO_ICMPV6) // its type is 1
	for _, c := range []struct {
		name   string
		packet []byte
		want   bool
	}{
		{"UDP", to("10.5.1.7:1", "10.5.2.9:1", unix.IPPROTO_UDP), true}, {"echo request", echo(8), true},
		{"unreachable", echo(3), false}, {"redirect", echo(5), false}, {"second fragment", fragment, false},
		{"from nobody", to("0.0.0.0:1", "10.5.2.9:1", unix.IPPROTO_UDP), false},
		{"multicast", to("10.5.1.7:1", "224.0.0.1:1", unix.IPPROTO_UDP), false},
		{"broadcast", to("10.5.1.7:1", "255.255.255.255:1", unix.IPPROTO_UDP), false},
		{"ICMPv6 error", six, false},
		{"router solicitation", to("[fe80::1]:34000", "[ff02::2]:1", unix.IPPROTO_ICMPV6), false},
	} {
		if got := mayReport(c.packet); got != c.want {
			t.Errorf("%s: an error is sent: %v, want %v", c.name, got, c.want)
		}
	}

	nstest.New(t)
	nstest.Run(t, "ip addr add 10.5.1.0/32 dev lo")
	nstest.Run(t, "ip addr add 10.5.1.7/32 dev lo")
	c, err := newICMPSender(subnet.Lease{Subnets: subnet.Subnets{IPv4: netip.MustParsePrefix("10.5.1.0/24")}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	c.limit = rate.NewLimiter(0, 3)
	hear, err := net.ListenPacket("ip4:icmp", "10.5.1.7")
	if err != nil {
		t.Fatal(err)
	}
	defer hear.Close()
	for range 10 {
		c.send(unreachable, to("10.5.1.7:1", "10.5.2.9:1", unix.IPPROTO_UDP))
	}
	c.limit = rate.NewLimiter(0, 1)
	c.send(timeExceeded, to("10.5.1.7:1", "10.5.2.9:1", unix.IPPROTO_UDP))
	b := make([]byte, 1500)
	for i := 0; ; i++ {
		hear.SetReadDeadline(time.Now().Add(20 * time.Second))
		if _, _, err := hear.ReadFrom(b); err != nil {
			t.Fatal(err)
		}
		if b[0] == 11 { // the last
			if i != 3 {
				t.Errorf("%d errors were sent, want 3", i)
			}
			return
		}
	}
}

// TestDevice: the proxy is back on a device that somebody deleted as soon as
// there is one, and bears one that is down.
func TestDevice(t *testing.T) {
	n := start(t, allOffloads)
	talk := func() {
		t.Helper()
		n.attached()
		for i := range families {
			n.send(n.pod[i], farPod[i], []byte("hello"))
			n.receive(n.peer[i])
			n.send(n.peer[i], near[i], flow{farPod[i], nearPod[i], unix.IPPROTO_UDP, 64}.finished(0, 0, []byte("hello")))
			n.receive(n.pod[i])
		}
	}
	talk()
	for _, damage := range [][]string{
		{"ip link del flannel0"},
		{"ip link set flannel0 down"},
		{"ip link set flannel0 down", "ip link set flannel0 name other", "ip link del other"},
		{"ip link set flannel0 mtu 600"},
	} {
		for _, line := range damage {
			nstest.Run(t, line)
		}
		switch damage[0] {
		case "ip link del flannel0":
			n.wait("the proxy to notice", func() bool { return n.udp.running.Load().tun.Load() == nil })
		case "ip link set flannel0 down":
			n.send(n.peer[0], near[0], flow{farPod[0], nearPod[0], unix.IPPROTO_UDP, 64}.finished(0, 0, nil))
			n.wait("the drop", func() bool { _, r := n.counters(); return r.drops[dropUnreceivable] > 0 })
		}
		n.apply()
		talk()
	}
	out := nstest.Run(t, "ip -d link show flannel0")
	for _, want := range []string{"tun type tun", "persist on", "mtu 1452"} {
		if !strings.Contains(out, want) {
			t.Errorf("the device lacks %q: %s", want, out)
		}
	}
}

// TestPort: a port that is taken is waited for.
func TestPort(t *testing.T) {
	nstest.New(t)
	nstest.Run(t, "ip addr add 198.18.0.1/32 dev lo")
	taken, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(near[0]))
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, err = listen(klog.Background(), near[0], allOffloads)
	if !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(err.Error(), "UDP port 8285 of 198.18.0.1") {
		t.Errorf("the error is %v", err)
	}
	// The address may be away.
	s, err := listen(klog.Background(), stranger[0], allOffloads)
	if err != nil {
		t.Fatal(err)
	}
	s.file.Close()
}

// TestTooBig: a burst of packets that the way does not take is sent one by one,
// in fragments, and what cannot be sent at all is counted.
func TestTooBig(t *testing.T) {
	nstest.New(t)
	for _, a := range []string{"198.18.0.1/32", "198.18.0.2/32"} {
		nstest.Run(t, "ip addr add "+a+" dev lo")
	}
	nstest.Run(t, "ip link set lo mtu 1300")
	n := &node{t: t}
	peer := n.listen(far[0])
	s, err := listen(klog.Background(), near[0], allOffloads)
	if err != nil {
		t.Fatal(err)
	}
	defer s.file.Close()
	if !s.offloads.udpSegment {
		t.Skip("the kernel has no UDP_SEGMENT")
	}
	var b batch
	counts := &counters{}
	b.open(s, counts)
	to, nowhere := newEndpoint(far[0]), newEndpoint(netip.MustParseAddrPort("192.0.2.1:8285"))
	var want [][]byte
	for i := range 5 {
		header, payload := random(40), random(1360)
		if i == 4 {
			payload = payload[:500]
		}
		b.add(to, header, payload)
		want = append(want, append(header, payload...))
	}
	for range 3 {
		b.add(nowhere, random(100), nil)
	}
	b.add(to, []byte("the last"), nil)
	if b.count != 3 {
		t.Errorf("%d bursts, want 3", b.count)
	}
	if err := b.flush(); err != nil {
		t.Fatal(err)
	}
	for i, w := range append(want, []byte("the last")) {
		if got, _ := n.receive(peer); !bytes.Equal(got, w) {
			t.Errorf("datagram %d differs: %d bytes, want %d", i, len(got), len(w))
		}
	}
	var c totals
	counts.addTo(&c)
	if c.packets != 6 || c.bytes != 4*1400+540+8 || c.drops[dropUnsendable] != 3 {
		t.Errorf("the counters say %+v", c)
	}
}

// TestAllocations: no packet takes any.
func TestAllocations(t *testing.T) {
	n := start(t, allOffloads)
	for i, family := range families {
		pod, peer := descriptor(t, n.pod[i]), descriptor(t, n.peer[i])
		connect(t, pod, farPod[i])
		connect(t, peer, near[i])
		data := make([]byte, 1000)
		in := flow{farPod[i], nearPod[i], unix.IPPROTO_UDP, 64}.finished(0, 0, data)
		buf := make([]byte, 65536)
		if got := testing.AllocsPerRun(2000, func() {
			exchange(t, pod, data, peer, buf)
			exchange(t, peer, in, pod, buf)
		}); got != 0 {
			t.Errorf("%s: %v allocations for two packets", family, got)
		}
	}
}

// descriptor returns a socket's file descriptor, which blocks.
func descriptor(t *testing.T, c *net.UDPConn) int {
	t.Helper()
	f, err := c.File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	fd := int(f.Fd())
	if err := unix.SetNonblock(fd, false); err != nil {
		t.Fatal(err)
	}
	return fd
}

func connect(t *testing.T, fd int, to netip.AddrPort) {
	t.Helper()
	var name unix.Sockaddr = &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
	if to.Addr().Is4() {
		name = &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	}
	if err := unix.Connect(fd, name); err != nil {
		t.Fatal(err)
	}
}

func exchange(t *testing.T, from int, b []byte, to int, buf []byte) {
	if _, err := unix.Write(from, b); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Read(to, buf); err != nil {
		t.Fatal(err)
	}
}
