package network

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/nstest"
	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/subnet/subnettest"

	_ "github.com/flanneld/flanneld/backend/all"
)

// Run works in goroutines of many threads, so that all of the test's process
// has to live in a network namespace of its own, and in a mount namespace.
func TestMain(m *testing.M) { nstest.Main(m) }

// manager is a subnet.Manager that the test plays. A nil error means that it
// waits.
type manager struct {
	*subnettest.Manager // for what the tests of this package do not play
	config              string
	previous            subnet.Attrs
	wants               chan subnet.Lease // what Acquire was asked for
	grants              chan subnet.Lease // what it answers
	lost                chan struct{}
	updates             chan subnet.Update
	configs             chan *subnet.Config
	expires             time.Time
	waiting             atomic.Pointer[string] // nil: a lease waits for nothing
}

func newManager(config string) *manager {
	return &manager{
		Manager: subnettest.NewManager(&subnettest.Store{}, "n1"),
		config:  config, wants: make(chan subnet.Lease, 10), grants: make(chan subnet.Lease, 10),
		lost: make(chan struct{}), updates: make(chan subnet.Update), configs: make(chan *subnet.Config),
	}
}

func (m *manager) Config(context.Context) (*subnet.Config, error) {
	c, err := subnet.ParseConfig([]byte(m.config))
	if err != nil {
		return nil, err
	}
	return c, c.Divide()
}

func (m *manager) State() subnet.State {
	s := subnet.State{Connected: true, Expires: m.expires}
	if w := m.waiting.Load(); w != nil {
		s.Waiting = *w
	}
	return s
}

func (m *manager) Configs(context.Context) <-chan *subnet.Config { return m.configs }

func (m *manager) Previous(context.Context, subnet.Attrs) (subnet.Attrs, error) {
	return m.previous, nil
}

func (m *manager) Acquire(ctx context.Context, _ *subnet.Config, want subnet.Lease) (subnet.Lease, error) {
	m.wants <- want
	select {
	case l := <-m.grants:
		l.Attrs = want.Attrs
		return l, nil
	case <-ctx.Done():
		return subnet.Lease{}, ctx.Err()
	}
}

func (m *manager) Keep(ctx context.Context, _ subnet.Lease) error {
	select {
	case <-m.lost:
		return subnet.ErrLost
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (m *manager) Watch(ctx context.Context) <-chan subnet.Update { return m.updates }

func lease(key, value string) subnet.Lease {
	s, err := subnet.ParseKey(key)
	if err != nil {
		panic(err)
	}
	l := subnet.Lease{Subnets: s}
	if value != "" {
		if err := l.Attrs.UnmarshalJSON([]byte(value)); err != nil {
			panic(err)
		}
	}
	return l
}

func snapshot(leases ...subnet.Lease) subnet.Update {
	u := subnet.Update{Snapshot: true}
	for _, l := range leases {
		u.Put(&l)
	}
	return u
}

var peer2 = lease("10.5.2.0-24", `{"PublicIP":"198.18.0.2","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:00:00:00:00:02"}}`)

const vxlanConfig = `{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}`

// flanneld is one that runs in the test's namespace.
type flanneld struct {
	*manager
	file string
	done chan error
	stop func()
}

const healthPort = 8471

// begin makes a host with an uplink and starts the main loop.
func begin(t *testing.T, m *manager, change func(*Options)) *flanneld {
	t.Helper()
	return beginIn(t.Context(), t, m, change)
}

// beginIn is begin with the logger of a context.
func beginIn(ctx context.Context, t *testing.T, m *manager, change func(*Options)) *flanneld {
	t.Helper()
	nstest.NeedRoot(t)
	nstest.Need(t, "ip", "iptables", "nft")
	nstest.Run(t, "ip link set lo up")
	nstest.Run(t, "ip link add eth0 type veth peer name far")
	nstest.Run(t, "ip link set far up")
	nstest.Run(t, "ip link set eth0 up")
	nstest.Run(t, "ip addr add 198.18.0.1/24 dev eth0")
	d := &flanneld{manager: m, file: filepath.Join(t.TempDir(), "run", "subnet.env"), done: make(chan error, 1)}
	metrics, handler := prometheus.NewRegistry(), http.NewServeMux()
	handler.Handle("GET /metrics", MetricsHandler(metrics))
	o := Options{
		Manager: m, Uplink: iface.Selector{Criteria: iface.Criteria{Names: []string{"eth0"}}}, SubnetFile: d.file, Metrics: metrics, Handler: handler,
		IPMasq: family.Pair[bool]{IPv4: true, IPv6: true}, Forward: true, RulesResync: 100 * time.Millisecond, KernelResync: time.Minute,
		Health: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), healthPort),
	}
	if change != nil {
		change(&o)
	}
	ctx, cancel := context.WithCancel(ctx)
	d.stop = func() {
		cancel()
		if err := <-d.done; err != nil {
			t.Errorf("Run returned %v", err)
		}
	}
	go func() { d.done <- Run(ctx, o) }()
	t.Cleanup(func() {
		cancel()
		<-d.done
		for _, line := range []string{"ip link del eth0", "ip link del flannel.1", "ip route flush proto 70",
			"nft flush ruleset", "iptables-legacy -t nat -F", "iptables-legacy -t nat -X"} {
			nstest.Try(line)
		}
	})
	return d
}

