package kernel

import (
	"context"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/nstest"
)

var (
	mac1 = MAC{0x0e, 0, 0, 0, 0, 1}
	mac2 = MAC{0x0e, 0, 0, 0, 0, 2}
	mac3 = MAC{0x0e, 0, 0, 0, 0, 3}
)

func addr(s string) netip.Addr     { return netip.MustParseAddr(s) }
func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// node is what a dual-stack VXLAN node wants for itself.
func node() []Object {
	return []Object{
		Link{Name: "flannel.1", MAC: mac1, MTU: 1450,
			Type: VXLAN{VNI: 1, Port: 8472, Local: addr("198.18.0.1"), Dev: "eth0"}},
		Addr{Dev: "flannel.1", Prefix: prefix("10.5.1.0/32")},
		Link{Name: "flannel-v6.1", MAC: mac1, MTU: 1430,
			Type: VXLAN{VNI: 1, Port: 8472, Local: addr("fd18::1"), Dev: "eth0", Learning: true, GBP: true}},
		Addr{Dev: "flannel-v6.1", Prefix: prefix("fd05:0:0:1::/128")},
		Route{Dst: prefix("10.5.1.0/24"), Blackhole: true, Metric: 4096},
		Route{Dst: prefix("fd05:0:0:1::/64"), Blackhole: true, Metric: 4096},
	}
}

// peer is what it wants for a peer over VXLAN, peerDirect for one on its own link.
func peer(mac MAC) []Object {
	return []Object{
		Neighbor{Dev: "flannel.1", IP: addr("10.5.2.0"), MAC: mac},
		FDBEntry{Dev: "flannel.1", MAC: mac, Dst: addr("198.18.0.2")},
		Route{Dst: prefix("10.5.2.0/24"), Via: addr("10.5.2.0"), Dev: "flannel.1", Onlink: true},
		Neighbor{Dev: "flannel-v6.1", IP: addr("fd05:0:0:2::"), MAC: mac},
		FDBEntry{Dev: "flannel-v6.1", MAC: mac, Dst: addr("fd18::2")},
		Route{Dst: prefix("fd05:0:0:2::/64"), Via: addr("fd05:0:0:2::"), Dev: "flannel-v6.1", Onlink: true},
	}
}

func peerDirect() []Object {
	return []Object{
		Route{Dst: prefix("10.5.3.0/24"), Via: addr("198.18.0.3"), Dev: "eth0"},
		Route{Dst: prefix("fd05:0:0:3::/64"), Via: addr("fd18::3"), Dev: "eth0"},
	}
}

// host makes the test's namespace a host with an uplink.
func host(t *testing.T) {
	nstest.New(t)
	nstest.Need(t, "ip", "bridge")
	uplink(t)
}

// quietHost is host, with an IPv4 uplink that gets no addresses by itself.
func quietHost(t *testing.T) {
	t.Helper()
	nstest.New(t)
	nstest.Need(t, "ip")
	for _, line := range []string{
		"ip link add eth0 type veth peer name far", "ip link set far addrgenmode none", "ip link set eth0 addrgenmode none",
		"ip link set far up", "ip link set eth0 up", "ip addr add 198.18.0.1/24 dev eth0",
	} {
		nstest.Run(t, line)
	}
	nstest.AwaitCarrier(t, "eth0", "far")
}

func uplink(t *testing.T) {
	t.Helper()
	nstest.Run(t, "ip link add eth0 type veth peer name far")
	nstest.Run(t, "ip link set far up")
	nstest.Run(t, "ip link set eth0 up")
	nstest.Run(t, "ip addr add 198.18.0.1/24 dev eth0")
	nstest.Run(t, "ip addr add fd18::1/64 dev eth0 nodad")
	nstest.AwaitCarrier(t, "eth0", "far")
}

// start returns a Reconciler that holds a node and two peers.
func start(t *testing.T) *Reconciler {
	t.Helper()
	r := idler(t)
	r.Set("node", node())
	r.Set("peer", peer(mac2))
	r.Set("direct", peerDirect())
	apply(t, r)
	return r
}

// noNexthops has the tests run as on a kernel before 5.3, with as many gateways as
// would call for nexthops.
var noNexthops = flag.Bool("no-nexthops", false, "use no nexthop objects")

