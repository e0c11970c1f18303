package kube

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/netspace"
	"github.com/flanneld/flanneld/pkg/nstest"
	"github.com/flanneld/flanneld/subnet"
)

// ownServer is an API server that has one Node: it streams frames, and answers
// each patch as it is told.
type ownServer struct {
	frames  chan []byte
	patches chan func(http.ResponseWriter) // takes the answer; a patch waits until then
}

func newOwnServer(t *testing.T) (*ownServer, *Manager) {
	s := &ownServer{frames: make(chan []byte, 10), patches: make(chan func(http.ResponseWriter))}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPatch {
			io.Copy(io.Discard, r.Body) // or its end would go unnoticed
			select {
			case answer := <-s.patches:
				answer(w)
			case <-r.Context().Done():
			}
			return
		}
		w.Header().Set("Content-Type", "application/vnd.kubernetes.protobuf;stream=watch")
		for {
			w.(http.Flusher).Flush()
			select {
			case f := <-s.frames:
				w.Write(f)
			case <-r.Context().Done():
				return
			}
		}
	}))
	t.Cleanup(server.Close)
	m, err := New(t.Context(), Options{APIURL: server.URL, NodeName: "n1", AnnotationPrefix: "flannel.alpha.coreos.com/",
		SetCondition: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return s, m
}

// answer answers the next patch.
func (s *ownServer) answer(t *testing.T, how func(http.ResponseWriter)) {
	t.Helper()
	select {
	case s.patches <- how:
	case <-time.After(time.Minute):
		t.Fatal("nothing is patched")
	}
}

func notFound(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusNotFound)
	w.Write([]byte(`{"kind":"Status","apiVersion":"v1","status":"Failure","code":404,"reason":"NotFound","message":"nodes \"n1\" not found"}`))
}

// takenAs answers a patch with the Node as it is then.
func takenAs(node []byte) func(http.ResponseWriter) {
	return func(w http.ResponseWriter) {
		w.Header().Set("Content-Type", "application/vnd.kubernetes.protobuf")
		w.Write(enveloped("Node", node))
	}
}

// publishedAs is this node's Node with what is published of a lease.
func publishedAs(attrs subnet.Attrs, cidrs ...string) []byte {
	n := peerNode(1)
	n.annotations, n.cidrs = nil, cidrs
	for key, value := range annotationsOf(attrs) {
		n.annotations = append(n.annotations, "flannel.alpha.coreos.com/"+key+"="+value)
	}
	return n.marshal()
}

// ownNodeWith is this node's Node as it is registered, before flanneld writes to
// it.
func ownNodeWith(cidrs ...string) []byte {
	n := peerNode(1)
	n.annotations, n.cidrs = nil, cidrs
	return n.marshal()
}

var lastBookmark = frame("BOOKMARK", text(nil, 1,
	string(text(text(nil, 6, "20"), 12, string(text(text(nil, 1, "k8s.io/initial-events-end"), 2, "true"))))))

// result returns what f returns, within some seconds.
func result[T any](t *testing.T, f func() (T, error)) (await func() (T, error)) {
	type both struct {
		v   T
		err error
	}
	done := make(chan both, 1)
	go func() {
		v, err := f()
		done <- both{v, err}
	}()
	return func() (T, error) {
		t.Helper()
		select {
		case b := <-done:
			return b.v, b.err
		case <-time.After(time.Minute):
			t.Fatal("it does not end")
			panic("unreachable")
		}
	}
}

// A Node that is deleted while its annotations are being written is waited for,
// and its next podCIDR taken.
func TestNodeDeletedWhilePublishing(t *testing.T) {
	said := logged(t)
	s, m := newOwnServer(t)
	cfg, err := subnet.ParseConfig([]byte(`{"Network": "10.5.0.0/16", "Backend": {"Type": "host-gw"}}`))
	if err != nil {
		t.Fatal(err)
	}
	attrs := subnet.Attrs{PublicIP: netip.MustParseAddr("198.18.0.1"), BackendType: "host-gw"}
	acquired := result(t, func() (subnet.Lease, error) { return m.Acquire(t.Context(), cfg, subnet.Lease{Attrs: attrs}) })
	s.frames <- frame("ADDED", ownNodeWith("10.5.1.0/24"))
	s.frames <- lastBookmark
	s.answer(t, notFound)
	s.frames <- frame("DELETED", ownNodeWith("10.5.1.0/24"))
	s.frames <- frame("ADDED", ownNodeWith())
	s.frames <- frame("MODIFIED", ownNodeWith("10.5.9.0/24"))
	s.answer(t, takenAs(publishedAs(attrs, "10.5.9.0/24")))
	if lease, err := acquired(); err != nil || lease.Subnets.String() != "10.5.9.0/24" {
		t.Errorf("acquired %+v, %v", lease, err)
	}
	if text := said(); strings.Count(text, `"Waiting for the Node" missing="Node n1"`) > 1 || strings.Contains(text, "not found") {
		t.Errorf("said\n%s", text)
	}
}

