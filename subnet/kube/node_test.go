package kube

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"

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
	for _, a := range n.addresses {
		k, v, _ := strings.Cut(a, "=")
		status = text(status, 5, string(text(text(nil, 1, k), 2, v)))
	}
	status = text(status, 8, strings.Repeat("image", 2000))
	return text(text(text(nil, 1, string(meta)), 2, string(spec)), 3, string(status))
}

func envelope(raw []byte) []byte { return append([]byte("k8s\x00"), text(nil, 2, string(raw))...) }

func frame(kind string, object []byte) []byte {
	e := text(text(nil, 1, kind), 2, string(text(nil, 1, string(envelope(object)))))
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(e))), e...)
}

func peerNode(i int) testNode {
	return testNode{
		name: fmt.Sprintf("n%d", i), version: "7", created: uint64(i), cidrs: []string{fmt.Sprintf("10.5.%d.0/24", i)},
		annotations: []string{
			"flannel.alpha.coreos.com/backend-data={\"VNI\":1}", "flannel.alpha.coreos.com/backend-type=vxlan",
			"flannel.alpha.coreos.com/kube-subnet-manager=true", fmt.Sprintf("flannel.alpha.coreos.com/public-ip=198.18.0.%d", i), "other/annotation=x",
		},
		addresses: []string{"InternalIP=198.18.0.1", "Hostname=n"},
	}
}

func TestNodeFields(t *testing.T) {
	f := fields{prefix: []byte("flannel.alpha.coreos.com/")}
	if err := f.node(peerNode(3).marshal()); err != nil {
		t.Fatal(err)
	}
	if string(f.name) != "n3" || string(f.version) != "7" || f.created != 3 || len(f.podCIDRs) != 1 || string(f.podCIDRs[0]) != "10.5.3.0/24" ||
		len(f.annotations) != 4 || string(f.annotations[3].key) != "public-ip" || len(f.internalIPs) != 1 || f.networkUp || f.initialEnd {
		t.Errorf("got %+v", f)
	}
	if err := f.node(text(nil, 1, string(text(nil, 12, string(text(text(nil, 1, "k8s.io/initial-events-end"), 2, "true")))))); err != nil || !f.initialEnd || len(f.annotations) != 0 {
		t.Errorf("a bookmark: %v, %+v", err, f)
	}
	if err := f.node(text(nil, 3, string(text(nil, 4, string(text(text(nil, 1, "NetworkUnavailable"), 2, "False")))))); err != nil || !f.networkUp {
		t.Errorf("a condition: %v, %+v", err, f)
	}
}

// What a heartbeat changes costs no memory and is no news.
func TestHeartbeats(t *testing.T) {
	p := testPeers()
	f := fields{prefix: []byte("flannel.alpha.coreos.com/")}
	n := peerNode(3)
	tell := func() {
		if err := f.node(n.marshal()); err != nil {
			t.Fatal(err)
		}
		p.put(&f)
	}
	p.begin()
	tell()
	p.end()
	if u := p.take(); !u.Snapshot || len(u.Leases) != 1 {
		t.Fatalf("got %+v", u)
	}
	n.heartbeat, n.version = "later", "8"
	tell()
	if u := p.take(); len(u.Leases)+len(u.Gone) != 0 {
		t.Errorf("a heartbeat is news: %+v", u)
	}
	raw := n.marshal()
	if got := testing.AllocsPerRun(100, func() {
		if f.node(raw) == nil {
			p.put(&f)
		}
	}); got > 0 {
		t.Errorf("a heartbeat makes %v allocations", got)
	}
}

func testPeers() *peers {
	return newPeers(&Manager{client: &client{}, on: subnet.Subnets{IPv4: netip.MustParsePrefix("10.5.0.0/16")}})
}

