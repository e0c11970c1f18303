package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

const metallbPool = `apiVersion: metallb.io/v1beta1
kind: IPAddressPool
metadata: {name: pool, namespace: metallb-system}
spec: {addresses: [198.18.0.200/32]}
---
apiVersion: metallb.io/v1beta1
kind: L2Advertisement
metadata: {name: pool, namespace: metallb-system}
spec: {ipAddressPools: [pool]}
`

// speakerPod is the pod that a speaker asks for. The speaker itself runs without a pod.
const speakerPod = `apiVersion: v1
kind: Pod
metadata: {name: %[1]s, namespace: metallb-system}
spec: {nodeName: %[1]s, hostNetwork: true, containers: [{name: speaker, image: none}]}
`

// balanced is a service of the second node's pod, with that policy.
const balanced = `apiVersion: v1
kind: Service
metadata: {name: mirror, namespace: default}
spec:
  type: LoadBalancer
  externalTrafficPolicy: %s
  ports: [{port: 7007, protocol: UDP}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: mirror, namespace: default, labels: {kubernetes.io/service-name: mirror}}
addressType: IPv4
endpoints: [{addresses: [%s], nodeName: %s, conditions: {ready: true, serving: true}}]
ports: [{port: 7007, protocol: UDP}]
`

// TestMetalLB: MetalLB gives a service an address of the nodes' network, and answers ARP for it. A host behind the router
// reaches the pod; with the policy Local, the pod sees that host's own address. It is left to make test-long.
func TestMetalLB(t *testing.T) {
	t.Parallel()
	if !labtest.Selected(false) {
		return
	}
	ctx := labtest.Context(t, 2*time.Minute)
	l := labtest.New(ctx, t, configuration(ipv4Network, `{"Type": "vxlan"}`, false), lab.NodeOptions{}, lab.NodeOptions{})
	k := labtest.Must(l.NewKube(ctx, "", "--disable-admission-plugins=ServiceAccount"))(t)
	labtest.Do(t, k.AddUser(lab.KubeProxy))
	labtest.Must(k.Kubectl(ctx, "apply", "-f", filepath.Join(l.Build, "metallb", "crd")))(t)
	labtest.Must(k.Kubectl(ctx, "wait", "--for=condition=Established", "crd", "--all", "--timeout=60s"))(t)
	labtest.Must(k.Kubectl(ctx, "create", "namespace", "metallb-system"))(t)
	labtest.Must(k.KubectlApply(ctx, metallbPool))(t)
	labtest.Start(ctx, t, l, "--ip-masq")
	pods := addPods(ctx, t, l)
	labtest.Do(t, pods[1].Mirror())
	start := func(n *lab.Node, program string, args ...string) {
		t.Helper()
		log := labtest.Must(os.Create(filepath.Join(n.Dir, program+".log")))(t)
		defer log.Close()
		cmd := exec.Command(labtest.Must(l.Program("metallb/"+program))(t), args...)
		cmd.Env = append(os.Environ(), "KUBECONFIG="+k.Kubeconfig("admin"), "METALLB_NAMESPACE=metallb-system")
		cmd.Stdout, cmd.Stderr = log, log
		labtest.Must(n.Launch(cmd))(t)
		t.Cleanup(func() {
			if text, _ := os.ReadFile(log.Name()); t.Failed() {
				t.Logf("%s of %s said:\n%s", program, n.Hostname, text)
			}
		})
	}
	for _, n := range l.Nodes() { // a speaker that sees its node later may announce nothing
		labtest.Do(t, k.AddNode(ctx, n))
	}
	for _, n := range l.Nodes() {
		labtest.Must(n.StartProxy(k, "iptables", "10.5.0.0/16"))(t)
		labtest.Must(k.KubectlApply(ctx, fmt.Sprintf(speakerPod, n.Hostname)))(t)
		start(n, "speaker", "--node-name="+n.Hostname, "--pod-name="+n.Hostname)
	}
	start(l.Nodes()[0], "controller", "--port=7473", "--webhook-mode=disabled", "--disable-cert-rotation")

	vip := netip.MustParseAddr("198.18.0.200")
	apply := func(policy string) {
		t.Helper()
		labtest.Must(k.KubectlApply(ctx, fmt.Sprintf(balanced, policy, pods[1].IPv4, l.Nodes()[1].Hostname)))(t)
	}
	apply("Local")
	labtest.Do(t, lab.Poll(ctx, "the pod to see the client", func() error {
		return seenAs(ctx, l.Outside, vip, lab.Outside)
	}))
	apply("Cluster")
	labtest.Do(t, lab.Poll(ctx, "the pod to see a node", func() error {
		got, err := l.Outside.SeenAs(ctx, "udp", vip)
		if err == nil && got == lab.Outside {
			err = fmt.Errorf("it sees %s", got)
		}
		return err
	}))
	for _, n := range l.Nodes() {
		labtest.Do(t, n.Restart(ctx))
		labtest.Do(t, n.WaitReady(ctx))
		labtest.Do(t, waitDiff(ctx, n, ""))
	}
	labtest.Must(l.Outside.SeenAs(ctx, "udp", vip))(t)
}
