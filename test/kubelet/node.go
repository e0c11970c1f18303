package kubelet

import (
	"context"
	"crypto/sha256"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"time"
)

// HeartbeatEvery is how often kubelet writes a Node's status although nothing has changed.
const HeartbeatEvery = 5 * time.Minute

// A Node is what makes one Node another than the next.
type Node struct {
	Name   string
	IP     netip.Addr
	Subnet netip.Prefix
	MAC    net.HardwareAddr // of its VTEP; nil: no daemon has run there yet
}

// Path is where the API server has the Node.
func (n Node) Path() string { return "/api/v1/nodes/" + n.Name }

// Create has the Node registered, with a subnet, and its status written, by the same components as in a real cluster:
// each leaves a list of the fields that it manages.
func (c *Client) Create(ctx context.Context, n Node) error {
	const zone = "eu-central-1b"
	err := c.Write(ctx, http.MethodPost, "/api/v1/nodes", "kubelet", map[string]any{
		"apiVersion": "v1", "kind": "Node",
		"metadata": map[string]any{
			"name": n.Name,
			"labels": map[string]string{
				"beta.kubernetes.io/arch": "amd64", "kubernetes.io/arch": "amd64",
				"beta.kubernetes.io/os": "linux", "kubernetes.io/os": "linux",
				"beta.kubernetes.io/instance-type": "m6i.2xlarge", "node.kubernetes.io/instance-type": "m6i.2xlarge",
				"failure-domain.beta.kubernetes.io/region": "eu-central-1", "topology.kubernetes.io/region": "eu-central-1",
				"failure-domain.beta.kubernetes.io/zone": zone, "topology.kubernetes.io/zone": zone,
				"kubernetes.io/hostname": n.Name, "node-pool": "workers-b",
			},
			"annotations": map[string]string{"volumes.kubernetes.io/controller-managed-attach-detach": "true"},
		},
		"spec": map[string]any{"providerID": "aws:///" + zone + "/i-" + digest(n.Name)[:17]},
	})
	if err != nil {
		return err
	}
	err = c.Write(ctx, http.MethodPatch, n.Path(), "kube-controller-manager", map[string]any{
		"metadata": map[string]any{"annotations": map[string]string{"node.alpha.kubernetes.io/ttl": "300"}},
		"spec":     map[string]any{"podCIDR": n.Subnet.String(), "podCIDRs": []string{n.Subnet.String()}},
	})
	if err != nil {
		return err
	}
	return c.Write(ctx, http.MethodPatch, n.Path()+"/status", "kubelet", map[string]any{"status": n.status()})
}

// Register creates a Node whose daemon is up.
func (c *Client) Register(ctx context.Context, n Node) error {
	if err := c.Create(ctx, n); err != nil {
		return err
	}
	const prefix = "flannel.alpha.coreos.com/"
	return c.Write(ctx, http.MethodPatch, n.Path()+"/status", "flanneld", map[string]any{
		"metadata": map[string]any{"annotations": map[string]string{
			prefix + "kube-subnet-manager": "true", prefix + "backend-type": "vxlan",
			prefix + "backend-data": fmt.Sprintf(`{"VNI":1,"VtepMAC":"%s"}`, n.MAC), prefix + "public-ip": n.IP.String(),
		}},
		"status": map[string]any{"conditions": []map[string]string{
			condition("NetworkUnavailable", "False", "FlannelIsUp", "Flannel is running on this node", time.Now()),
		}},
	})
}

// Heartbeat writes the status as kubelet does when nothing has changed for HeartbeatEvery.
func (c *Client) Heartbeat(ctx context.Context, n Node) error {
	return c.Write(ctx, http.MethodPatch, n.Path()+"/status", "kubelet", map[string]any{
		"status": map[string]any{"conditions": conditions()},
	})
}

// status is what kubelet writes.
func (n Node) status() map[string]any {
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
			{"type": "InternalIP", "address": n.IP.String()}, {"type": "InternalDNS", "address": n.Name}, {"type": "Hostname",
				"address": n.Name},
		},
		"allocatable": allocatable, "capacity": capacity,
		"conditions":      conditions(),
		"daemonEndpoints": map[string]any{"kubeletEndpoint": map[string]int{"Port": 10250}},
		"features":        map[string]bool{"supplementalGroupsPolicy": true},
		"images":          images,
		"nodeInfo": map[string]string{
			"architecture": "amd64", "operatingSystem": "linux", "osImage": "Debian GNU/Linux 12 (bookworm)",
			"bootID": digest(n.Name + "boot")[:36], "machineID": digest(n.Name)[:32], "systemUUID": digest(n.Name +
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
