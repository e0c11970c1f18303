package kube

import (
	"bytes"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/subnet"
)

// logged returns what is logged from now on, each time what is new: a line for
// each line, without its header.
func logged(t *testing.T) func() string {
	var text bytes.Buffer
	flags := flag.NewFlagSet("", flag.PanicOnError)
	klog.InitFlags(flags)
	flags.Parse([]string{"-logtostderr=false", "-stderrthreshold=FATAL", "-one_output=true"})
	klog.SetOutput(&text)
	t.Cleanup(func() {
		klog.SetOutput(nil)
		flags.Parse([]string{"-logtostderr=true"})
	})
	header := regexp.MustCompile(`(?m)^[IWE][^]]*\] `)
	return func() string {
		klog.Flush()
		defer text.Reset()
		lines := strings.Split(strings.TrimSuffix(header.ReplaceAllString(text.String(), ""), "\n"), "\n")
		slices.Sort(lines)
		return strings.Join(lines, "\n")
	}
}

// A cluster is peers, and a reader of their updates.
type cluster struct {
	*testing.T
	*peers
	leases map[subnet.Subnets]*subnet.Lease // as the reader knows them
}

func newCluster(t *testing.T, on subnet.Networks) *cluster {
	return &cluster{T: t, peers: newPeers(testManager(on)), leases: map[subnet.Subnets]*subnet.Lease{}}
}

func (c *cluster) add(nodes ...testNode) {
	c.Helper()
	for _, n := range nodes {
		c.Update(n.object())
	}
}

// tell tells the whole state.
func (c *cluster) tell(nodes ...testNode) { c.Replace(objects(nodes...), "") }

func (c *cluster) drop(name string) { c.Delete(testNode{name: name}.object()) }

// read takes the news, as network does.
func (c *cluster) read() {
	u := taken(c.peers)
	if u.Snapshot {
		clear(c.leases)
	}
	for s := range u.Gone {
		delete(c.leases, s)
	}
	for s, l := range u.Leases {
		c.leases[s] = l
	}
}

