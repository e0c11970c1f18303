// Package cni tests the CNI plugin as it is built, with the real bridge and
// host-local plugins as delegates, the way a container runtime executes it.
package cni

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/flanneld/flanneld/pkg/nstest"
	"github.com/flanneld/flanneld/subnet"
)

var (
	ipv4 = subnet.Subnets{IPv4: netip.MustParsePrefix("10.244.3.0/24")}
	ipv6 = subnet.Subnets{IPv6: netip.MustParsePrefix("fd00:244:0:3::/64")}
	dual = subnet.Subnets{IPv4: ipv4.IPv4, IPv6: ipv6.IPv6}

	// networks of the whole cluster, of which the above are the node's part
	networks = subnet.Subnets{IPv4: netip.MustParsePrefix("10.244.0.0/16"), IPv6: netip.MustParsePrefix("fd00:244::/48")}
)

const mtu = 1430

// A node is the network namespace that the test is in, with the files of one
// flannel network and the runtime's.
type node struct {
	testing.TB
	dir string // where all files are
	cni *libcni.CNIConfig
}

func newNode(t testing.TB, subnets subnet.Subnets) *node {
	t.Helper()
	build, err := filepath.Abs("../../build")
	if err != nil {
		t.Fatal(err)
	}
	for _, program := range []string{"bin/flannel", "cni/bridge", "cni/host-local"} {
		if _, err := os.Stat(filepath.Join(build, program)); err != nil {
			nstest.Missing(t, "%v: run make build tools", err)
		}
	}
	nstest.Need(t, "ip", "ping")
	nstest.New(t)
	n := &node{TB: t, dir: t.TempDir()}
	n.cni = libcni.NewCNIConfigWithCacheDir([]string{filepath.Join(build, "bin"), filepath.Join(build, "cni")},
		n.path("cache"), nil)
	n.lease(subnets, true)
	return n
}

func (n *node) path(name string) string { return filepath.Join(n.dir, name) }

// lease writes subnet.env.
func (n *node) lease(s subnet.Subnets, ipMasq bool) {
	n.Helper()
	e := subnet.Env{Networks: subnet.NetworksOf(networks.Each()...), Subnets: s, MTU: mtu, IPMasq: ipMasq}
	if err := e.WriteFile(n.path("subnet.env")); err != nil {
		n.Fatal(err)
	}
}

// network returns a configuration as in /etc/cni/net.d, with more keys as JSON.
func (n *node) network(version, name string, more ...string) *libcni.NetworkConfigList {
	n.Helper()
	conf := append([]string{
		`"type": "flannel"`,
		fmt.Sprintf(`"subnetFile": %q`, n.path("subnet.env")),
		fmt.Sprintf(`"dataDir": %q`, n.path("records")),
		fmt.Sprintf(`"ipam": {"dataDir": %q}`, n.path("addresses")),
	}, more...)
	list, err := libcni.NetworkConfFromBytes(fmt.Appendf(nil, `{"cniVersion": %q, "name": %q, "plugins": [{%s}]}`,
		version, name, strings.Join(conf, ", ")))
	if err != nil {
		n.Fatal(err)
	}
	return list
}

// files returns the names of the files in a directory, apart from host-local's
// own: the containers in records, the addresses taken in addresses/NETWORK.
func (n *node) files(dir string) []string {
	files, err := os.ReadDir(n.path(dir))
	if err != nil && !os.IsNotExist(err) {
		n.Error(err)
	}
	var names []string
	for _, f := range files {
		if f.Name() != "lock" && !strings.HasPrefix(f.Name(), "last_reserved_ip") {
			names = append(names, f.Name())
		}
	}
	return names
}

func (n *node) wantFiles(dir string, want ...string) {
	n.Helper()
	if got := n.files(dir); !slices.Equal(got, want) {
		n.Errorf("%s has %q, want %q", dir, got, want)
	}
}

var pods atomic.Int32 // that this process made

// A pod is a network namespace with a name, as runtimes make them.
type pod struct {
	*node
	name string
}

func (n *node) pod() *pod {
	n.Helper()
	p := &pod{n, fmt.Sprintf("flcni%d-%d", os.Getpid(), pods.Add(1))}
	nstest.Run(n, "ip netns add "+p.name)
	n.Cleanup(p.stop)
	return p
}

// stop takes the namespace away, if it is there.
func (p *pod) stop() {
	if _, err := os.Stat(p.path()); err == nil {
		nstest.Run(p, "ip netns del "+p.name)
	}
}

func (p *pod) path() string { return "/run/netns/" + p.name }

// run runs a command in the pod.
func (p *pod) run(line string) string {
	p.Helper()
	return nstest.Run(p, "ip netns exec "+p.name+" "+line)
}