// eventually waits for a condition, which some event is to bring about.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !condition(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

func get(path string) (int, string) { return getAt(healthPort, path) }

func getAt(port uint16, path string) (int, string) {
	r, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d%s", port, path))
	if err != nil {
		return 0, err.Error()
	}
	defer r.Body.Close()
	text, _ := io.ReadAll(r.Body)
	return r.StatusCode, strings.TrimSpace(string(text))
}

func ready() bool { code, _ := get("/readyz"); return code == http.StatusOK }

func route(dst string) string {
	out, _ := nstest.Try("ip route show " + dst)
	return strings.TrimSpace(out)
}

func TestFromStartToReady(t *testing.T) {
	m := newManager(vxlanConfig)
	m.previous.BackendData = []byte(`{"VNI":1,"VtepMAC":"0e:00:00:00:00:01"}`)
	d := begin(t, m, func(o *Options) { o.Blackhole = true })
	want := <-m.wants
	if got := string(want.Attrs.BackendData); want.Attrs.PublicIP.String() != "198.18.0.1" ||
		got != `{"VNI":1,"VtepMAC":"0e:00:00:00:00:01"}` {
		t.Errorf("a lease is wanted for %s with %s: the VTEP should stay", want.Attrs.PublicIP, got)
	}
	eventually(t, "readyz waits for a lease", func() bool {
		code, text := get("/readyz")
		return code == http.StatusServiceUnavailable && text == "waiting for a lease"
	})
	if code, _ := get("/healthz"); code != http.StatusOK {
		t.Errorf("healthz: %d", code)
	}
	// A route from before a restart must outlive the time in which its peer is
	// not known yet.
	nstest.Run(t, "ip route add 10.5.2.0/24 via 198.18.0.9 dev eth0 proto 70")
	nstest.Run(t, "ip route add 10.5.9.0/24 via 198.18.0.9 dev eth0 proto 70")
	m.grants <- lease("10.5.1.0-24", "")
	eventually(t, "readyz waits for the leases of the other nodes", func() bool {
		_, text := get("/readyz")
		return strings.HasPrefix(text, "waiting for the leases")
	})
	if route("10.5.9.0/24") == "" {
		t.Error("routes are removed before the peers are known")
	}
	m.updates <- snapshot(peer2)
	eventually(t, "ready", ready)
	if got := route("10.5.2.0/24"); got != "10.5.2.0/24 via 10.5.2.0 dev flannel.1 proto 70 onlink" {
		t.Errorf("the peer's route is %q", got)
	}
	if got := route("10.5.9.0/24"); got != "" {
		t.Errorf("of a peer that is gone there is %q", got)
	}
	if got := route("10.5.1.0/24"); !strings.HasPrefix(got, "blackhole") {
		t.Errorf("our own subnet's route is %q", got)
	}
	text, err := os.ReadFile(d.file)
	if err != nil || string(text) != "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n" {
		t.Errorf("subnet file: %v %q", err, text)
	}
	if got, _ := nstest.Try("iptables -t nat -S POSTROUTING"); !strings.Contains(got, "FLANNEL-POSTRTG") {
		t.Errorf("nat rules: %s", got)
	}
	before, _ := nstest.Try("ip route")
	d.stop()
	d.done <- nil
	if after, _ := nstest.Try("ip route"); after != before {
		t.Errorf("stopping changed\n%s\nto\n%s", before, after)
	}
}

