package lab_test

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/nstest"
	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// The lab's own workings, without the daemon: what it would write into the
// subnet file and the routing table is put there by hand.

func TestUnderlay(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, time.Minute)
	l := labtest.New(ctx, t, "{}", lab.NodeOptions{}, lab.NodeOptions{}, lab.NodeOptions{Routed: true},
		lab.NodeOptions{NAT: true})
	nodes := l.Nodes()
	for _, from := range nodes {
		for _, to := range nodes {
			for i, ip := range to.Addrs() {
				if i == 0 && (from.Number == 4) != (to.Number == 4) && (from.Number == 3 || to.Number == 3) {
					continue // a NAT node's default route leads nowhere, on purpose
				}
				if err := from.WaitPing(ctx, ip); err != nil {
					t.Error(err)
				}
			}
		}
	}
	labtest.Must(nodes[2].Ping(ctx, lab.Outside, lab.PingOptions{}))(t)
	labtest.Must(nodes[3].Ping(ctx, lab.OutsideV6, lab.PingOptions{}))(t)
	if route := labtest.Must(nodes[3].Run(ctx, "ip -4 route show default"))(t); !strings.Contains(route, "dev nat0") {
		t.Errorf("the NAT node's default route is %q", route)
	}
	labtest.Do(t, l.Outside.Mirror())
	for _, network := range []string{"tcp", "udp"} {
		for i, dst := range []netip.Addr{lab.Outside, lab.OutsideV6} {
			want := nodes[2].Addrs()[i]
			if got := labtest.Must(nodes[2].SeenAs(ctx, network, dst))(t); got != want {
				t.Errorf("%s from n3 is seen as %s, want %s", network, got, want)
			}
		}
	}
	if host := labtest.Must(nodes[1].Run(ctx, "hostname"))(t); host != "n2" {
		t.Errorf("host name is %q", host)
	}
	if id := labtest.Must(nodes[1].Run(ctx, "cat /etc/machine-id"))(t); len(id) != 32 ||
		id == labtest.Must(nodes[0].Run(ctx, "cat /etc/machine-id"))(t) {
		t.Errorf("machine id %q is none, or another node's", id)
	}
	if sys := labtest.Must(nodes[3].Run(ctx, "ls /sys/class/net"))(t); sys != "eth0\nlo\nnat0" {
		t.Errorf("/sys shows %q", sys)
	}
}

// TestHome: a home network reaches the underlay through NAT, and is not reached from there.
func TestHome(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, time.Minute)
	l := labtest.New(ctx, t, "{}", lab.NodeOptions{}, lab.NodeOptions{Home: 1}, lab.NodeOptions{Home: 1},
		lab.NodeOptions{Home: 2})
	nodes := l.Nodes()
	labtest.Do(t, nodes[0].Mirror())
	for _, n := range nodes[1:] {
		want := lab.HomeAddress(1)
		if n == nodes[3] {
			want = lab.HomeAddress(2)
		}
		for _, network := range []string{"tcp", "udp"} {
			if got := labtest.Must(n.SeenAs(ctx, network, nodes[0].IPv4))(t); got != want {
				t.Errorf("%s from %s is seen as %s, want %s", network, n.Hostname, got, want)
			}
		}
		if _, err := nodes[0].Ping(ctx, n.IPv4, lab.PingOptions{}); err == nil {
			t.Errorf("%s is reached from outside", n.Hostname)
		}
	}
	labtest.Must(nodes[1].Ping(ctx, nodes[2].IPv4, lab.PingOptions{}))(t)
	if _, err := nodes[1].Ping(ctx, nodes[3].IPv4, lab.PingOptions{}); err == nil {
		t.Error("one home network is reached from the other")
	}
	labtest.Do(t, l.RestartRouter(ctx, 1))
	if got := labtest.Must(nodes[1].SeenAs(ctx, "udp", nodes[0].IPv4))(t); got != lab.HomeAddress(1) {
		t.Errorf("after the router's restart, n2 is seen as %s", got)
	}
}