func idler(t *testing.T) *Reconciler {
	t.Helper()
	r, err := New(klog.Background())
	if err != nil {
		t.Fatal(err)
	}
	if *noNexthops {
		r.supported[KindNexthop], r.fewGateways = false, 0
	}
	t.Cleanup(r.Close)
	r.backoff.First, r.backoff.Most = 100*time.Millisecond, 100*time.Millisecond
	r.SetNetworks([]netip.Prefix{prefix("10.5.0.0/16"), prefix("fd05::/48")}, nil)
	return r
}

func apply(t *testing.T, r *Reconciler) {
	t.Helper()
	if err := r.Reconcile(); err != nil {
		t.Fatal(err)
	}
}

// settle reconciles until the condition holds.
func settle(t *testing.T, r *Reconciler, what string, condition func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	met := false
	r.signal() // for the first time
	r.Run(ctx, func(err error) {
		if err != nil {
			t.Logf("refused: %v", err)
		}
		if met = condition(); met {
			cancel()
		}
	})
	if !met {
		t.Fatalf("not within a minute: %s\n\ngot\n%s", what, tables(t))
	}
}

// tables shows all that matters of the kernel's tables.
func tables(t *testing.T) string {
	t.Helper()
	var out []string
	for _, line := range []string{
		"ip -d -o link show type vxlan", "ip -o addr show", "ip route show", "ip -6 route show",
		"ip neigh show nud permanent", "bridge fdb show",
	} {
		var kept []string
		for _, l := range strings.Split(nstest.Run(t, line), "\n") {
			// Link-local addresses, the kernel's own FDB entries for
			// multicast, and what a new device numbers otherwise.
			if strings.Contains(l, "fe80::") || strings.Contains(l, "33:33:") || strings.Contains(l, "01:00:5e") {
				continue
			}
			if _, rest, ok := strings.Cut(l, ": "); ok && strings.HasPrefix(line, "ip -") {
				l = rest
			}
			kept = append(kept, strings.Join(strings.Fields(l), " "))
		}
		slices.Sort(kept)
		out = append(out, line+":\n  "+strings.Join(kept, "\n  "))
	}
	return strings.Join(out, "\n")
}

// commands returns the commands that bring about what r wants.
func commands() []string {
	var lines []string
	for _, objects := range [][]Object{node(), peer(mac2), peerDirect()} {
		for _, o := range objects {
			lines = append(lines, o.String())
		}
	}
	return lines
}

// What a person would type from the log is what the daemon does, and the
// other way round.
func TestCommandsSayWhatIsDone(t *testing.T) {
	host(t)
	r := start(t)
	ours := tables(t)
	r.Compare()
	if err := r.compare(); err != nil || len(r.dirty) > 0 {
		t.Fatalf("what was just applied differs when read back: %v, %d entries", err, len(r.dirty))
	}

	nstest.Run(t, "ip link del flannel.1")
	nstest.Run(t, "ip link del flannel-v6.1")
	for _, o := range append(peerDirect(), node()[4], node()[5]) {
		nstest.Run(t, o.Undo())
	}
	for _, line := range commands() {
		nstest.Run(t, line)
	}
	for _, dev := range []string{"flannel.1", "flannel-v6.1"} {
		nstest.Run(t, "ip link set "+dev+" alias "+linkAlias)
	}
	if typed := tables(t); typed != ours {
		t.Errorf("by the commands:\n%s\n\nby the reconciler:\n%s", typed, ours)
	}
}

func TestAdoptsWhatFits(t *testing.T) {
	host(t)
	start(t)
	index := strings.SplitN(nstest.Run(t, "ip -o link show flannel.1"), ":", 2)[0]
	before := tables(t)

	again := idler(t)
	again.Set("node", node())
	again.Set("peer", peer(mac2))
	again.Set("direct", peerDirect())
	if err := again.compare(); err != nil {
		t.Fatal(err)
	}
	for e := range again.entries.All() {
		if e.kind != KindNexthop && e.want != e.have {
			t.Errorf("a restart would touch %v", e.want)
		}
	}
	apply(t, again)
	if after := tables(t); after != before ||
		strings.SplitN(nstest.Run(t, "ip -o link show flannel.1"), ":", 2)[0] != index {
		t.Errorf("a restart changed\n%s\nto\n%s", before, after)
	}
}

