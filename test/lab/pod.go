package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	types "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
)

// A Pod is a namespace attached to a node's cni0 by flannel's CNI plugin, which
// has the bridge and host-local plugins do so.
type Pod struct {
	*Namespace
	IPv4, IPv6 netip.Addr // invalid where the family is off
	MTU        int

	node   *Node
	cni    *libcni.CNIConfig
	config *libcni.NetworkConfigList
	run    *libcni.RuntimeConf
}

// AddPod attaches a pod to the node, whose daemon must be ready.
func (n *Node) AddPod(ctx context.Context, name string) (*Pod, error) {
	text, err := n.CNIConfig()
	if err != nil {
		return nil, err
	}
	return n.AddPodBy(ctx, name, text)
}

// AddPodBy attaches a pod with the plugins of a list, as in /etc/cni/net.d, and arguments for them: CNI_ARGS.
func (n *Node) AddPodBy(ctx context.Context, name string, list []byte, args ...[2]string) (*Pod, error) {
	env, err := n.SubnetEnv()
	if err != nil {
		return nil, err
	}
	p := &Pod{node: n, MTU: env.MTU}
	if p.config, err = libcni.NetworkConfFromBytes(list); err != nil {
		return nil, err
	}
	if p.Namespace, err = n.lab.namespace(ctx, n.Hostname+"-"+name, nil); err != nil {
		return nil, err
	}
	p.cni = libcni.NewCNIConfigWithCacheDir([]string{filepath.Join(n.lab.Build, "bin"),
		filepath.Join(n.lab.Build, "cni")}, n.cniDir(), &plugins{node: n})
	p.run = &libcni.RuntimeConf{ContainerID: p.Namespace.Name, NetNS: p.path(), IfName: "eth0", Args: args}
	added, err := p.cni.AddNetworkList(ctx, p.config, p.run)
	if err != nil {
		return nil, fmt.Errorf("attaching pod %s: %w", p.Name, err)
	}
	result, err := types.NewResultFromResult(added)
	if err != nil {
		return nil, fmt.Errorf("attaching pod %s: %w", p.Name, err)
	}
	for _, got := range result.IPs {
		if ip, ok := netip.AddrFromSlice(got.Address.IP); ok && ip.Unmap().Is4() {
			p.IPv4 = ip.Unmap()
		} else {
			p.IPv6 = ip
		}
	}
	n.pods = append(n.pods, p)
	return p, nil
}

// Addrs returns the pod's addresses, IPv4 first.
func (p *Pod) Addrs() []netip.Addr { return valid(p.IPv4, p.IPv6) }

// Addrs returns the node's addresses on the underlay, IPv4 first.
func (n *Node) Addrs() []netip.Addr { return valid(n.IPv4, n.IPv6) }

func valid(ips ...netip.Addr) []netip.Addr {
	var out []netip.Addr
	for _, ip := range ips {
		if ip.IsValid() {
			out = append(out, ip)
		}
	}
	return out
}

// Delete detaches the pod and removes it.
func (p *Pod) Delete(ctx context.Context) error {
	if err := p.cni.DelNetworkList(ctx, p.config, p.run); err != nil {
		return fmt.Errorf("detaching pod %s: %w", p.Name, err)
	}
	return p.node.lab.drop(ctx, p.Namespace)
}

func (n *Node) cniDir() string { return filepath.Join(n.Dir, "cni") }

// CNIConfig is what is in /etc/cni/net.d of a real node, with paths of this
// node's own. The bridge does not masquerade, since that would hide what the daemon does.
func (n *Node) CNIConfig() ([]byte, error) {
	type object = map[string]any
	return json.Marshal(object{
		"cniVersion": "1.0.0",
		"name":       "cbr0",
		"plugins": []object{{
			"type":       "flannel",
			"subnetFile": n.SubnetFile(),
			"dataDir":    filepath.Join(n.cniDir(), "flannel"),
			"ipam":       object{"dataDir": filepath.Join(n.cniDir(), "networks")},
			"delegate":   object{"hairpinMode": true, "isDefaultGateway": true, "ipMasq": false},
		}},
	})
}

// plugins runs CNI plugins on a node, as the container runtime does there.
type plugins struct {
	node *Node
	version.PluginDecoder
}

func (x *plugins) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, path)
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = environ, bytes.NewReader(stdin), &out, &errs
	p, err := x.node.Launch(cmd)
	if err == nil {
		err = p.Wait()
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s%s", path, err, out.Bytes(), errs.Bytes())
	}
	return out.Bytes(), nil
}

func (x *plugins) FindInPath(plugin string, paths []string) (string, error) {
	path, err := invoke.FindInPath(plugin, paths)
	if err != nil {
		return "", fmt.Errorf("%w: run make build tools", err)
	}
	return path, nil
}