func TestPods(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, time.Minute)
	l := labtest.New(ctx, t, "{}", lab.NodeOptions{}, lab.NodeOptions{})
	n1, n2 := l.Nodes()[0], l.Nodes()[1]
	for _, n := range l.Nodes() {
		env := subnet.Env{
			Networks: subnet.NetworksOf(netip.MustParsePrefix("10.5.0.0/16"), netip.MustParsePrefix("fd00:5::/48")),
			Subnets:  ownSubnets(n.Number),
			MTU:      1450,
		}
		labtest.Do(t, env.WriteFile(n.SubnetFile()))
	}
	a := labtest.Must(n1.AddPod(ctx, "a"))(t)
	b := labtest.Must(n2.AddPod(ctx, "b"))(t)
	for _, pair := range [][2]*lab.Node{{n1, n2}, {n2, n1}} {
		for i, s := range ownSubnets(pair[1].Number).Each() {
			labtest.Do(t, pair[0].Script(ctx, "route add "+s.String()+" via "+pair[1].Addrs()[i].String()))
		}
	}
	if got := len(b.Addrs()); got != 2 {
		t.Fatalf("pod b has %d addresses", got)
	}
	for i, dst := range b.Addrs() {
		labtest.Do(t, a.WaitPing(ctx, dst))
		labtest.Must(a.Ping(ctx, dst, lab.PingOptions{Count: 3, Packet: 1450, DF: true}))(t)
		if _, err := a.Ping(ctx, dst, lab.PingOptions{Packet: 1451, DF: true}); err == nil {
			t.Errorf("a packet of 1451 bytes went to %s through an MTU of 1450", dst)
		} else if !regexp.MustCompile(`0 of 1 answered: .*mtu[:=] ?1450`).MatchString(err.Error()) {
			t.Errorf("unexpected error: %v", err)
		}
		if i == 0 {
			labtest.Do(t, b.Mirror())
		}
		if got := labtest.Must(a.SeenAs(ctx, "tcp", dst))(t); got != a.Addrs()[i] {
			t.Errorf("pod a is seen as %s, want %s", got, a.Addrs()[i])
		}
	}
	if bits := labtest.Must(a.Throughput(ctx, b.Namespace, b.IPv4, 1))(t); bits < 1e6 {
		t.Errorf("throughput is %.0f bit/s", bits)
	}

	// A break in the path shows in the count.
	p := labtest.Must(a.StartPing(ctx, b.IPv4))(t)
	labtest.Do(t, n2.Script(ctx, "link set eth0 down"))
	if _, err := a.Ping(ctx, b.IPv4, lab.PingOptions{Count: 5}); err == nil {
		t.Error("a packet went through an interface that is down")
	}
	labtest.Do(t, n2.Script(ctx, "link set eth0 up"))
	labtest.Do(t, n2.Script(ctx, "route replace "+ownSubnets(1).IPv4.String()+" via "+n1.IPv4.String()))
	labtest.Do(t, a.WaitPing(ctx, b.IPv4))
	got := labtest.Must(p.Stop())(t)
	if len(got.Lost) < 5 || len(got.Lost) != got.Sent-got.Received || got.Received == 0 {
		t.Errorf("with a break: %+v", got)
	}

	labtest.Do(t, b.Delete(ctx))
	if _, err := b.Run(ctx, "true"); err == nil {
		t.Error("the pod is there still")
	}
	b = labtest.Must(n2.AddPod(ctx, "b"))(t)
	labtest.Do(t, a.WaitPing(ctx, b.IPv4))
}

// ownSubnets is what node k of this test gets.
func ownSubnets(k int) subnet.Subnets {
	return subnet.Subnets{
		IPv4: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 5, byte(k), 0}), 24),
		IPv6: netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 0, 0, 5, 0, 0, 0, byte(k)}), 64),
	}
}

func TestReboot(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, time.Minute)
	l := labtest.New(ctx, t, "{}", lab.NodeOptions{}, lab.NodeOptions{NAT: true})
	n1, n2 := l.Nodes()[0], l.Nodes()[1]
	labtest.Do(t, n2.Script(ctx, "link add test0 type bridge"))
	before := labtest.Must(n2.Run(ctx, "cat /sys/class/net/eth0/address /etc/machine-id"))(t)
	labtest.Do(t, n2.Reboot(ctx))
	if after := labtest.Must(n2.Run(ctx, "cat /sys/class/net/eth0/address /etc/machine-id"))(t); after != before {
		t.Errorf("MAC and machine id were %q, are %q", before, after)
	}
	if _, err := n2.Run(ctx, "ip link show test0"); err == nil {
		t.Error("test0 survived")
	}
	labtest.Do(t, n1.WaitPing(ctx, n2.IPv4))
}

