package lab

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// NodeOptions for a node. The zero value puts it on the bridge.
type NodeOptions struct {
	// Routed puts the node on a subnet of its own, 198.18.N.0/24 and
	// fd18:0:0:N::/64, that the underlay routes.
	Routed bool

	// NAT gives the node a second interface as VirtualBox does: nat0, with the
	// same address and MAC on every such node, and the default route.
	NAT bool

	// Home, if it is not 0, is the number of a network behind NAT, in which the node is 192.168.HOME.N, without IPv6. The
	// network's address outside is HomeAddress.
	Home int
}

// NATAddress is every node's address on nat0.
const NATAddress = "10.0.2.15"

// A Node is a namespace with the daemon in it. Besides the network it has a
// host name and a machine id of its own, and /sys shows its own devices.
type Node struct {
	*Namespace
	*Daemon

	Number     int // 1, 2, …
	Hostname   string
	IPv4, IPv6 netip.Addr // of eth0
	Dir        string     // the daemon's log and subnet.env, CNI's state

	lab  *Lab
	opts NodeOptions
	far  *Namespace // which has the other end of eth0
	pods []*Pod

	kubelet *Process // nil where there is no cluster
	docker  *Process // the engine; nil before StartDocker
	dockerd []string // its arguments
}

// AddNode adds a node, without starting the daemon.
func (l *Lab) AddNode(ctx context.Context, o NodeOptions) (*Node, error) {
	l.mu.Lock()
	n := &Node{Number: len(l.nodes) + 1, lab: l, opts: o}
	l.nodes = append(l.nodes, n)
	l.mu.Unlock()

	n.Hostname = fmt.Sprintf("n%d", n.Number)
	n.IPv4 = netip.AddrFrom4([4]byte{198, 18, 0, byte(n.Number)})
	six := [16]byte{0: 0xfd, 1: 0x18, 15: byte(n.Number)}
	if o.Routed {
		n.IPv4 = netip.AddrFrom4([4]byte{198, 18, byte(n.Number), byte(n.Number)})
		six[7] = byte(n.Number)
	}
	n.IPv6 = netip.AddrFrom16(six)
	if o.Home != 0 {
		n.IPv4, n.IPv6 = netip.AddrFrom4([4]byte{192, 168, byte(o.Home), byte(n.Number)}), netip.Addr{}
	}
	n.Dir = filepath.Join(l.Dir, n.Hostname)
	if err := os.Mkdir(n.Dir, 0o755); err != nil {
		return nil, err
	}
	id := sha256.Sum256([]byte(n.Dir))
	if err := os.WriteFile(n.machineID(), fmt.Appendf(nil, "%x\n", id[:16]), 0o644); err != nil {
		return nil, err
	}
	n.Daemon = &Daemon{node: n}
	return n, n.boot(ctx)
}