func TestRemovesWhatIsStale(t *testing.T) {
	host(t)
	foreign := []string{
		"ip route add 10.99.0.0/16 via 198.18.0.9 dev eth0",                // outside the network
		"ip route add 10.5.77.0/24 via 198.18.0.9 dev eth0 proto static",   // an operator's own
		"ip route add 10.5.78.0/24 dev eth0",                               // no gateway
		"ip route add blackhole 10.5.79.0/24",                              // likewise
		"ip route add 10.5.80.0/24 via 198.18.0.9 dev eth0 table 100",      // another table
		"ip neigh add 198.18.0.9 lladdr 0e:00:00:00:00:99 dev eth0",        // another device
		"ip link add vxlan9 type vxlan id 9 dstport 4789 local 198.18.0.1", // another's VTEP
		"bridge fdb add 0e:00:00:00:00:99 dev vxlan9 dst 198.18.0.9 self permanent",
	}
	for _, line := range foreign {
		nstest.Run(t, line)
	}
	theirs := strings.Split(tables(t), "\n")
	r := start(t)
	before := tables(t)
	for _, stale := range []string{
		"ip route add 10.5.9.0/24 via 10.5.9.0 dev flannel.1 onlink",                   // as upstream leaves them
		"ip route add 10.5.8.0/24 via 198.18.0.8 dev eth0",                             // its host-gw
		"ip route add 10.5.7.0/24 via 198.18.0.8 dev eth0 proto 70",                    // ours
		"ip route add 172.31.7.0/24 via 198.18.0.8 dev eth0 proto 70",                  // ours, of an earlier network
		"ip route add blackhole 172.31.0.0/24 metric 4096 proto 70",                    // likewise
		"ip -6 route add fd05:0:0:9::/64 via fd05:0:0:9:: dev flannel-v6.1 onlink",     // IPv6
		"ip -6 route add fd05:0:0:8::/64 via fd18::8 dev eth0 proto 70",                //
		"ip addr add 10.5.9.0/32 dev flannel.1",                                        // of an earlier lease
		"ip -6 addr add fd05:0:0:9::/128 dev flannel-v6.1 nodad",                       //
		"ip neigh add 10.5.9.0 lladdr 0e:00:00:00:00:09 dev flannel.1",                 //
		"ip neigh add fd05:0:0:9:: lladdr 0e:00:00:00:00:09 dev flannel-v6.1",          //
		"bridge fdb add 0e:00:00:00:00:09 dev flannel.1 dst 198.18.0.9 self permanent", //
		"ip link add flannel.7 type vxlan id 7 dstport 8472 local 198.18.0.1 dev eth0", // of an earlier VNI
		"ip link set flannel.7 alias " + linkAlias,
	} {
		nstest.Run(t, stale)
	}
	r.Close()

	again := idler(t)
	again.Set("node", node())
	again.Set("peer", peer(mac2))
	again.Set("direct", peerDirect())
	apply(t, again)
	after := tables(t)
	if after != before {
		t.Errorf("want\n%s\ngot\n%s", before, after)
	}
	for _, line := range theirs {
		if !strings.Contains(after, line) {
			t.Errorf("not ours, and gone: %s", line)
		}
	}
}

func TestPeersComeAndGo(t *testing.T) {
	host(t)
	r := idler(t)
	r.Set("node", node())
	apply(t, r)
	alone := tables(t)
	r.Set("peer", peer(mac2))
	r.Set("direct", peerDirect())
	apply(t, r)
	both := tables(t)
	if !strings.Contains(both, "10.5.2.0/24 via 10.5.2.0 dev flannel.1 proto 70 onlink") {
		t.Errorf("no route in\n%s", both)
	}
	r.Set("peer", peer(mac3))
	apply(t, r)
	if got, want := tables(t), strings.ReplaceAll(both, mac2.String(), mac3.String()); got != want {
		t.Errorf("another VTEP: want\n%s\ngot\n%s", want, got)
	}
	r.Set("peer", nil)
	r.Set("direct", nil)
	apply(t, r)
	if got := tables(t); got != alone {
		t.Errorf("without peers: want\n%s\ngot\n%s", alone, got)
	}
	if entries := slices.Collect(r.entries.All()); len(entries) != len(node()) || len(r.owners) != 1 {
		t.Errorf("%d entries, %d owners are remembered", len(entries), len(r.owners))
	}
}

