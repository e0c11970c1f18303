package main

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/flanneld/flanneld/test/lab"
)

// maxPeers have addresses below.
const maxPeers = 1<<15 - 1

// A node is what makes one Node another than the next.
type node struct {
	name   string
	ip     netip.Addr
	subnet netip.Prefix
	mac    net.HardwareAddr // of its VTEP; nil: no daemon has run there yet
}

// peer is one that nobody runs.
func peer(i int) node {
	b := binary.BigEndian.AppendUint16(nil, uint16(i))
	ip := netip.AddrFrom4([4]byte{198, 18, 128 + b[0], b[1]})
	return node{
		name:   fmt.Sprintf("ip-198-18-%d-%d.eu-central-1.compute.internal", 128+b[0], b[1]),
		ip:     ip,
		subnet: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 64 + b[0], b[1], 0}), 24),
		mac:    net.HardwareAddr{0x0e, 0x5a, 0, 0, b[0], b[1]},
	}
}

func peers(from, to int) []node {
	var all []node
	for i := from; i < to; i++ {
		all = append(all, peer(i))
	}
	return all
}

// ownNode is the one that the daemon runs on.
func ownNode(n *lab.Node) node {
	return node{name: n.Hostname, ip: n.IPv4, subnet: netip.MustParsePrefix("10.1.0.0/24")}
}

func (n node) path() string { return "/api/v1/nodes/" + n.name }

// create has the Node registered, with a subnet, and its status written, by the
// same components as in a real cluster: each leaves a list of the fields that
// it manages.
func (a *api) create(ctx context.Context, n node) error {
	const zone = "eu-central-1b"
	err := a.write(ctx, http.MethodPost, "/api/v1/nodes", "kubelet", map[string]any{
		"apiVersion": "v1", "kind": "Node",
		"metadata": map[string]any{
			"name": n.name,
			"labels": map[string]string{
				"beta.kubernetes.io/arch": "amd64", "kubernetes.io/arch": "amd64",
				"beta.kubernetes.io/os": "linux", "kubernetes.io/os": "linux",
				"beta.kubernetes.io/instance-type": "m6i.2xlarge", "node.kubernetes.io/instance-type": "m6i.2xlarge",
				"failure-domain.beta.kubernetes.io/region": "eu-central-1", "topology.kubernetes.io/region": "eu-central-1",
				"failure-domain.beta.kubernetes.io/zone": zone, "topology.kubernetes.io/zone": zone,
				"kubernetes.io/hostname": n.name, "node-pool": "workers-b",
			},
			"annotations": map[string]string{"volumes.kubernetes.io/controller-managed-attach-detach": "true"},
		},
		"spec": map[string]any{"providerID": "aws:///" + zone + "/i-" + digest(n.name)[:17]},
	})
	if err != nil {
		return err
	}
	err = a.write(ctx, http.MethodPatch, n.path(), "kube-controller-manager", map[string]any{
		"metadata": map[string]any{"annotations": map[string]string{"node.alpha.kubernetes.io/ttl": "300"}},
		"spec":     map[string]any{"podCIDR": n.subnet.String(), "podCIDRs": []string{n.subnet.String()}},
	})
	if err != nil {
		return err
	}
	return a.write(ctx, http.MethodPatch, n.path()+"/status", "kubelet", map[string]any{"status": n.status()})
}

// register creates a Node whose daemon is up.
func (a *api) register(ctx context.Context, n node) error {
	if err := a.create(ctx, n); err != nil {
		return err
	}
	const prefix = "flannel.alpha.coreos.com/"
	return a.write(ctx, http.MethodPatch, n.path()+"/status", "flanneld", map[string]any{
		"metadata": map[string]any{"annotations": map[string]string{
			prefix + "kube-subnet-manager": "true", prefix + "backend-type": "vxlan",
			prefix + "backend-data": fmt.Sprintf(`{"VNI":1,"VtepMAC":"%s"}`, n.mac), prefix + "public-ip": n.ip.String(),
		}},
		"status": map[string]any{"conditions": []map[string]string{
			condition("NetworkUnavailable", "False", "FlannelIsUp", "Flannel is running on this node", time.Now()),
		}},
	})
}

