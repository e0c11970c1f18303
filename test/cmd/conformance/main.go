// Command conformance runs Kubernetes' own tests of networking, [sig-network] of its end-to-end suite, in the lab: on
// three nodes with containerd, kubelet and kube-proxy, CoreDNS, and the pod network of the published manifest. With
// -quick it runs a few of them. The environment has the settings:
//
//	CONFORMANCE=host-gw,ipv6  which combinations, one after the other; all: each (see combinations)
//	TESTS=network             besides the conformance tests, also what else the lab can run
//	TESTS=cri                 in their place critest's tests of networking, those of containerd on one node
//	FOCUS='hairpin back'      only the tests whose names match this regular expression
//	PROCS=4                   how many tests run at a time
//	NODES=6                   how many nodes the cluster has, 3 unless told otherwise, in three zones: some tests skip
//	                          themselves where there are fewer than two in each
//
// build/conformance/report has, for each combination, the JUnit file and what the suite and the cluster logged.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/flanneld/flanneld/test/lab"
)

// manifest is what a user applies, as seen from the repository.
const manifest = "Documentation/kube-flannel.yml"

// A combination is a cluster of its own.
type combination struct {
	name   string
	proxy  string // kube-proxy's mode
	values string // of the chart, as helm's --set; empty: the published manifest
	pods   string // addresses of pods
	// services are where Services have their addresses. The tests make hundreds of them.
	services string
	features []string // labels Feature:… of tests that run in this combination alone
	netpol   bool     // kube-network-policies runs beside flanneld
	direct   bool     // nodes route packets of pods to each other without a tunnel
}

const (
	podsV4, podsV6 = "10.244.0.0/16", "fd00:10:244::/48"
	servicesV4     = "198.19.128.0/20"
)

// combinations are what CONFORMANCE names. The first is run unless told otherwise.
var combinations = []combination{
	{name: "vxlan", proxy: "iptables", pods: podsV4, services: servicesV4},
	{name: "vxlan-nftables", proxy: "nftables", pods: podsV4, services: servicesV4, values: "flannel.enableNFTables=true"},
	{name: "host-gw", proxy: "iptables", pods: podsV4, services: servicesV4, values: "flannel.backend=host-gw",
		direct: true},
	{name: "wireguard", proxy: "iptables", pods: podsV4, services: servicesV4, values: "flannel.backend=wireguard," +
		"flannel.extraEnv[0].name=WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD,flannel.extraEnv[0].value=yes," +
		"flannel.extraVolumes[0].name=tun,flannel.extraVolumes[0].hostPath.path=/dev/net/tun," +
		"flannel.extraVolumeMounts[0].name=tun,flannel.extraVolumeMounts[0].mountPath=/dev/net/tun"},
	{name: "dual-stack", proxy: "iptables", pods: podsV4 + "," + podsV6, services: servicesV4 + "," + lab.ServiceRangeV6,
		values: "podCidrv6=" + podsV6, features: []string{"IPv6DualStack"}},
	{name: "ipv6", proxy: "iptables", pods: podsV6, services: lab.ServiceRangeV6,
		values: "podCidr=,podCidrv6=" + podsV6},
	{name: "netpol", proxy: "iptables", pods: podsV4, services: servicesV4, values: "netpol.enabled=true," +
		"netpol.image.repository=" + netpolRepository + ",netpol.image.tag=" + netpolTag,
		features: []string{"NetworkPolicy"}, netpol: true},
}

// The image of kube-network-policies.
const netpolRepository, netpolTag = "docker.io/lab/netpol", "v1"

// quick matches the tests of -quick: pod to pod, Service, hostPort, DNS.
const quick = `Granular Checks: Pods should function for (intra-pod|node-pod) communication: (http|udp)` +
	`|Services should (serve multiport endpoints from pods|be able to create a functioning NodePort service)` +
	`|HostPort validates|DNS should provide DNS for services`

func main() {
	quick := flag.Bool("quick", false, "run a few tests only")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := run(ctx, *quick)
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "\nconformance: %v\n", err)
		os.Exit(1)
	}
}

// settings are from the environment.
type settings struct {
	combinations []combination
	focus        string // matches names of tests; empty: all that select matches
	everything   bool   // not only conformance tests
	cri          bool   // critest in the place of the suite
	procs        int
	nodes        int
}