// So is one that is deleted while a lease of it is kept.
func TestNodeDeletedWhileKept(t *testing.T) {
	logged(t)
	s, m := newOwnServer(t)
	lease := subnet.Lease{Subnets: subnet.Subnets{IPv4: netip.MustParsePrefix("10.5.1.0/24")},
		Attrs: subnet.Attrs{PublicIP: netip.MustParseAddr("198.18.0.1"), BackendType: "host-gw"}}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	m.Ready()
	kept := result(t, func() (bool, error) { return false, m.Keep(ctx, lease) })
	s.frames <- frame("ADDED", ownNodeWith("10.5.1.0/24"))
	s.frames <- lastBookmark
	s.answer(t, takenAs(publishedAs(lease.Attrs, "10.5.1.0/24"))) // the annotations
	s.answer(t, notFound)                                         // the condition
	s.frames <- frame("DELETED", ownNodeWith("10.5.1.0/24"))
	s.frames <- frame("ADDED", ownNodeWith("10.5.1.0/24"))
	s.answer(t, notFound) // again: it has gone once more
	s.frames <- frame("DELETED", ownNodeWith("10.5.1.0/24"))
	s.frames <- frame("ADDED", ownNodeWith("10.5.2.0/24"))
	if _, err := kept(); err != subnet.ErrLost {
		t.Errorf("Keep returned %v", err)
	}
}

// annotated is this node's Node with more annotations of ours.
func annotated(annotations ...string) []byte {
	n := peerNode(1)
	for _, a := range annotations {
		n.annotations = append(n.annotations, "flannel.alpha.coreos.com/"+a)
	}
	return n.marshal()
}

// A public address that the Node overwrites while the lease is kept is published,
// and so is the one that was found when that ends.
func TestOverwriteWhileKept(t *testing.T) {
	said := logged(t)
	s, m := newOwnServer(t)
	cfg, err := subnet.ParseConfig([]byte(`{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}`))
	if err != nil {
		t.Fatal(err)
	}
	want := subnet.Lease{Attrs: subnet.Attrs{PublicIP: netip.MustParseAddr("198.18.0.1"), BackendType: "vxlan",
		BackendData: []byte(`{"VNI":1}`)}}
	acquiring := func() (await func() subnet.Lease) {
		acquired := result(t, func() (subnet.Lease, error) { return m.Acquire(t.Context(), cfg, want) })
		return func() subnet.Lease {
			t.Helper()
			lease, err := acquired()
			if err != nil {
				t.Fatal(err)
			}
			return lease
		}
	}
	keep := func(l subnet.Lease) func() (bool, error) {
		return result(t, func() (bool, error) { return false, m.Keep(t.Context(), l) })
	}
	s.frames <- frame("ADDED", annotated("public-ip-overwrite=nonsense"))
	s.frames <- lastBookmark
	kept := keep(acquiring()())
	s.frames <- frame("MODIFIED", annotated("public-ip-overwrite=203.0.113.7"))
	if _, err := kept(); err != subnet.ErrChanged {
		t.Fatalf("Keep returned %v", err)
	}
	acquired := acquiring()
	s.answer(t, takenAs(annotated("public-ip-overwrite=203.0.113.7", "public-ip=203.0.113.7")))
	lease := acquired()
	if lease.Attrs.PublicIP.String() != "203.0.113.7" {
		t.Errorf("acquired %+v", lease)
	}
	kept = keep(lease)
	s.frames <- frame("MODIFIED", annotated())
	if _, err := kept(); err != subnet.ErrChanged {
		t.Fatalf("Keep returned %v", err)
	}
	if lease = acquiring()(); lease.Attrs.PublicIP != want.Attrs.PublicIP {
		t.Errorf("acquired %+v", lease)
	}
	if text := said(); strings.Count(text, `\"nonsense\"`) != 1 {
		t.Errorf("logged\n%s", text)
	}
}

