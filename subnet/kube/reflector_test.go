package kube

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/flanneld/flanneld/subnet"
)

// A scripted server answers one request after the other, each in its own way, and
// writes down what it was asked for.
type scripted struct {
	mu      sync.Mutex
	asked   []string
	answers []http.HandlerFunc // the last one stays
}

func (s *scripted) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	s.mu.Lock()
	s.asked = append(s.asked, fmt.Sprintf("watch=%s version=%s initial=%s", q.Get("watch"), q.Get("resourceVersion"), q.Get("sendInitialEvents")))
	answer := s.answers[0]
	if len(s.answers) > 1 {
		s.answers = s.answers[1:]
	}
	s.mu.Unlock()
	answer(w, r)
}

// stream sends events, and ends the watch.
func stream(frames ...[]byte) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/vnd.kubernetes.protobuf;stream=watch")
		w.Write(bytes.Join(frames, nil))
	}
}

// list sends the state.
func list(version string, nodes ...testNode) http.HandlerFunc {
	all := text(nil, 1, string(text(nil, 2, version)))
	for _, n := range nodes {
		all = text(all, 2, string(n.marshal()))
	}
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/vnd.kubernetes.protobuf")
		w.Write(enveloped("NodeList", all))
	}
}

// streamAndHold sends events, and then nothing for as long as it is asked.
func streamAndHold(frames ...[]byte) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		stream(frames...)(w, r)
		quietly(w, r)
	}
}

// quietly sends nothing for as long as it is asked.
func quietly(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/vnd.kubernetes.protobuf;stream=watch")
	w.(http.Flusher).Flush()
	<-r.Context().Done()
}

// Whatever keeps a server from streaming the state, the state is listed, and
// nothing is logged; a server that forgot what we know is asked for all again.
func TestReflect(t *testing.T) {
	one := peerNode(1).marshal()
	for name, c := range map[string]struct {
		answers []http.HandlerFunc
		want    int // of peers in the end
	}{
		"streamed": {[]http.HandlerFunc{streamAndHold(frame("ADDED", one), lastBookmark)}, 1},
		"the state breaks off": {[]http.HandlerFunc{
			stream(frame("ADDED", one)), stream(frame("ADDED", one), lastBookmark, frame("ADDED", peerNode(2).marshal())), quietly}, 2},
		"not possible": {[]http.HandlerFunc{func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusUnprocessableEntity) },
			list("30", peerNode(4), peerNode(5)), quietly}, 2},
		// As API servers have it whose etcd is older than 3.4.25.
		"not possible for its store": {[]http.HandlerFunc{
			stream(frame("ERROR", status(500, "InternalError", "the required storage feature RequestWatchProgress is disabled"))), list("30", peerNode(4)), quietly}, 1},
		"forgotten": {[]http.HandlerFunc{
			stream(frame("ADDED", one), lastBookmark, frame("MODIFIED", one)), stream(frame("ERROR", status(410, "Expired", "too old resource version"))),
			streamAndHold(frame("ADDED", peerNode(7).marshal()), frame("ADDED", peerNode(8).marshal()), frame("ADDED", peerNode(9).marshal()), lastBookmark)}, 3},
	} {
		t.Run(name, func(t *testing.T) {
			said := logged(t)
			s := &scripted{answers: c.answers}
			server := httptest.NewServer(s)
			ctx, cancel := context.WithCancel(t.Context())
			m := testManager(onlyIPv4)
			m.client = testClient(t, server.URL)
			m.outage = subnet.Outage{Store: "the server"}
			p := newPeers(m)
			var running sync.WaitGroup
			running.Go(func() { m.reflectNodes(ctx, "", "follow the nodes", p) })
			leases := map[subnet.Subnets]subnet.Lease{}
			for late := time.After(time.Minute); len(leases) != c.want; {
				select {
				case <-p.wake:
					p.take().Apply(leases)
				case <-late:
					t.Fatalf("there are %d peers; asked %q", len(leases), s.asked)
				}
			}
			cancel()
			running.Wait()
			server.Close()
			if text := said(); text != "" {
				t.Errorf("logged\n%s", text)
			}
			if !m.outage.State().Connected {
				t.Error("the server counts as away")
			}
		})
	}
}

// A watch that breaks off goes on from where it was, however it does: the whole
// state is asked for once.
func TestWatchResumes(t *testing.T) {
	said := logged(t)
	fail := func(code int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
	}
	s := &scripted{answers: []http.HandlerFunc{
		stream(frame("ADDED", peerNode(1).marshal()), lastBookmark),
		func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
		fail(500), fail(503), fail(429), fail(401), stream(), fail(502),
		stream(frame("MODIFIED", peerNode(2).marshal())), quietly,
	}}
	server := httptest.NewUnstartedServer(s)
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.Start()
	ctx, cancel := context.WithCancel(t.Context())
	m := testManager(onlyIPv4)
	m.client = testClient(t, server.URL)
	m.outage = subnet.Outage{Store: "the server"}
	p := newPeers(m)
	var running sync.WaitGroup
	running.Go(func() { m.reflectNodes(ctx, "", "follow the nodes", p) })
	leases := map[subnet.Subnets]subnet.Lease{}
	for late := time.After(time.Minute); len(leases) != 2; {
		select {
		case <-p.wake:
			p.take().Apply(leases)
		case <-late:
			t.Fatalf("there are %d peers; asked %q", len(leases), s.asked)
		}
	}
	cancel()
	running.Wait()
	server.Close()
	for i, asked := range s.asked {
		if want := "watch=true version=20 initial="; i > 0 && i < 9 && asked != want {
			t.Errorf("request %d asks for %s, not for %s", i, asked, want)
		}
	}
	// Our credentials and the rest are two causes.
	if text := said(); strings.Count(text, "Waiting to follow the nodes") != 2 || strings.Count(text, "is back") != 1 {
		t.Errorf("logged\n%s", text)
	}
}

// A server that always breaks off is not asked again at once.
func TestReflectIsPaced(t *testing.T) {
	logged(t)
	for name, answer := range map[string]http.HandlerFunc{
		"each watch ends after an event": stream(frame("ADDED", peerNode(1).marshal())),
		"a frame is cut":                 stream(frame("ADDED", peerNode(1).marshal()), frame("ADDED", peerNode(2).marshal())[:100]),
		"nothing is answered":            func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := &scripted{answers: []http.HandlerFunc{answer}}
			server := httptest.NewServer(s)
			defer server.Close()
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			defer cancel()
			m := testManager(onlyIPv4)
			m.client = testClient(t, server.URL)
			m.reflectNodes(ctx, "", "follow the nodes", newPeers(m))
			s.mu.Lock()
			defer s.mu.Unlock()
			if n := len(s.asked); n > requestBurst+4 {
				t.Errorf("it was asked %d times in three seconds", n)
			}
		})
	}
}