// expect compares what the reader knows with lines of subnets and addresses.
func (c *cluster) expect(what string, want ...string) {
	c.Helper()
	c.read()
	var got []string
	for s, l := range c.leases {
		got = append(got, fmt.Sprintf("%s at %s", s, l.Attrs.PublicIPs()[0]))
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		c.Errorf("%s: there are\n%s\nwant\n%s", what, strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// claimant is node i with these podCIDRs and this public address.
func claimant(i int, ip string, cidrs ...string) testNode {
	n := peerNode(i)
	n.cidrs = cidrs
	n.annotations[3] = "flannel.alpha.coreos.com/public-ip=" + ip
	return n
}

var onlyIPv4 = subnet.NetworksOf(netip.MustParsePrefix("10.5.0.0/16"))

// Each conflict is said once, and when it is over.
func TestConflictsAreSaid(t *testing.T) {
	said := logged(t)
	expect := func(what string, want ...string) {
		t.Helper()
		if got := said(); got != strings.Join(want, "\n") {
			t.Errorf("%s: said\n%s\nwant\n%s", what, got, strings.Join(want, "\n"))
		}
	}
	const (
		one = `older="n1" younger="n2" conflict="the podCIDR 10.5.1.0/24"`
		two = `older="n2" younger="n3" conflict="the public address 198.18.0.2"`

		both = `"Two Nodes conflict" ` + one + ` fix="n1, the older one, counts, and pods on n2 cannot be reached. ` +
			`Delete the Node that no longer exists; or delete n2 and restart its kubelet, for another podCIDR"`
		twoAndThree = `"Two Nodes conflict" ` + two +
			` fix="delete the Node that no longer exists, or give flanneld on one of them ` +
			`--iface, --iface-node-address or --public-ip, for an address of its own"`
	)
	c := newCluster(t, onlyIPv4)
	c.tell(claimant(2, "198.18.0.2", "10.5.1.0/24"), claimant(1, "198.18.0.1", "10.5.1.0/24"),
		claimant(3, "198.18.0.2", "10.5.3.0/24"))
	expect("two conflicts", both, twoAndThree)
	c.expect("the older one counts, and addresses are nobody's alone", "10.5.1.0/24 at 198.18.0.1",
		"10.5.3.0/24 at 198.18.0.2")

	changed := claimant(2, "198.18.0.2", "10.5.1.0/24")
	changed.annotations[0] = `flannel.alpha.coreos.com/backend-data={"VNI":2}`
	c.add(changed, claimant(4, "198.18.0.4", "10.5.4.0/24"))
	c.tell(claimant(1, "198.18.0.1", "10.5.1.0/24"), changed, claimant(3, "198.18.0.2", "10.5.3.0/24"),
		claimant(4, "198.18.0.4", "10.5.4.0/24"))
	expect("changes, and the whole state again")

	c.drop("n1")
	expect("the older one goes", `"Two Nodes no longer conflict" `+one)
	c.expect("the other counts", "10.5.1.0/24 at 198.18.0.2", "10.5.3.0/24 at 198.18.0.2", "10.5.4.0/24 at 198.18.0.4")
	c.add(claimant(1, "198.18.0.1", "10.5.1.0/24"))
	expect("and comes back", both)
	c.add(claimant(3, "198.18.0.3", "10.5.3.0/24"))
	expect("an address changes", `"Two Nodes no longer conflict" `+two)

	c.tell(claimant(2, "198.18.0.2", "10.5.1.0/24"), claimant(7, "198.18.0.1", "10.5.7.0/24"))
	expect("n1 goes, and n7 gets its address, while the watch is away", `"Two Nodes no longer conflict" `+one)
	c.expect("what is left", "10.5.1.0/24 at 198.18.0.2", "10.5.7.0/24 at 198.18.0.1")
}

// Nodes behind NAT may share a public address, where the backend tells them apart by something else.
func TestSharedAddresses(t *testing.T) {
	said := logged(t)
	const sharing = "sharing"
	subnet.ShareAddresses(sharing)
	var nodes []testNode
	for i := 1; i <= 2; i++ {
		n := claimant(i, "198.18.0.9", fmt.Sprintf("10.5.%d.0/24", i))
		n.annotations = append(n.annotations, "flannel.alpha.coreos.com/backend-type="+sharing)
		nodes = append(nodes, n)
	}
	c := newCluster(t, onlyIPv4)
	c.tell(nodes...)
	if text := said(); text != "" {
		t.Errorf("said %s", text)
	}
	c.expect("both count", "10.5.1.0/24 at 198.18.0.9", "10.5.2.0/24 at 198.18.0.9")
}

// Subnets that overlap, in one family or with another length, are not both told
// of.
func TestOverlaps(t *testing.T) {
	said := logged(t)
	c := newCluster(t, bothFamilies)
	c.tell(claimant(1, "198.18.0.1", "10.5.0.0/24", "fd05:0:0:1::/64"),
		claimant(2, "198.18.0.2", "10.5.2.0/24", "fd05:0:0:2::/64"))
	c.add(claimant(3, "198.18.0.3", "10.5.3.0/24", "fd05:0:0:2::/64"),
		claimant(4, "198.18.0.4", "10.5.0.0/23", "fd05:0:0:4::/64"),
		claimant(5, "198.18.0.5", "10.5.2.128/25", "fd05:0:0:5::/64"))
	c.expect("younger ones", "10.5.0.0/24,fd05:0:0:1::/64 at 198.18.0.1", "10.5.2.0/24,fd05:0:0:2::/64 at 198.18.0.2")
	text := said()
	for _, want := range []string{
		`older="n2" younger="n3" conflict="the podCIDR fd05:0:0:2::/64"`,
		`older="n1" younger="n4" conflict="podCIDRs that overlap, 10.5.0.0/24 and 10.5.0.0/23"`,
		`older="n2" younger="n5" conflict="podCIDRs that overlap, 10.5.2.0/24 and 10.5.2.128/25"`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("said\n%s\nwant %s", text, want)
		}
	}
	c.drop("n2")
	c.drop("n1")
	c.expect("the older ones go", "10.5.0.0/23,fd05:0:0:4::/64 at 198.18.0.4",
		"10.5.2.128/25,fd05:0:0:5::/64 at 198.18.0.5", "10.5.3.0/24,fd05:0:0:2::/64 at 198.18.0.3")
	c.add(claimant(1, "198.18.0.1", "10.5.1.0/25", "fd05:0:0:9::/64"))
	c.expect("an older one comes back", "10.5.1.0/25,fd05:0:0:9::/64 at 198.18.0.1",
		"10.5.2.128/25,fd05:0:0:5::/64 at 198.18.0.5", "10.5.3.0/24,fd05:0:0:2::/64 at 198.18.0.3")
}

// Whatever happens in whatever order, the reader knows of those nodes that have
// no older one with an overlapping subnet.
func TestClaimsAtRandom(t *testing.T) {
	logged(t)
	for seed := range uint64(60) {
		random := rand.New(rand.NewPCG(seed, 0))
		c := newCluster(t, bothFamilies)
		nodes := map[string]testNode{}
		step := func(telling bool) {
			i := random.IntN(8)
			name := fmt.Sprintf("n%d", i)
			if random.IntN(3) == 0 {
				delete(nodes, name)
				if !telling {
					c.drop(name)
				}
				return
			}
			n := claimant(i, fmt.Sprintf("198.18.0.%d", random.IntN(8)),
				netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 5, byte(random.IntN(4)), 0}), 22+random.IntN(3)).Masked().String(),
				fmt.Sprintf("fd05:0:0:%d::/64", random.IntN(8)))
			if same, ok := nodes[name]; ok && random.IntN(4) == 0 {
				n = same // perhaps made again
			}
			n.created = uint64(random.IntN(4))
			nodes[name] = n
			if !telling {
				c.add(n)
			}
		}
		for range 30 {
			if random.IntN(5) == 0 || !c.synced {
				for range random.IntN(4) {
					step(true)
				}
				c.tell(slices.Collect(maps.Values(nodes))...)
			} else {
				step(false)
			}
			if random.IntN(2) == 0 {
				c.read()
			}
		}
		c.expect(fmt.Sprintf("seed %d", seed), counting(nodes)...)
		for name, n := range c.byName {
			if l := c.leases[n.lease.Subnets]; n.accepted && l.Created != n.lease.Created {
				t.Errorf("seed %d: the reader has the lease of %s as of %d, want %d", seed, name, l.Created, n.lease.Created)
			}
		}
	}
}