// A node that comes back with another subnet has two leases for a while, with
// the same VTEP.
func TestSharedObjectsStay(t *testing.T) {
	host(t)
	r := idler(t)
	r.Set("node", node())
	fdb := FDBEntry{Dev: "flannel.1", MAC: mac2, Dst: addr("198.18.0.2")}
	moved := FDBEntry{Dev: "flannel.1", MAC: mac2, Dst: addr("198.18.0.22")}
	r.Set("old", []Object{fdb})
	r.Set("new", []Object{fdb})
	apply(t, r)
	show := func() string { return nstest.Run(t, "bridge fdb show dev flannel.1") }
	r.Set("old", nil)
	apply(t, r)
	if !strings.Contains(show(), "dst 198.18.0.2 self permanent") {
		t.Errorf("gone with its first owner: %s", show())
	}
	r.Set("third", []Object{moved}) // waits for its turn
	apply(t, r)
	if strings.Contains(show(), "198.18.0.22") {
		t.Errorf("a latecomer has its way: %s", show())
	}
	r.Set("new", nil)
	apply(t, r)
	if !strings.Contains(show(), "dst 198.18.0.22 self permanent") {
		t.Errorf("the next owner has not: %s", show())
	}
}

// Changes of flanneld's objects by other programs are undone when the kernel notifies of them.
func TestRepairsDrift(t *testing.T) {
	for _, c := range drifts {
		t.Run(c.name, func(t *testing.T) {
			host(t)
			c.try(t, start(t))
		})
	}
}

// A drift is a change of flanneld's objects by another program.
type drift struct{ name, harm string }

// try tells whether it is undone.
func (c drift) try(t *testing.T, r *Reconciler) {
	t.Helper()
	before := tables(t)
	for _, line := range strings.Split(c.harm, ";") {
		nstest.Run(t, line)
	}
	if tables(t) == before && !strings.Contains(c.harm, ";") {
		t.Fatal("no harm done: the test proves nothing")
	}
	settle(t, r, "the state before "+c.harm+":\n"+before, func() bool { return tables(t) == before })
}

var drifts = []drift{
	{"route deleted", "ip route del 10.5.2.0/24"},
	{"routes flushed", "ip route flush proto 70"},
	{"IPv6 routes flushed", "ip -6 route flush proto 70"},
	{"route hijacked", "ip route replace 10.5.2.0/24 via 198.18.0.66 dev eth0"},
	{"host-gw route hijacked", "ip route replace 10.5.3.0/24 via 198.18.0.66 dev eth0 proto static"},
	{"IPv6 route hijacked", "ip -6 route replace fd05:0:0:3::/64 via fd18::66 dev eth0"},
	{"blackhole deleted", "ip route del blackhole 10.5.1.0/24 metric 4096"},
	{"neighbours flushed", "ip neigh flush dev flannel.1 nud permanent"},
	{"neighbour changed", "ip neigh replace 10.5.2.0 lladdr 0e:00:00:00:00:66 dev flannel.1"},
	{"neighbour made dynamic", "ip neigh replace 10.5.2.0 lladdr 0e:00:00:00:00:02 dev flannel.1 nud stale"},
	{"FDB entry deleted", "bridge fdb del 0e:00:00:00:00:02 dev flannel.1 dst 198.18.0.2 self"},
	{"FDB entry changed", "bridge fdb replace 0e:00:00:00:00:02 dev flannel.1 dst 198.18.0.66 self permanent"},
	{"address deleted", "ip addr del 10.5.1.0/32 dev flannel.1"},
	{"IPv6 address deleted", "ip addr del fd05:0:0:1::/128 dev flannel-v6.1"},
	{"address added", "ip addr add 10.5.66.0/32 dev flannel.1"},
	{"device deleted", "ip link del flannel.1"},
	{"IPv6 device deleted", "ip link del flannel-v6.1"},
	{"device down", "ip link set flannel.1 down"},
	{"IPv6 device down", "ip link set flannel-v6.1 down"},
	{"MTU changed", "ip link set flannel.1 mtu 1300"},
	{"MAC changed", "ip link set flannel.1 address 0e:00:00:00:00:66"},
	{"stray route", "ip route add 10.5.66.0/24 via 198.18.0.66 dev eth0 proto 70"},
	{"stray neighbour", "ip neigh add 10.5.66.0 lladdr 0e:00:00:00:00:66 dev flannel.1"},
	{"stray FDB entry", "bridge fdb add 0e:00:00:00:00:66 dev flannel.1 dst 198.18.0.66 self permanent"},
	{"uplink down and up", "ip link set eth0 down;ip link set eth0 up;ip addr add fd18::1/64 dev eth0 nodad"},
	{"uplink's address away and back", "ip addr flush dev eth0;ip addr add 198.18.0.1/24 dev eth0;ip addr add fd18::1/64 dev eth0 nodad"},
	{"uplink recreated", "ip link del eth0;ip link add eth0 type veth peer name far;ip link set far up;ip link set eth0 up;" +
		"ip addr add 198.18.0.1/24 dev eth0;ip addr add fd18::1/64 dev eth0 nodad"},
	{"device replaced", "ip link del flannel.1;ip link add flannel.1 type vxlan id 5 dstport 4789 local 198.18.0.1"},
	{"device of another type in its place", "ip link del flannel.1;ip link add flannel.1 type bridge"},
	{"device renamed", "ip link set flannel.1 down;ip link set flannel.1 name other;ip link del other"},
}

