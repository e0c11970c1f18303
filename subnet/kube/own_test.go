package kube

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

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
	m, err := New(t.Context(), Options{APIURL: server.URL, NodeName: "n1", AnnotationPrefix: "flannel.alpha.coreos.com/", SetCondition: true})
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

func taken(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/vnd.kubernetes.protobuf")
	w.Write(envelope("Node", ownNodeWith()))
}

// ownNodeWith is this node's Node as it is registered, before flanneld writes to
// it.
func ownNodeWith(cidrs ...string) []byte {
	n := peerNode(1)
	n.annotations, n.cidrs = nil, cidrs
	return n.marshal()
}

var lastBookmark = frame("BOOKMARK", text(nil, 1, string(text(text(nil, 6, "20"), 12, string(text(text(nil, 1, "k8s.io/initial-events-end"), 2, "true"))))))

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
	acquired := result(t, func() (subnet.Lease, error) {
		return m.Acquire(t.Context(), cfg, subnet.Lease{Attrs: subnet.Attrs{PublicIP: netip.MustParseAddr("198.18.0.1"), BackendType: "host-gw"}})
	})
	s.frames <- frame("ADDED", ownNodeWith("10.5.1.0/24"))
	s.frames <- lastBookmark
	s.answer(t, notFound)
	s.frames <- frame("DELETED", ownNodeWith("10.5.1.0/24"))
	s.frames <- frame("ADDED", ownNodeWith())
	s.frames <- frame("MODIFIED", ownNodeWith("10.5.9.0/24"))
	s.answer(t, taken)
	if lease, err := acquired(); err != nil || lease.Subnets.String() != "10.5.9.0/24" {
		t.Errorf("acquired %+v, %v", lease, err)
	}
	if text := said(); strings.Count(text, "Waiting for Node n1") > 1 || strings.Contains(text, "not found") {
		t.Errorf("said\n%s", text)
	}
}

// So is one that is deleted while a lease of it is kept.
func TestNodeDeletedWhileKept(t *testing.T) {
	logged(t)
	s, m := newOwnServer(t)
	lease := subnet.Lease{Subnets: subnet.Subnets{IPv4: netip.MustParsePrefix("10.5.1.0/24")}, Attrs: subnet.Attrs{PublicIP: netip.MustParseAddr("198.18.0.1"), BackendType: "host-gw"}}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	m.Ready()
	kept := result(t, func() (bool, error) { return false, m.Keep(ctx, lease) })
	s.frames <- frame("ADDED", ownNodeWith("10.5.1.0/24"))
	s.frames <- lastBookmark
	s.answer(t, taken)    // the annotations
	s.answer(t, notFound) // the condition
	s.frames <- frame("DELETED", ownNodeWith("10.5.1.0/24"))
	s.frames <- frame("ADDED", ownNodeWith("10.5.1.0/24"))
	s.answer(t, notFound) // again: it has gone once more
	s.frames <- frame("DELETED", ownNodeWith("10.5.1.0/24"))
	s.frames <- frame("ADDED", ownNodeWith("10.5.2.0/24"))
	if _, err := kept(); err != subnet.ErrLost {
		t.Errorf("Keep returned %v", err)
	}
}
