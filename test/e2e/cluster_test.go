package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// TestCluster: kubelet, kube-proxy, pods from a Deployment. The network comes from the manifest as it is published, or
// from the chart in kube-system, and recovers from what happens to its pods and files. It is left to make test-clusters.
func TestCluster(t *testing.T) {
	t.Parallel()
	for from, proxy := range map[string]string{"manifest": "iptables", "chart": "nftables"} {
		if !labtest.Selected(false) {
			continue
		}
		t.Run(from+"/"+proxy, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t, 6*time.Minute)
			l := labtest.New(ctx, t, "{}")
			c := newCluster(ctx, t, l, proxy)
			manifest, namespace := labtest.Must(os.ReadFile("../../Documentation/kube-flannel.yml"))(t), "kube-flannel"
			if from == "chart" {
				namespace = "kube-system"
				manifest = renderChart(ctx, t, l, namespace, "flannel.enableNFTables=true")
			}
			testCluster(ctx, t, c, string(manifest), namespace)
		})
	}
}

func testCluster(ctx context.Context, t *testing.T, c *lab.Cluster, manifest, namespace string) {
	conditions := kubectl(ctx, t, c, "get nodes -o jsonpath={.items[*].status.conditions[?(@.type=='Ready')].status}")
	if conditions != "False False" {
		t.Errorf("before there is a network, nodes are Ready: %s", conditions)
	}
	labtest.Must(c.KubectlApply(ctx, manifest))(t)
	labtest.Must(c.KubectlApply(ctx, lab.Echo))(t)
	waitFlannel(ctx, t, c, namespace)
	kubectl(ctx, t, c, "wait nodes --all --for=condition=Ready --timeout=60s")
	waitRollout(ctx, t, c, "deployment/echo")

	pods := enterPods(ctx, t, c)
	checkEcho(ctx, t, c, pods)
	checkRights(ctx, t, c, namespace, flannelRights)

	p1, p2 := labtest.Must(pods[0].StartPing(ctx, pods[1].ip))(t), labtest.Must(pods[1].StartPing(ctx, pods[0].ip))(t)
	kubectl(ctx, t, c, "-n "+namespace+" rollout restart "+flannelDaemonSet)
	waitFlannel(ctx, t, c, namespace)
	kubectl(ctx, t, c, "-n "+namespace+" delete pods --all")
	waitFlannel(ctx, t, c, namespace)
	for _, file := range []string{"/etc/cni/net.d/10-flannel.conflist", "/opt/cni/bin/flannel"} {
		n := c.Nodes[0]
		labtest.Must(n.Run(ctx, "rm "+file))(t)
		labtest.Do(t, lab.Poll(ctx, file+" to return", func() error {
			_, err := n.Run(ctx, "test -e "+file)
			return err
		}))
	}
	for _, p := range []*lab.Pinging{p1, p2} {
		if got := labtest.Must(p.Stop())(t); len(got.Lost) > 0 {
			t.Errorf("%s: of %d packets these were lost: %d", p, got.Sent, got.Lost)
		} else {
			t.Logf("%s: %d of %d answered", p, got.Received, got.Sent)
		}
	}

	// The restored files work: two more pods start, one on each node.
	kubectl(ctx, t, c, "scale deployment/echo --replicas=4")
	waitRollout(ctx, t, c, "deployment/echo")
	checkEcho(ctx, t, c, enterPods(ctx, t, c))
	changeConfigMap(ctx, t, c, namespace)
}