func (p *pod) runtime(ifName string) *libcni.RuntimeConf {
	return &libcni.RuntimeConf{ContainerID: p.name, NetNS: p.path(), IfName: ifName}
}

// add attaches the pod and returns its addresses.
func (p *pod) add(list *libcni.NetworkConfigList, rt *libcni.RuntimeConf) []netip.Prefix {
	p.Helper()
	added, err := p.cni.AddNetworkList(p.Context(), list, rt)
	if err != nil {
		p.Fatalf("ADD: %v", err)
	}
	if added.Version() != list.CNIVersion {
		p.Errorf("ADD answers in version %s, want %s", added.Version(), list.CNIVersion)
	}
	result, err := types100.NewResultFromResult(added)
	if err != nil {
		p.Fatalf("ADD: %v", err)
	}
	var addrs []netip.Prefix
	for _, ip := range result.IPs {
		addrs = append(addrs, netip.MustParsePrefix(ip.Address.String()))
	}
	return addrs
}

func (p *pod) del(list *libcni.NetworkConfigList, rt *libcni.RuntimeConf) {
	p.Helper()
	if err := p.cni.DelNetworkList(p.Context(), list, rt); err != nil {
		p.Errorf("DEL: %v", err)
	}
}

// has fails the test unless the pod has the addresses, reaches the node with
// each, and has a route to the whole network.
func (p *pod) has(ifName string, subnets subnet.Subnets, addrs []netip.Prefix) {
	p.Helper()
	if len(addrs) != len(subnets.Each()) {
		p.Fatalf("addresses %v, want one of each of %s", addrs, subnets)
	}
	device := p.run("ip -oneline addr show dev " + ifName)
	for i, s := range subnets.Each() {
		if !s.Contains(addrs[i].Addr()) || addrs[i].Bits() != s.Bits() {
			p.Errorf("address %s is not of %s", addrs[i], s)
		}
		if !strings.Contains(device, " "+addrs[i].String()+" ") {
			p.Errorf("%s has no %s:\n%s", ifName, addrs[i], device)
		}
		gateway, network := s.Addr().Next(), networks.IPv4
		family := "-4"
		if s.Addr().Is6() {
			network, family = networks.IPv6, "-6"
		}
		p.run(fmt.Sprintf("ping -n -c 1 -w 20 -I %s %s", addrs[i].Addr(), gateway))
		if routes := p.run("ip " + family + " route"); !strings.Contains(routes,
			network.String()+" via "+gateway.String()+" dev "+ifName) {
			p.Errorf("no route to %s:\n%s", network, routes)
		}
	}
	if link := p.run("ip link show dev " + ifName); !strings.Contains(link, fmt.Sprintf(" mtu %d ", mtu)) {
		p.Errorf("want MTU %d:\n%s", mtu, link)
	}
}

// TestLife: from ADD to the second DEL, in each version of the protocol that a
// runtime of these years speaks, and for each set of families.
func TestLife(t *testing.T) {
	for _, version := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		for _, f := range []struct {
			name    string
			subnets subnet.Subnets
		}{{"IPv4", ipv4}, {"dual stack", dual}, {"IPv6", ipv6}} {
			t.Run(version+"/"+f.name, func(t *testing.T) {
				n := newNode(t, f.subnets)
				ctx := t.Context()
				list := n.network(version, "cbr0")
				status := func() error { return n.cni.GetStatusNetworkList(ctx, list) }
				if err := status(); err != nil {
					t.Errorf("STATUS: %v", err)
				}
				p, other := n.pod(), n.pod()
				eth0 := p.runtime("eth0")
				addrs := p.add(list, eth0)
				p.has("eth0", f.subnets, addrs)
				others := other.add(list, other.runtime("eth0"))
				other.has("eth0", f.subnets, others)

				if version != "0.3.1" { // which has no CHECK
					if err := n.cni.CheckNetworkList(ctx, list, eth0); err != nil {
						t.Errorf("CHECK: %v", err)
					}
					lost := addrs[len(addrs)-1]
					p.run("ip addr del " + lost.String() + " dev eth0")
					if err := n.cni.CheckNetworkList(ctx, list, eth0); err == nil || !strings.Contains(err.Error(),
						lost.Addr().String()) {
						t.Errorf("CHECK without %s: %v", lost, err)
					}
				}

				// The daemon has not come up yet after a reboot.
				if err := os.Remove(n.path("subnet.env")); err != nil {
					t.Fatal(err)
				}
				if err := status(); version == "1.1.0" && (err == nil || !strings.Contains(err.Error(),
					"flanneld is not ready on this node")) {
					t.Errorf("STATUS without subnet.env: %v", err)
				}
				p.del(list, eth0)
				if links := p.run("ip -oneline link"); strings.Contains(links, "eth0") {
					t.Errorf("eth0 is still there:\n%s", links)
				}
				var left []string
				for _, a := range others {
					left = append(left, a.Addr().String())
				}
				n.wantFiles("addresses/cbr0", left...)
				n.wantFiles("records", other.name)
				p.del(list, eth0)

				// The other pod's namespace goes before its DEL.
				other.stop()
				other.del(list, other.runtime("eth0"))
				n.wantFiles("addresses/cbr0")
				n.wantFiles("records")
				other.del(list, other.runtime("eth0"))
			})
		}
	}
}