func TestEtcd(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, time.Minute)
	l := labtest.New(ctx, t, `{"Network": "10.5.0.0/16"}`, lab.NodeOptions{})
	node := l.Nodes()[0]
	// reach is how a node sees etcd.
	reach := func() error {
		_, err := node.Run(ctx, l.Build+"/bin/etcdctl --command-timeout=1s --dial-timeout=1s --endpoints="+lab.Endpoint+","+lab.EndpointV6+" get "+lab.Prefix+"/config")
		return err
	}
	labtest.Do(t, lab.Poll(ctx, "etcd from a node", reach))

	l.Etcd.Kill()
	if reach() == nil {
		t.Error("etcd answers after it was killed")
	}
	labtest.Do(t, l.Etcd.Start(ctx))
	labtest.Do(t, l.Etcd.Stop(ctx))
	labtest.Do(t, l.Etcd.Start(ctx))
	if got := labtest.Must(l.Etcd.Get(ctx, lab.Prefix+"/config"))(t); got != `{"Network": "10.5.0.0/16"}` {
		t.Errorf("after two restarts config is %q", got)
	}
	labtest.Do(t, reach())

	labtest.Do(t, l.Etcd.Cut(ctx))
	if reach() == nil {
		t.Error("a node reaches etcd through the cut")
	}
	labtest.Do(t, l.Etcd.Put(ctx, lab.Prefix+"/subnets/10.5.9.0-24", `{"PublicIP":"198.18.0.9","PublicIPv6":null}`))
	labtest.Do(t, l.Etcd.Restore(ctx))
	labtest.Do(t, reach())

	leases := labtest.Must(l.Etcd.Leases(ctx))(t)
	if got := leases[lab.Prefix+"/subnets/10.5.9.0-24"]; len(leases) != 1 ||
		got.Attrs.PublicIP.String() != "198.18.0.9" || got.IPv4.String() != "10.5.9.0/24" {
		t.Errorf("leases: %+v", leases)
	}
	rev := labtest.Must(l.Etcd.Client.Get(ctx, "none"))(t).Header.Revision
	labtest.Do(t, l.Etcd.Compact(ctx))
	if w := <-l.Etcd.Client.Watch(ctx, lab.Prefix, clientv3.WithRev(rev-1)); w.CompactRevision != rev {
		t.Errorf("a watch from before the compaction got %+v", w)
	}
	labtest.Do(t, l.Etcd.Delete(ctx, lab.Prefix+"/subnets/10.5.9.0-24"))
	if err := l.Etcd.Delete(ctx, lab.Prefix+"/subnets/10.5.9.0-24"); err == nil {
		t.Error("deleting twice is no error")
	}
}

// TestLeftovers kills a process that has a lab; the next lab cleans up after it.
func TestLeftovers(t *testing.T) {
	if os.Getenv("LAB_TO_LEAVE") != "" {
		// The child: make a lab, print its name, and wait for the end.
		l, err := lab.New(t.Context(), lab.Options{})
		if err != nil {
			t.Fatal(err)
		}
		n, err := l.AddNode(t.Context(), lab.NodeOptions{})
		if err != nil {
			t.Fatal(err)
		}
		// One of these dies with us; the other must be found.
		for _, line := range []string{"sleep 1000", "setsid --fork sleep 1000"} {
			if _, err := n.Launch(exec.Command("sh", "-c", line)); err != nil {
				t.Fatal(err)
			}
		}
		os.Stdout.WriteString(l.Name + "\n")
		select {}
	}
	nstest.NeedRoot(t)
	ctx := labtest.Context(t, time.Minute)
	child := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestLeftovers$")
	child.Env = append(os.Environ(), "LAB_TO_LEAVE=1")
	out := labtest.Must(child.StdoutPipe())(t)
	labtest.Do(t, child.Start())
	var buf [100]byte
	size, err := out.Read(buf[:])
	labtest.Do(t, err)
	name := strings.TrimSpace(string(buf[:size]))
	pids := func() []string {
		out, _ := exec.CommandContext(ctx, "ip", "netns", "pids", name+"-n1").Output()
		return strings.Fields(string(out))
	}
	labtest.Do(t, lab.Poll(ctx, "the daemonized process", func() error {
		if len(pids()) < 2 {
			return os.ErrNotExist
		}
		return nil
	}))
	labtest.Do(t, child.Process.Signal(unix.SIGKILL))
	child.Wait()
	orphans := pids()
	if len(orphans) == 0 {
		t.Error("no process was left to be found")
	}

	labtest.New(ctx, t, "{}")
	for _, path := range []string{"/run/netns/" + name + "-n1", "/run/netns/" + name + "-net",
		filepath.Join(os.TempDir(), name)} {
		if _, err := os.Stat(path); err == nil {
			t.Errorf("%s is there still", path)
		}
	}
	for _, pid := range orphans {
		if _, err := os.Readlink("/proc/" + pid + "/ns/net"); err == nil { // a zombie has none
			t.Errorf("process %s lives still", pid)
		}
	}
}

// TestClose: nothing remains, of a kept lab neither.
func TestClose(t *testing.T) {
	t.Parallel()
	nstest.NeedRoot(t)
	ctx := labtest.Context(t, time.Minute)
	keep := "labclose" // no other test's name
	labtest.Do(t, lab.Remove(context.WithoutCancel(ctx), keep))
	l := labtest.Must(lab.New(ctx, lab.Options{Keep: keep}))(t)
	labtest.Must(l.AddNode(ctx, lab.NodeOptions{}))(t)
	if !lab.Exists(keep) {
		t.Error("the lab does not exist")
	}
	if _, err := lab.New(ctx, lab.Options{Keep: keep}); err == nil {
		t.Error("a second lab of that name is no error")
	}
	labtest.Do(t, lab.Remove(ctx, keep))
	entries := labtest.Must(os.ReadDir("/run/netns"))(t)
	if slices.ContainsFunc(entries, func(e os.DirEntry) bool { return strings.HasPrefix(e.Name(), keep) }) ||
		lab.Exists(keep) {
		t.Errorf("something remains: %v", entries)
	}
	labtest.Do(t, l.Close())
}