// heartbeat writes the status as kubelet does when nothing has changed for five
// minutes.
func (a *api) heartbeat(ctx context.Context, n node) error {
	return a.write(ctx, http.MethodPatch, n.path()+"/status", "kubelet", map[string]any{
		"status": map[string]any{"conditions": conditions()},
	})
}

// status is what kubelet writes.
func (n node) status() map[string]any {
	allocatable := map[string]string{
		"cpu": "7910m", "memory": "31482288Ki", "ephemeral-storage": "95491281146", "pods": "58",
		"hugepages-1Gi": "0", "hugepages-2Mi": "0",
	}
	capacity := map[string]string{
		"cpu": "8", "memory": "32499120Ki", "ephemeral-storage": "104845292Ki", "pods": "58",
		"hugepages-1Gi": "0", "hugepages-2Mi": "0",
	}
	var images []map[string]any
	for i := range 50 { // nodeStatusMaxImages
		name := fmt.Sprintf("registry.eu-central-1.example.com/%s/%s", []string{"platform", "payments", "observability"}[i%3],
			[]string{"api-gateway", "ledger", "log-collector", "metrics-agent", "session-store", "mailer",
				"report-renderer"}[i%7])
		images = append(images, map[string]any{
			"names":     []string{name + "@sha256:" + digest(fmt.Sprint(i)), fmt.Sprintf("%s:v1.%d.3", name, i)},
			"sizeBytes": 412345678 - i*7654321,
		})
	}
	return map[string]any{
		"addresses": []map[string]string{
			{"type": "InternalIP", "address": n.ip.String()}, {"type": "InternalDNS", "address": n.name}, {"type": "Hostname",
				"address": n.name},
		},
		"allocatable": allocatable, "capacity": capacity,
		"conditions":      conditions(),
		"daemonEndpoints": map[string]any{"kubeletEndpoint": map[string]int{"Port": 10250}},
		"features":        map[string]bool{"supplementalGroupsPolicy": true},
		"images":          images,
		"nodeInfo": map[string]string{
			"architecture": "amd64", "operatingSystem": "linux", "osImage": "Debian GNU/Linux 12 (bookworm)",
			"bootID": digest(n.name + "boot")[:36], "machineID": digest(n.name)[:32], "systemUUID": digest(n.name +
				"system")[:36],
			"kernelVersion": "6.1.0-31-cloud-amd64", "containerRuntimeVersion": "containerd://2.1.4",
			"kubeletVersion": "v1.35.1", "kubeProxyVersion": "",
		},
		"runtimeHandlers": []map[string]any{
			{"name": "", "features": map[string]bool{"recursiveReadOnlyMounts": true, "userNamespaces": true}},
			{"name": "runc", "features": map[string]bool{"recursiveReadOnlyMounts": true, "userNamespaces": true}},
		},
	}
}

// conditions are kubelet's, with the time of now.
func conditions() []map[string]string {
	booted := time.Now().Add(-time.Hour)
	return []map[string]string{
		condition("MemoryPressure", "False", "KubeletHasSufficientMemory", "kubelet has sufficient memory available", booted),
		condition("DiskPressure", "False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure", booted),
		condition("PIDPressure", "False", "KubeletHasSufficientPID", "kubelet has sufficient PID available", booted),
		condition("Ready", "True", "KubeletReady", "kubelet is posting ready status", booted),
	}
}

func condition(kind, status, reason, message string, changed time.Time) map[string]string {
	return map[string]string{
		"type": kind, "status": status, "reason": reason, "message": message,
		"lastHeartbeatTime": time.Now().UTC().Format(time.RFC3339), "lastTransitionTime": changed.UTC().Format(time.RFC3339),
	}
}

func digest(of string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(of))) }