// changeConfigMap changes the backend in the ConfigMap, which takes effect in the pods that run.
func changeConfigMap(ctx context.Context, t *testing.T, c *lab.Cluster, namespace string) {
	t.Helper()
	before := kubectl(ctx, t, c, "-n "+namespace+" get pods -l app=flannel -o jsonpath={.items[*].metadata.uid}")
	var config map[string]any
	labtest.Do(t, json.Unmarshal([]byte(kubectl(ctx, t, c, "-n "+namespace+
		` get configmap kube-flannel-cfg -o jsonpath={.data.net-conf\.json}`)), &config))
	config["Backend"] = map[string]string{"Type": "host-gw"}
	text := labtest.Must(json.Marshal(config))(t)
	patch := labtest.Must(json.Marshal(map[string]any{"data": map[string]string{"net-conf.json": string(text)}}))(t)
	labtest.Must(c.Kubectl(ctx, "-n", namespace, "patch", "configmap", "kube-flannel-cfg", "--type=merge", "-p", string(patch)))(t)
	changed := time.Now()
	for _, n := range c.Nodes {
		waitTraces(ctx, t, n, []trace{{"ip route show proto 70", "dev eth0"}}, true)
		waitTraces(ctx, t, n, []trace{{"ip link show", "flannel.1"}}, false)
		t.Logf("%s: the changed ConfigMap was in force after %v", n.Hostname, time.Since(changed).Round(time.Second))
	}
	checkEcho(ctx, t, c, enterPods(ctx, t, c))
	if now := kubectl(ctx, t, c, "-n "+namespace+" get pods -l app=flannel -o jsonpath={.items[*].metadata.uid}"); now != before {
		t.Errorf("the pods were %s, and are %s", before, now)
	}
}

const flannelDaemonSet = "daemonset/kube-flannel-ds"

// TestOtherManifests: manifests that others write for flannel's images work with ours: its name is all that changes. Our
// manifest for kube-system takes the place of an old one there, and pods lose no packet. It is left to make
// test-long.
func TestOtherManifests(t *testing.T) {
	t.Parallel()
	chart := []string{"template", "flannel", "testdata/flannel-chart"}
	for name, m := range map[string]struct {
		namespace, daemonSet string
		helm                 []string // how the manifest is made of testdata/flannel-chart, if it is
		prepare              func(context.Context, *testing.T, *lab.Cluster)
		replace              bool // by our manifest for kube-system
	}{
		"flannel's": {"kube-flannel", "kube-flannel-ds", chart, nil, false},
		"up to 0.14's": {"kube-system", "kube-flannel-ds",
			append(chart, `--set-json=selector={"tier": "node"}`, `--set-json=installConf=["cp", "-f"]`), nil, true},
		"minikube":     {"kube-flannel", "kube-flannel-ds", nil, nil, false},
		"kubespray":    {"kube-system", "kube-flannel", nil, nil, false},
		"talos":        {"kube-system", "kube-flannel", nil, installPlugin, false},
		"rke2-flannel": {"kube-system", "kube-flannel-ds", nil, installPlugin, false},
		"canal":        {"kube-system", "canal", nil, installOtherCNI, false},
	} {
		if !labtest.Selected(false) {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t, 5*time.Minute)
			l := labtest.New(ctx, t, "{}")
			c := newCluster(ctx, t, l, "iptables")
			var text string
			if m.helm != nil {
				text = labtest.Must(c.Helm(ctx, slices.Concat(m.helm, valuesWithImage(t), []string{"--namespace=" + m.namespace})...))(t)
				if _, err := c.Kubectl(ctx, "get", "namespace", m.namespace); err != nil {
					kubectl(ctx, t, c, "create namespace "+m.namespace)
				}
			} else {
				file := labtest.Must(os.ReadFile("testdata/installers/" + name + ".yaml"))(t)
				repository, tag := imageName(t)
				text = strings.ReplaceAll(string(file), "image: IMAGE", "image: "+repository+":"+tag)
			}
			if m.prepare != nil {
				m.prepare(ctx, t, c)
			}
			labtest.Must(c.KubectlApply(ctx, text))(t)
			labtest.Must(c.KubectlApply(ctx, lab.Echo))(t)
			kubectl(ctx, t, c, "-n "+m.namespace+" rollout status --timeout="+rolloutTimeout()+" daemonset/"+m.daemonSet)
			kubectl(ctx, t, c, "wait nodes --all --for=condition=Ready --timeout=60s")
			waitRollout(ctx, t, c, "deployment/echo")
			pods := enterPods(ctx, t, c)
			checkEcho(ctx, t, c, pods)
			for _, command := range []string{"status", "doctor", "connectivity"} {
				t.Log(kubectl(ctx, t, c, "-n "+m.namespace+" exec daemonset/"+m.daemonSet+
					" -c kube-flannel -- /opt/bin/flannelctl "+command))
			}
			if !m.replace {
				return
			}

			ping := labtest.Must(pods[0].StartPing(ctx, pods[1].ip))(t)
			ours := labtest.Must(os.ReadFile("../../Documentation/kube-flannel-kube-system.yml"))(t)
			labtest.Must(c.KubectlApply(ctx, string(ours)))(t)
			waitFlannel(ctx, t, c, m.namespace)
			checkRights(ctx, t, c, m.namespace, flannelRights)
			checkEcho(ctx, t, c, pods)
			if got := labtest.Must(ping.Stop())(t); len(got.Lost) > 0 {
				t.Errorf("%s: of %d packets these were lost: %d", ping, got.Sent, got.Lost)
			}
		})
	}
}

