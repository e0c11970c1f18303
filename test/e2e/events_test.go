package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// A kubeEvent has the fields of an Event that tests read.
type kubeEvent struct {
	Type, Reason, Message string
	Count                 int
	FirstTimestamp        time.Time
	LastTimestamp         time.Time
	InvolvedObject        struct{ Kind, Name, UID string }
	Source                struct{ Component string }
}

// eventsOf returns a Node's Events by their reasons, as kubectl describe node
// asks for them.
func eventsOf(ctx context.Context, k *lab.Kube, node string) (map[string][]kubeEvent, error) {
	text, err := k.Do(ctx, "GET", "/api/v1/events?fieldSelector=involvedObject.kind=Node,involvedObject.uid="+node+",involvedObject.name="+node, nil)
	if err != nil {
		return nil, err
	}
	var list struct{ Items []kubeEvent }
	if err := json.Unmarshal(text, &list); err != nil {
		return nil, err
	}
	all := map[string][]kubeEvent{}
	for _, e := range list.Items {
		if e.Type != "Warning" || e.Source.Component != "flanneld" {
			return nil, fmt.Errorf("somebody's event: %+v", e)
		}
		all[e.Reason] = append(all[e.Reason], e)
	}
	return all, nil
}

// waitEvent waits until a Node has exactly one Event of that reason, with so
// high a count and words in its message.
func waitEvent(ctx context.Context, t *testing.T, k *lab.Kube, node, reason string, count int, words string) {
	t.Helper()
	labtest.Do(t, lab.Poll(ctx, fmt.Sprintf("the Event %s of Node %s", reason, node), func() error {
		all, err := eventsOf(ctx, k, node)
		if err != nil {
			return err
		}
		if e := all[reason]; len(e) != 1 || e[0].Count < count || !strings.Contains(e[0].Message, words) {
			return fmt.Errorf("there are %+v", all)
		}
		return nil
	}))
}

// TestEvents: what needs a hand is an Event of the Node, one for each thing.
func TestEvents(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 3*time.Minute)
	l, k := newKube(ctx, t, "", make([]lab.NodeOptions, 3))
	nodes := l.Nodes()
	n1, n2, misfit := nodes[0], nodes[1], nodes[2]
	args := daemonArgs(t, k, vxlanConfig)

	labtest.Do(t, k.AddNode(ctx, n1))
	labtest.Do(t, n1.Start(args...))
	waitEvent(ctx, t, k, "n1", "NodeIncomplete", 1, "flanneld waits for spec.podCIDR of Node n1: set --allocate-node-cidrs")
	// Another life of the daemon counts on.
	labtest.Do(t, n1.Restart(ctx))
	waitEvent(ctx, t, k, "n1", "NodeIncomplete", 2, "")
	labtest.Do(t, k.StartControllers("10.5.0.0/16"))
	labtest.Do(t, n1.WaitReady(ctx))

	// It ends at once, and says so all the same.
	labtest.Do(t, k.AddNode(ctx, misfit, "10.99.1.0/24"))
	for times := 1; times <= 2; times++ {
		labtest.Do(t, misfit.Start(args...))
		labtest.Do(t, lab.Poll(ctx, "the daemon to give up", func() error {
			if !misfit.Exited() {
				return fmt.Errorf("it runs still")
			}
			return nil
		}))
		waitEvent(ctx, t, k, "n3", "PodCIDROutsideNetwork", times,
			"10.99.1.0/24 of Node n3 is outside the Network 10.5.0.0/16")
	}

	// Both nodes of a conflict have it, and no other node.
	labtest.Do(t, k.DeleteNode(ctx, "n3"))
	taken := labtest.Must(n1.SubnetEnv())(t).Subnets.IPv4.String()
	labtest.Do(t, k.AddNode(ctx, n2))
	labtest.Do(t, n2.Start(args...))
	labtest.Do(t, n2.WaitReady(ctx))
	labtest.Do(t, k.AddNode(ctx, misfit, taken))
	labtest.Do(t, misfit.Start(args...))
	for _, node := range []string{"n1", "n3"} {
		waitEvent(ctx, t, k, node, "OverlappingPodCIDRs", 1, "Nodes n1 and n3 both have the podCIDR "+taken)
	}
	if all := labtest.Must(eventsOf(ctx, k, "n2"))(t); len(all) > 0 {
		t.Errorf("Node n2 has %+v", all)
	}
	labtest.Do(t, misfit.Stop(ctx))
	labtest.Do(t, k.DeleteNode(ctx, "n3"))
	waitSaid(ctx, t, n2, conflictsNoLonger("n1", "n3", ""))

	// Two agents fight.
	fight, stop := context.WithCancel(ctx)
	defer stop()
	done := make(chan struct{})
	route := labtest.Must(n2.SubnetEnv())(t).Subnets.IPv4.String()
	go func() {
		defer close(done)
		for fight.Err() == nil {
			n1.Run(fight, "ip route del "+route)
		}
	}()
	waitEvent(ctx, t, k, "n1", "KernelFight", 1, "ip route replace "+route)
	stop()
	<-done
}