// counting is what resolveConflicts finds, in the plainest way.
func counting(nodes map[string]testNode) []string {
	var out []string
	for _, n := range nodes {
		s := subnetsOf(n.cidrs, bothFamilies)
		if !slices.ContainsFunc(slices.Collect(maps.Values(nodes)), func(o testNode) bool {
			other := subnetsOf(o.cidrs, bothFamilies)
			older := o.created < n.created || o.created == n.created && o.name < n.name
			return older && (s.IPv4.Overlaps(other.IPv4) || s.IPv6.Overlaps(other.IPv6))
		}) {
			_, ip, _ := strings.Cut(n.annotations[3], "=")
			out = append(out, fmt.Sprintf("%s at %s", s, ip))
		}
	}
	slices.Sort(out)
	return out
}

// TestOutsideTheNetwork: a podCIDR that is not in the network keeps no younger node out, whatever it overlaps.
func TestOutsideTheNetwork(t *testing.T) {
	c := newCluster(t, onlyIPv4)
	everything := peerNode(1)
	everything.cidrs = []string{"0.0.0.0/0"}
	c.Replace(objects(everything, peerNode(2)), "")
	c.add(peerNode(3))
	for _, name := range []string{"n2", "n3"} {
		if n := c.byName[name]; !n.accepted || len(n.conflicts) > 0 {
			t.Errorf("%s is kept out: %+v", name, n.conflicts)
		}
	}
}