func TestPeers(t *testing.T) {
	p := testPeers()
	f := fields{prefix: []byte("flannel.alpha.coreos.com/")}
	put := func(n testNode) {
		t.Helper()
		if err := f.node(n.marshal()); err != nil {
			t.Fatal(err)
		}
		p.put(&f)
	}
	expect := func(what, want string) {
		t.Helper()
		u := p.take()
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
	p.begin()
	put(peerNode(1))
	put(peerNode(2))
	put(stranger)
	put(podless)
	expect("before all is told", "")
	p.end()
	expect("all", "+10.5.1.0/24 at 198.18.0.1 +10.5.2.0/24 at 198.18.0.2")
	p.drop([]byte("n2"))
	put(peerNode(9)) // joins
	put(peerNode(8)) // has got its podCIDR
	expect("changes", "+10.5.8.0/24 at 198.18.0.8 +10.5.9.0/24 at 198.18.0.9 -10.5.2.0/24")
	moved := peerNode(1)
	moved.cidrs = []string{"10.5.77.0/24"}
	put(moved)
	expect("a node made anew with another podCIDR", "+10.5.77.0/24 at 198.18.0.1 -10.5.1.0/24")
	twin := peerNode(30)
	twin.cidrs = []string{"10.5.8.0/24"}
	put(twin)
	expect("a younger node with the same podCIDR", "")
	p.drop([]byte("n8"))
	expect("the older one goes", "+10.5.8.0/24 at 198.18.0.30")

	p.begin() // after a gap
	put(peerNode(9))
	put(peerNode(5))
	p.end()
	expect("what went in the gap", "+10.5.5.0/24 at 198.18.0.5 -10.5.77.0/24 -10.5.8.0/24")
}

// recorder writes down what it is told.
type recorder struct{ told []string }

func (r *recorder) begin()           { r.told = append(r.told, "begin") }
func (r *recorder) put(n *fields)    { r.told = append(r.told, "put "+string(n.name)) }
func (r *recorder) drop(name []byte) { r.told = append(r.told, "drop "+string(name)) }
func (r *recorder) end()             { r.told = append(r.told, "end") }

// A server that forgot what we know, and one that cannot stream the state.
func TestFeed(t *testing.T) {
	bookmark := text(nil, 1, string(text(text(nil, 6, "20"), 12, string(text(text(nil, 1, "k8s.io/initial-events-end"), 2, "true")))))
	gone := number(text(text(nil, 3, "too old resource version"), 4, "Expired"), 6, 410)
	list := text(text(nil, 1, string(text(nil, 2, "30"))), 2, string(peerNode(4).marshal()))
	var asked []string
	var answers []func(w http.ResponseWriter)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		asked = append(asked, fmt.Sprintf("watch=%s version=%s initial=%s", q.Get("watch"), q.Get("resourceVersion"), q.Get("sendInitialEvents")))
		answer := answers[0]
		answers = answers[1:]
		answer(w)
	}))
	defer server.Close()
	send := func(frames ...[]byte) func(http.ResponseWriter) {
		return func(w http.ResponseWriter) { w.Write(bytes.Join(frames, nil)) }
	}
	answers = []func(http.ResponseWriter){
		send(frame("ADDED", peerNode(1).marshal())), // breaks off: told again
		send(frame("ADDED", peerNode(1).marshal()), frame("BOOKMARK", bookmark), frame("DELETED", peerNode(1).marshal())),
		send(frame("ERROR", gone)),
		func(w http.ResponseWriter) { w.WriteHeader(http.StatusUnprocessableEntity) },
		func(w http.ResponseWriter) { w.Write(envelope(list)) },
		send(frame("MODIFIED", peerNode(4).marshal())),
	}
	w := &feed{client: &client{http: server.Client(), server: server.URL}, answered: func() {}}
	r := &recorder{}
	for range 5 {
		if err := w.follow(context.Background(), r); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := strings.Join(r.told, ", "), "begin, put n1, begin, put n1, end, drop n1, begin, put n4, end, put n4"; got != want {
		t.Errorf("told %s\nwant %s", got, want)
	}
	if got, want := strings.Join(asked, "\n"), `watch=1 version= initial=true
watch=1 version= initial=true
watch=1 version=7 initial=
watch=1 version= initial=true
watch= version= initial=
watch=1 version=30 initial=`; got != want {
		t.Errorf("asked\n%s\nwant\n%s", got, want)
	}
}

func TestAnnotations(t *testing.T) {
	for _, a := range []subnet.Attrs{
		{PublicIP: netip.MustParseAddr("192.0.2.1"), BackendType: "host-gw"},
		{PublicIP: netip.MustParseAddr("192.0.2.1"), PublicIPv6: netip.MustParseAddr("2001:db8::1"), BackendType: "vxlan", BackendData: []byte(`{"VNI":1}`), BackendV6Data: []byte(`{"VNI":2}`)},
		{PublicIPv6: netip.MustParseAddr("2001:db8::1"), BackendType: "vxlan", BackendV6Data: []byte(`{"VNI":2}`)},
	} {
		if got := attrsOf(annotationsOf(a)); !got.Equal(a) {
			t.Errorf("%+v became %+v", a, got)
		}
	}
}

// The cluster may be dual stack, and this network of IPv4 alone.
func TestFamiliesThatAreOff(t *testing.T) {
	p := testPeers()
	f := fields{prefix: []byte("flannel.alpha.coreos.com/")}
	n := peerNode(9)
	n.cidrs = append(n.cidrs, "fd05:0:0:9::/64")
	if err := f.node(n.marshal()); err != nil {
		t.Fatal(err)
	}
	p.begin()
	p.put(&f)
	p.end()
	for s := range p.take().Leases {
		if s.String() != "10.5.9.0/24" {
			t.Errorf("the peer's subnets are %s", s)
		}
	}
}

// A whole heartbeat, from the frame on, makes no allocation.
func TestHeartbeatFrames(t *testing.T) {
	p := testPeers()
	w := &feed{client: p.manager.client, fields: fields{prefix: []byte("flannel.alpha.coreos.com/")}, version: make([]byte, 0, 16)}
	event := frame("MODIFIED", peerNode(3).marshal())
	r := bytes.NewReader(event)
	if got := testing.AllocsPerRun(100, func() {
		r.Reset(event)
		if err := w.tell(r, p); err != nil {
			t.Fatal(err)
		}
	}); got > 0 {
		t.Errorf("a heartbeat makes %v allocations", got)
	}
}

func TestAddressesOfTheWrongFamily(t *testing.T) {
	for annotation, text := range map[string]string{publicIP: "fd18::1", publicIPv6: "192.0.2.1", publicIPv6Overwrite: "::ffff:192.0.2.1", nodePublicIP: "nonsense"} {
		if ip, err := parseAddress(text, annotation); err == nil {
			t.Errorf("%s: %s is taken for %s", annotation, text, ip)
		}
	}
}

func FuzzEvent(f *testing.F) {
	f.Add(frame("ADDED", peerNode(1).marshal())[4:])
	f.Add(frame("ERROR", number(nil, 6, 410))[4:])
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := decodeEvent(b)
		if err != nil {
			return
		}
		n := fields{prefix: []byte("flannel.alpha.coreos.com/")}
		if n.node(e.object) == nil {
			testPeers().put(&n)
		}
	})
}