func readSettings(onlyQuick bool) (settings, error) {
	s := settings{combinations: combinations[:1], focus: os.Getenv("FOCUS"), procs: 4, nodes: 3}
	if onlyQuick && s.focus == "" {
		s.focus = quick
	}
	if _, err := regexp.Compile(s.focus); err != nil {
		return s, fmt.Errorf("FOCUS=%s: %w", s.focus, err)
	}
	switch tests := os.Getenv("TESTS"); tests {
	case "", "conformance":
	case "network":
		s.everything = true
	case "cri":
		s.cri = true
	default:
		return s, fmt.Errorf("TESTS=%s: conformance, network or cri", tests)
	}
	for name, number := range map[string]*int{"PROCS": &s.procs, "NODES": &s.nodes} {
		if text := os.Getenv(name); text != "" {
			n, err := strconv.Atoi(text)
			if err != nil || n < 1 {
				return s, fmt.Errorf("%s=%s: a number, at least 1", name, text)
			}
			*number = n
		}
	}
	switch names := os.Getenv("CONFORMANCE"); names {
	case "":
	case "all":
		s.combinations = combinations
	default:
		s.combinations = nil
		for name := range strings.SplitSeq(names, ",") {
			i := slices.IndexFunc(combinations, func(c combination) bool { return c.name == name })
			if i < 0 {
				return s, fmt.Errorf("CONFORMANCE=%s: there is no combination %q", names, name)
			}
			s.combinations = append(s.combinations, combinations[i])
		}
	}
	return s, nil
}

func run(ctx context.Context, onlyQuick bool) error {
	s, err := readSettings(onlyQuick)
	if err != nil {
		return err
	}
	var errs []error
	for _, c := range s.combinations {
		if err := s.judge(ctx, c); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", c.name, err))
		}
		if ctx.Err() != nil {
			break
		}
	}
	return errors.Join(errs...)
}

// judge brings up a cluster and runs the tests on it.
func (s settings) judge(ctx context.Context, c combination) (err error) {
	l, err := lab.New(ctx, lab.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	dir := filepath.Join(l.Build, "conformance", "report", c.name)
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o755)); err != nil {
		return err
	}
	fmt.Printf("%s: a cluster of %d nodes, kube-proxy %s\n", c.name, s.nodes, c.proxy)
	cluster, err := s.start(ctx, l, c)
	if err != nil {
		return err
	}
	fmt.Printf("%s: the tests; they log to %s\n", c.name, filepath.Join(dir, "e2e.log"))
	began, names := time.Now(), suiteTests
	var ran error
	if s.cri {
		names, ran = criTests, runCRI(ctx, l, cluster, dir)
	} else {
		ran = s.runSuite(ctx, cluster, c, dir)
	}
	if ran != nil {
		saveLogs(cluster, dir)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	results, err := readJUnit(filepath.Join(dir, "junit.xml"), names)
	if err != nil {
		return errors.Join(ran, err)
	}
	results.print(os.Stdout)
	fmt.Printf("%s: %s, in %s\n", c.name, results.sum(), time.Since(began).Round(time.Second))
	return ran
}

// start returns a cluster in which the network and the DNS work.
func (s settings) start(ctx context.Context, l *lab.Lab, c combination) (*lab.Cluster, error) {
	cluster, err := l.NewCluster(ctx, lab.ClusterOptions{
		Nodes: s.nodes, ProxyMode: c.proxy, ClusterCIDR: c.pods, ServiceCIDR: c.services, DNS: true, Privileged: true,
	})
	if err != nil {
		return nil, err
	}
	images, err := writeImages(ctx, l)
	if err != nil {
		return nil, err
	}
	for _, file := range append(images, filepath.Join(l.Build, "image", "flannel-"+runtime.GOARCH+".tar")) {
		if err := cluster.Import(ctx, file); err != nil {
			return nil, err
		}
	}
	if c.netpol {
		if err := cluster.ImportProgram(ctx, netpolRepository+":"+netpolTag, "/bin/netpol", "kube/netpol"); err != nil {
			return nil, err
		}
	}
	text, err := c.network(ctx, l, cluster)
	if err != nil {
		return nil, err
	}
	if _, err := cluster.KubectlApply(ctx, text); err != nil {
		return nil, err
	}
	for i, n := range cluster.Nodes { // some tests are about zones
		zone := fmt.Sprintf("topology.kubernetes.io/zone=z%d", i%3+1)
		if _, err := cluster.Kubectl(ctx, "label", "node", n.Hostname, zone); err != nil {
			return nil, err
		}
	}
	for _, line := range []string{
		"-n kube-flannel rollout status --timeout=180s daemonset/kube-flannel-ds",
		"wait nodes --all --for=condition=Ready --timeout=180s",
		"-n kube-system rollout status --timeout=180s deployment/coredns",
	} {
		if _, err := cluster.Kubectl(ctx, strings.Fields(line)...); err != nil {
			pods, _ := cluster.Kubectl(ctx, "describe", "pods", "-A")
			return nil, fmt.Errorf("%w\n%s", err, pods)
		}
	}
	if c.netpol {
		for _, n := range cluster.Nodes {
			byHand, err := n.QueuePackets(ctx, c.pods)
			if err != nil {
				return nil, err
			}
			if byHand {
				fmt.Printf("%s: %s: the kernel's nftables has no queue: iptables passes packets to kube-network-policies\n",
					c.name, n.Hostname)
			}
		}
	}
	return cluster, cluster.RoutePods(ctx)
}