func TestRefusedObjects(t *testing.T) {
	host(t)
	r := idler(t)
	r.Set("node", node())
	r.Set("far", []Object{Route{Dst: prefix("10.5.4.0/24"), Via: addr("198.19.0.4"), Dev: "eth0"}})
	r.Set("peer", peer(mac2))
	err := r.Reconcile()
	if err == nil || !strings.Contains(err.Error(),
		"ip route replace 10.5.4.0/24 via 198.19.0.4 dev eth0 proto 70: network is unreachable") {
		t.Fatalf("got error %v", err)
	}
	if !r.waiting() || r.pending() {
		t.Errorf("waiting %t, pending %t", r.waiting(), r.pending())
	}
	if got := nstest.Run(t, "ip route show 10.5.2.0/24"); got == "" {
		t.Error("one refusal kept the rest from being applied")
	}
	// A wish that changes is tried at once.
	r.Set("far", []Object{Route{Dst: prefix("10.5.4.0/24"), Via: addr("198.18.0.4"), Dev: "eth0"}})
	apply(t, r)
	if got := nstest.Run(t, "ip route show 10.5.4.0/24"); !strings.Contains(got, "via 198.18.0.4") {
		t.Errorf("route: %q", got)
	}
	r.retry()
	if r.pending() {
		t.Error("what was refused once is retried though it is no longer wanted")
	}
}

// nodeOnPort returns what node does, but with another port of its first device.
func nodeOnPort(port int) []Object {
	objects := node()
	l := objects[0].(Link)
	v := l.Type.(VXLAN)
	v.Port = port
	l.Type = v
	objects[0] = l
	return objects
}

func TestDeviceThatDoesNotFitIsReplaced(t *testing.T) {
	host(t)
	r := start(t)
	before := tables(t)
	r.Set("node", nodeOnPort(4789))
	apply(t, r)
	if got, want := tables(t), strings.Replace(before, "srcport 0 0 dstport 8472 nolearning",
		"srcport 0 0 dstport 4789 nolearning", 1); got != want {
		t.Errorf("want\n%s\ngot\n%s", want, got)
	}
	r.Compare()
	apply(t, r)
	if got := nstest.Run(t, "ip route show dev flannel.1"); !strings.Contains(got, "10.5.2.0/24") {
		t.Errorf("the peer's route did not follow: %q", got)
	}
}

// Another program removes a device that we are about to remove or to replace. Its notification has not come yet.
func TestDeviceThatIsRemovedMeanwhile(t *testing.T) {
	for name, change := range map[string]func(*Reconciler){
		"no longer desired": func(r *Reconciler) { r.Set("node", nil) },
		"to be replaced":    func(r *Reconciler) { r.Set("node", nodeOnPort(4789)) },
	} {
		t.Run(name, func(t *testing.T) {
			host(t)
			r := start(t)
			r.Set("peer", nil)
			r.Set("direct", nil)
			change(r)
			nstest.Run(t, "ip link del flannel.1")
			if err := r.apply(); err != nil {
				t.Errorf("refused: %v", err)
			}
			apply(t, r)
			if !r.Has("node") {
				t.Errorf("the device is not as desired:\n%s", tables(t))
			}
		})
	}
}

