package lab

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// kubeURL is where the API server is, as nodes see it.
const kubeURL = "https://198.18.0.254:6443"

// Kube is a control plane on the lab's etcd: a real kube-apiserver, and a real
// kube-controller-manager that hands out podCIDRs.
type Kube struct {
	lab         *Lab
	dir         string
	args        []string // of the API server, besides ours
	http        *http.Client
	server      *Process
	controllers *Process
}

// The users, by their token: an administrator, and the one that the daemon is.
const (
	kubeAdmin  = "admin"
	kubeDaemon = "flannel"
)

// NewKube starts a control plane whose nodes get podCIDRs of clusterCIDR. More
// arguments are for the API server.
func (l *Lab) NewKube(ctx context.Context, clusterCIDR string, args ...string) (*Kube, error) {
	k := &Kube{lab: l, dir: filepath.Join(l.Dir, "kube"), args: args}
	k.http = &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DialContext:     l.net.Dial,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, // its certificate is its own
	}}
	if err := os.MkdirAll(k.dir, 0o755); err != nil {
		return nil, err
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	files := map[string]string{
		"sa.key": string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})),
		"tokens": kubeAdmin + ",admin,1,system:masters\n" + kubeDaemon + ",flannel,2\n",
	}
	for _, user := range []string{kubeAdmin, kubeDaemon} {
		files[user+".kubeconfig"] = fmt.Sprintf(`{"apiVersion": "v1", "kind": "Config", "current-context": "lab",
			"clusters": [{"name": "lab", "cluster": {"server": %q, "insecure-skip-tls-verify": true}}],
			"users": [{"name": "lab", "user": {"token": %q}}],
			"contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}]}`, kubeURL, user)
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(k.dir, name), []byte(text), 0o600); err != nil {
			return nil, err
		}
	}
	if err := k.Start(ctx); err != nil {
		return nil, err
	}
	k.controllers, err = k.launch("kube-controller-manager",
		"--kubeconfig="+k.Kubeconfig(kubeAdmin),
		"--controllers=node-ipam-controller",
		"--allocate-node-cidrs", "--cluster-cidr="+clusterCIDR,
		"--leader-elect=false", "--bind-address=127.0.0.1")
	return k, err
}

// Kubeconfig is the path of a user's credentials.
func (k *Kube) Kubeconfig(user string) string { return filepath.Join(k.dir, user+".kubeconfig") }

// DaemonArgs are the flags with which a daemon takes its lease from here, with
// the network's configuration in a file.
func (k *Kube) DaemonArgs(config string) ([]string, error) {
	file := filepath.Join(k.dir, "net-conf.json")
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		return nil, err
	}
	return []string{"--kube-subnet-mgr", "--kubeconfig-file=" + k.Kubeconfig(kubeDaemon), "--net-config-path=" + file}, nil
}