// TestEarlierSubnet: the bridge has the addresses of another subnet than subnet.env names. Without pods, the bridge gets
// the new addresses; with pods, the error says what to do, and doing it lets new pods start.
func TestEarlierSubnet(t *testing.T) {
	n := newNode(t, dual)
	list := n.network("1.0.0", "cbr0")
	old := n.pod()
	old.add(list, old.runtime("eth0"))
	old.del(list, old.runtime("eth0"))

	next := subnet.Subnets{IPv4: netip.MustParsePrefix("10.244.4.0/24"), IPv6: netip.MustParsePrefix("fd00:244:0:4::/64")}
	n.lease(next, true)
	p := n.pod()
	p.has("eth0", next, p.add(list, p.runtime("eth0")))
	if shown := nstest.Run(t, "ip -oneline addr show dev cni0"); strings.Contains(shown, "10.244.3.1/") ||
		strings.Contains(shown, "fd00:244:0:3::1/") {
		t.Errorf("the bridge has addresses of the earlier subnet:\n%s", shown)
	}

	n.lease(dual, true)
	late := n.pod()
	_, err := n.cni.AddNetworkList(t.Context(), list, late.runtime("eth0"))
	if err == nil {
		t.Fatal("with a pod on the bridge, ADD succeeds")
	}
	for _, part := range []string{`"cni0" already has an IP address different from 10.244.3.1/24`, "containers on the bridge: 1",
		"ip address del 10.244.4.1/24 dev cni0 && ", "kubectl get pods"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("ADD: %v: it does not say %s", err, part)
		}
	}
	if !strings.Contains(nstest.Run(t, "ip addr show dev cni0"), "10.244.4.1/24") {
		t.Error("the pod on the bridge has lost its gateway")
	}
	nstest.Run(t, "ip address del 10.244.4.1/24 dev cni0")
	late.has("eth0", dual, late.add(list, late.runtime("eth0")))
}

// TestMasquerade: where flanneld does not, the bridge plugin does.
func TestMasquerade(t *testing.T) {
	nstest.Need(t, "iptables-save")
	n := newNode(t, ipv4)
	n.lease(ipv4, false)
	list := n.network("1.0.0", "cbr0", `"delegate": {"ipMasqBackend": "iptables"}`)
	p := n.pod()
	addr := p.add(list, p.runtime("eth0"))[0].Addr().String()
	if rules := nstest.Run(t, "iptables-save -t nat"); !strings.Contains(rules, "-s "+addr+"/32") {
		t.Errorf("no rule for %s:\n%s", addr, rules)
	}
	p.del(list, p.runtime("eth0"))
	if rules := nstest.Run(t, "iptables-save -t nat"); strings.Contains(rules, addr) {
		t.Errorf("a rule for %s is left:\n%s", addr, rules)
	}
}

// TestCapability: the runtime asks for an address, which host-local gives.
func TestCapability(t *testing.T) {
	n := newNode(t, ipv4)
	list := n.network("1.0.0", "cbr0", `"capabilities": {"ips": true}`)
	p := n.pod()
	rt := p.runtime("eth0")
	rt.CapabilityArgs = map[string]any{"ips": []string{"10.244.3.77/24"}}
	if got := p.add(list, rt); len(got) != 1 || got[0] != netip.MustParsePrefix("10.244.3.77/24") {
		t.Errorf("addresses %v, want the one asked for", got)
	}
	p.del(list, rt)
	n.wantFiles("addresses/cbr0")
}

// TestFailedAdd: what an ADD that fails has taken is given back at once.
func TestFailedAdd(t *testing.T) {
	n := newNode(t, ipv4)
	list := n.network("1.0.0", "cbr0", `"delegate": {"vlan": 5000}`) // 4094 is the highest
	p := n.pod()
	if _, err := n.cni.AddNetworkList(t.Context(), list, p.runtime("eth0")); err == nil ||
		!strings.Contains(err.Error(), "bridge: ") {
		t.Errorf("ADD: %v, want an error of the bridge plugin's", err)
	}
	n.wantFiles("addresses/cbr0")
	n.wantFiles("records")
}

