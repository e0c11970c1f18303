package lab

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"sigs.k8s.io/yaml"
)

const (
	// kubeURL is where the API server is, as nodes see it.
	kubeURL = "https://198.18.0.254:6443"
	// spareURL is where a second one is, see Spare.
	spareURL = "https://198.18.0.254:6444"

	// Services get addresses of serviceRange, the API server the first.
	serviceRange = "198.19.128.0/24"
	serviceIP    = "198.19.128.1"
	// ServiceRangeV6 is for clusters with IPv6.
	ServiceRangeV6 = "fd19:0:0:8000::/108"
	serviceIPv6    = "fd19:0:0:8000::1"
)

// Kube is a control plane on the lab's etcd: a real kube-apiserver, and a real
// kube-controller-manager that hands out podCIDRs. Who talks to it knows it by
// its certificate.
type Kube struct {
	lab         *Lab
	dir         string
	url         string
	args        []string // of the API server, besides ours
	ca          *authority
	admin       tls.Certificate
	http        *http.Client // an administrator's
	server      *Process
	controllers *Process
}

// The users: an administrator, and the service account that the daemon is.
const (
	kubeAdmin  = "admin"
	kubeDaemon = "flannel"
)

// The names of the daemon's service account, and of the namespace that it is
// in: those of the published manifest.
const kubeNamespace, kubeAccount = "kube-flannel", "flannel"

// NewKube starts a control plane whose nodes get podCIDRs of clusterCIDR; none
// do, until StartControllers, where that is "". More arguments are for the API
// server.
func (l *Lab) NewKube(ctx context.Context, clusterCIDR string, args ...string) (*Kube, error) {
	k := &Kube{lab: l, dir: filepath.Join(l.Dir, "kube"), url: kubeURL, args: args}
	if err := os.MkdirAll(k.dir, 0o755); err != nil {
		return nil, err
	}
	if err := k.credentials(); err != nil {
		return nil, fmt.Errorf("credentials for kube-apiserver: %w", err)
	}
	if err := k.Start(ctx); err != nil {
		return nil, err
	}
	if clusterCIDR == "" {
		return k, nil
	}
	return k, k.StartControllers(clusterCIDR)
}

// credentials makes all keys, certificates and kubeconfigs.
func (k *Kube) credentials() (err error) {
	if k.ca, err = newAuthority(); err != nil {
		return err
	}
	var caKey, accounts, cert, key []byte
	if caKey, err = keyPEM(k.ca.key); err != nil {
		return err
	}
	signer, err := newKey()
	if err == nil {
		accounts, err = keyPEM(signer)
	}
	if err != nil {
		return err
	}
	for name, text := range map[string][]byte{"ca.crt": k.ca.pem, "ca.key": caKey, "sa.key": accounts} {
		if err := os.WriteFile(k.file(name), text, 0o600); err != nil {
			return err
		}
	}
	if cert, key, err = k.addUser(kubeAdmin, "system:masters"); err != nil {
		return err
	}
	if k.admin, err = tls.X509KeyPair(cert, key); err != nil {
		return err
	}
	if err := k.certify(k.ca); err != nil {
		return err
	}
	return errors.Join(replaceFile(k.caFile(), k.ca.pem),
		k.writeKubeconfig(kubeDaemon, "certificate-authority", k.caFile(), map[string]any{"tokenFile": k.TokenFile()}))
}

// certify has an authority issue the API server's certificate, and an
// administrator trust that authority alone.
func (k *Kube) certify(by *authority) error {
	cert, key, err := by.server([]string{"kubernetes", "kubernetes.default", "kubernetes.default.svc",
		"kubernetes.default.svc.cluster.local"},
		Gateway.AsSlice(), net.ParseIP(serviceIP), GatewayV6.AsSlice(), net.ParseIP(serviceIPv6))
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AddCert(by.certificate)
	k.http = &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DialContext:     k.lab.net.Dial,
		TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{k.admin}},
	}}
	return errors.Join(replaceFile(k.file("apiserver.crt"), cert), replaceFile(k.file("apiserver.key"), key))
}

// RenewCA gives the API server a certificate of a new authority, which is in use
// when the server starts next, if not sooner. Daemons are to trust that authority
// once trust has been called: it replaces the file that their kubeconfig names. All
// other kubeconfigs stay with the old authority.
func (k *Kube) RenewCA() (trust func() error, err error) {
	ca, err := newAuthority()
	if err != nil {
		return nil, err
	}
	trust = func() error { return replaceFile(k.caFile(), ca.pem) }
	return trust, k.certify(ca)
}