// network returns the manifest of the pod network.
func (c combination) network(ctx context.Context, l *lab.Lab, cluster *lab.Cluster) (string, error) {
	root := filepath.Dir(l.Build)
	if c.values == "" {
		text, err := os.ReadFile(filepath.Join(root, manifest))
		return string(text), err
	}
	return cluster.Helm(ctx, "template", "flannel", filepath.Join(root, "chart", "flannel"), "--namespace=kube-flannel",
		"--set=createNamespace=true,"+c.values)
}

// labels selects tests, in the language of Ginkgo's label filters. A label Feature:… says that the test needs what not
// every cluster has.
func (s settings) labels(c combination) string {
	filter := "sig-network && Feature: isEmpty"
	if !s.everything && s.focus == "" {
		filter += " && Conformance"
	}
	for _, f := range c.features {
		filter += fmt.Sprintf(" || sig-network && Feature: containsAny {%s} && Feature: isSubsetOf {%[1]s}", f)
	}
	return filter
}

// runSuite runs the tests. It returns an error when one fails.
func (s settings) runSuite(ctx context.Context, cluster *lab.Cluster, c combination, dir string) error {
	paths := map[string]string{}
	for _, program := range []string{"conformance/ginkgo", "conformance/e2e.test", "kube/kubectl"} {
		path, err := lab.Program(program)
		if err != nil {
			return err
		}
		paths[program] = path
	}
	log, err := os.Create(filepath.Join(dir, "e2e.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	args := []string{
		"--procs=" + strconv.Itoa(s.procs), "-v", "--no-color", "--timeout=4h", "--label-filter=" + s.labels(c),
		"--focus=" + cmp.Or(s.focus, "."), "--junit-report=junit.xml", "--output-dir=" + dir,
	}
	for _, l := range leftOut {
		if !l.direct || !c.direct {
			args = append(args, "--skip="+l.name)
		}
	}
	args = append(args, paths["conformance/e2e.test"], "--",
		"--kubeconfig="+cluster.AdminKubeconfig(), "--kubectl-path="+paths["kube/kubectl"], "--provider=skeleton",
		"--disable-log-dump", "--e2e-output-dir="+dir,
		// Only the first of Ginkgo's processes would count them: with the others, tests would be skipped.
		"--num-nodes="+strconv.Itoa(s.nodes))
	cmd := exec.CommandContext(ctx, "nice", append([]string{"-n", "5", paths["conformance/ginkgo"]}, args...)...)
	cmd.Env = append(os.Environ(), "HOME="+dir) // for kubectl's cache
	progress := newProgress(os.Stdout)
	cmd.Stdout, cmd.Stderr = io.MultiWriter(log, progress), log
	p, err := cluster.Launch(cmd)
	if err != nil {
		return err
	}
	return p.Wait()
}

// saveLogs keeps what the cluster's programs have logged, before the cluster goes.
func saveLogs(cluster *lab.Cluster, dir string) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for file, line := range map[string]string{
		"pods.txt":    "get nodes,pods -A -o wide",
		"flannel.log": "-n kube-flannel logs -l app=flannel --all-containers --prefix --tail=-1",
		"coredns.log": "-n kube-system logs -l k8s-app=kube-dns --prefix --tail=-1",
	} {
		text, err := cluster.Kubectl(ctx, strings.Fields(line)...)
		if err != nil {
			text += "\n" + err.Error()
		}
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
	for _, n := range cluster.Nodes {
		for _, program := range []string{"kubelet", "kube-proxy", "containerd"} {
			text, err := os.ReadFile(filepath.Join(n.Dir, program+".log"))
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, n.Hostname+"-"+program+".log"), text, 0o644)
			}
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
		}
	}
}