// installPlugin puts the CNI plugin on the nodes, where an installer has it from elsewhere.
func installPlugin(ctx context.Context, t *testing.T, c *lab.Cluster) {
	t.Helper()
	for _, n := range c.Nodes {
		labtest.Must(n.Run(ctx, "cp "+labtest.Must(filepath.Abs("../../build/bin/flannel"))(t)+" /opt/cni/bin/flannel"))(t)
	}
}

// installOtherCNI gives pods addresses of the podCIDR without our plugin, as Calico's plugin does it for canal.
func installOtherCNI(ctx context.Context, t *testing.T, c *lab.Cluster) {
	t.Helper()
	for _, n := range c.Nodes {
		podCIDR := kubectl(ctx, t, c, "get node "+n.Hostname+" -o jsonpath={.spec.podCIDR}")
		conflist := filepath.Join(n.Dir, "other.conflist")
		labtest.Do(t, os.WriteFile(conflist, fmt.Appendf(nil, `{"cniVersion": "1.0.0", "name": "other", "plugins": [{"type": "bridge",
			"bridge": "cni0", "mtu": 1450, "hairpinMode": true, "isDefaultGateway": true,
			"ipam": {"type": "host-local", "subnet": %q}}]}`, podCIDR), 0o644))
		labtest.Must(n.Run(ctx, "mkdir -p /etc/cni/net.d"))(t)
		labtest.Must(n.Run(ctx, "cp "+conflist+" /etc/cni/net.d"))(t)
	}
}

// TestSetImage: the commands of Documentation/installers.md change the image of another's DaemonSet, and change it back. A
// second name of our image stands for flannel's. It is left to make test-long.
func TestSetImage(t *testing.T) {
	t.Parallel()
	if !labtest.Selected(false) {
		t.Skip("left to make test-long")
	}
	ctx := labtest.Context(t, 4*time.Minute)
	l := labtest.New(ctx, t, "{}")
	c := newCluster(ctx, t, l, "iptables")
	repository, tag := imageName(t)
	ours, theirs := repository+":"+tag, "docker.io/flannel/flannel:v0.28.9"
	for _, n := range c.Nodes {
		labtest.Must(n.Run(ctx, "ctr --namespace=k8s.io images tag "+ours+" "+theirs))(t)
	}
	const images = "-n kube-flannel get pods -l app=flannel -o jsonpath={.items[*].spec['initContainers','containers'][*].image}"
	check := func(want string) {
		t.Helper()
		waitFlannel(ctx, t, c, "kube-flannel")
		// Three containers on each of two nodes.
		if got := kubectl(ctx, t, c, images); got != strings.TrimSpace(strings.Repeat(want+" ", 6)) {
			t.Errorf("the containers run %s, want %s", got, want)
		}
	}
	file := string(labtest.Must(os.ReadFile("testdata/installers/minikube.yaml"))(t))
	labtest.Must(c.KubectlApply(ctx, strings.ReplaceAll(file, "image: IMAGE", "image: "+theirs)))(t)
	labtest.Must(c.KubectlApply(ctx, lab.Echo))(t)
	check(theirs)
	waitRollout(ctx, t, c, "deployment/echo")
	pods := enterPods(ctx, t, c)
	p := labtest.Must(pods[0].StartPing(ctx, pods[1].ip))(t)
	kubectl(ctx, t, c, "-n kube-flannel set image "+flannelDaemonSet+" *="+ours)
	check(ours)
	kubectl(ctx, t, c, "-n kube-flannel rollout undo "+flannelDaemonSet)
	check(theirs)
	if got := labtest.Must(p.Stop())(t); len(got.Lost) > 0 {
		t.Errorf("%s: of %d packets these were lost: %d", p, got.Sent, got.Lost)
	}
}

