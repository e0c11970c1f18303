package kube

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/nstest"
	"github.com/flanneld/flanneld/subnet"
)

// text and number append a field of a protobuf message.
func text(b []byte, num protowire.Number, v string) []byte {
	return protowire.AppendString(protowire.AppendTag(b, num, protowire.BytesType), v)
}

func number(b []byte, num protowire.Number, v uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, num, protowire.VarintType), v)
}

// testNode is a Node as the API server sends it, with much that does not
// matter.
type testNode struct {
	name, version string
	created       uint64
	cidrs         []string
	annotations   []string // key=value
	addresses     []string // type=address
	heartbeat     string
	networkUp     bool
}

func (n testNode) marshal() []byte {
	meta := text(nil, 1, n.name)
	meta = text(meta, 5, "uid-of-"+n.name)
	meta = text(meta, 6, n.version)
	meta = text(meta, 8, string(number(nil, 1, n.created)))
	meta = text(meta, 11, string(text(text(nil, 1, "label"), 2, "value")))
	for _, a := range n.annotations {
		k, v, _ := strings.Cut(a, "=")
		meta = text(meta, 12, string(text(text(nil, 1, k), 2, v)))
	}
	var spec []byte
	if len(n.cidrs) > 0 {
		spec = text(spec, 1, n.cidrs[0])
	}
	for _, c := range n.cidrs {
		spec = text(spec, 7, c)
	}
	status := text(nil, 4, string(text(text(text(nil, 1, "Ready"), 2, "True"), 6, n.heartbeat)))
	if n.networkUp {
		status = text(status, 4, string(text(text(nil, 1, "NetworkUnavailable"), 2, "False")))
	}
	for _, a := range n.addresses {
		k, v, _ := strings.Cut(a, "=")
		status = text(status, 5, string(text(text(nil, 1, k), 2, v)))
	}
	status = text(status, 8, strings.Repeat("image", 2000))
	return text(text(text(nil, 1, string(meta)), 2, string(spec)), 3, string(status))
}

// enveloped is what objects are sent in: four bytes, then a runtime.Unknown
// (k8s.io/apimachinery/pkg/runtime/generated.proto).
func enveloped(kind string, raw []byte) []byte {
	return append([]byte("k8s\x00"), text(text(nil, 1, string(text(text(nil, 1, "v1"), 2, kind))), 2, string(raw))...)
}

// frame is an event of a watch: its length, then a metav1.WatchEvent.
func frame(event string, object []byte) []byte {
	kind := "Node"
	if event == "ERROR" {
		kind = "Status"
	}
	e := text(text(nil, 1, event), 2, string(text(nil, 1, string(enveloped(kind, object)))))
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(e))), e...)
}

// status is a failure, as a metav1.Status.
func status(code uint64, reason, message string) []byte {
	return number(text(text(text(nil, 2, "Failure"), 3, message), 4, reason), 6, code)
}

// object is the Node as our store is given it.
func (n testNode) object() *Node {
	o := Node{prefix: DefaultAnnotationPrefix}
	if err := o.Unmarshal(n.marshal()); err != nil {
		panic(err)
	}
	return &o
}

// objects are a list as a store is given it.
func objects(nodes ...testNode) []any {
	var all []any
	for _, n := range nodes {
		all = append(all, n.object())
	}
	return all
}

func peerNode(i int) testNode {
	return testNode{
		name: fmt.Sprintf("n%d", i), version: "7", created: uint64(i), cidrs: []string{fmt.Sprintf("10.5.%d.0/24", i)},
		annotations: []string{
			"flannel.alpha.coreos.com/backend-data={\"VNI\":1}", "flannel.alpha.coreos.com/backend-type=vxlan",
			"flannel.alpha.coreos.com/kube-subnet-manager=true",
			fmt.Sprintf("flannel.alpha.coreos.com/public-ip=198.18.0.%d", i), "other/annotation=x",
		},
		addresses: []string{"InternalIP=198.18.0.1", "Hostname=n"},
	}
}

func TestUnmarshal(t *testing.T) {
	n := peerNode(3).object()
	if n.Name != "n3" || n.ResourceVersion != "7" || n.CreationTimestamp.Unix() != 3 ||
		!slices.Equal(n.podCIDRs, []string{"10.5.3.0/24"}) ||
		len(n.annotations) != 4 || len(n.internalIPs) != 1 || n.networkUp {
		t.Errorf("got %+v", n)
	}
	if got := n.annotation(publicIP); got != "198.18.0.3" {
		t.Errorf("the public address is %q", got)
	}
	n.Reset()
	if err := n.Unmarshal(text(nil, 3, string(text(nil, 4,
		string(text(text(nil, 1, "NetworkUnavailable"), 2, "False")))))); err != nil || !n.networkUp || n.Name != "" {
		t.Errorf("a condition: %v, %+v", err, n)
	}
	if c := peerNode(3).object().DeepCopyObject().(*Node); !reflect.DeepEqual(c, peerNode(3).object()) {
		t.Errorf("the copy is %+v", c)
	}
}

