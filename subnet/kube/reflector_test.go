package kube

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/time/rate"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"

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
	s.asked = append(s.asked, fmt.Sprintf("watch=%s version=%s initial=%s", q.Get("watch"), q.Get("resourceVersion"),
		q.Get("sendInitialEvents")))
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

// followUntil has the Nodes of a server followed until there are so many peers.
func followUntil(t *testing.T, s *scripted, peers int) *Manager {
	t.Helper()
	server := httptest.NewUnstartedServer(s)
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.Start()
	defer server.Close()
	ctx, cancel := context.WithCancel(t.Context())
	m := testManager(onlyIPv4)
	m.client = testClient(t, server.URL)
	p := newPeers(m)
	var running sync.WaitGroup
	running.Go(func() { m.reflectNodes(ctx, "", "watch the Nodes", p) })
	defer running.Wait()
	defer cancel()
	leases := map[subnet.Subnets]*subnet.Lease{}
	for late := time.After(time.Minute); len(leases) != peers; {
		select {
		case u := <-p.updates.C():
			u.Apply(leases)
		case <-late:
			t.Fatalf("there are %d peers; asked %q", len(leases), s.asked)
		}
	}
	return m
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
		"the state breaks off": {[]http.HandlerFunc{stream(frame("ADDED", one)), list("30", peerNode(1), peerNode(2)),
			quietly}, 2},
		"not possible": {[]http.HandlerFunc{func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusUnprocessableEntity) },
			list("30", peerNode(4), peerNode(5)), quietly}, 2},
		// As API servers have it whose etcd is older than 3.4.25.
		"not possible for its store": {[]http.HandlerFunc{
			stream(frame("ERROR", status(500, "InternalError",
				"the required storage feature RequestWatchProgress is disabled"))), list("30", peerNode(4)), quietly}, 1},
		"forgotten": {[]http.HandlerFunc{
			stream(frame("ADDED", one), lastBookmark, frame("MODIFIED", one)),
			stream(frame("ERROR", status(410, "Expired", "too old resource version"))),
			streamAndHold(frame("ADDED", peerNode(7).marshal()), frame("ADDED", peerNode(8).marshal()),
				frame("ADDED", peerNode(9).marshal()), lastBookmark)}, 3},
	} {
		t.Run(name, func(t *testing.T) {
			said := logged(t)
			s := &scripted{answers: c.answers}
			m := followUntil(t, s, c.want)
			if text := said(); text != "" {
				t.Errorf("logged\n%s", text)
			}
			if !m.health.State().Connected {
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
	followUntil(t, s, 2)
	for i, asked := range s.asked {
		if want := "watch=true version=20 initial="; i > 0 && i < 9 && asked != want {
			t.Errorf("request %d asks for %s, not for %s", i, asked, want)
		}
	}
	// Our credentials and the rest are two causes.
	if text := said(); strings.Count(text, `operation="watch the Nodes"`) != 2 ||
		strings.Count(text, "The store is back") != 1 {
		t.Errorf("logged\n%s", text)
	}
}

// A reflector that is slow to begin takes a watch for shorter than it was. Without an event it would request the whole
// state.
func TestShortWatchHasAnEvent(t *testing.T) {
	for name, c := range map[string]struct {
		initial bool
		events  []watch.Event // before the end
		version string        // of the last event
	}{
		"a watch":                {false, nil, "7"},
		"a watch with the state": {true, []watch.Event{{Type: watch.Bookmark, Object: &Node{ObjectMeta: metav1.ObjectMeta{ResourceVersion: "20"}}}}, "20"},
	} {
		t.Run(name, func(t *testing.T) {
			m := testManager(onlyIPv4)
			m.client = testClient(t, "http://127.0.0.1:1")
			w := &nodeWatcher{manager: m, settledAfter: settledAfter}
			from := watch.NewFakeWithChanSize(len(c.events), false)
			for _, e := range c.events {
				from.Action(e.Type, e.Object)
			}
			from.Stop()
			var got []watch.Event
			for e := range w.observe(t.Context(), from, "7", c.initial).ResultChan() {
				got = append(got, e)
			}
			if len(got) != len(c.events)+1 {
				t.Fatalf("%d events: %v", len(got), got)
			}
			last := got[len(got)-1]
			if node, ok := last.Object.(*Node); !ok || last.Type != watch.Bookmark || node.ResourceVersion != c.version {
				t.Errorf("the last event is %+v", last)
			}
		})
	}
}

// A watch that stalls goes on from where it was, too, and is no outage: there are
// API servers that send no bookmarks.
func TestStalledWatch(t *testing.T) {
	said := logged(t)
	m := testManager(onlyIPv4)
	m.client = testClient(t, "http://127.0.0.1:1")
	s := &stalling{}
	m.client.rest.Client.Transport = s
	ctx, cancel := context.WithCancel(t.Context())
	s.enough = func() { cancel() }
	m.reflectNodes(ctx, "", "watch the Nodes", newPeers(m))
	for i, asked := range s.asked {
		if i > 0 && asked != "version=7 initial=" {
			t.Errorf("request %d is for %s", i, asked)
		}
	}
	if text := said(); text != "" || len(s.asked) < 2 {
		t.Errorf("asked %d times, logged\n%s", len(s.asked), text)
	}
}

// stalling answers with some events, and then with what a stallGuard makes of
// silence.
type stalling struct {
	asked  []string
	enough func() // ends it
}

func (s *stalling) RoundTrip(r *http.Request) (*http.Response, error) {
	q := r.URL.Query()
	if s.asked = append(s.asked, "version="+q.Get("resourceVersion")+" initial="+q.Get("sendInitialEvents")); len(s.asked) == 4 {
		s.enough()
	}
	events := bytes.NewReader(bytes.Join([][]byte{frame("ADDED", peerNode(1).marshal()), lastBookmark,
		frame("MODIFIED", peerNode(1).marshal())}, nil))
	body := io.NopCloser(io.MultiReader(events, silent{}))
	return &http.Response{StatusCode: http.StatusOK,
			Header: http.Header{"Content-Type": {"application/vnd.kubernetes.protobuf;stream=watch"}}, Body: body, Request: r},
		nil
}

type silent struct{}

func (silent) Read([]byte) (int, error) { return 0, errStalled{silence} }

// What is no list of Nodes is not taken for an empty one: the peers stay.
func TestNoList(t *testing.T) {
	for name, body := range map[string]string{
		"an empty object": "{}",
		"JSON":            `{"kind":"NodeList","apiVersion":"v1","metadata":{"resourceVersion":"5"},"items":[{"metadata":{"name":"n1"}}]}`,
		"a success":       `{"kind":"Status","apiVersion":"v1","status":"Success"}`,
	} {
		t.Run(name, func(t *testing.T) {
			said := logged(t)
			asked := make(chan struct{}, 1)
			s := &scripted{answers: []http.HandlerFunc{
				stream(frame("ADDED", peerNode(1).marshal()), lastBookmark,
					frame("ERROR", status(410, "Expired", "too old resource version"))),
				func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) },
				func(w http.ResponseWriter, _ *http.Request) {
					w.Header().Set("Content-Type", "application/json")
					io.WriteString(w, body)
				},
				func(w http.ResponseWriter, _ *http.Request) {
					w.WriteHeader(http.StatusBadGateway)
					select {
					case asked <- struct{}{}:
					default:
					}
				},
			}}
			server := httptest.NewServer(s)
			defer server.Close()
			ctx, cancel := context.WithCancel(t.Context())
			m := testManager(onlyIPv4)
			m.client = testClient(t, server.URL)
			p := newPeers(m)
			var running sync.WaitGroup
			running.Go(func() { m.reflectNodes(ctx, "", "watch the Nodes", p) })
			<-asked
			cancel()
			running.Wait()
			if len(p.byName) != 1 {
				t.Errorf("there are %d peers", len(p.byName))
			}
			if !strings.Contains(said(), "the answer is not a list of Nodes") {
				t.Error("the answer is not logged")
			}
		})
	}
}

// Nobody waits for a reflector that pauses.
func TestCloseWhileRefused(t *testing.T) {
	logged(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	m := testManager(onlyIPv4)
	m.client = testClient(t, "http://"+l.Addr().String())
	ctx, cancel := context.WithCancel(t.Context())
	w := &nodeWatcher{manager: m, limit: rate.NewLimiter(rate.Inf, 1)}
	ended := result(t, func() (bool, error) {
		initial := true
		_, err := w.watch(ctx, metav1.ListOptions{SendInitialEvents: &initial})
		return false, err
	})
	for m.health.State().Problem == "" {
		runtime.Gosched()
	}
	cancel()
	if _, err := ended(); !errors.Is(err, context.Canceled) {
		t.Errorf("client-go is left to pause: %v", err)
	}
}

// The log names the reason for which there is no answer.
func TestCause(t *testing.T) {
	m := testManager(onlyIPv4)
	m.client = testClient(t, "http://127.0.0.1:1")
	w := &nodeWatcher{manager: m, limit: rate.NewLimiter(rate.Inf, 1)}
	for want, cause := range map[string]error{
		"i/o timeout":      &net.OpError{Op: "dial", Net: "tcp", Err: os.ErrDeadlineExceeded},
		errClosed.Error():  io.ErrUnexpectedEOF,
		"no answer for 2m": errStalled{silence},
	} {
		m.client.rest.Client.Transport = stallGuard{failing{cause}}
		if _, err := w.tryWatch(t.Context(), metav1.ListOptions{Watch: true, ResourceVersion: "5"}); err == nil ||
			!strings.Contains(err.Error(), want) {
			t.Errorf("%v is told as %v", cause, err)
		}
	}
}

type failing struct{ err error }

func (f failing) RoundTrip(*http.Request) (*http.Response, error) { return nil, f.err }

// A server that always breaks off is not asked again at once.
func TestReflectIsPaced(t *testing.T) {
	logged(t)
	for name, answer := range map[string]http.HandlerFunc{
		"each watch ends after an event": stream(frame("ADDED", peerNode(1).marshal())),
		"a frame is cut": stream(frame("ADDED", peerNode(1).marshal()),
			frame("ADDED", peerNode(2).marshal())[:100]),
		"nothing is answered": func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
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
			m.reflectNodes(ctx, "", "watch the Nodes", newPeers(m))
			s.mu.Lock()
			defer s.mu.Unlock()
			if n := len(s.asked); n > requestBurst+4 {
				t.Errorf("it was asked %d times in three seconds", n)
			}
		})
	}
}

// A server lists pages of a version as they were then. A reflector that may not watch from a version lists the latest
// state instead, whether the answer comes in pages or not.
func TestPagesOfTheLatestState(t *testing.T) {
	var versions []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("limit") != "" {
			versions = append(versions, r.URL.Query().Get("resourceVersion"))
		}
		list("20")(w, r)
	}))
	t.Cleanup(server.Close)
	m := testManager(onlyIPv4)
	var err error
	if m.client, err = newClient(t.Context(), Options{APIURL: server.URL}); err != nil {
		t.Fatal(err)
	}
	w := &nodeWatcher{manager: m, limit: rate.NewLimiter(rate.Inf, 1)}
	for _, version := range []string{"0", "10"} {
		if _, err := w.list(t.Context(), metav1.ListOptions{ResourceVersion: version, Limit: 500}); err != nil {
			t.Fatal(err)
		}
	}
	if !slices.Equal(versions, []string{"", ""}) {
		t.Errorf("pages of the versions %q are requested", versions)
	}
}