// What the Node says of the public addresses is told each time that it changes,
// and the operator's word stands.
func TestSelect(t *testing.T) {
	logged(t)
	s, m := newOwnServer(t)
	selected := m.Select(t.Context(), iface.Selector{PublicIPv6: netip.MustParseAddr("fd18::1")})
	s.frames <- frame("ADDED", annotated("node-public-ip=198.18.0.2", "node-public-ipv6=fd18::2"))
	s.frames <- lastBookmark
	next := func(want string) {
		t.Helper()
		select {
		case sel := <-selected:
			if got := fmt.Sprint(sel.PublicIP, " ", sel.PublicIPv6); got != want {
				t.Errorf("selected %s, not %s", got, want)
			}
		case <-time.After(time.Minute):
			t.Fatal("nothing is selected")
		}
	}
	next("198.18.0.2 fd18::1")
	s.frames <- frame("MODIFIED", annotated("node-public-ip=198.18.0.2", "node-public-ipv6=fd18::3"))
	s.frames <- frame("MODIFIED", annotated("node-public-ip=198.18.0.4"))
	next("198.18.0.4 fd18::1")
	s.frames <- frame("MODIFIED", annotated())
	next("invalid IP fd18::1")
}

// The Manager waits until an interface has the Node's address, in the network namespace of the context, from which it
// also reaches the API server.
func TestSelectElsewhere(t *testing.T) {
	nstest.New(t)
	logged(t)
	s, m := newOwnServer(t)
	m.options.NodeAddress = true
	m.on = subnet.NetworksOf(netip.MustParsePrefix("10.5.0.0/16"))
	nstest.Run(t, "ip addr add 198.18.0.1/32 dev lo")
	space, err := netspace.Current()
	if err != nil {
		t.Fatal(err)
	}
	selected := m.Select(space.NewContext(t.Context()), iface.Selector{})
	s.frames <- frame("ADDED", annotated()) // its InternalIP is 198.18.0.1
	s.frames <- lastBookmark
	select {
	case sel := <-selected:
		if len(sel.Names) != 1 || sel.Names[0] != "198.18.0.1" {
			t.Errorf("selected %v", sel.Names)
		}
	case <-time.After(20 * time.Second):
		t.Error("the address is not found")
	}
}

// A Node that the API server does not find, though its watch has it, is patched
// again: it may have been registered again as it was. So is one that a proxy does
// not find.
func TestNodeNotFound(t *testing.T) {
	for name, answer := range map[string]func(http.ResponseWriter){
		"registered again": notFound,
		"a proxy's answer": func(w http.ResponseWriter) { http.Error(w, "default backend - 404", http.StatusNotFound) },
	} {
		t.Run(name, func(t *testing.T) {
			logged(t)
			s, m := newOwnServer(t)
			cfg, err := subnet.ParseConfig([]byte(`{"Network": "10.5.0.0/16", "Backend": {"Type": "host-gw"}}`))
			if err != nil {
				t.Fatal(err)
			}
			attrs := subnet.Attrs{PublicIP: netip.MustParseAddr("198.18.0.1"), BackendType: "host-gw"}
			acquired := result(t, func() (subnet.Lease,
				error) {
				return m.Acquire(t.Context(), cfg, subnet.Lease{Attrs: attrs})
			})
			s.frames <- frame("ADDED", ownNodeWith("10.5.1.0/24"))
			s.frames <- lastBookmark
			s.answer(t, answer)
			s.frames <- frame("MODIFIED", ownNodeWith("10.5.1.0/24")) // as a list would find it
			s.answer(t, takenAs(publishedAs(attrs, "10.5.1.0/24")))
			if _, err := acquired(); err != nil {
				t.Error(err)
			}
		})
	}
}

