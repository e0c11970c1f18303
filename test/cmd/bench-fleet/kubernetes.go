package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/subnet/kube"
	"github.com/flanneld/flanneld/test/kubelet"
	"github.com/flanneld/flanneld/test/lab"
)

const (
	apiPort   = "6443"
	nodesPath = "/api/v1/nodes"
)

// Users of the API server. The daemons are the service account of the published manifest, with its rights and its share
// of the server; another client has no share of its own.
const (
	adminToken, daemonToken, otherToken = "admin", "flannel", "other"

	users = `admin,admin,1,"system:masters"
flannel,system:serviceaccount:kube-flannel:flannel,2,"system:serviceaccounts,system:serviceaccounts:kube-flannel"
other,other,3
`
)

// A kubeStore is an API server, and what it keeps its state in.
type kubeStore struct {
	behind *cluster
	api    *server
	dir    string

	kubelets *kubelet.Client
	other    *kubelet.Client
	ours     atomic.Int64 // requests for Nodes that the simulator has sent
}

// newKubeStore starts an API server on a cluster that has no data.
func newKubeStore(ctx context.Context, behind *cluster, apiServer, dir string) (*kubeStore, error) {
	s := &kubeStore{behind: behind, dir: dir}
	url := "https://127.0.0.1:" + apiPort
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return s, err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return s, err
	}
	accounts, tokens := s.file("accounts.key"), s.file("tokens")
	kubeconfig := fmt.Sprintf(`{"apiVersion": "v1", "kind": "Config", "current-context": "fleet",
		"clusters": [{"name": "fleet", "cluster": {"server": %q, "insecure-skip-tls-verify": true}}],
		"users": [{"name": "flannel", "user": {"token": %q}}],
		"contexts": [{"name": "fleet", "context": {"cluster": "fleet", "user": "flannel"}}]}`, url, daemonToken)
	for file, text := range map[string]string{
		accounts: string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})), tokens: users,
		s.file("kubeconfig"): kubeconfig, s.file("network.json"): network,
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			return s, err
		}
	}
	s.api = &server{kind: "kube-apiserver", log: s.file("api.log"), args: []string{apiServer,
		"--etcd-servers=" + strings.Join(behind.endpoints, ","), "--bind-address=0.0.0.0", "--secure-port=" + apiPort,
		"--advertise-address=198.18.0.1", "--endpoint-reconciler-type=none", // nobody uses the Service
		"--cert-dir=" + dir, "--service-cluster-ip-range=198.19.128.0/24", "--service-account-issuer=https://fleet",
		"--service-account-key-file=" + accounts, "--service-account-signing-key-file=" + accounts,
		"--authorization-mode=RBAC", "--token-auth-file=" + tokens,
	}}
	client := &http.Client{Transport: countNodes{insecure(), &s.ours}}
	s.kubelets = &kubelet.Client{HTTP: client, Server: url, Token: adminToken}
	s.other = &kubelet.Client{HTTP: client, Server: url, Token: otherToken}
	if s.api.metrics, err = http.NewRequest(http.MethodGet, url+"/metrics", nil); err != nil {
		return s, err
	}
	s.api.metrics.Header.Set("Authorization", "Bearer "+adminToken)
	s.api.client, s.api.field = client, apiField
	if err := s.api.start(); err != nil {
		return s, err
	}
	return s, s.prepare(ctx)
}

func (s *kubeStore) file(name string) string { return filepath.Join(s.dir, name) }

