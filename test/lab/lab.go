// Package lab is a cluster on one machine: nodes as network namespaces on an
// underlay that lives in a namespace of its own, a real etcd, the daemon, pods
// attached by the real CNI plugins, and a host outside.
//
//	n1 eth0 198.18.0.1 ─┐               ┌─ eth0 198.18.3.3 n3 (routed)
//	n2 eth0 198.18.0.2 ─┤ br0           │
//	                    └─ .0.254 net .3.254    etcd 198.18.0.254:2379
//	                           │ 198.19.0.254
//	                           └─ eth0 198.19.0.1 outside
//
// IPv6 likewise: fd18::N, fd18:0:0:K::K, fd19::1. All addresses are from the
// ranges for benchmarks (RFC 2544) and unique local ones, but for those of nodes
// in home networks, 192.168.HOME.N, behind routers that translate them. Nothing is ever made
// in the root namespace, so that labs may run side by side.
package lab

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Addresses of the underlay.
var (
	Gateway   = netip.MustParseAddr("198.18.0.254") // also etcd's
	GatewayV6 = netip.MustParseAddr("fd18::fe")
	Outside   = netip.MustParseAddr("198.19.0.1")
	OutsideV6 = netip.MustParseAddr("fd19::1")
)

// Options for a lab. The zero value is right for a test.
type Options struct {
	// Keep is the name of a lab that is to outlive the process, until Remove.
	// Empty: a name from the process id, and everything goes with the process.
	Keep string

	// Store is the program that the lab's etcd is, such as stores/etcd-3.4, or
	// stores/kine. Empty: bin/etcd.
	Store string
	// APIServer is the program that kube-apiserver is, see NewKube. Empty:
	// kube/kube-apiserver.
	APIServer string
}

// A Lab is an underlay with etcd, an outside host, and nodes.
type Lab struct {
	Name    string // namespaces are called Name-n1, Name-net, …
	Dir     string // etcd's data, the nodes' logs and files
	Etcd    *Etcd
	Outside *Namespace // no route leads from here to pods
	Build   string     // where bin/ and cni/ are

	options Options
	keep    bool
	net     *Namespace // the underlay

	mu     sync.Mutex
	spaces []*Namespace
	nodes  []*Node
}

var count atomic.Int32 // labs that this process made