// What a heartbeat changes is no news.
func TestHeartbeats(t *testing.T) {
	p := testPeers()
	n := peerNode(3)
	p.Replace(objects(n), "")
	if u := taken(p); !u.Snapshot || len(u.Leases) != 1 {
		t.Fatalf("got %+v", u)
	}
	before := p.byName["n3"]
	n.heartbeat, n.version = "later", "8"
	p.Update(n.object())
	if u := taken(p); len(u.Leases)+len(u.Gone) != 0 || p.byName["n3"] != before {
		t.Errorf("a heartbeat is news: %+v", u)
	}
}

// taken returns the unread update of peers; the zero Update if there is none.
func taken(p *peers) subnet.Update {
	select {
	case u := <-p.updates.C():
		return u
	default:
		return subnet.Update{}
	}
}

func testPeers() *peers { return newPeers(testManager(onlyIPv4)) }

func testManager(on subnet.Networks) *Manager {
	health := subnet.NewStoreHealth(klog.Background(), subnet.State{Store: "the server"})
	return &Manager{log: klog.Background(), client: &client{}, health: health,
		records: subnet.NewRecordLog(klog.Background()), ownRecords: subnet.NewRecordLog(klog.Background()),
		options: Options{AnnotationPrefix: DefaultAnnotationPrefix}, on: on}
}

func TestPeers(t *testing.T) {
	p := testPeers()
	put := func(n testNode) { p.Update(n.object()) }
	expect := func(what, want string) {
		t.Helper()
		u := taken(p)
		var got []string
		for s, l := range u.Leases {
			got = append(got, fmt.Sprintf("+%s at %s", s, l.Attrs.PublicIP))
		}
		for s := range u.Gone {
			got = append(got, "-"+s.String())
		}
		slices.Sort(got)
		if strings.Join(got, " ") != want {
			t.Errorf("%s: got %q, want %q", what, got, want)
		}
	}
	stranger := peerNode(9)
	stranger.annotations = nil
	podless := peerNode(8)
	podless.cidrs = nil
	expect("before all is told", "")
	p.Replace(objects(peerNode(1), peerNode(2), stranger, podless), "")
	expect("all", "+10.5.1.0/24 at 198.18.0.1 +10.5.2.0/24 at 198.18.0.2")
	p.Delete(peerNode(2).object())
	put(peerNode(9)) // joins
	put(peerNode(8)) // has got its podCIDR
	expect("changes", "+10.5.8.0/24 at 198.18.0.8 +10.5.9.0/24 at 198.18.0.9 -10.5.2.0/24")
	moved := peerNode(1)
	moved.cidrs = []string{"10.5.77.0/24"}
	put(moved)
	expect("a node made again with another podCIDR", "+10.5.77.0/24 at 198.18.0.1 -10.5.1.0/24")
	twin := peerNode(30)
	twin.cidrs = []string{"10.5.8.0/24"}
	put(twin)
	expect("a younger node with the same podCIDR", "")
	p.Delete(peerNode(8).object())
	expect("the older one goes", "+10.5.8.0/24 at 198.18.0.30")

	p.Replace(objects(peerNode(9), peerNode(5)), "") // after a gap
	expect("what went in the gap", "+10.5.5.0/24 at 198.18.0.5 -10.5.77.0/24 -10.5.8.0/24")
}

func TestAnnotations(t *testing.T) {
	for _, a := range []subnet.Attrs{
		{PublicIP: netip.MustParseAddr("192.0.2.1"), BackendType: "host-gw"},
		{PublicIP: netip.MustParseAddr("192.0.2.1"), PublicIPv6: netip.MustParseAddr("2001:db8::1"), BackendType: "vxlan",
			BackendData: []byte(`{"VNI":1}`), BackendV6Data: []byte(`{"VNI":2}`)},
		{PublicIPv6: netip.MustParseAddr("2001:db8::1"), BackendType: "vxlan", BackendV6Data: []byte(`{"VNI":2}`)},
	} {
		all := annotationsOf(a)
		if got := attrsOf(func(name string) string { return all[name] }); !got.Equal(a) {
			t.Errorf("%+v became %+v", a, got)
		}
	}
}

// The cluster may be dual stack, and this network of IPv4 alone.
func TestFamiliesThatAreOff(t *testing.T) {
	p := testPeers()
	n := peerNode(9)
	n.cidrs = append(n.cidrs, "fd05:0:0:9::/64")
	p.Replace(objects(n), "")
	for s := range taken(p).Leases {
		if s.String() != "10.5.9.0/24" {
			t.Errorf("the peer's subnets are %s", s)
		}
	}
}