// TestMigrate: the steps of Documentation/upgrading.md from a DaemonSet of another name in another namespace to our
// manifest, and back: pods lose no packet. It is left to make test-long.
func TestMigrate(t *testing.T) {
	t.Parallel()
	if !labtest.Selected(false) {
		t.Skip("left to make test-long")
	}
	ctx := labtest.Context(t, 4*time.Minute)
	l := labtest.New(ctx, t, "{}")
	c := newCluster(ctx, t, l, "iptables")
	repository, tag := imageName(t)
	old := strings.ReplaceAll(string(labtest.Must(os.ReadFile("testdata/installers/kubespray.yaml"))(t)),
		"image: IMAGE", "image: "+repository+":"+tag)
	ours := string(labtest.Must(os.ReadFile("../../Documentation/kube-flannel.yml"))(t))
	oldRollout := "-n kube-system rollout status --timeout=" + rolloutTimeout() + " daemonset/kube-flannel"
	labtest.Must(c.KubectlApply(ctx, old))(t)
	labtest.Must(c.KubectlApply(ctx, lab.Echo))(t)
	kubectl(ctx, t, c, oldRollout)
	waitRollout(ctx, t, c, "deployment/echo")
	pods := enterPods(ctx, t, c)
	p := labtest.Must(pods[0].StartPing(ctx, pods[1].ip))(t)

	kubectl(ctx, t, c, "-n kube-system delete daemonset kube-flannel --cascade=foreground")
	labtest.Must(c.KubectlApply(ctx, ours))(t)
	waitFlannel(ctx, t, c, "kube-flannel")
	kubectl(ctx, t, c, "-n kube-system delete configmap/kube-flannel-cfg serviceaccount/flannel")
	checkEcho(ctx, t, c, pods)

	kubectl(ctx, t, c, "delete --cascade=foreground -f "+labtest.Must(filepath.Abs("../../Documentation/kube-flannel.yml"))(t))
	labtest.Must(c.KubectlApply(ctx, old))(t)
	kubectl(ctx, t, c, oldRollout)
	checkEcho(ctx, t, c, pods)
	if got := labtest.Must(p.Stop())(t); len(got.Lost) > 0 {
		t.Errorf("%s: of %d packets these were lost: %d", p, got.Sent, got.Lost)
	}
}

// valuesWithImage are flags of helm: values in the shape of flannel's chart, with the image that was built.
func valuesWithImage(t *testing.T) []string {
	t.Helper()
	repository, tag := imageName(t)
	return []string{
		"--values=testdata/flannel-values.yaml",
		"--set=flannel.image.repository=" + repository + ",flannel.image.tag=" + tag,
		"--set=flannel.flannel_cni.image.repository=" + repository + ",flannel.flannel_cni.image.tag=" + tag,
	}
}