// TestLeaseThatIsLost: a node whose lease went to another node, and that waits for another one, is not ready: probes,
// flannelctl, metrics and Options.Waiting say so, and what it waits for.
func TestLeaseThatIsLost(t *testing.T) {
	waits := make(chan string, 100)
	m := newManager(vxlanConfig)
	socket := filepath.Join(t.TempDir(), "flanneld.sock")
	begin(t, m, func(o *Options) {
		o.StatusSocket, o.KernelResync = socket, 100*time.Millisecond
		o.Waiting = func(what string) { waits <- what }
	})
	m.grants <- lease("10.5.1.0-24", "")
	m.updates <- snapshot(peer2)
	eventually(t, "ready", ready)
	waitsFor := func(want string) {
		t.Helper()
		for nextWait(t, waits) != want {
		}
	}
	status := func() Status {
		t.Helper()
		s, err := NewClient(socket).Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	if s := status(); !s.Ready || s.Lease == nil {
		t.Errorf("with a lease: %+v", s)
	}

	what := "the public address 198.18.0.1"
	m.waiting.Store(&what)
	m.lost <- struct{}{}
	waitsFor("a lease: " + what)
	if code, text := get("/readyz"); code != http.StatusServiceUnavailable || text != "waiting for a lease: "+what {
		t.Errorf("readyz: %d %s", code, text)
	}
	if s := status(); s.Ready || s.Waiting != "a lease: "+what || s.Lease != nil {
		t.Errorf("without a lease: %+v", s)
	}
	waitMetrics(t, map[string]float64{"flannel_ready": 0})

	m.waiting.Store(nil)
	m.grants <- lease("10.5.1.0-24", "")
	waitsFor("")
	eventually(t, "ready again", ready)
	waitMetrics(t, map[string]float64{"flannel_ready": 1})
	if s := status(); !s.Ready || s.Lease == nil {
		t.Errorf("with a lease again: %+v", s)
	}
}

// nextWait returns what Options.Waiting was called with next.
func nextWait(t *testing.T, waits <-chan string) string {
	t.Helper()
	select {
	case what := <-waits:
		return what
	case <-time.After(20 * time.Second):
		t.Fatal("within 20 s, Waiting was not called again")
		return ""
	}
}

// TestWaiting: the caller of Run learns what the node waits for, each thing once, and when the node is ready.
func TestWaiting(t *testing.T) {
	waits := make(chan string, 100)
	m := newManager(vxlanConfig)
	begin(t, m, func(o *Options) { o.Waiting = func(what string) { waits <- what } })
	var got []string
	until := func(want string) {
		t.Helper()
		for len(got) == 0 || got[len(got)-1] != want {
			got = append(got, nextWait(t, waits))
		}
	}
	until("a lease")
	m.grants <- lease("10.5.1.0-24", "")
	m.updates <- snapshot(peer2)
	until("")
	if slices.Contains(got[:len(got)-1], "") || len(slices.Compact(slices.Clone(got))) != len(got) {
		t.Errorf("Waiting was called with %q", got)
	}
}

// The blackhole is the last choice: the bridge that holds the pods comes first.
func TestBlackholeLeavesPodsAlone(t *testing.T) {
	m := newManager(vxlanConfig)
	begin(t, m, func(o *Options) { o.Blackhole = true })
	m.grants <- lease("10.5.1.0-24", "")
	m.updates <- snapshot()
	eventually(t, "ready", ready)
	nstest.Run(t, "ip link add cni0 type bridge")
	defer nstest.Try("ip link del cni0")
	nstest.Run(t, "ip link set cni0 up")
	nstest.Run(t, "ip addr add 10.5.1.1/24 dev cni0")
	if got, err := nstest.Try("ip route get 10.5.1.7"); err != nil || !strings.Contains(got, "dev cni0") {
		t.Errorf("a pod is reached by: %s", got)
	}
	nstest.Run(t, "ip link del cni0")
	if got, err := nstest.Try("ip route get 10.5.1.7"); err == nil {
		t.Errorf("without the bridge, there is still a route: %s", got)
	}
}

// A subnet that changes while the daemon does not run is announced with the pods that it cuts off, until they are gone.
func TestSubnetThatChangedOverARestart(t *testing.T) {
	nstest.NeedRoot(t)
	nstest.Need(t, "ip")
	m := &eventManager{manager: newManager(vxlanConfig), events: make(chan string, 10)}
	for _, line := range []string{
		"ip link add cni0 type bridge", "ip addr add 10.5.1.1/24 dev cni0",
		"ip link add pod1 type veth peer name far1", "ip link set pod1 master cni0",
		"ip link add pod2 type veth peer name far2", "ip link set pod2 master cni0",
	} {
		nstest.Run(t, line)
	}
	for _, link := range []string{"cni0", "pod1", "pod2"} {
		defer nstest.Try("ip link del " + link)
	}
	begin(t, m.manager, func(o *Options) {
		o.Manager, o.KernelResync = m, 50*time.Millisecond
		env := subnet.Env{Networks: subnet.NetworksOf(netip.MustParsePrefix("10.5.0.0/16")), Subnets: lease("10.5.1.0-24", "").Subnets, MTU: 1450}
		if err := env.WriteFile(o.SubnetFile); err != nil {
			t.Fatal(err)
		}
	})
	m.grants <- lease("10.5.7.0-24", "")
	m.updates <- snapshot()
	const want = "subnet SubnetChanged This node's subnet changed from 10.5.1.0/24 to 10.5.7.0/24, " +
		"which cuts off up to 2 pods: restart the pods"
	if got := m.next(t); !strings.HasPrefix(got, want) {
		t.Errorf("got the event %q, want %s", got, want)
	}
	nstest.Run(t, "ip link del pod1")
	nstest.Run(t, "ip link del pod2")
	if got := m.next(t); got != "subnet  " {
		t.Errorf("without pods, got the event %q", got)
	}
}

// An eventManager is a manager whose store has a place for events.
type eventManager struct {
	*manager
	events chan string // the subject, reason and message of each about the subnet, reachability or retired networks
}

func (m *eventManager) next(t *testing.T) string {
	t.Helper()
	select {
	case event := <-m.events:
		return event
	case <-time.After(20 * time.Second):
		t.Fatal("no event within 20 s")
		return ""
	}
}

func (m *eventManager) RecordEvent(subject, reason, message string) {
	if subject == "subnet" || subject == "reachability" || subject == "retired" {
		m.events <- subject + " " + reason + " " + message
	}
}

func TestLostLease(t *testing.T) {
	m := newManager(vxlanConfig)
	d := begin(t, m, nil)
	m.grants <- lease("10.5.1.0-24", "")
	<-m.wants
	m.updates <- snapshot(peer2)
	eventually(t, "ready", ready)
	m.lost <- struct{}{}
	if again := <-m.wants; again.Subnets.Key() != "10.5.1.0-24" {
		t.Errorf("the next lease is wanted of %s: the old subnet might be free again", again.Subnets)
	}
	if route("10.5.2.0/24") == "" {
		t.Error("the data path went with the lease")
	}
	m.grants <- lease("10.5.7.0-24", "")
	taken := lease("10.5.1.0-24", `{"PublicIP":"198.18.0.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:00:00:00:00:03"}}`)
	var u subnet.Update
	u.Put(&taken)
	m.updates <- u
	eventually(t, "the device has the new address, the file the new subnet, and the peer who took the old one its route",
		func() bool {
			out, _ := nstest.Try("ip addr show flannel.1")
			env, _ := subnet.ReadEnv(d.file)
			return strings.Contains(out, "10.5.7.0/32") && !strings.Contains(out, "10.5.1.0/32") &&
				env.Subnets.Key() == "10.5.7.0-24" &&
				route("10.5.1.0/24") != "" && route("10.5.2.0/24") != ""
		})
	eventually(t, "the rules are of the new subnet", func() bool {
		out, _ := nstest.Try("iptables -t nat -S FLANNEL-POSTRTG")
		return strings.Contains(out, "-s 10.5.7.0/24") && !strings.Contains(out, "10.5.1.0/24")
	})
}

// A DHCP server has given the uplink another address.
func TestUplinkMoves(t *testing.T) {
	m := newManager(vxlanConfig)
	begin(t, m, nil)
	m.grants <- lease("10.5.1.0-24", "")
	first := <-m.wants
	m.updates <- snapshot(peer2)
	eventually(t, "ready", ready)
	nstest.Run(t, "ip addr add 198.18.9.77/24 dev eth0")
	nstest.Run(t, "ip addr del 198.18.0.1/24 dev eth0")
	for {
		want := <-m.wants
		if want.Subnets.Key() != "10.5.1.0-24" || string(want.Attrs.BackendData) != string(first.Attrs.BackendData) {
			t.Errorf("moving, the node wants %s with %s", want.Subnets, want.Attrs.BackendData)
		}
		if want.Attrs.PublicIP.String() == "198.18.9.77" {
			break
		}
	}
	m.grants <- lease("10.5.1.0-24", "")
	eventually(t, "the device sends from the new address, and the peer's route is back", func() bool {
		out, _ := nstest.Try("ip -d link show flannel.1")
		return strings.Contains(out, "local 198.18.9.77") && route("10.5.2.0/24") != ""
	})
}

func TestWaitsForUplink(t *testing.T) {
	m := newManager(vxlanConfig)
	begin(t, m, func(o *Options) { o.Uplink.Names = []string{"late0"} })
	eventually(t, "readyz says what there is", func() bool {
		_, text := get("/readyz")
		return strings.Contains(text, "late0") && strings.Contains(text, "eth0 (198.18.0.1/24)")
	})
	nstest.Run(t, "ip link add late0 type veth peer name early0")
	defer nstest.Try("ip link del late0")
	nstest.Run(t, "ip link set early0 up")
	nstest.Run(t, "ip link set late0 up")
	nstest.Run(t, "ip addr add 198.18.7.1/24 dev late0")
	if want := <-m.wants; want.Attrs.PublicIP.String() != "198.18.7.1" {
		t.Errorf("address %s", want.Attrs.PublicIP)
	}
}

func TestWhatCannotWork(t *testing.T) {
	for _, c := range []struct{ config, want string }{
		{`{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "VNI": -1}}`,
			"Backend vxlan: VNI -1 is not allowed: 0 to 16777215"},
		{`{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlam"}}`, `Backend Type "vxlam" is not known: known are `},
		{`{"Network": "10.5.0.0/33", "Backend": {"Type": "vxlan"}}`,
			`Network "10.5.0.0/33" is not an IPv4 network such as 10.5.0.0/16`},
	} {
		d := begin(t, newManager(c.config), nil)
		err := <-d.done
		d.done <- nil
		if err == nil || !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %s", c.config, err, c.want)
		}
		nstest.Run(t, "ip link del eth0")
	}
}