func TestAddressesOfTheWrongFamily(t *testing.T) {
	for annotation, text := range map[string]string{publicIP: "fd18::1", publicIPv6: "192.0.2.1",
		publicIPv6Overwrite: "::ffff:192.0.2.1", nodePublicIP: "nonsense", nodePublicIPv6: "fe80::1%x\nforged"} {
		if ip, err := parseAddress(text, annotation); err == nil {
			t.Errorf("%s: %s is taken for %s", annotation, text, ip)
		}
	}
}

// protobufMedia is how Nodes in protobuf are decoded.
func protobufMedia() runtime.SerializerInfo {
	all := newCodecs(DefaultAnnotationPrefix).SupportedMediaTypes()
	return all[slices.IndexFunc(all, func(i runtime.SerializerInfo) bool { return i.MediaType == runtime.ContentTypeProtobuf })]
}

// decodeEvent decodes an event of a watch as client-go does.
func decodeEvent(b []byte) (runtime.Object, error) {
	var e metav1.WatchEvent
	media := protobufMedia()
	if _, _, err := media.StreamSerializer.Serializer.Decode(b, nil, &e); err != nil {
		return nil, err
	}
	o, _, err := media.Serializer.Decode(e.Object.Raw, nil, nil)
	return o, err
}

func FuzzEvent(f *testing.F) {
	f.Add(frame("ADDED", peerNode(1).marshal())[4:])
	f.Add(frame("ERROR", status(410, "Expired", "too old resource version"))[4:])
	f.Add(text(text(nil, 1, string(text(nil, 2, "30"))), 2, string(peerNode(4).marshal()))) // a list
	f.Fuzz(func(t *testing.T, b []byte) {
		new(NodeList).Unmarshal(b)
		o, err := decodeEvent(b)
		if n, ok := o.(*Node); ok && err == nil {
			p := testPeers()
			p.Replace([]any{n}, "")
			p.Delete(n)
			if len(p.byName) != 0 {
				t.Errorf("a Node that is gone is still known: %+v", n)
			}
		}
	})
}

// BenchmarkHeartbeat is what an event costs that changes nothing, from the frame on.
func BenchmarkHeartbeat(b *testing.B) {
	p := testPeers()
	p.Replace(objects(peerNode(3)), "")
	event := frame("MODIFIED", peerNode(3).marshal())[4:]
	b.ReportAllocs()
	for b.Loop() {
		n, err := decodeEvent(event)
		if err != nil {
			b.Fatal(err)
		}
		p.Update(n)
	}
}

// The address that the Node publishes already is preferred: peers know it.
func TestSelectorPrefersWhatIsPublished(t *testing.T) {
	m := testManager(onlyIPv4)
	own := &ownNode{annotations: map[string]string{publicIP: "198.18.0.1", publicIPv6: "nonsense"}}
	sel, _ := m.updateSelector(own, iface.Selector{})
	if want := []netip.Addr{netip.MustParseAddr("198.18.0.1")}; !slices.Equal(sel.Prefer, want) {
		t.Errorf("prefers %v, want %v", sel.Prefer, want)
	}
}

// With --iface-node-address, each family has the interface of its own InternalIP, where this host holds both.
func TestSelectInternalIPs(t *testing.T) {
	nstest.New(t)
	nstest.Run(t, "ip link set lo up")
	m := testManager(subnet.NetworksOf(netip.MustParsePrefix("10.5.0.0/16"), netip.MustParsePrefix("fd05::/48")))
	m.options.NodeAddress = true
	own := &ownNode{addresses: []netip.Addr{netip.MustParseAddr("fd18::1"), netip.MustParseAddr("198.18.0.1")}}
	for _, c := range []struct{ address, four, six string }{
		{"198.18.0.1/32", "[fd18::1 198.18.0.1]", "[]"},
		{"fd18::1/128", "[198.18.0.1]", "[fd18::1]"},
	} {
		nstest.Run(t, "ip addr add "+c.address+" dev lo")
		sel, changed := m.updateSelector(own, iface.Selector{})
		if four, six := fmt.Sprint(sel.Names), fmt.Sprint(sel.IPv6.Names); !changed || four != c.four || six != c.six {
			t.Errorf("with %s: changed %t, %s for IPv4 and %s for IPv6, want %s and %s", c.address, changed, four, six, c.four, c.six)
		}
	}
	nstest.Run(t, "ip addr add fd18::2/128 dev lo")
	own.addresses[0] = netip.MustParseAddr("fd18::2")
	if sel, changed := m.updateSelector(own, iface.Selector{}); !changed || fmt.Sprint(sel.IPv6.Names) != "[fd18::2]" {
		t.Errorf("with another IPv6 address: changed %t, %v", changed, sel.IPv6)
	}
	nstest.Run(t, "ip addr del 198.18.0.1/32 dev lo")
	if sel, changed := m.updateSelector(own, iface.Selector{}); !changed || sel.Apart() {
		t.Errorf("without IPv4's: changed %t, %v", changed, sel.IPv6)
	}
}
