package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// furnish gives a node what it takes besides a network to run containers, and
// starts containerd.
func (n *Node) furnish(ctx context.Context, o ClusterOptions) error {
	if err := addCgroup(n.Namespace.Name); err != nil {
		return err
	}
	if err := n.Do(n.mountFiles); err != nil {
		return fmt.Errorf("%s: %w", n.Hostname, err)
	}
	// As Kubernetes asks of every node.
	settings := []string{"net.ipv4.ip_forward=1", "net.bridge.bridge-nf-call-iptables=1"}
	if _, v6 := o.families(); v6 {
		settings = append(settings, "net.ipv6.conf.all.forwarding=1", "net.bridge.bridge-nf-call-ip6tables=1")
	}
	for _, set := range settings {
		if err := n.sysctl(set); err != nil {
			return err
		}
	}
	plugins := filepath.Join(n.lab.Build, "cni")
	if err := n.Do(func() error { return os.CopyFS("/opt/cni/bin", os.DirFS(plugins)) }); err != nil {
		return fmt.Errorf("CNI's standard plugins: %w: run make tools", err)
	}
	return n.startRuntime(ctx)
}

// mountFiles runs on the node's thread. The machine's files show through, but
// what the node writes stays with it.
func (n *Node) mountFiles() error {
	for _, dir := range []string{"/etc", "/opt", "/var/lib", "/var/log"} {
		upper, work := filepath.Join(n.Dir, "files", dir), filepath.Join(n.Dir, "work", dir)
		if err := errors.Join(os.MkdirAll(upper, 0o755), os.MkdirAll(work, 0o755)); err != nil {
			return err
		}
		if err := unix.Mount("overlay", dir, "overlay", 0, "lowerdir="+dir+",upperdir="+upper+",workdir="+work); err != nil {
			return fmt.Errorf("mounting an overlay on %s: %w", dir, err)
		}
	}
	// containerd mounts overlays of its own, which cannot lie on this one.
	for _, dir := range []string{"/var/lib/containerd", "/var/lib/kubelet", "/run"} {
		own := filepath.Join(n.Dir, "disk", dir)
		if err := errors.Join(os.MkdirAll(own, 0o755), os.MkdirAll(dir, 0o755)); err != nil {
			return err
		}
		if err := unix.Mount(own, dir, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mounting %s: %w", dir, err)
		}
	}
	// What kubelet mounts for containers appears in them.
	if err := unix.Mount("", "/var/lib/kubelet", "", unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("making /var/lib/kubelet a shared mount: %w", err)
	}
	id, err := os.ReadFile(n.machineID())
	if err != nil {
		return err
	}
	if err := os.WriteFile("/etc/machine-id", id, 0o644); err != nil {
		return err
	}
	// What kubelet sets for the whole machine it finds to be so already.
	for name, value := range map[string]string{
		"vm/overcommit_memory": "1", "vm/panic_on_oom": "0", "kernel/panic": "10", "kernel/panic_on_oops": "1",
		"kernel/keys/root_maxkeys": "1000000", "kernel/keys/root_maxbytes": "25000000",
	} {
		own := filepath.Join(n.Dir, "sysctl", name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(own), 0o755), os.WriteFile(own, []byte(value+"\n"),
			0o644)); err != nil {
			return err
		}
		if err := unix.Mount(own, "/proc/sys/"+name, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mounting /proc/sys/%s: %w", name, err)
		}
	}
	return nil
}

