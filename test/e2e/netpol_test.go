package e2e

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// friends is a policy: only pods with the label friend may call echo pods.
const friends = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: friends, namespace: default}
spec:
  podSelector: {matchLabels: {app: echo}}
  policyTypes: [Ingress]
  ingress:
  - from: [{podSelector: {matchLabels: {friend: "yes"}}}]
    ports: [{port: 8080, protocol: TCP}]
`

// TestNetworkPolicy: with netpol.enabled, NetworkPolicies take effect, between pods of one node and between nodes,
// beginning with the first connection. It is left to make test-clusters.
func TestNetworkPolicy(t *testing.T) {
	t.Parallel()
	if !labtest.Selected(false) {
		t.Skip("left to make test-clusters")
	}
	const image = "docker.io/lab/netpol:v1"
	ctx := labtest.Context(t, 4*time.Minute)
	l := labtest.New(ctx, t, "{}")
	c := newCluster(ctx, t, l, "iptables")
	labtest.Do(t, c.ImportProgram(ctx, image, "/bin/netpol", "kube/netpol"))
	repository, tag, _ := strings.Cut(image, ":")
	labtest.Must(c.KubectlApply(ctx, string(renderChart(ctx, t, l, "kube-flannel",
		"createNamespace=true,netpol.enabled=true,netpol.image.repository="+repository+",netpol.image.tag="+tag))))(t)
	labtest.Must(c.KubectlApply(ctx, lab.Echo))(t)
	waitFlannel(ctx, t, c, "kube-flannel")
	kubectl(ctx, t, c, "wait nodes --all --for=condition=Ready --timeout="+rolloutTimeout())
	kubectl(ctx, t, c, "scale deployment/echo --replicas=3") // two of them on one node
	waitRollout(ctx, t, c, "deployment/echo")
	want := maps.Clone(flannelRights)
	want["netpol"] = rights{"CapBnd 0000000000001000 NoNewPrivs 1 Seccomp 2", "", true} // CAP_NET_ADMIN
	checkRights(ctx, t, c, "kube-flannel", want)
	for _, n := range c.Nodes {
		queuePackets(ctx, t, n, "10.244.0.0/16")
	}

	pods := enterPods(ctx, t, c)
	waitCallers(ctx, t, "kube-network-policies to start", pods, pods)
	checkEcho(ctx, t, c, pods)
	labtest.Must(c.KubectlApply(ctx, friends))(t)
	waitCallers(ctx, t, "a policy that allows nobody", pods, nil)
	kubectl(ctx, t, c, "label pod "+pods[0].name+" friend=yes")
	waitCallers(ctx, t, "a friend", pods, pods[:1])
	kubectl(ctx, t, c, "label pod "+pods[0].name+" friend-")
	waitCallers(ctx, t, "a former friend", pods, nil)
	kubectl(ctx, t, c, "delete networkpolicy friends")
	waitCallers(ctx, t, "no policy", pods, pods)
	checkEcho(ctx, t, c, pods)
}

// queuePackets passes packets of a network's pods to kube-network-policies where the rules of the program cannot.
func queuePackets(ctx context.Context, t *testing.T, n *lab.Node, network string) {
	t.Helper()
	if labtest.Must(n.QueuePackets(ctx, network))(t) {
		t.Logf("%s: the kernel's nftables has no queue: iptables passes packets to kube-network-policies", n.Hostname)
	}
}

// waitCallers waits until of the pods just the callers reach the others.
func waitCallers(ctx context.Context, t *testing.T, what string, pods, callers []echoPod) {
	t.Helper()
	waitCalls(ctx, t, what, pods, callers, func(from, to echoPod) error {
		name, _, err := ask(ctx, from.Namespace, to.ip.String()+":8080")
		if err == nil && name != to.name {
			err = fmt.Errorf("%s answers", name)
		}
		return err
	})
}

// waitCalls waits until of the pods just the callers can call the others.
func waitCalls[P comparable](ctx context.Context, t *testing.T, what string, pods, callers []P,
	call func(from, to P) error) {
	t.Helper()
	labtest.Do(t, lab.Poll(ctx, what, func() error {
		var wrong []error
		var lock sync.Mutex
		var wg sync.WaitGroup
		for i, from := range pods {
			for j, to := range pods {
				if from == to {
					continue
				}
				wg.Go(func() {
					err := call(from, to)
					if (err == nil) == slices.Contains(callers, from) {
						return
					}
					lock.Lock()
					wrong = append(wrong, fmt.Errorf("pod %d calls pod %d: %v", i, j, err))
					lock.Unlock()
				})
			}
		}
		wg.Wait()
		return errors.Join(wrong...)
	}))
}