func (k *Kube) file(name string) string { return filepath.Join(k.dir, name) }

// AddUser makes the Kubeconfig of a user who proves by a certificate to be one
// of groups.
func (k *Kube) AddUser(user string, groups ...string) error {
	_, _, err := k.addUser(user, groups...)
	return err
}

func (k *Kube) addUser(user string, groups ...string) (cert, key []byte, err error) {
	if cert, key, err = k.ca.client(user, groups...); err == nil {
		err = k.writeKubeconfig(user, "certificate-authority-data", k.ca.pem,
			map[string]any{"client-certificate-data": cert, "client-key-data": key})
	}
	return cert, key, err
}

func (k *Kube) writeKubeconfig(user, authorityKey string, authority any, credentials map[string]any) error {
	type object = map[string]any
	text, err := json.MarshalIndent(object{
		"apiVersion": "v1", "kind": "Config", "current-context": "lab",
		"clusters": []object{{"name": "lab", "cluster": object{"server": kubeURL, authorityKey: authority}}},
		"users":    []object{{"name": user, "user": credentials}},
		"contexts": []object{{"name": "lab", "context": object{"cluster": "lab", "user": user}}},
	}, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(k.Kubeconfig(user), text, 0o600)
}

// Kubeconfig is the path of a user's credentials.
func (k *Kube) Kubeconfig(user string) string { return k.file(user + ".kubeconfig") }

// caFile is where the daemons' kubeconfig has the API server's authority.
func (k *Kube) caFile() string { return k.file("apiserver-ca.crt") }

// TokenFile is where the daemons' token is, see Install.
func (k *Kube) TokenFile() string { return k.file(kubeDaemon + ".token") }

// DaemonArgs are the flags with which a daemon takes its lease from here, with
// the network's configuration in a file. Its rights are those of Install.
func (k *Kube) DaemonArgs(config string) ([]string, error) {
	if err := k.Configure(config); err != nil {
		return nil, err
	}
	return []string{"--kube-subnet-mgr", "--kubeconfig-file=" + k.Kubeconfig(kubeDaemon),
		"--net-config-path=" + k.ConfigFile()}, nil
}

// ConfigFile is the file with the daemons' configuration, in a directory of its own.
func (k *Kube) ConfigFile() string { return k.file("config/net-conf.json") }

// Configure writes the daemons' configuration as kubelet writes the files of a
// mounted ConfigMap: the file is a link into ..data, which is a link that is replaced.
func (k *Kube) Configure(config string) error {
	dir, name := filepath.Split(k.ConfigFile())
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	now, err := os.MkdirTemp(dir, "..config")
	if err != nil {
		return err
	}
	data := filepath.Join(dir, "..data")
	before, _ := os.Readlink(data) // there is none at first
	for _, step := range []func() error{
		func() error { return os.Chmod(now, 0o755) },
		func() error { return os.WriteFile(filepath.Join(now, name), []byte(config), 0o644) },
		func() error { return os.Symlink(filepath.Base(now), data+"_tmp") },
		func() error { return os.Rename(data+"_tmp", data) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	if before != "" {
		if err := os.RemoveAll(filepath.Join(dir, before)); err != nil {
			return err
		}
	}
	if err := os.Symlink(filepath.Join("..data", name), k.ConfigFile()); !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// Install applies a manifest but for its DaemonSets, and gives the lab's
// daemons a token of its service account: they may do what that may.
func (k *Kube) Install(ctx context.Context, manifest string) error {
	objects, err := parseObjects(manifest)
	if err != nil {
		return err
	}
	objects = slices.DeleteFunc(objects, func(o kubeObject) bool { return o.Kind == "DaemonSet" })
	if err := k.apply(ctx, objects, ""); err != nil {
		return err
	}
	return k.WriteToken(ctx, "{}")
}

// WriteToken puts a new token in the place of the daemons'. What is asked for is
// the spec of a TokenRequest, JSON.
func (k *Kube) WriteToken(ctx context.Context, spec string) error {
	token, err := k.token(ctx, kubeAccount, spec)
	if err != nil {
		return err
	}
	return replaceFile(k.TokenFile(), []byte(token))
}

// token returns a new token of a service account.
func (k *Kube) token(ctx context.Context, account, spec string) (string, error) {
	answer, err := k.Do(ctx, http.MethodPost, "/api/v1/namespaces/"+kubeNamespace+"/serviceaccounts/"+account+"/token",
		[]byte(`{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": `+spec+`}`))
	if err != nil {
		return "", err
	}
	var request struct{ Status struct{ Token string } }
	err = json.Unmarshal(answer, &request)
	return request.Status.Token, err
}

// Rights asks the API server, as a service account of the manifest's namespace,
// what that may do in a namespace and with what is in none. Each right is a verb
// and a resource, such as "patch nodes/status" or "get apps/deployments", or a
// verb and a path.
func (k *Kube) Rights(ctx context.Context, account, namespace string) ([]string, error) {
	token, err := k.token(ctx, account, "{}")
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AddCert(k.ca.certificate)
	as := *k
	as.http = &http.Client{Timeout: 10 * time.Second, Transport: bearer{token, &http.Transport{
		DialContext: k.lab.net.Dial, TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true,
	}}}
	answer, err := as.Do(ctx, http.MethodPost, "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews",
		fmt.Appendf(nil, `{"spec": {"namespace": %q}}`, namespace))
	if err != nil {
		return nil, err
	}
	var review struct {
		Status struct {
			ResourceRules []struct {
				Verbs, APIGroups, Resources, ResourceNames []string
			}
			NonResourceRules []struct{ Verbs, NonResourceURLs []string }
			Incomplete       bool
		}
	}
	if err := json.Unmarshal(answer, &review); err != nil {
		return nil, err
	}
	if review.Status.Incomplete {
		return nil, fmt.Errorf("the API server does not know all rights: %s", answer)
	}
	var rights []string
	for _, rule := range review.Status.ResourceRules {
		for _, verb := range rule.Verbs {
			for _, group := range rule.APIGroups {
				for _, resource := range rule.Resources {
					right := verb + " " + strings.TrimPrefix(group+"/"+resource, "/")
					if len(rule.ResourceNames) > 0 {
						right += " " + strings.Join(rule.ResourceNames, ",")
					}
					rights = append(rights, right)
				}
			}
		}
	}
	for _, rule := range review.Status.NonResourceRules {
		for _, verb := range rule.Verbs {
			for _, path := range rule.NonResourceURLs {
				rights = append(rights, verb+" "+path)
			}
		}
	}
	slices.Sort(rights)
	return slices.Compact(rights), nil
}

// A bearer sends a token with each request.
type bearer struct {
	token string
	next  http.RoundTripper
}

func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+b.token)
	return b.next.RoundTrip(r)
}

// replaceFile puts a new file in the place of another, as kubelet does, rather
// than write into it.
func replaceFile(name string, text []byte) error {
	if err := os.WriteFile(name+".new", text, 0o600); err != nil {
		return err
	}
	return os.Rename(name+".new", name)
}

// launch starts a program that was built. Its log has its name.
func (k *Kube) launch(program string, args ...string) (*Process, error) {
	path, err := k.lab.Program(program)
	if err != nil {
		return nil, err
	}
	log, err := os.OpenFile(k.file(filepath.Base(program)+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
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
	at, err := url.Parse(k.url)
	if err != nil {
		return err
	}
	program, sa := k.lab.options.APIServer, k.file("sa.key")
	k.server, err = k.launch(program, append([]string{
		"--etcd-servers=" + Endpoint,
		"--bind-address=" + at.Hostname(), "--advertise-address=" + at.Hostname(), "--secure-port=" + at.Port(),
		"--cert-dir=" + k.dir, "--tls-cert-file=" + k.file("apiserver.crt"), "--tls-private-key-file=" + k.file("apiserver.key"),
		"--client-ca-file=" + k.file("ca.crt"),
		"--service-cluster-ip-range=" + serviceRange,
		"--service-account-issuer=https://lab", "--service-account-key-file=" + sa, "--service-account-signing-key-file=" + sa,
		"--authorization-mode=RBAC",
	}, k.args...)...)
	if err != nil {
		return err
	}
	return Poll(ctx, "kube-apiserver", func() error {
		if k.server.Exited() {
			return fmt.Errorf("it has exited\n%s", tail(k.file(filepath.Base(program)+".log")))
		}
		_, err := k.Do(ctx, http.MethodGet, "/readyz", nil)
		return err
	})
}

// Kill ends the API server as a crash would.
func (k *Kube) Kill() { k.server.Kill() }

// Spare starts a second API server on the same etcd, of which no daemon knows:
// it is for what happens while the first is down.
func (k *Kube) Spare(ctx context.Context) (*Kube, error) {
	spare := *k
	spare.url = spareURL
	return &spare, spare.Start(ctx)
}

// StartControllers starts kube-controller-manager, which hands out podCIDRs of
// clusterCIDR. More arguments are for it; it does nothing else unless these name
// more --controllers.
func (k *Kube) StartControllers(clusterCIDR string, args ...string) (err error) {
	k.controllers, err = k.launch("kube/kube-controller-manager", append([]string{
		"--kubeconfig=" + k.Kubeconfig(kubeAdmin),
		"--root-ca-file=" + k.file("ca.crt"), "--service-account-private-key-file=" + k.file("sa.key"),
		"--controllers=node-ipam-controller",
		"--allocate-node-cidrs", "--cluster-cidr=" + clusterCIDR,
		"--leader-elect=false", "--bind-address=127.0.0.1",
	}, args...)...)
	return err
}

// Cut keeps everybody outside of the underlay's own namespace from the API
// server: packets to it vanish on the way. Its own packets end its side of a
// connection: otherwise the kernel would deliver them after Restore, even when the
// server has been killed.
func (k *Kube) Cut(ctx context.Context) error {
	_, err := k.lab.net.run(ctx, `
		add table inet cut-kube
		add chain inet cut-kube in { type filter hook input priority 0; }
		add rule inet cut-kube in iifname != "lo" tcp dport 6443 drop
		add chain inet cut-kube out { type filter hook output priority 0; }
		add rule inet cut-kube out oifname != "lo" tcp sport 6443 reject with tcp reset`, "nft", "-f", "-")
	return err
}

// Restore ends a Cut.
func (k *Kube) Restore(ctx context.Context) error {
	_, err := k.lab.net.Run(ctx, "nft delete table inet cut-kube")
	return err
}

// Do sends an administrator's request and returns the answer. A body is JSON,
// or YAML where it does not begin like that; a patch is a strategic merge patch.
func (k *Kube) Do(ctx context.Context, method, path string, body []byte) ([]byte, error) {
	kind := "application/json"
	switch {
	case method == http.MethodPatch:
		kind = "application/strategic-merge-patch+json"
	case !bytes.HasPrefix(bytes.TrimSpace(body), []byte("{")):
		kind = "application/yaml"
	}
	return k.send(ctx, method, path, kind, body)
}

func (k *Kube) send(ctx context.Context, method, path, contentType string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, k.url+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", contentType)
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
// the controllers or another program give it one; podCIDRs gives it these.
func (k *Kube) AddNode(ctx context.Context, n *Node, podCIDRs ...string) error {
	node := map[string]any{
		"apiVersion": "v1", "kind": "Node",
		"metadata": map[string]any{"name": n.Hostname},
	}
	if len(podCIDRs) > 0 {
		node["spec"] = map[string]any{"podCIDR": podCIDRs[0], "podCIDRs": podCIDRs}
	}
	body, err := json.Marshal(node)
	if err != nil {
		return err
	}
	if _, err := k.Do(ctx, http.MethodPost, "/api/v1/nodes", body); err != nil {
		return err
	}
	addresses := []map[string]string{{"type": "Hostname", "address": n.Hostname}}
	for _, ip := range n.Addrs() {
		addresses = append(addresses, map[string]string{"type": "InternalIP", "address": ip.String()})
	}
	status, err := json.Marshal(map[string]any{"status": map[string]any{"addresses": addresses}})
	if err != nil {
		return err
	}
	_, err = k.Do(ctx, http.MethodPatch, "/api/v1/nodes/"+n.Hostname+"/status", status)
	return err
}

// Annotate sets annotations of a node, key=value, or removes them, key alone.
// They are flannel's.
func (k *Kube) Annotate(ctx context.Context, name string, annotations ...string) error {
	patch := map[string]any{}
	for _, a := range annotations {
		key, value, set := strings.Cut(a, "=")
		patch["flannel.alpha.coreos.com/"+key] = nil
		if set {
			patch["flannel.alpha.coreos.com/"+key] = value
		}
	}
	body, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": patch}})
	if err != nil {
		return err
	}
	_, err = k.Do(ctx, http.MethodPatch, "/api/v1/nodes/"+name, body)
	return err
}

// DeleteNode deletes a node.
func (k *Kube) DeleteNode(ctx context.Context, name string) error {
	_, err := k.Do(ctx, http.MethodDelete, "/api/v1/nodes/"+name, nil)
	return err
}

// KubeNode has the fields of a Node that tests read.
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

// Apply applies the objects of a YAML file, one after the other, as
// `kubectl apply --server-side` does.
func (k *Kube) Apply(ctx context.Context, text string) error {
	objects, err := parseObjects(text)
	if err != nil {
		return err
	}
	return k.apply(ctx, objects, "")
}

// DryRun has the API server say whether it would take the objects, and changes
// nothing: their namespaces must be there.
func (k *Kube) DryRun(ctx context.Context, text string) error {
	objects, err := parseObjects(text)
	if err != nil {
		return err
	}
	return k.apply(ctx, objects, "&dryRun=All")
}

func (k *Kube) apply(ctx context.Context, objects []kubeObject, query string) error {
	var errs []error
	for _, o := range objects {
		path, err := k.path(ctx, o)
		if err == nil {
			_, err = k.send(ctx, http.MethodPatch, path+"?fieldManager=lab&force=true&fieldValidation=Strict"+query,
				"application/apply-patch+yaml", o.text)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Kubectl runs kubectl as an administrator and returns what it prints.
func (k *Kube) Kubectl(ctx context.Context, args ...string) (string, error) {
	return k.kubectl(ctx, "", args...)
}

// KubectlApply is kubectl apply, of a file with that text.
func (k *Kube) KubectlApply(ctx context.Context, text string) (string, error) {
	return k.kubectl(ctx, text, "apply", "--filename=-")
}

// Helm runs helm as an administrator and returns what it prints. Files are relative to the test's directory.
func (k *Kube) Helm(ctx context.Context, args ...string) (string, error) {
	program, err := k.lab.Program("bin/helm")
	if err != nil {
		return "", err
	}
	return k.lab.net.run(ctx, "", append([]string{"env", "HOME=" + k.file("helm"), program,
		"--kubeconfig=" + k.Kubeconfig(kubeAdmin)}, args...)...)
}

func (k *Kube) kubectl(ctx context.Context, stdin string, args ...string) (string, error) {
	program, err := k.lab.Program("kube/kubectl")
	if err != nil {
		return "", err
	}
	return k.lab.net.run(ctx, stdin, append([]string{program, "--kubeconfig=" + k.Kubeconfig(kubeAdmin),
		"--cache-dir=" + k.file("cache")}, args...)...)
}

// A kubeObject is one of the objects of a YAML file.
type kubeObject struct {
	APIVersion, Kind string
	Metadata         struct{ Name, Namespace string }

	text []byte
}

var documentEnd = regexp.MustCompile(`(?m)^---.*$`)

// parseObjects splits a YAML file. A document without content is none.
func parseObjects(text string) ([]kubeObject, error) {
	var all []kubeObject
	for _, doc := range documentEnd.Split(text, -1) {
		o := kubeObject{text: []byte(doc)}
		if err := yaml.Unmarshal(o.text, &o); err != nil {
			return nil, fmt.Errorf("%w:\n%s", err, doc)
		}
		if o.Kind != "" {
			all = append(all, o)
		}
	}
	return all, nil
}

// path asks the API server where an object is.
func (k *Kube) path(ctx context.Context, o kubeObject) (string, error) {
	base := "/apis/" + o.APIVersion
	if !strings.Contains(o.APIVersion, "/") {
		base = "/api/" + o.APIVersion
	}
	answer, err := k.Do(ctx, http.MethodGet, base, nil)
	if err != nil {
		return "", err
	}
	var list struct {
		Resources []struct {
			Name, Kind string
			Namespaced bool
		}
	}
	if err := json.Unmarshal(answer, &list); err != nil {
		return "", err
	}
	for _, r := range list.Resources {
		if r.Kind != o.Kind || strings.Contains(r.Name, "/") { // a subresource
			continue
		}
		if r.Namespaced {
			base += "/namespaces/" + cmp.Or(o.Metadata.Namespace, "default")
		}
		return base + "/" + r.Name + "/" + o.Metadata.Name, nil
	}
	return "", fmt.Errorf("%s has no kind %s", o.APIVersion, o.Kind)
}
