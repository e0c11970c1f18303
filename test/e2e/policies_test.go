package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// TestPolicies: kube-network-policies decides which pods talk over flanneld's network, on one node and between nodes.
// The program is the real one, the API server is not: TestNetworkPolicy has a whole cluster. With nftables, the
// program's own rules pass packets to it, which needs a kernel whose nftables has a queue. With iptables, others do.
func TestPolicies(t *testing.T) {
	t.Parallel()
	t.Run("nftables", func(t *testing.T) {
		labtest.NeedKernel(t, lab.QueueRule)
		testPolicies(t)
	})
	t.Run("iptables", testPolicies)
}

func testPolicies(t *testing.T) {
	labtest.NeedPrograms(t, "kube/netpol")
	ctx := labtest.Context(t, time.Minute)
	l := labtest.New(ctx, t, configuration(ipv4Network, `{"Type": "vxlan"}`, false), make([]lab.NodeOptions, 2)...)
	labtest.Start(ctx, t, l, "--ip-masq")
	api := newPolicyAPI()
	api.put(map[string]any{"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"name": "default"}})
	var pods []*lab.Pod
	var objects []map[string]any
	for i, on := range []int{0, 0, 1} {
		n, name := l.Nodes()[on], fmt.Sprintf("pod%d", i)
		p := labtest.Must(n.AddPod(ctx, name))(t)
		labtest.Do(t, p.Mirror())
		pods = append(pods, p)
		objects = append(objects, map[string]any{"apiVersion": "v1", "kind": "Pod",
			"metadata": map[string]any{"name": name, "namespace": "default", "labels": map[string]any{"app": "echo"}},
			"spec":     map[string]any{"nodeName": n.Hostname},
			"status":   map[string]any{"phase": "Running", "podIPs": []any{map[string]any{"ip": p.IPv4.String()}}}})
		api.put(objects[i])
	}
	for _, n := range l.Nodes() {
		startNetpol(ctx, t, l, n, api)
		queuePackets(ctx, t, n, "10.5.0.0/16")
	}

	wait := func(what string, callers []*lab.Pod) {
		t.Helper()
		waitCalls(ctx, t, what, pods, callers, func(from, to *lab.Pod) error {
			ctx, cancel := context.WithTimeout(ctx, lab.Patiently(time.Second)) // half of what each refusal takes otherwise
			defer cancel()
			_, err := from.SeenAs(ctx, "tcp", to.IPv4)
			return err
		})
	}
	var policy map[string]any
	labtest.Do(t, yaml.Unmarshal([]byte(strings.ReplaceAll(friends, "8080", "7007")), &policy))
	wait("pods without a policy", pods)
	api.put(policy)
	wait("a policy that allows nobody", nil)
	objects[0]["metadata"].(map[string]any)["labels"] = map[string]any{"app": "echo", "friend": "yes"}
	api.put(objects[0])
	wait("a friend", pods[:1])
	api.remove(policy)
	wait("no policy", pods)
}

// startNetpol starts kube-network-policies on a node, as in a container of its own.
func startNetpol(ctx context.Context, t *testing.T, l *lab.Lab, n *lab.Node, api *policyAPI) {
	t.Helper()
	var listener net.Listener
	labtest.Do(t, n.Do(func() (err error) {
		listener, err = net.Listen("tcp", "127.0.0.1:0")
		return err
	}))
	server := &httptest.Server{Listener: listener, Config: &http.Server{Handler: api}}
	server.StartTLS()
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	account := filepath.Join(n.Dir, "account")
	labtest.Do(t, os.Mkdir(account, 0o755))
	labtest.Do(t, os.WriteFile(filepath.Join(account, "ca.crt"), ca, 0o600))
	labtest.Do(t, os.WriteFile(filepath.Join(account, "token"), []byte("token"), 0o600))
	const script = `mount -t tmpfs tmpfs /run && mkdir -p ` + serviceAccountDir + ` && cp "$1"/* ` + serviceAccountDir + ` &&
		exec "$2" --hostname-override="$3" --v=2`
	cmd := exec.Command("unshare", "-m", "sh", "-c", script, "sh", account,
		labtest.Must(l.Program("kube/netpol"))(t), n.Hostname)
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.Env = append(os.Environ(), "KUBERNETES_SERVICE_HOST=127.0.0.1",
		"KUBERNETES_SERVICE_PORT="+strconv.Itoa(listener.Addr().(*net.TCPAddr).Port))
	p := labtest.Must(n.Launch(cmd))(t)
	t.Cleanup(func() {
		p.Kill()
		if t.Failed() {
			t.Logf("kube-network-policies of %s said:\n%s", n.Hostname, log.Bytes())
			rules, _ := n.Run(context.WithoutCancel(ctx), "nft list table inet kube-network-policies")
			t.Logf("its rules:\n%s", rules)
		}
	})
}

// policyLists are the paths of lists that kube-network-policies reads, by the kind of the objects.
var policyLists = map[string]string{
	"Namespace":     "/api/v1/namespaces",
	"Pod":           "/api/v1/pods",
	"NetworkPolicy": "/apis/networking.k8s.io/v1/networkpolicies",
}

// A policyAPI is as much of an API server as kube-network-policies needs: lists and watches, without expiry.
type policyAPI struct {
	mu      sync.Mutex
	events  []policyEvent
	changed chan struct{} // closed by the next event
}

// A policyEvent is an event of a watch. The resource version is the number of events.
type policyEvent struct {
	kind, name string
	Type       string          `json:"type"`
	Object     json.RawMessage `json:"object"`
}

func newPolicyAPI() *policyAPI { return &policyAPI{changed: make(chan struct{})} }

// put creates or replaces an object.
func (a *policyAPI) put(object map[string]any) { a.add("MODIFIED", object) }

func (a *policyAPI) remove(object map[string]any) { a.add("DELETED", object) }

func (a *policyAPI) add(event string, object map[string]any) {
	a.mu.Lock()
	defer a.mu.Unlock()
	meta := object["metadata"].(map[string]any)
	meta["resourceVersion"] = strconv.Itoa(len(a.events) + 1)
	text, err := json.Marshal(object)
	if err != nil {
		panic(err)
	}
	a.events = append(a.events, policyEvent{object["kind"].(string), meta["name"].(string), event, text})
	close(a.changed)
	a.changed = make(chan struct{})
}

// since returns the events of a kind after a version, the version now, and what is closed by the next event.
func (a *policyAPI) since(kind string, version int) (events []policyEvent, now int, changed <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, e := range a.events[version:] {
		if e.kind == kind {
			events = append(events, e)
		}
	}
	return events, len(a.events), a.changed
}

func (a *policyAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	for kind, path := range policyLists {
		if r.Method != http.MethodGet || r.URL.Path != path {
			continue
		}
		w.Header().Set("Content-Type", "application/json")
		if r.FormValue("watch") == "" {
			a.list(w, kind)
		} else {
			a.watch(w, r, kind)
		}
		return
	}
	http.NotFound(w, r)
}

func (a *policyAPI) list(w http.ResponseWriter, kind string) {
	events, now, _ := a.since(kind, 0)
	items := map[string]json.RawMessage{}
	for _, e := range events {
		if items[e.name] = e.Object; e.Type == "DELETED" {
			delete(items, e.name)
		}
	}
	version := strings.TrimPrefix(strings.TrimPrefix(filepath.Dir(policyLists[kind]), "/apis/"), "/api/")
	json.NewEncoder(w).Encode(map[string]any{"apiVersion": version, "kind": kind + "List",
		"metadata": map[string]any{"resourceVersion": strconv.Itoa(now)}, "items": slices.Collect(maps.Values(items))})
}

func (a *policyAPI) watch(w http.ResponseWriter, r *http.Request, kind string) {
	now, err := strconv.Atoi(r.FormValue("resourceVersion"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	for {
		events, next, changed := a.since(kind, now)
		for _, e := range events {
			json.NewEncoder(w).Encode(e)
		}
		w.(http.Flusher).Flush()
		now = next
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		}
	}
}