// ended is a context that has ended before any that is made from it.
type ended struct{ context.Context }

func (ended) Err() error { return context.Canceled }

// A manager that hears of the end first has failed for that alone.
func TestEndIsNoError(t *testing.T) {
	m := &hasty{newManager(vxlanConfig)}
	if err := Run(ended{context.WithoutCancel(t.Context())},
		Options{Manager: m, SubnetFile: filepath.Join(t.TempDir(), "subnet.env")}); err != nil {
		t.Error(err)
	}
}

// hasty is a manager that has been told to end.
type hasty struct{ *manager }

func (*hasty) Config(context.Context) (*subnet.Config, error) { return nil, context.Canceled }

// The file is written again when somebody loses it, and rules when somebody
// flushes them.
func TestRulesAreKept(t *testing.T) {
	for _, nftables := range []bool{false, true} {
		t.Run(fmt.Sprintf("nftables=%t", nftables), func(t *testing.T) {
			m := newManager(fmt.Sprintf(`{"Network": "10.5.0.0/16", "EnableNFTables": %t, "Backend": {"Type": "host-gw"}}`,
				nftables))
			begin(t, m, nil)
			m.grants <- lease("10.5.1.0-24", "")
			m.updates <- snapshot()
			eventually(t, "ready", ready)
			show, flush := "iptables -t nat -S FLANNEL-POSTRTG", "iptables -t nat -F"
			if nftables {
				show, flush = "nft list table ip flannel-ipv4", "nft flush ruleset"
			}
			there := func() bool { out, _ := nstest.Try(show); return strings.Contains(strings.ToLower(out), "masquerade") }
			if !there() {
				t.Fatal("ready without rules")
			}
			nstest.Run(t, flush)
			eventually(t, "the rules are back after "+flush, there)
		})
	}
}