// TestSecondAdd: an ADD too many fails and leaves the pod as it is.
func TestSecondAdd(t *testing.T) {
	n := newNode(t, dual)
	list := n.network("1.0.0", "cbr0")
	p := n.pod()
	addrs := p.add(list, p.runtime("eth0"))
	if _, err := n.cni.AddNetworkList(t.Context(), list, p.runtime("eth0")); err == nil {
		t.Error("the second ADD succeeds")
	}
	p.has("eth0", dual, addrs)
	p.del(list, p.runtime("eth0"))
	n.wantFiles("addresses/cbr0")
	n.wantFiles("records")
}

// TestTwoNetworks: one pod on two networks gives back the addresses of both.
func TestTwoNetworks(t *testing.T) {
	n := newNode(t, ipv4)
	first := n.network("1.0.0", "cbr0")
	second := n.network("1.0.0", "storage", `"delegate": {"bridge": "cni1"}`,
		fmt.Sprintf(`"subnetFile": %q`, n.path("storage.env")))
	e := subnet.Env{Networks: subnet.NetworksOf(netip.MustParsePrefix("10.245.0.0/16")),
		Subnets: subnet.Subnets{IPv4: netip.MustParsePrefix("10.245.3.0/24")}, MTU: mtu}
	if err := e.WriteFile(n.path("storage.env")); err != nil {
		t.Fatal(err)
	}
	p := n.pod()
	p.has("eth0", ipv4, p.add(first, p.runtime("eth0")))
	p.add(second, p.runtime("net1"))
	n.wantFiles("records", p.name, p.name+":net1")
	p.del(first, p.runtime("eth0"))
	n.wantFiles("addresses/cbr0")
	n.wantFiles("addresses/storage", "10.245.3.2")
	p.del(second, p.runtime("net1"))
	n.wantFiles("addresses/storage")
	n.wantFiles("records")
}

// TestSwitchFromUpstream: a pod that upstream's plugin attached is checked and
// deleted by ours.
func TestSwitchFromUpstream(t *testing.T) {
	n := newNode(t, ipv4)
	list := n.network("0.4.0", "cbr0")
	p := n.pod()
	p.add(list, p.runtime("eth0"))
	// Its record is ours without the key that differs between interfaces.
	file := filepath.Join(n.path("records"), p.name)
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var conf map[string]any
	if err := json.Unmarshal(text, &conf); err != nil {
		t.Fatal(err)
	}
	delete(conf, "flannelIfName")
	text, err = json.Marshal(conf)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := n.cni.CheckNetworkList(t.Context(), list, p.runtime("eth0")); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	p.del(list, p.runtime("eth0"))
	n.wantFiles("addresses/cbr0")
	n.wantFiles("records")
}

// TestSwitchToUpstream: what upstream's plugin does on DEL, to give the record
// to the delegate as it is, works with ours.
func TestSwitchToUpstream(t *testing.T) {
	n := newNode(t, dual)
	list := n.network("1.0.0", "cbr0")
	p := n.pod()
	p.add(list, p.runtime("eth0"))
	record, err := os.Open(filepath.Join(n.path("records"), p.name))
	if err != nil {
		t.Fatal(err)
	}
	defer record.Close()
	bridge := exec.Command("../../build/cni/bridge")
	bridge.Stdin = record
	bridge.Env = append(os.Environ(), "CNI_COMMAND=DEL", "CNI_CONTAINERID="+p.name, "CNI_NETNS="+p.path(),
		"CNI_IFNAME=eth0", "CNI_PATH="+strings.Join(n.cni.Path, ":"))
	if out, err := bridge.CombinedOutput(); err != nil {
		t.Fatalf("bridge DEL: %v: %s", err, out)
	}
	if links := p.run("ip -oneline link"); strings.Contains(links, "eth0") {
		t.Errorf("eth0 is still there:\n%s", links)
	}
	n.wantFiles("addresses/cbr0")
}

// TestGC: the runtime has forgotten a pod; its address is taken back.
func TestGC(t *testing.T) {
	n := newNode(t, ipv4)
	list := n.network("1.1.0", "cbr0")
	p, lost := n.pod(), n.pod()
	kept := p.add(list, p.runtime("eth0"))[0].Addr().String()
	lost.add(list, lost.runtime("eth0"))
	lost.stop()
	if err := os.RemoveAll(n.path("cache")); err != nil {
		t.Fatal(err)
	}
	valid := &libcni.GCArgs{ValidAttachments: []types.GCAttachment{{ContainerID: p.name, IfName: "eth0"}}}
	if err := n.cni.GCNetworkList(t.Context(), list, valid); err != nil {
		t.Errorf("GC: %v", err)
	}
	n.wantFiles("addresses/cbr0", kept)
	n.wantFiles("records", p.name)
}