// New makes a lab without nodes, with etcd up. What dead labs left behind is
// removed first. It needs root.
func New(ctx context.Context, o Options) (_ *Lab, err error) {
	if os.Getuid() != 0 {
		return nil, errors.New("a lab needs root: it is made of network namespaces")
	}
	build, err := findBuild()
	if err != nil {
		return nil, err
	}
	if err := removeDead(ctx); err != nil {
		return nil, fmt.Errorf("removing what a dead lab left: %w", err)
	}
	o.Store, o.APIServer = cmp.Or(o.Store, "bin/etcd"), cmp.Or(o.APIServer, "kube/kube-apiserver")
	l := &Lab{Name: o.Keep, Build: build, options: o, keep: o.Keep != ""}
	if !l.keep {
		l.Name = fmt.Sprintf("fl%d-%d", os.Getpid(), count.Add(1))
	}
	l.Dir = filepath.Join(os.TempDir(), l.Name)
	if !l.keep {
		if err := Remove(ctx, l.Name); err != nil { // an earlier process had our id
			return nil, err
		}
	}
	if err := os.Mkdir(l.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("lab %s: %w", l.Name, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	if l.net, err = l.namespace(ctx, "net", nil); err != nil {
		return nil, err
	}
	if l.Outside, err = l.namespace(ctx, "outside", nil); err != nil {
		return nil, err
	}
	for _, set := range []string{
		"net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1",
		"net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.default.rp_filter=0",
		"net.ipv6.conf.default.accept_dad=0",
	} {
		if err := l.net.sysctl(set); err != nil {
			return nil, err
		}
	}
	// What crosses the bridge is none of the underlay's firewall's business.
	for _, family := range []string{"iptables", "ip6tables"} {
		if err := l.net.sysctl("net.bridge.bridge-nf-call-" + family + "=0"); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	err = l.net.Script(ctx,
		"link add br0 address 02:00:00:00:00:fe type bridge mcast_snooping 0",
		"link set br0 up",
		"addr add 198.18.0.254/24 dev br0",
		"addr add fd18::fe/64 dev br0 nodad",
		"link add outside type veth peer name eth0 netns "+l.Outside.Name,
		"link set outside up",
		"addr add 198.19.0.254/24 dev outside",
		"addr add fd19::fe/64 dev outside nodad")
	if err != nil {
		return nil, err
	}
	err = l.Outside.Script(ctx,
		"link set eth0 up",
		"addr add 198.19.0.1/24 dev eth0",
		"addr add fd19::1/64 dev eth0 nodad",
		"route add default via 198.19.0.254",
		"route add default via fd19::fe")
	if err != nil {
		return nil, err
	}
	l.Etcd, err = newEtcd(ctx, l)
	return l, err
}

// namespace makes a namespace that goes with the lab.
func (l *Lab) namespace(ctx context.Context, name string, settle func() error) (*Namespace, error) {
	ns, err := newNamespace(ctx, l.Name+"-"+name, l.keep, settle)
	if err != nil {
		return nil, err
	}
	l.own(ns)
	return ns, nil
}

// own has a namespace go with the lab.
func (l *Lab) own(ns *Namespace) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.spaces = append(l.spaces, ns)
}

// owned returns the namespace of that name; nil: the lab has none.
func (l *Lab) owned(name string) *Namespace {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, ns := range l.spaces {
		if ns.Name == name {
			return ns
		}
	}
	return nil
}

// drop removes a namespace before its time.
func (l *Lab) drop(ctx context.Context, ns *Namespace) error {
	l.mu.Lock()
	l.spaces = slices.DeleteFunc(l.spaces, func(other *Namespace) bool { return other == ns })
	l.mu.Unlock()
	return ns.close(ctx)
}

// sysctl writes net.x.y=value of the namespace.
func (ns *Namespace) sysctl(assignment string) error {
	key, value, _ := strings.Cut(assignment, "=")
	return ns.Do(func() error {
		return os.WriteFile("/proc/sys/"+strings.ReplaceAll(key, ".", "/"), []byte(value), 0)
	})
}

// Nodes returns the nodes in the order in which they were added.
func (l *Lab) Nodes() []*Node {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.nodes)
}

// Close ends what runs in the lab and removes it, a kept one too.
func (l *Lab) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if l.Etcd != nil {
		l.Etcd.Client.Close()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	var errs []error
	for _, ns := range slices.Backward(l.spaces) { // pods before their nodes
		errs = append(errs, ns.close(ctx))
	}
	l.spaces = nil
	return errors.Join(append(errs, Remove(ctx, l.Name))...)
}

// Remove removes the lab of that name, also one that another process made.
func Remove(ctx context.Context, name string) error {
	names, err := namespaces()
	if err != nil {
		return err
	}
	for _, ns := range names {
		if strings.HasPrefix(ns, name+"-") {
			err = errors.Join(err, removeNamespace(ctx, ns))
		}
	}
	// Containers end when no process is left that would start them again. The
	// directory goes last: by it the rest is found, should something fail.
	if err := errors.Join(err, removeCgroups(ctx, name+"-")); err != nil {
		return err
	}
	return os.RemoveAll(filepath.Join(os.TempDir(), name))
}

// Exists reports whether there is a lab of that name.
func Exists(name string) bool {
	_, err := os.Stat(filepath.Join(os.TempDir(), name))
	return err == nil
}

// labName matches the names that labs give themselves: the process id, then a
// number that differs between the labs of one process.
var labName = regexp.MustCompile(`^(fl([0-9]+)-[0-9]+)(-|$)`)

// removeDead removes the labs whose process has died.
func removeDead(ctx context.Context) error {
	names, err := namespaces()
	if err != nil {
		return err
	}
	dirs, err := filepath.Glob(filepath.Join(os.TempDir(), "fl[0-9]*"))
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		names = append(names, filepath.Base(dir))
	}
	for _, name := range names {
		m := labName.FindStringSubmatch(name)
		if m == nil {
			continue
		}
		pid, err := strconv.Atoi(m[2])
		if err != nil || unix.Kill(pid, 0) != unix.ESRCH {
			continue
		}
		if err := Remove(ctx, m[1]); err != nil {
			return err
		}
	}
	return nil
}

// namespaces lists the named network namespaces of this machine.
func namespaces() ([]string, error) {
	entries, err := os.ReadDir("/run/netns")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, nil
}

// findBuild returns the repository's build directory: the one beside the test
// directory that the working directory is in.
func findBuild() (string, error) {
	wd, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for dir := wd; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "test", "go.mod")); err == nil {
			return filepath.Join(dir, "build"), nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("%s is not inside the repository, whose build directory has the programs", wd)
		}
	}
}

// Program returns the path of a program that was built, such as bin/etcd.
func (l *Lab) Program(name string) (string, error) { return programIn(l.Build, name) }

// Program is the same before there is a lab.
func Program(name string) (string, error) {
	build, err := findBuild()
	if err != nil {
		return "", err
	}
	return programIn(build, name)
}

func programIn(build, name string) (string, error) {
	path, err := exec.LookPath(filepath.Join(build, name))
	if err != nil {
		return "", fmt.Errorf("%w: run make build tools", err)
	}
	return path, nil
}
