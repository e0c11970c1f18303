package e2e

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// networkAttachments is as much of the definition of NetworkAttachmentDefinitions as the API server needs.
const networkAttachments = `apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: network-attachment-definitions.k8s.cni.cncf.io}
spec:
  group: k8s.cni.cncf.io
  scope: Namespaced
  names: {plural: network-attachment-definitions, singular: network-attachment-definition, kind: NetworkAttachmentDefinition}
  versions:
  - name: v1
    served: true
    storage: true
    schema: {openAPIV3Schema: {type: object, properties: {spec: {type: object, properties: {config: {type: string}}}}}}
`

// TestMultus: Multus attaches pods to the network, and by definitions in Kubernetes to a second network of flannel's, and
// to a bridge of its own. All three work, and nothing is left when a pod is deleted. It is left to make test-long.
func TestMultus(t *testing.T) {
	t.Parallel()
	if !labtest.Selected(false) {
		return
	}
	ctx := labtest.Context(t, 2*time.Minute)
	l := labtest.New(ctx, t, configuration(ipv4Network+`, `+ipv6Network, `{"Type": "vxlan"}`, false), lab.NodeOptions{}, lab.NodeOptions{})
	k := labtest.Must(l.NewKube(ctx, "", "--disable-admission-plugins=ServiceAccount"))(t)
	labtest.Must(k.KubectlApply(ctx, networkAttachments))(t)
	labtest.Must(k.Kubectl(ctx, "wait", "--for=condition=Established", "crd", "--all", "--timeout=60s"))(t)
	const prefix = "/blue/network"
	labtest.Do(t, l.Etcd.Put(ctx, prefix+"/config", `{"Network": "10.99.0.0/16", "Backend": {"Type": "vxlan", "VNI": 2}}`))
	labtest.Start(ctx, t, l, "--ip-masq")
	type object = map[string]any
	pods := map[*lab.Node]*lab.Pod{}
	for i, n := range l.Nodes() {
		blue := filepath.Join(n.Dir, "blue.env")
		p := labtest.Must(n.Launch(exec.Command(labtest.Must(l.Program("bin/flanneld"))(t), "--etcd-endpoints="+lab.Endpoint,
			"--etcd-prefix="+prefix, "--subnet-file="+blue)))(t)
		t.Cleanup(p.Kill)
		labtest.Do(t, lab.Poll(ctx, blue, func() error {
			_, err := subnet.ReadEnv(blue)
			return err
		}))
		text := labtest.Must(n.CNIConfig())(t)
		dir := filepath.Join(n.Dir, "cni")
		for name, config := range map[string]object{
			"blue": {"cniVersion": "1.0.0", "name": "blue", "type": "flannel", "subnetFile": blue,
				"dataDir": filepath.Join(dir, "flannel"), "ipam": object{"dataDir": filepath.Join(dir, "networks")},
				"delegate": object{"bridge": "cni1"}},
			"lan": {"cniVersion": "1.0.0", "name": "lan", "type": "bridge", "bridge": "lan0", "isGateway": true,
				"ipam": object{"type": "host-local", "subnet": "198.19.77.0/24", "dataDir": filepath.Join(dir, "networks")}},
		} {
			labtest.Must(k.KubectlApply(ctx, string(labtest.Must(json.Marshal(object{"apiVersion": "k8s.cni.cncf.io/v1",
				"kind": "NetworkAttachmentDefinition", "metadata": object{"name": fmt.Sprintf("%s-%d", name, i)},
				"spec": object{"config": string(labtest.Must(json.Marshal(config))(t))}}))(t))))(t)
		}
		name := fmt.Sprintf("pod-%d", i)
		labtest.Must(k.KubectlApply(ctx, string(labtest.Must(json.Marshal(object{"apiVersion": "v1", "kind": "Pod",
			"metadata": object{"name": name, "annotations": object{"k8s.v1.cni.cncf.io/networks": fmt.Sprintf("blue-%d,lan-%[1]d", i)}},
			"spec":     object{"containers": []object{{"name": "c", "image": "none"}}}}))(t))))(t)
		list := labtest.Must(json.Marshal(object{"cniVersion": "1.0.0", "name": "multus-cni-network", "plugins": []object{{
			"type": "multus", "cniDir": filepath.Join(n.Dir, "multus"), "kubeconfig": k.Kubeconfig("admin"),
			"readinessindicatorfile": n.SubnetFile(), "logFile": filepath.Join(n.Dir, "multus.log"), "logLevel": "debug",
			"delegates": []json.RawMessage{text}}}}))(t)
		pods[n] = labtest.Must(n.AddPodBy(ctx, "pod", list, [2]string{"IgnoreUnknown", "1"},
			[2]string{"K8S_POD_NAMESPACE", "default"}, [2]string{"K8S_POD_NAME", name}))(t)
	}
	a, b := pods[l.Nodes()[0]], pods[l.Nodes()[1]]
	for _, ip := range b.Addrs() {
		labtest.Do(t, a.WaitPing(ctx, ip))
	}
	there := labtest.Must(b.Run(ctx, "ip -4 -o addr show dev net1"))(t)
	labtest.Do(t, lab.Poll(ctx, "the second network", func() error {
		_, err := a.Run(ctx, "ping -c1 -W1 -I net1 "+addressIn(there))
		return err
	}))
	labtest.Must(a.Run(ctx, "ping -c1 -W5 -I net2 198.19.77.1"))(t)
	for n, p := range pods {
		labtest.Do(t, waitDiff(ctx, n, ""))
		labtest.Do(t, p.Delete(ctx))
		var left []string
		for _, pattern := range []string{"cni/flannel/*", "cni/networks/*/1*", "cni/networks/*/f*"} {
			left = append(left, labtest.Must(filepath.Glob(filepath.Join(n.Dir, pattern)))(t)...)
		}
		if len(left) > 0 {
			t.Errorf("%s: deleting the pod has left %s", n.Hostname, left)
		}
	}
}

// addressIn returns the address in what `ip -o addr` prints.
func addressIn(line string) string {
	_, after, _ := strings.Cut(line, "inet ")
	address, _, _ := strings.Cut(after, "/")
	return address
}