// imageName returns the name of the image that was built.
func imageName(t *testing.T) (repository, tag string) {
	t.Helper()
	manifest := string(labtest.Must(os.ReadFile("../../Documentation/kube-flannel.yml"))(t))
	_, image, _ := strings.Cut(manifest, " image: ")
	repository, rest, _ := strings.Cut(image, ":")
	tag, _, _ = strings.Cut(rest, "\n")
	return repository, tag
}

// TestHelmCluster: while a release in the shape of flannel's chart is upgraded to our chart, and rolled back, pods lose
// no packet. It is left to make test-clusters.
func TestHelmCluster(t *testing.T) {
	t.Parallel()
	if !labtest.Selected(false) {
		t.Skip("left to make test-clusters")
	}
	ctx := labtest.Context(t, 4*time.Minute)
	l := labtest.New(ctx, t, "{}")
	c := newCluster(ctx, t, l, "iptables")
	release := func(args ...string) {
		t.Helper()
		labtest.Must(c.Helm(ctx, append(args, "--namespace=kube-flannel")...))(t)
		waitFlannel(ctx, t, c, "kube-flannel")
	}
	release(append([]string{"install", "flannel", "testdata/flannel-chart", "--create-namespace"}, valuesWithImage(t)...)...)
	labtest.Must(c.KubectlApply(ctx, lab.Echo))(t)
	waitRollout(ctx, t, c, "deployment/echo")
	pods := enterPods(ctx, t, c)
	checkEcho(ctx, t, c, pods)

	p1, p2 := labtest.Must(pods[0].StartPing(ctx, pods[1].ip))(t), labtest.Must(pods[1].StartPing(ctx, pods[0].ip))(t)
	release(append([]string{"upgrade", "flannel", "../../chart/flannel"}, valuesWithImage(t)...)...)
	checkRights(ctx, t, c, "kube-flannel", flannelRights) // the pods are those of our chart
	checkEcho(ctx, t, c, pods)
	release("rollback", "flannel", "1")
	checkEcho(ctx, t, c, pods)
	for _, p := range []*lab.Pinging{p1, p2} {
		if got := labtest.Must(p.Stop())(t); len(got.Lost) > 0 {
			t.Errorf("%s: of %d packets these were lost: %d", p, got.Sent, got.Lost)
		}
	}
}

// TestFullImage: the larger image has what the commands of the extension backend need. It is left to make test-clusters.
func TestFullImage(t *testing.T) {
	t.Parallel()
	if !labtest.Selected(false) {
		t.Skip("left to make test-clusters")
	}
	ctx := labtest.Context(t, 4*time.Minute)
	l := labtest.New(ctx, t, "{}")
	c := newCluster(ctx, t, l, "iptables")
	labtest.Do(t, c.Import(ctx, filepath.Join(l.Build, "image", "flannel-"+runtime.GOARCH+"-full.tar")))
	text := labtest.Must(c.Helm(ctx, "template", "flannel", "../../chart/flannel", "--namespace=kube-flannel",
		"--set=createNamespace=true,flannel.image.tag=v0.1.0-full,flannel.backend=extension", "--set-json=flannel.backendOptions="+
			`{"SubnetAddCommand": "ip route replace $SUBNET via $PUBLIC_IP", "SubnetRemoveCommand": "ip route del $SUBNET"}`))(t)
	labtest.Must(c.KubectlApply(ctx, text))(t)
	labtest.Must(c.KubectlApply(ctx, lab.Echo))(t)
	waitFlannel(ctx, t, c, "kube-flannel")
	kubectl(ctx, t, c, "wait nodes --all --for=condition=Ready --timeout=60s")
	waitRollout(ctx, t, c, "deployment/echo")
	checkEcho(ctx, t, c, enterPods(ctx, t, c))
}