// A lease of other subnets: the kernel removes the routes of a device with its only address.
func TestAddressChanges(t *testing.T) {
	host(t)
	r := start(t)
	before := tables(t)
	other := node()
	other[1] = Addr{Dev: "flannel.1", Prefix: prefix("10.5.44.0/32")}
	r.Set("node", other)
	apply(t, r)
	if got, want := tables(t), strings.Replace(before, "inet 10.5.1.0/32", "inet 10.5.44.0/32", 1); got != want {
		t.Errorf("want\n%s\ngot\n%s", want, got)
	}
	settle(t, r, "all that the removal of the address may have taken is set again", func() bool { return !r.pending() })
	// Without any address, too, the routes that the kernel has removed with it come back.
	r.Set("node", slices.Delete(other, 1, 2))
	settle(t, r, "the routes without the address", func() bool {
		got := nstest.Run(t, "ip addr show dev flannel.1") + nstest.Run(t, "ip route show dev flannel.1")
		return !strings.Contains(got, "inet 10.5.44.0") && strings.Contains(got, "10.5.2.0/24 via 10.5.2.0")
	})
}

// Several addresses of a device that are removed at once: each removal takes note of the other objects on the device.
func TestSeveralAddressesChange(t *testing.T) {
	host(t)
	r := start(t)
	addrs := func(third string) []Object {
		return append(node(), Addr{"flannel.1", prefix("10.5." + third + ".1/32")}, Addr{"flannel.1", prefix("10.5." + third + ".2/32")})
	}
	for _, third := range []string{"50", "60"} {
		r.Set("node", addrs(third))
		settle(t, r, "the addresses of "+third, func() bool {
			got := nstest.Run(t, "ip addr show dev flannel.1")
			return strings.Contains(got, "10.5."+third+".1/32") && strings.Contains(got, "10.5."+third+".2/32") && !r.pending()
		})
	}
	got := nstest.Run(t, "ip addr show dev flannel.1") + nstest.Run(t, "ip route show dev flannel.1")
	if strings.Contains(got, "10.5.50.") || !strings.Contains(got, "10.5.2.0/24 via 10.5.2.0") {
		t.Errorf("got\n%s", got)
	}
}