// upstreamRole is the ClusterRole of flannel's own manifest: no Events, but pods, which tell a daemon without NODE_NAME
// its Node.
const upstreamRole = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: flannel
rules:
- {apiGroups: [""], resources: [pods], verbs: [get]}
- {apiGroups: [""], resources: [nodes], verbs: [get, list, watch]}
- {apiGroups: [""], resources: [nodes/status], verbs: [patch]}
`

// TestUpstreamsRights: with the rights and the environment of flannel's own manifest only Events are missing.
func TestUpstreamsRights(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 2*time.Minute)
	l := labtest.New(ctx, t, "{}", make([]lab.NodeOptions, 1)...)
	k := labtest.Must(l.NewKube(ctx, ""))(t)
	var theirs []string
	for _, object := range strings.Split(string(labtest.Must(os.ReadFile("../../Documentation/kube-flannel.yml"))(t)), "\n---\n") {
		switch {
		case strings.Contains(object, "\nkind: ClusterRole\n"):
			theirs = append(theirs, upstreamRole)
		case !strings.Contains(object, "\nkind: Role\n") && !strings.Contains(object, "\nkind: RoleBinding\n"):
			theirs = append(theirs, object)
		}
	}
	labtest.Do(t, k.Install(ctx, strings.Join(theirs, "\n---\n")))
	n := l.Nodes()[0]
	labtest.Do(t, k.AddNode(ctx, n))
	labtest.Must(k.Do(ctx, "POST", "/api/v1/namespaces/kube-flannel/pods", []byte(`{"metadata": {"name": "kube-flannel-ds-x"},
		"spec": {"nodeName": "n1", "serviceAccountName": "flannel", "containers": [{"name": "c", "image": "none.invalid/none"}]}}`)))(t)
	n.Env = []string{"NODE_NAME=", "POD_NAME=kube-flannel-ds-x", "POD_NAMESPACE=kube-flannel"}
	labtest.Do(t, n.Start(append(daemonArgs(t, k, vxlanConfig), "--v=1")...))
	const said = `"Cannot record Events; problems are in the log alone" err="events \"n1.flannel-`
	waitSaid(ctx, t, n, said)
	labtest.Do(t, k.StartControllers("10.5.0.0/16"))
	labtest.Do(t, n.WaitReady(ctx))
	checkNode(ctx, t, k, n, "vxlan")
	if log := n.Log(); strings.Count(log, said) != 1 || strings.Contains(log, "API server") {
		t.Errorf("that events are not allowed is said\n%s", log)
	}
	if all := labtest.Must(eventsOf(ctx, k, "n1"))(t); len(all) > 0 {
		t.Errorf("there are events: %+v", all)
	}
}
