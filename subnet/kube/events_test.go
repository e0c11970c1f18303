package kube

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"path"
	"slices"
	"sync"
	"testing"
	"time"

	"k8s.io/klog/v2"
)

// eventServer keeps Events as the API server does.
type eventServer struct {
	*httptest.Server
	mu        sync.Mutex
	counts    map[string]int // by name
	requests  []string       // methods
	forbidden bool
}

func newEventServer(t *testing.T) *eventServer {
	s := &eventServer{counts: map[string]int{}}
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.Close)
	return s
}

func (s *eventServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests = append(s.requests, r.Method)
	var e struct {
		Metadata struct{ Name string }
		Count    *int
	}
	if err := json.NewDecoder(r.Body).Decode(&e); err != nil {
		panic(err)
	}
	name := path.Base(r.URL.Path)
	if r.Method == http.MethodPost {
		name = e.Metadata.Name
	}
	_, known := s.counts[name]
	switch {
	case s.forbidden:
		http.Error(w, "not allowed", http.StatusForbidden)
		return
	case r.Method == http.MethodPatch && !known:
		http.Error(w, "not found", http.StatusNotFound)
		return
	case e.Count != nil:
		s.counts[name] = *e.Count
	}
	fmt.Fprintf(w, `{"count": %d}`, s.counts[name])
}

func testClient(t *testing.T, url string) *client {
	c, err := newClient(t.Context(), Options{APIURL: url, AnnotationPrefix: DefaultAnnotationPrefix})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// told returns the methods of the requests since the last time.
func (s *eventServer) told() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	told := s.requests
	s.requests = nil
	return told
}

// count returns the count of the only Event; 0 where there is none.
func (s *eventServer) count(t *testing.T) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.counts) > 1 {
		t.Errorf("there are the Events %v", s.counts)
	}
	for _, n := range s.counts {
		return n
	}
	return 0
}

func TestNotices(t *testing.T) {
	s := newEventServer(t)
	fresh := func() *events {
		return newEvents(klog.Logger{}, testClient(t, s.URL), func() string { return "n1" })
	}
	n := fresh()
	step := func(what string, count int, methods ...string) {
		t.Helper()
		n.write(t.Context())
		if got := s.told(); !slices.Equal(got, methods) || s.count(t) != count {
			t.Errorf("%s: %v, and the count is %d; want %v and %d", what, got, s.count(t), methods, count)
		}
	}
	later := func(by time.Duration) {
		for _, v := range n.all {
			v.tried = v.tried.Add(-by)
		}
	}
	n.begin("x", "Reason", "message")
	n.end("x")
	step("over at once", 0)
	for range 3 {
		n.begin("x", "Reason", "message")
	}
	step("thrice", 3, "PATCH", "POST")
	n.begin("x", "Reason", "message")
	step("too soon", 3)
	later(eventRest)
	step("a minute later", 4, "PATCH")
	later(eventRest)
	step("nothing new", 4)
	later(eventAgain)
	step("it goes on", 5, "PATCH")
	n.end("x")
	later(eventAgain)
	step("it is over", 5)
	if n.idle() {
		t.Error("forgotten at once")
	}
	later(eventMemory)
	if !n.idle() || len(n.all) != 0 {
		t.Error("never forgotten")
	}

	n = fresh()
	n.begin("x", "Reason", "message")
	step("another life", 6, "PATCH", "PATCH")
	n.begin("x", "Reason", "another message")
	step("another message, too soon", 6)

	s.counts, s.forbidden = map[string]int{}, true
	n = fresh()
	n.begin("x", "Reason", "message")
	step("not allowed", 0, "PATCH")
	later(eventRest)
	step("not tried again soon", 0)
	s.Close()
	n = fresh()
	n.begin("x", "Reason", "message")
	step("nobody answers", 0)
	s2 := newEventServer(t)
	n.client = testClient(t, s2.URL)
	s = s2
	later(eventRest)
	step("until then it waits", 1, "PATCH", "POST")

	// Only so many at once.
	for i := range 2 * maxEvents {
		n.begin(fmt.Sprint(i), "Reason", "message")
	}
	if len(n.all) != maxEvents {
		t.Errorf("%d events", len(n.all))
	}
}