func (k *Kube) launch(program string, args ...string) (*Process, error) {
	path, err := k.lab.Program("kube/" + program)
	if err != nil {
		return nil, err
	}
	log, err := os.OpenFile(filepath.Join(k.dir, program+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(path, args...)
	cmd.Stdout, cmd.Stderr = log, log
	return k.lab.net.Launch(cmd)
}

// Start starts the API server, also again after Kill, and returns when it is
// ready.
func (k *Kube) Start(ctx context.Context) error {
	sa := filepath.Join(k.dir, "sa.key")
	var err error
	k.server, err = k.launch("kube-apiserver", append([]string{
		"--etcd-servers=" + Endpoint,
		"--bind-address=198.18.0.254", "--advertise-address=198.18.0.254",
		"--cert-dir=" + k.dir,
		"--service-cluster-ip-range=198.19.128.0/24",
		"--service-account-issuer=https://lab", "--service-account-key-file=" + sa, "--service-account-signing-key-file=" + sa,
		"--authorization-mode=RBAC", "--token-auth-file=" + filepath.Join(k.dir, "tokens"),
	}, k.args...)...)
	if err != nil {
		return err
	}
	return Poll(ctx, "kube-apiserver", func() error {
		if k.server.Exited() {
			return fmt.Errorf("it has exited\n%s", tail(filepath.Join(k.dir, "kube-apiserver.log")))
		}
		_, err := k.Do(ctx, http.MethodGet, "/readyz", nil)
		return err
	})
}

// Kill ends the API server as a crash would.
func (k *Kube) Kill() { k.server.Kill() }

// Do sends an administrator's request and returns the answer. A body is JSON,
// or YAML where it begins like that.
func (k *Kube) Do(ctx context.Context, method, path string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, kubeURL+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+kubeAdmin)
	req.Header.Set("Content-Type", "application/json")
	if !bytes.HasPrefix(bytes.TrimSpace(body), []byte("{")) {
		req.Header.Set("Content-Type", "application/yaml")
	}
	if method == http.MethodPatch {
		req.Header.Set("Content-Type", "application/strategic-merge-patch+json")
	}
	resp, err := k.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode/100 != 2 {
		err = fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, bytes.TrimSpace(answer))
	}
	return answer, err
}

// AddNode registers a node as kubelet does. Podless, it has no podCIDR until
// the controllers, or somebody, give it one.
func (k *Kube) AddNode(ctx context.Context, n *Node) error {
	node := map[string]any{
		"apiVersion": "v1", "kind": "Node",
		"metadata": map[string]any{"name": n.Hostname},
	}
	body, err := json.Marshal(node)
	if err != nil {
		return err
	}
	if _, err := k.Do(ctx, http.MethodPost, "/api/v1/nodes", body); err != nil {
		return err
	}
	status, err := json.Marshal(map[string]any{"status": map[string]any{"addresses": []map[string]string{
		{"type": "InternalIP", "address": n.IPv4.String()}, {"type": "InternalIP", "address": n.IPv6.String()}, {"type": "Hostname", "address": n.Hostname},
	}}})
	if err != nil {
		return err
	}
	_, err = k.Do(ctx, http.MethodPatch, "/api/v1/nodes/"+n.Hostname+"/status", status)
	return err
}

// DeleteNode deletes a node.
func (k *Kube) DeleteNode(ctx context.Context, name string) error {
	_, err := k.Do(ctx, http.MethodDelete, "/api/v1/nodes/"+name, nil)
	return err
}

// KubeNode is what of a Node tests look at.
type KubeNode struct {
	Metadata struct{ Annotations map[string]string }
	Spec     struct {
		PodCIDR  string
		PodCIDRs []string
	}
	Status struct {
		Conditions []struct{ Type, Status, Reason, Message string }
	}
}

// Node reads a node.
func (k *Kube) Node(ctx context.Context, name string) (KubeNode, error) {
	var n KubeNode
	answer, err := k.Do(ctx, http.MethodGet, "/api/v1/nodes/"+name, nil)
	if err != nil {
		return n, err
	}
	return n, json.Unmarshal(answer, &n)
}

// Apply creates the objects of a YAML file, one after the other, at the paths
// that go with their kinds.
func (k *Kube) Apply(ctx context.Context, text string) error {
	paths := map[string]string{
		"ClusterRole":        "/apis/rbac.authorization.k8s.io/v1/clusterroles",
		"ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
	}
	var errs []error
	for _, doc := range strings.Split(text, "\n---\n") {
		kind := ""
		for line := range strings.Lines(doc) {
			if rest, ok := strings.CutPrefix(line, "kind: "); ok {
				kind = strings.TrimSpace(rest)
				break
			}
		}
		path, ok := paths[kind]
		if !ok {
			errs = append(errs, fmt.Errorf("no path for kind %q", kind))
			continue
		}
		_, err := k.Do(ctx, http.MethodPost, path, []byte(doc))
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