// launch starts a program of a node, which logs to a file of its own.
func (n *Node) launch(program string, args ...string) (*Process, error) {
	log, err := os.OpenFile(n.logOf(filepath.Base(program)), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = log, log
	return n.Launch(cmd)
}

func (n *Node) logOf(program string) string { return filepath.Join(n.Dir, program+".log") }

// startRuntime starts containerd, and returns when it answers.
func (n *Node) startRuntime(ctx context.Context) error {
	config := filepath.Join(n.Dir, "containerd.toml")
	// A process in a container may have no right to be spared when memory ends.
	err := os.WriteFile(config, []byte(`version = 2
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "`+pauseImage+`"
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true
`), 0o644)
	if err != nil {
		return err
	}
	proc, err := n.launch("containerd", "--config="+config)
	if err != nil {
		return err
	}
	return Poll(ctx, "containerd on "+n.Hostname, func() error {
		if proc.Exited() {
			return fmt.Errorf("it has exited\n%s", tail(n.logOf("containerd")))
		}
		_, err := n.Run(ctx, "ctr version")
		return err
	})
}

// startKubelet starts kubelet, which registers the node.
func (n *Node) startKubelet(k *Kube, o ClusterOptions) error {
	program, err := n.lab.Program("kube/kubelet")
	if err != nil {
		return err
	}
	user := "system:node:" + n.Hostname
	if err := k.AddUser(user, "system:nodes"); err != nil {
		return err
	}
	type object = map[string]any
	settings := object{
		"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
		"containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
		// The API server, for kubectl logs and exec, does not say who it is.
		"authentication":         object{"anonymous": object{"enabled": true}, "webhook": object{"enabled": false}},
		"authorization":          object{"mode": "AlwaysAllow"},
		"volumePluginDir":        "/var/lib/kubelet/volume-plugins", // rather than in /usr
		"cgroupDriver":           "cgroupfs",
		"cgroupRoot":             "/" + n.Namespace.Name,
		"failCgroupV1":           false,
		"enforceNodeAllocatable": []string{},
		"oomScoreAdj":            0,
		// Nothing is evicted because the machine is full.
		"evictionHard": object{"memory.available": "0%", "nodefs.available": "0%", "nodefs.inodesFree": "0%",
			"imagefs.available": "0%", "imagefs.inodesFree": "0%"},
		"failSwapOn":                  false,
		"imageGCHighThresholdPercent": 100,
	}
	if o.DNS {
		ip, err := o.dnsIP()
		if err != nil {
			return err
		}
		settings["clusterDNS"], settings["clusterDomain"], settings["resolvConf"] = []string{ip}, "cluster.local", ""
	}
	config, err := json.MarshalIndent(settings, "", "  ")
	if err != nil {
		return err
	}
	file := filepath.Join(n.Dir, "kubelet.json")
	if err := os.WriteFile(file, config, 0o644); err != nil {
		return err
	}
	var ips []string
	v4, v6 := o.families()
	if v4 {
		ips = append(ips, n.IPv4.String())
	}
	if v6 {
		ips = append(ips, n.IPv6.String())
	}
	n.kubelet, err = n.launch(program, "--config="+file, "--kubeconfig="+k.Kubeconfig(user), "--node-ip="+strings.Join(ips, ","))
	return err
}

// StopKubelet ends kubelet: containerd goes on without.
func (n *Node) StopKubelet(ctx context.Context) error { return n.kubelet.Stop(ctx) }

// StartProxy starts kube-proxy.
func (n *Node) StartProxy(k *Kube, mode, clusterCIDR string) (*Process, error) {
	program, err := n.lab.Program("kube/kube-proxy")
	if err != nil {
		return nil, err
	}
	return n.launch(program, "--kubeconfig="+k.Kubeconfig(KubeProxy), "--proxy-mode="+mode,
		"--cluster-cidr="+clusterCIDR,
		// These belong to the machine.
		"--conntrack-max-per-core=0", "--oom-score-adj=0")
}

// QueueRule is a command that works where nftables has a queue.
const QueueRule = "nft add table inet try { chain c { queue num 100 ; } ; }"

// QueuePackets does the one thing that kube-network-policies cannot do itself on a kernel whose nftables has no queue: it
// passes the first packet of each connection of pods to kube-network-policies, with iptables. On other kernels it does
// nothing, and returns false.
func (n *Node) QueuePackets(ctx context.Context, pods string) (bool, error) {
	if _, err := n.Run(ctx, QueueRule); err == nil {
		_, err := n.Run(ctx, "nft delete table inet try")
		return false, err
	}
	for _, rule := range []string{
		"-m owner --uid-owner 0 -j ACCEPT", // probes
		"-m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
		"-s " + pods + " -j NFQUEUE --queue-num 100",
		"-d " + pods + " -j NFQUEUE --queue-num 100",
	} {
		if _, err := n.Run(ctx, "iptables -t mangle -A POSTROUTING "+rule); err != nil {
			return false, err
		}
	}
	return true, nil
}

const cgroupRoot = "/sys/fs/cgroup"

// cgroupHierarchies lists where control groups are: all in one place, or
// those of each controller in another.
func cgroupHierarchies() ([]string, error) {
	if _, err := os.Stat(filepath.Join(cgroupRoot, "cgroup.procs")); err == nil {
		return []string{cgroupRoot}, nil
	}
	files, err := filepath.Glob(cgroupRoot + "/*/cgroup.procs")
	for i, f := range files {
		files[i] = filepath.Dir(f)
	}
	return files, err
}

// addCgroup makes a control group in every hierarchy.
func addCgroup(name string) error {
	roots, err := cgroupHierarchies()
	if err != nil {
		return err
	}
	for _, root := range roots {
		dir := filepath.Join(root, name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} { // without, nothing may run in it
			value, err := os.ReadFile(filepath.Join(root, file))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, file), value, 0)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// cgroupDirs lists the directories of the control groups that match a pattern,
// and of all in them: parents first.
func cgroupDirs(pattern string) ([]string, error) {
	roots, err := cgroupHierarchies()
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, root := range roots {
		tops, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			return nil, err
		}
		for _, top := range tops {
			filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					dirs = append(dirs, path)
				}
				return nil // what goes meanwhile is gone
			})
		}
	}
	return dirs, nil
}

// cgroupProcs lists the processes in a directory of cgroupDirs.
func cgroupProcs(dir string) []string {
	text, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs")) // gone: none
	return strings.Fields(string(text))
}

// removeCgroups ends all that runs in the control groups whose names begin so,
// and removes them.
func removeCgroups(ctx context.Context, prefix string) error {
	return Poll(ctx, "control groups "+prefix+"* to end", func() error {
		dirs, err := cgroupDirs(prefix + "*")
		if err != nil {
			return err
		}
		for _, dir := range slices.Backward(dirs) {
			for _, text := range cgroupProcs(dir) {
				if pid, err := strconv.Atoi(text); err == nil && pid > 0 {
					unix.Kill(pid, unix.SIGKILL)
				}
			}
			if gone := unix.Rmdir(dir); gone != nil && gone != unix.ENOENT {
				err = fmt.Errorf("rmdir %s: %w", dir, gone)
			}
		}
		return err
	})
}