// boot makes the namespace and connects it.
func (n *Node) boot(ctx context.Context) (err error) {
	if n.Namespace, err = n.lab.namespace(ctx, n.Hostname, n.settle); err != nil {
		return err
	}
	gateway, gatewayV6, bridge := Gateway, GatewayV6, "br0"
	n.far = n.lab.net
	switch {
	case n.opts.Home != 0:
		if n.far, err = n.lab.homeRouter(ctx, n.opts.Home); err != nil {
			return err
		}
		gateway, bridge = homeGateway(n.opts.Home), "lan"
	case n.opts.Routed:
		four, six := n.IPv4.As4(), n.IPv6.As16()
		four[3], six[15] = 254, 0xfe
		gateway, gatewayV6 = netip.AddrFrom4(four), netip.AddrFrom16(six)
	}
	port := n.Hostname
	link := func(port, name, mac string) string {
		return fmt.Sprintf("link add %s type veth peer name %s address %s netns %s", port, name, mac, n.Namespace.Name)
	}
	underlay := []string{link(port, "eth0", fmt.Sprintf("02:00:c6:12:00:%02x", n.Number))}
	if n.opts.Routed {
		underlay = append(underlay,
			"addr add "+gateway.String()+"/24 dev "+port,
			"addr add "+gatewayV6.String()+"/64 dev "+port+" nodad")
	} else {
		underlay = append(underlay, "link set "+port+" master "+bridge)
	}
	underlay = append(underlay, "link set "+port+" up")
	node := []string{
		"link set eth0 up",
		"addr add " + n.IPv4.String() + "/24 dev eth0",
	}
	if n.IPv6.IsValid() {
		node = append(node, "addr add "+n.IPv6.String()+"/64 dev eth0 nodad", "route add default via "+gatewayV6.String())
	}
	if n.opts.NAT {
		underlay = append(underlay, link(n.natPort(), "nat0", "52:54:00:12:34:56"), "link set "+n.natPort()+" up")
		node = append(node, "link set nat0 up", "addr add "+NATAddress+"/24 dev nat0", "route add default via 10.0.2.2")
	} else {
		node = append(node, "route add default via "+gateway.String())
	}
	if err := n.far.Script(ctx, underlay...); err != nil {
		return err
	}
	return n.Script(ctx, node...)
}

// settle runs on the node's thread: what a machine has of its own besides the
// network.
func (n *Node) settle() error {
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_NEWUTS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	// Mounts from outside still arrive, the names of pods' namespaces above
	// all; ours stay here.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("making / a slave mount: %w", err)
	}
	// A new /sys shows the namespace's devices; control groups are as before.
	cgroups, err := unix.OpenTree(unix.AT_FDCWD, cgroupRoot, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return fmt.Errorf("opening %s: %w", cgroupRoot, err)
	}
	defer unix.Close(cgroups)
	if err := unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
		return fmt.Errorf("mounting /sys: %w", err)
	}
	if err := unix.MoveMount(cgroups, "", unix.AT_FDCWD, cgroupRoot, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mounting %s: %w", cgroupRoot, err)
	}
	// A machine without the file, a container perhaps, has none to hide.
	if err := unix.Mount(n.machineID(), "/etc/machine-id", "", unix.MS_BIND, ""); err != nil &&
		!errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("mounting /etc/machine-id: %w", err)
	}
	// WireGuard in user space is found by a socket.
	if err := os.MkdirAll("/run/wireguard", 0o755); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", "/run/wireguard", "tmpfs", 0, "size=1m"); err != nil {
		return fmt.Errorf("mounting /run/wireguard: %w", err)
	}
	if err := unix.Sethostname([]byte(n.Hostname)); err != nil {
		return fmt.Errorf("sethostname: %w", err)
	}
	return nil
}

// natPort is the underlay's end of nat0. It is connected to nothing.
func (n *Node) natPort() string { return fmt.Sprintf("nat%d", n.Number) }

func (n *Node) machineID() string { return filepath.Join(n.Dir, "machine-id") }

// Reboot takes the node's power away and gives it back: pods, processes and all
// that the kernel held are gone, the addresses, MACs and files are the same.
// The daemon is not started.
func (n *Node) Reboot(ctx context.Context) error {
	n.Kill()
	// The kernel takes namespaces apart at leisure, but a veth pair at once.
	unplug := []string{"link del " + n.Hostname}
	if n.opts.NAT {
		unplug = append(unplug, "link del "+n.natPort())
	}
	if err := n.far.Script(ctx, unplug...); err != nil {
		return err
	}
	for _, p := range n.pods {
		if err := n.lab.drop(ctx, p.Namespace); err != nil {
			return err
		}
	}
	n.pods = nil
	if err := n.lab.drop(ctx, n.Namespace); err != nil {
		return err
	}
	// These live in /run on a real node.
	if err := errors.Join(os.RemoveAll(n.cniDir()), os.RemoveAll(n.SubnetFile()), os.RemoveAll(n.KeyFile())); err != nil {
		return err
	}
	return n.boot(ctx)
}
