package kube

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/subnet/subnettest"
)

const testPrefix = "flannel.alpha.coreos.com/"

// An apiServer keeps Nodes as the API server does: it lists them, streams their changes and takes patches.
type apiServer struct {
	*httptest.Server

	mu      sync.Mutex
	nodes   map[string]*testNode
	version int
	oldest  int // the version from which on changes are known
	changes []nodeChange
	changed chan struct{} // closed, and replaced, at each change
	failing bool
}

// nodeChange is what a watch sends for one version.
type nodeChange struct {
	version int
	name    string
	frame   []byte
}

func newAPIServer(t *testing.T) *apiServer {
	s := &apiServer{nodes: map[string]*testNode{}, changed: make(chan struct{})}
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.Close)
	return s
}

// update changes a Node, which is created if need be.
func (s *apiServer) update(name string, change func(*testNode)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.updateLocked(name, change)
}

func (s *apiServer) updateLocked(name string, change func(*testNode)) {
	n, event := s.nodes[name], "MODIFIED"
	if n == nil {
		n, event = &testNode{name: name, created: 1}, "ADDED"
		s.nodes[name] = n
	}
	change(n)
	s.version++
	n.version = strconv.Itoa(s.version)
	s.changes = append(s.changes, nodeChange{s.version, name, frame(event, n.marshal())})
	s.wake()
}

func (s *apiServer) wake() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// setFailing makes requests fail and ends watches; or makes requests succeed again, without the changes of before where
// those are to be forgotten.
func (s *apiServer) setFailing(failing, forget bool) {
	s.mu.Lock()
	s.failing = failing
	if forget {
		s.oldest = s.version
	}
	s.wake()
	s.mu.Unlock()
	s.CloseClientConnections()
}

func (s *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	const nodes = "/api/v1/nodes"
	name := strings.TrimPrefix(r.URL.Query().Get("fieldSelector"), "metadata.name=")
	switch {
	case s.failing:
		http.Error(w, "failing", http.StatusServiceUnavailable)
	case r.URL.Path == "/version":
	case r.Method == http.MethodPatch && strings.HasPrefix(r.URL.Path, nodes):
		s.patch(w, r, strings.TrimSuffix(strings.TrimPrefix(r.URL.Path, nodes+"/"), "/status"))
	case r.URL.Path != nodes:
		http.Error(w, "forbidden", http.StatusForbidden)
	case r.URL.Query().Get("watch") != "":
		s.watch(w, r, name)
	default:
		list(strconv.Itoa(s.version), s.named(name)...)(w, r)
	}
}

// named returns the Node with a name; all Nodes if that is "".
func (s *apiServer) named(name string) (nodes []testNode) {
	for _, n := range s.nodes {
		if name == "" || n.name == name {
			nodes = append(nodes, *n)
		}
	}
	return nodes
}

func (s *apiServer) patch(w http.ResponseWriter, r *http.Request, name string) {
	var p struct {
		Metadata struct{ Annotations map[string]string }
		Status   struct {
			Conditions []struct{ Type, Status string }
		}
	}
	if err := json.NewDecoder(r.Body).Decode(&p); err != nil {
		panic(err)
	}
	if s.nodes[name] == nil {
		notFound(w)
		return
	}
	s.updateLocked(name, func(n *testNode) {
		for key, value := range p.Metadata.Annotations {
			n.annotate(key, value)
		}
		for _, c := range p.Status.Conditions {
			n.networkUp = n.networkUp || c.Type == "NetworkUnavailable" && c.Status == "False"
		}
	})
	takenAs(s.nodes[name].marshal())(w)
}

// watch streams changes, after all Nodes where those are asked for. The caller holds s.mu.
func (s *apiServer) watch(w http.ResponseWriter, r *http.Request, name string) {
	w.Header().Set("Content-Type", "application/vnd.kubernetes.protobuf;stream=watch")
	sent, _ := strconv.Atoi(r.URL.Query().Get("resourceVersion"))
	if r.URL.Query().Get("sendInitialEvents") != "" {
		for _, n := range s.named(name) {
			w.Write(frame("ADDED", n.marshal()))
		}
		sent = s.version
		end := text(text(nil, 1, "k8s.io/initial-events-end"), 2, "true")
		w.Write(frame("BOOKMARK", text(nil, 1, string(text(text(nil, 6, strconv.Itoa(sent)), 12, string(end))))))
	}
	for !s.failing {
		if sent < s.oldest {
			w.Write(frame("ERROR", status(410, "Expired", "too old resource version")))
			return
		}
		for _, c := range s.changes {
			if c.version > sent && (name == "" || c.name == name) {
				w.Write(c.frame)
			}
		}
		sent = s.version
		w.(http.Flusher).Flush()
		changed := s.changed
		s.mu.Unlock()
		select {
		case <-changed:
		case <-r.Context().Done():
		}
		s.mu.Lock()
		if r.Context().Err() != nil {
			return
		}
	}
}

// annotate sets an annotation; "" removes it.
func (n *testNode) annotate(key, value string) {
	n.annotations = slices.DeleteFunc(slices.Clone(n.annotations),
		func(a string) bool { return strings.HasPrefix(a, key+"=") })
	if value != "" {
		n.annotations = append(n.annotations, key+"="+value)
	}
}

// The Manager passes the suite of all subnet managers.
func TestConformance(t *testing.T) {
	logged(t)
	subnettest.Run(t, newHarness)
}

func newHarness(t *testing.T) subnettest.Harness {
	s := newAPIServer(t)
	config := filepath.Join(t.TempDir(), "net-conf.json")
	name := func(node int) string { return fmt.Sprintf("n%d", node) }
	cidr := func(l subnet.Subnets) []string { return []string{l.IPv4.String()} }
	return subnettest.Harness{
		Manager: func(node int) subnet.Manager {
			m, err := New(t.Context(), Options{
				APIURL: s.URL, NodeName: name(node), AnnotationPrefix: testPrefix, ConfigPath: config, SetCondition: true,
			})
			if err != nil {
				t.Fatal(err)
			}
			return m
		},
		Configure: func(text string) {
			if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		},
		ConfigFirst: true,
		SetLease: func(node int, l subnet.Lease) {
			s.mu.Lock()
			defer s.mu.Unlock()
			for _, n := range s.nodes {
				if n.name != name(node) && slices.Equal(n.cidrs, cidr(l.Subnets)) {
					s.updateLocked(n.name, func(n *testNode) { n.cidrs = nil })
				}
			}
			s.updateLocked(name(node), func(n *testNode) {
				n.cidrs = cidr(l.Subnets)
				for key, value := range annotationsOf(l.Attrs) {
					n.annotate(testPrefix+key, value)
				}
			})
		},
		DeleteLease: func(node int, _ subnet.Subnets) {
			s.update(name(node), func(n *testNode) { n.annotations = nil })
		},
		Assign:   func(node int, l subnet.Subnets) { s.update(name(node), func(n *testNode) { n.cidrs = cidr(l) }) },
		NoExpiry: true,
		Republish: func(node int, ip netip.Addr) {
			s.update(name(node), func(n *testNode) { n.annotate(testPrefix+publicIPOverwrite, ip.String()) })
		},
		Ready: func(node int) bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.nodes[name(node)].networkUp
		},
		Fail: func() func() {
			s.setFailing(true, false)
			return func() { s.setFailing(false, false) }
		},
		Gap: func(change func()) {
			s.setFailing(true, false)
			change()
			s.setFailing(false, true)
		},
	}
}