// What a watch brings of before a patch that was answered is no news; a whole
// state is, as after etcd was restored.
func TestStaleEvent(t *testing.T) {
	_, m := newOwnServer(t)
	store := ownStore{m}
	expect := func(what, cidr string) {
		t.Helper()
		if m.own == nil || m.own.subnets.String() != cidr {
			t.Errorf("%s: our Node is %+v", what, m.own)
		}
	}
	at := func(version, cidr string) *Node {
		n := peerNode(1)
		n.version, n.cidrs = version, []string{cidr}
		return n.object()
	}
	store.Update(at("10", "10.5.10.0/24"))
	expect("a patch's answer", "10.5.10.0/24")
	store.Update(at("9", "10.5.9.0/24"))
	expect("an event of before", "10.5.10.0/24")
	store.Update(at("11", "10.5.11.0/24"))
	expect("an event of after", "10.5.11.0/24")
	store.Replace([]any{at("3", "10.5.3.0/24")}, "4")
	expect("the whole state", "10.5.3.0/24")
}

// Goroutines that have got our Node from await read it without a lock: a heartbeat of kubelet does not change that
// value, and wakes nobody.
func TestHeartbeatOfOwnNode(t *testing.T) {
	_, m := newOwnServer(t)
	store := ownStore{m}
	n := peerNode(1)
	store.Update(n.object())
	own, changed, err := m.await(t.Context(), func(*ownNode) string { return "" })
	if err != nil {
		t.Fatal(err)
	}
	n.heartbeat, n.version = "later", "8"
	store.Update(n.object())
	if own.version != 7 || m.own.version != 8 {
		t.Errorf("the version is %d where it was read before the heartbeat, and %d now", own.version, m.own.version)
	}
	select {
	case <-changed:
		t.Error("a heartbeat is news")
	default:
	}
}

// Another Node than ours is not taken for ours, whatever a server sends.
func TestOwnIsOwn(t *testing.T) {
	_, m := newOwnServer(t)
	ownStore{m}.Replace(objects(peerNode(2), peerNode(1), peerNode(3)), "20")
	ownStore{m}.Update(peerNode(4).object())
	ownStore{m}.Delete(peerNode(5).object())
	if m.own == nil || m.own.subnets.String() != "10.5.1.0/24" {
		t.Errorf("ours is %+v", m.own)
	}
	ownStore{m}.Replace(objects(peerNode(2)), "21")
	if m.own != nil {
		t.Errorf("ours is %+v", m.own)
	}
}

// What two wait for is an Event until there is nobody who waits.
func TestWaits(t *testing.T) {
	said := logged(t)
	_, m := newOwnServer(t)
	for range 2 {
		m.startWait("Node n1: register it", false)
		m.startWait("status.addresses: set it", true)
	}
	m.endWait("Node n1: register it", true)
	m.endWait("status.addresses: set it", false)
	if n := len(m.events.all); n != 1 || strings.Contains(said(), "No longer") {
		t.Errorf("there are %d events while it is waited for", n)
	}
	m.endWait("Node n1: register it", true)
	m.endWait("status.addresses: set it", true)
	if n := len(m.events.all); n != 0 || len(m.waits) != 0 {
		t.Errorf("there are %d events, and waits %v, in the end", n, m.waits)
	}
	if text := said(); text != `"No longer waiting for the Node" missing="Node n1"`+"\n"+`"No longer waiting for the Node" missing="status.addresses"` {
		t.Errorf("logged\n%s", text)
	}
}

// TestForeignAddress: a public address that is not the Node's is logged once, even if the Node has no addresses for a
// while, as when it is registered again. It is logged again after it was right.
func TestForeignAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, _, logged := checkedPeers()
		found := netip.MustParseAddr("10.0.2.15")
		check := func(what string, lines int, addresses ...string) {
			t.Helper()
			time.Sleep(time.Hour) // each may be logged again
			own := &ownNode{}
			for _, a := range addresses {
				own.addresses = append(own.addresses, netip.MustParseAddr(a))
			}
			store.checkAddress(own, found)
			if got := logged(); len(got) != lines {
				t.Errorf("%s: logged %q, want %d lines", what, got, lines)
			}
		}
		check("another address", 1, "198.18.0.1", "fd18::1")
		check("the same", 0, "198.18.0.1", "fd18::1")
		check("no address", 0)
		check("no address of the family", 0, "fd18::1")
		check("back again", 0, "198.18.0.1", "fd18::1")
		check("right", 0, "10.0.2.15", "fd18::1")
		check("wrong again", 1, "198.18.0.1", "fd18::1")
	})
}