// newCluster makes a cluster of two nodes that has the image. When the test
// fails, the cluster is asked about its pods.
func newCluster(ctx context.Context, t *testing.T, l *lab.Lab, proxy string) *lab.Cluster {
	t.Helper()
	c := labtest.Must(l.NewCluster(ctx, lab.ClusterOptions{Nodes: 2, ProxyMode: proxy, ClusterCIDR: "10.244.0.0/16"}))(t)
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		for _, line := range []string{
			"get nodes,pods -A -o wide", "get events -A --field-selector type=Warning", "-n kube-flannel logs -l app=flannel --all-containers --prefix --tail=50",
			"-n kube-system logs -l app=flannel --all-containers --prefix --tail=50",
		} {
			out, err := c.Kubectl(ctx, strings.Fields(line)...)
			t.Logf("kubectl %s\n%s\n%v", line, out, err)
		}
	})
	labtest.Do(t, c.Import(ctx, filepath.Join(l.Build, "image", "flannel-"+runtime.GOARCH+".tar")))
	return c
}

// renderChart returns what helm makes of the chart for a namespace, with these settings.
func renderChart(ctx context.Context, t *testing.T, l *lab.Lab, namespace, set string) []byte {
	t.Helper()
	helm := labtest.Must(l.Program("bin/helm"))(t)
	return labtest.Must(exec.CommandContext(ctx, helm, "template", "flannel", "../../chart/flannel",
		"--namespace="+namespace, "--set="+set).Output())(t)
}

// kubectl runs a line of arguments.
func kubectl(ctx context.Context, t *testing.T, c *lab.Cluster, line string) string {
	t.Helper()
	return labtest.Must(c.Kubectl(ctx, strings.Fields(line)...))(t)
}

// waitRollout waits until all pods are of the newest kind and ready.
func waitRollout(ctx context.Context, t *testing.T, c *lab.Cluster, what string) {
	t.Helper()
	kubectl(ctx, t, c, "rollout status --timeout="+rolloutTimeout()+" "+what)
}

// waitFlannel does so for flannel's DaemonSet in a namespace.
func waitFlannel(ctx context.Context, t *testing.T, c *lab.Cluster, namespace string) {
	t.Helper()
	kubectl(ctx, t, c, "-n "+namespace+" rollout status --timeout="+rolloutTimeout()+" "+flannelDaemonSet)
}

func rolloutTimeout() string { return lab.Patiently(90 * time.Second).String() }

// An echoPod is one of the Deployment's, entered.
type echoPod struct {
	*lab.Namespace
	name string
	ip   netip.Addr
}

func enterPods(ctx context.Context, t *testing.T, c *lab.Cluster) []echoPod {
	t.Helper()
	var pods []echoPod
	nodes := map[string]bool{}
	for _, p := range labtest.Must(c.Pods(ctx, "default", "app=echo"))(t) {
		ns := labtest.Must(c.Enter(ctx, p))(t)
		nodes[p.Spec.NodeName] = true
		pods = append(pods, echoPod{ns, p.Metadata.Name, p.Status.PodIP})
	}
	if len(nodes) < len(c.Nodes) {
		t.Fatalf("only these nodes have pods: %v", nodes)
	}
	return pods
}