// prepare waits for the API server, and gives users their rights.
func (s *kubeStore) prepare(ctx context.Context) error {
	if err := lab.Poll(ctx, "kube-apiserver", func() error {
		answer, err := s.kubelets.Do(ctx, http.MethodGet, "/readyz", http.Header{}, nil)
		if err == nil {
			answer.Body.Close()
		}
		return err
	}); err != nil {
		return fmt.Errorf("%w; see %s", err, s.api.log)
	}
	program, err := lab.Program("kube/kubectl")
	if err != nil {
		return err
	}
	manifest := filepath.Join(filepath.Dir(filepath.Dir(filepath.Dir(program))), "Documentation", "kube-flannel.yml")
	for _, args := range [][]string{
		{"apply", "-f", manifest}, // nobody runs its DaemonSet
		{"create", "clusterrolebinding", "other", "--clusterrole=cluster-admin", "--user=other"},
		{"create", "configmap", "probe"},
	} {
		cmd := exec.CommandContext(ctx, program, append([]string{"--server=" + s.kubelets.Server, "--token=" + adminToken,
			"--insecure-skip-tls-verify", "--cache-dir=" + s.file("cache")}, args...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("kubectl %s: %w: %s", args[0], err, out)
		}
	}
	return awaitAnswer(ctx, s)
}

// countNodes counts requests for Nodes.
type countNodes struct {
	next  http.RoundTripper
	count *atomic.Int64
}

func (c countNodes) RoundTrip(r *http.Request) (*http.Response, error) {
	if strings.HasPrefix(r.URL.Path, nodesPath) {
		c.count.Add(1)
	}
	return c.next.RoundTrip(r)
}

func (s *kubeStore) servers() []*server { return append([]*server{s.api}, s.behind.members...) }
func (s *kubeStore) own() int64         { return s.ours.Load() }

func (s *kubeStore) rests() []rest {
	return []rest{
		{what: "at rest"},
		{"at rest, with each kubelet's status every 5 minutes", s.heartbeats},
	}
}

func (s *kubeStore) moments() []moment {
	all := []moment{
		{"api", "the API server is away for 60 s", func(ctx context.Context, f *fleet) (time.Time, error) {
			return outage(ctx, f, s.api)
		}},
		{"store", s.behind.members[0].kind + " is away for 60 s", s.behind.loseAll},
		{"history", "half are cut off, and history is lost", s.loseHistory},
	}
	if len(s.behind.members) > 1 {
		all = append(all, moment{"leader", "etcd's leader is lost", s.behind.loseLeader})
	}
	return all
}

// loseHistory cuts half of the nodes off. Meanwhile the API server starts again, and no longer knows older versions.
func (s *kubeStore) loseHistory(ctx context.Context, f *fleet) (time.Time, error) {
	return f.cutHalf(ctx, 15*time.Second, func() error {
		if err := s.behind.compact(ctx); err != nil {
			return err
		}
		s.api.kill()
		return startServers(ctx, s)
	})
}

// apiField is the field of a server of an API server. The requests of a watch are counted when they end.
func apiField(t *traffic, line string) *float64 {
	name, labels, _ := strings.Cut(line, "{")
	switch {
	case !strings.Contains(labels, `resource="nodes"`) && !strings.Contains(labels, `kind="Node"`):
	case name == "apiserver_request_total" && strings.Contains(labels, `code="429"`):
		return &t.refused
	case name == "apiserver_request_total", name == "apiserver_longrunning_requests":
		return &t.requests
	case name == "apiserver_watch_events_total":
		return &t.events
	case name == "apiserver_request_body_size_bytes_sum":
		return &t.in
	case name == "apiserver_watch_events_sizes_sum",
		name == "apiserver_response_sizes_sum" && !strings.Contains(labels, `verb="WATCH"`): // which has the same bytes

		return &t.out
	}
	return nil
}

func (s *kubeStore) manager(ctx context.Context, n *node) (subnet.Manager, error) {
	return kube.New(ctx, kube.Options{
		APIURL: fmt.Sprintf("https://127.0.%d.1:%s", n.half(), apiPort), Kubeconfig: s.file("kubeconfig"),
		ConfigPath: s.file("network.json"), NodeName: nodeOf(n.number).Name, SetCondition: true,
	})
}

// nodeOf returns what kubelet registers for a node.
func nodeOf(number int) kubelet.Node {
	ip := publicIP(number)
	return kubelet.Node{
		Name:   fmt.Sprintf("ip-%s.eu-central-1.compute.internal", strings.ReplaceAll(ip.String(), ".", "-")),
		IP:     ip,
		Subnet: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(number >> 8), byte(number), 0}), 24),
	}
}