// A process without privileges can read what there is, whichever tables of the kernel it may listen to.
func TestWithoutPrivileges(t *testing.T) {
	const child = "KERNEL_TEST_WITHOUT_PRIVILEGES"
	if os.Getenv(child) != "" {
		r, err := New(klog.Background())
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		if _, err := r.Diff(); err != nil {
			t.Error(err)
		}
		return
	}
	nstest.NeedRoot(t)
	program := filepath.Join("/tmp", fmt.Sprintf("kernel-test-%d", os.Getpid()))
	text, err := os.ReadFile("/proc/self/exe")
	if err == nil {
		err = os.WriteFile(program, text, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(program)
	cmd := exec.Command(program, "-test.run=^TestWithoutPrivileges$")
	cmd.Dir, cmd.Env = "/", append(os.Environ(), child+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// An IPv4 uplink that goes down takes its routes along without a word, and no
// address goes or comes. News of the link is all there is.
func TestUplinkFlaps(t *testing.T) {
	quietHost(t)
	r := idler(t)
	r.Set("direct", peerDirect()[:1])
	apply(t, r)
	before := tables(t)
	r.backoff.First, r.backoff.Most = time.Hour, time.Hour // it is the notifications that lead to repairs
	nstest.Run(t, "ip link set eth0 down")
	settle(t, r, "it is noticed, and cannot be repaired yet", r.waiting)
	nstest.Run(t, "ip link set eth0 up")
	settle(t, r, before, func() bool { return tables(t) == before })
}

// Notifications that do not fit into the socket, because nobody reconciles, end in a comparison. Nothing reads them
// meanwhile.
func TestLostNotifications(t *testing.T) {
	host(t)
	r := start(t)
	nstest.Overflow(t, r.listeners[0], "eth0")
	nstest.Run(t, "ip route del 10.5.2.0/24") // this notification is among the lost ones
	apply(t, r)
	if got := nstest.Run(t, "ip route show 10.5.2.0/24"); got == "" {
		t.Error("the route is still gone")
	}
}

// TestChangeDuringRead changes the devices while they are read, of which there are
// too many for one datagram: the kernel says so (NLM_F_DUMP_INTR).
func TestChangeDuringRead(t *testing.T) {
	host(t)
	for i := range 60 {
		nstest.Run(t, fmt.Sprintf("ip link add v%d type veth peer name w%d", i, i))
	}
	r := start(t)
	changed := false
	r.Devices = func(string) bool { // is asked about each device as it is read
		if !changed {
			changed = true
			nstest.Run(t, "ip link add late type veth peer name later")
		}
		return false
	}
	r.Compare()
	apply(t, r) // is no failure
	if !changed || !r.pending() {
		t.Errorf("changed %v, pending %v", changed, r.pending())
	}
	apply(t, r)
	if r.pending() {
		t.Error("is not content with a read that nothing came between")
	}
}

// vxlanPeer is one of many.
func vxlanPeer(i int) []Object {
	a := netip.AddrFrom4([4]byte{10, 6 + byte(i>>8), byte(i), 0})
	m := MAC{0x0e, 1, 0, 0, byte(i >> 8), byte(i)}
	return []Object{
		Neighbor{Dev: "flannel.1", IP: a, MAC: m},
		FDBEntry{Dev: "flannel.1", MAC: m, Dst: netip.AddrFrom4([4]byte{198, 19, byte(i >> 8), byte(i)})},
		Route{Dst: netip.PrefixFrom(a, 24), Via: a, Dev: "flannel.1", Onlink: true},
	}
}

func TestManyPeers(t *testing.T) {
	host(t)
	r := idler(t)
	r.Set("node", node())
	const n = 2000 // more than one batch
	for i := range n {
		r.Set(fmt.Sprint(i), vxlanPeer(i))
	}
	apply(t, r)
	if err := r.compare(); err != nil || len(r.dirty) != 0 {
		t.Errorf("after %d peers: %v, %d differ", n, err, len(r.dirty))
	}
	routes := strings.Count(nstest.Run(t, "ip route show dev flannel.1"), "\n") + 1
	if routes != n {
		t.Errorf("%d routes, want %d", routes, n)
	}
}

// The kernel replaces no route that hides ours, and in IPv6 none that is the
// way to our gateway.
func TestEvict(t *testing.T) {
	host(t)
	r := start(t)
	nstest.Run(t, "ip route prepend 10.5.3.0/24 via 198.18.0.66 dev eth0")
	settle(t, r, "our route alone", func() bool {
		got := nstest.Run(t, "ip route show 10.5.3.0/24")
		return !strings.Contains(got, "198.18.0.66") && strings.Contains(got, "198.18.0.3")
	})
}

// Networks on one host leave each other's objects alone, also after a restart.
func TestNetworks(t *testing.T) {
	host(t)
	start := func(name, network string, objects []Object) *Reconciler {
		r := idler(t)
		r.Network, r.within = name, []netip.Prefix{prefix(network)}
		r.Set("node", objects)
		apply(t, r)
		return r
	}
	red := append(node()[:2], peer(mac2)[:3]...)
	red = append(red, peerDirect()[0], node()[4])
	blue := []Object{
		Link{Name: "flannel.2", MAC: mac2, MTU: 1450,
			Type: VXLAN{VNI: 2, Port: 8472, Local: addr("198.18.0.1"), Dev: "eth0"}},
		Route{Dst: prefix("10.6.2.0/24"), Via: addr("10.6.2.0"), Dev: "flannel.2", Onlink: true},
		Route{Dst: prefix("10.6.3.0/24"), Via: addr("198.18.0.3"), Dev: "eth0"},
		Route{Dst: prefix("10.6.1.0/24"), Blackhole: true, Metric: 4096},
	}
	first := start("", "10.5.0.0/16", red)
	alone := tables(t)
	second := start("blue", "10.6.0.0/16", blue)
	both := tables(t)
	for _, r := range []*Reconciler{first, second, start("", "10.5.0.0/16", red), start("blue", "10.6.0.0/16", blue)} {
		if differences, err := r.Diff(); err != nil || len(differences) > 0 {
			t.Errorf("the network %q calls for %q, %v", r.Network, differences, err)
		}
		r.Compare()
		apply(t, r)
	}
	if now := tables(t); now != both {
		t.Errorf("want\n%s\ngot\n%s", both, now)
	}
	start("blue", "10.6.0.0/16", nil) // what is left is removed
	if now := tables(t); now != alone {
		t.Errorf("want\n%s\ngot\n%s", alone, now)
	}
}