// checkEcho: every pod reaches every other as itself, and through the Service
// all of them; so do nodes.
func checkEcho(ctx context.Context, t *testing.T, c *lab.Cluster, pods []echoPod) {
	t.Helper()
	service := kubectl(ctx, t, c, "get service echo -o jsonpath={.spec.clusterIP}")
	all := map[string]bool{}
	callers := []*lab.Namespace{c.Nodes[0].Namespace, c.Nodes[1].Namespace}
	for _, p := range pods {
		all[p.name] = true
		callers = append(callers, p.Namespace)
	}
	for _, from := range pods {
		for _, to := range pods {
			name, seen, err := ask(ctx, from.Namespace, to.ip.String()+":8080")
			if err != nil || name != to.name || seen != from.ip.String() && from.name != to.name {
				t.Errorf("%s calls %s: %s answers and saw %s, %v", from.name, to.name, name, seen, err)
			}
		}
	}
	for _, from := range callers {
		answered := map[string]bool{}
		err := lab.Poll(ctx, "all pods to answer "+from.Name+" through the Service", func() error {
			name, _, err := ask(ctx, from, service+":80")
			answered[name] = err == nil
			delete(answered, "")
			if err == nil && !maps.Equal(answered, all) {
				err = fmt.Errorf("these have: %v", answered)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// ask calls an echo pod, and returns its name and whom it saw.
func ask(ctx context.Context, from *lab.Namespace, address string) (name, seen string, err error) {
	client := &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DialContext: from.Dial,
		DisableKeepAlives: true}}
	answer, err := client.Get("http://" + address)
	if err != nil {
		return "", "", err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err == nil {
		_, err = fmt.Sscan(string(text), &name, &seen)
	}
	return name, seen, err
}

// serviceAccountDir is where a container has the token of a service account.
const serviceAccountDir = "/var/run/secrets/kubernetes.io/serviceaccount"

// The rights of a process in a pod of the DaemonSet.
type rights struct {
	status string // in /proc/PID/status
	mounts string // the files of the node that it can write
	token  bool   // of the service account
}

// flannelRights are those of the programs in the pods that the manifest makes.
var flannelRights = map[string]rights{
	"flanneld": {"CapBnd 0000000000003000 NoNewPrivs 1 Seccomp 2", // CAP_NET_ADMIN and CAP_NET_RAW
		"/run/flannel /run/xtables.lock", true},
	"flannel": {"CapBnd 0000000000000000 NoNewPrivs 1 Seccomp 2", "/etc/cni/net.d /opt/cni/bin", false},
}

// checkRights checks that the DaemonSet's pods in a namespace run these programs, with these rights.
func checkRights(ctx context.Context, t *testing.T, c *lab.Cluster, namespace string, programs map[string]rights) {
	t.Helper()
	pods := labtest.Must(c.Pods(ctx, namespace, "app=flannel"))(t)
	if len(pods) < len(c.Nodes) {
		t.Errorf("namespace %s has %d pods of flannel", namespace, len(pods))
	}
	for _, p := range pods {
		want := maps.Clone(programs)
		for _, pid := range labtest.Must(c.Processes(p))(t) {
			var program string
			var status []string
			for line := range strings.Lines(string(labtest.Must(os.ReadFile("/proc/" + pid + "/status"))(t))) {
				switch key, value, _ := strings.Cut(line, ":"); key {
				case "Name":
					program = strings.TrimSpace(value)
				case "CapBnd", "NoNewPrivs", "Seccomp":
					status = append(status, key, strings.TrimSpace(value))
				}
			}
			if program == "pause" {
				continue // the container runtime's
			}
			_, err := os.Stat("/proc/" + pid + "/root" + serviceAccountDir + "/token")
			got := rights{strings.Join(status, " "), writableMounts(t, pid), err == nil}
			if got != programs[program] {
				t.Errorf("%s on %s has the rights %+v, want %+v", program, p.Spec.NodeName, got, programs[program])
			}
			delete(want, program)
		}
		if len(want) > 0 {
			t.Errorf("on %s these do not run: %v", p.Spec.NodeName, want)
		}
	}
}

// writableMounts returns where files of the node are mounted for a process that the process can write.
func writableMounts(t *testing.T, pid string) string {
	t.Helper()
	// What belongs to the container alone, and the kernel's files.
	own := regexp.MustCompile(`^/(dev|proc|sys)(/|$)|^/etc/hosts$`)
	var found []string
	for line := range strings.Lines(string(labtest.Must(os.ReadFile("/proc/" + pid + "/mountinfo"))(t))) {
		f := strings.Fields(line) // proc_pid_mountinfo(5)
		at, options := f[4], strings.Split(f[5], ",")
		if slices.Contains(options, "rw") && !own.MatchString(at) {
			found = append(found, at)
		}
	}
	slices.Sort(found)
	return strings.Join(found, " ")
}