func (s *kubeStore) register(ctx context.Context, from, to int) error {
	return kubelet.Each(ctx, to-from, func(ctx context.Context, i int) error {
		return s.kubelets.Create(ctx, nodeOf(from+i))
	})
}

func (s *kubeStore) remove(ctx context.Context, gone []*node) error {
	return kubelet.Each(ctx, len(gone), func(ctx context.Context, i int) error {
		answer, err := s.kubelets.Do(ctx, http.MethodDelete, nodeOf(gone[i].number).Path(), http.Header{}, nil)
		if err == nil {
			err = answer.Body.Close()
		}
		return err
	})
}

// markNumber is the number that the first mark would have as a node.
const markNumber = maxNodes

func (s *kubeStore) mark(ctx context.Context, number int) error {
	n := nodeOf(markNumber + number)
	n.MAC = net.HardwareAddr{0x0e, 2, 0, 0, 0, byte(number)}
	return lab.Poll(ctx, "registering "+n.Name, func() error {
		err := s.kubelets.Register(ctx, n)
		if err != nil { // a part of it may be there
			s.kubelets.Do(ctx, http.MethodDelete, n.Path(), http.Header{}, nil)
		}
		return err
	})
}

// heartbeats has kubelets write the status of their Nodes, each once in kubelet.HeartbeatEvery.
func (s *kubeStore) heartbeats(ctx context.Context, count int) error {
	began := time.Now()
	for i := 0; ; i++ {
		due := began.Add(kubelet.HeartbeatEvery * time.Duration(i) / time.Duration(count))
		if pause(ctx, time.Until(due)) != nil {
			return nil
		}
		if err := s.kubelets.Heartbeat(ctx, nodeOf(i%count)); err != nil && ctx.Err() == nil {
			return err
		}
	}
}

func (s *kubeStore) leases(ctx context.Context, count int) (map[subnet.Subnets]subnet.Attrs, error) {
	answer, err := s.kubelets.Do(ctx, http.MethodGet, nodesPath, http.Header{
		"Accept": {"application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"}}, nil)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	var list struct {
		Items []struct {
			Metadata struct {
				Name        string
				Annotations map[string]string
			}
		}
	}
	if err := json.NewDecoder(answer.Body).Decode(&list); err != nil {
		return nil, err
	}
	leases := map[subnet.Subnets]subnet.Attrs{}
	for _, item := range list.Items {
		annotation := func(name string) string { return item.Metadata.Annotations[kube.DefaultAnnotationPrefix+name] }
		number, err := numberOf(item.Metadata.Name)
		if err != nil {
			return nil, err
		}
		if annotation("kube-subnet-manager") != "true" {
			return nil, fmt.Errorf("node %d has published nothing", number)
		}
		a := subnet.Attrs{BackendType: annotation("backend-type"), BackendData: json.RawMessage(annotation("backend-data"))}
		if a.PublicIP, err = netip.ParseAddr(annotation("public-ip")); err != nil {
			return nil, err
		}
		leases[subnet.Subnets{IPv4: nodeOf(number).Subnet}] = a
	}
	return leases, nil
}

// numberOf returns the number of the node that has a name.
func numberOf(name string) (int, error) {
	text, _, _ := strings.Cut(strings.TrimPrefix(name, "ip-"), ".")
	ip, err := netip.ParseAddr(strings.ReplaceAll(text, "-", "."))
	if err != nil {
		return 0, err
	}
	b := ip.As4()
	return (int(b[1])-18)<<16 + int(b[2])<<8 + int(b[3]) - 1<<16, nil
}

func (s *kubeStore) probe(ctx context.Context) error {
	const path = "/api/v1/namespaces/default/configmaps/probe"
	patch := map[string]any{"data": map[string]string{"at": time.Now().String()}}
	if err := s.other.Write(ctx, http.MethodPatch, path, "probe", patch); err != nil {
		return err
	}
	answer, err := s.other.Do(ctx, http.MethodGet, path, http.Header{}, nil)
	if err == nil {
		err = answer.Body.Close()
	}
	return err
}

func (s *kubeStore) close() {
	if s.api != nil {
		s.api.kill()
	}
	s.behind.close()
}
