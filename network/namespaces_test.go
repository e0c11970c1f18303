package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/netspace"
	"github.com/flanneld/flanneld/pkg/nstest"
	"github.com/flanneld/flanneld/subnet/subnettest"
)

// member is a node that runs in this process, in a network namespace of its own.
type member struct {
	thread int // in the namespace
	space  *netspace.Space
	socket string
	done   chan error
}

// join starts a node that is known by its address, as a program does that embeds it: in a goroutine with a thread that
// is locked and in another network namespace. The node's eth0 and another node's are the ends of one link.
func join(ctx context.Context, t *testing.T, address string, linked <-chan struct{}, o Options) *member {
	t.Helper()
	dir := t.TempDir()
	m := &member{socket: filepath.Join(dir, "sock"), done: make(chan error, 1)}
	o.SubnetFile, o.StatusSocket = filepath.Join(dir, "subnet.env"), m.socket
	inside := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		home, err := netns.Get()
		if err != nil {
			inside <- err
			return
		}
		defer home.Close()
		defer netns.Set(home)
		namespace, err := netns.New()
		if err == nil {
			defer namespace.Close()
			m.thread = unix.Gettid()
			m.space, err = netspace.Current()
		}
		inside <- err
		if err != nil {
			return
		}
		<-linked
		for _, line := range []string{"ip link set lo up", "ip link set eth0 up", "ip addr add " + address + "/24 dev eth0"} {
			if out, err := nstest.Try(line); err != nil {
				m.done <- fmt.Errorf("%s: %w: %s", line, err, out)
				return
			}
		}
		m.done <- Run(ctx, o)
	}()
	if err := <-inside; err != nil {
		t.Fatal(err)
	}
	return m
}

// try runs a command in the node's namespace.
func (m *member) try(line string) (out string, err error) {
	m.space.Do(func() { out, err = nstest.Try(line) })
	return out, err
}

// TestTwoInOneProcess: two nodes in one process, each in a network namespace of its own, are a network like any other:
// devices, sockets and rules of each are in its namespace, and nothing is in the process's own.
func TestTwoInOneProcess(t *testing.T) {
	nstest.NeedRoot(t)
	nstest.Need(t, "ip", "iptables", "nft", "ping", "ss")
	for backend, device := range map[string]string{"vxlan": "flannel.1", "udp": "flannel0"} {
		t.Run(backend, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			store, registry := &subnettest.Store{}, prometheus.NewPedanticRegistry()
			store.Configure(`{"Network": "10.5.0.0/16", "Backend": {"Type": "` + backend + `"}}`)
			linked := make(chan struct{})
			ready := make(chan string, 100)
			var nodes []*member
			for i, name := range []string{"n1", "n2"} {
				manager := subnettest.NewManager(store, name)
				defer manager.Close()
				nodes = append(nodes, join(ctx, t, fmt.Sprintf("198.18.0.%d", i+1), linked, Options{
					Manager: manager, Uplink: iface.Selector{Criteria: iface.Criteria{Names: []string{"eth0"}}},
					IPMasq: family.Pair[bool]{IPv4: true}, Forward: true, RulesResync: 100 * time.Millisecond,
					Health:  netip.AddrPortFrom(netip.IPv4Unspecified(), healthPort), // the same port
					Metrics: prometheus.WrapRegistererWith(prometheus.Labels{"node": name}, registry),
					Waiting: func(what string) {
						if what == "" {
							ready <- name
						}
					},
				}))
			}
			nstest.Run(t, "ip link add near type veth peer name far")
			nstest.Run(t, fmt.Sprintf("ip link set near netns %d name eth0", nodes[0].thread))
			nstest.Run(t, fmt.Sprintf("ip link set far netns %d name eth0", nodes[1].thread))
			close(linked)
			for range nodes {
				select {
				case <-ready:
				case err := <-nodes[0].done:
					t.Fatalf("n1 has ended: %v", err)
				case err := <-nodes[1].done:
					t.Fatalf("n2 has ended: %v", err)
				case <-time.After(time.Minute):
					t.Fatal("a node is not ready within a minute")
				}
			}

			var first [2]string // address of each node in its own subnet
			for i, m := range nodes {
				status, err := NewClient(m.socket).Status(ctx)
				if err != nil || status.Lease == nil {
					t.Fatalf("status: %+v, %v", status, err)
				}
				first[i] = status.Lease.Subnets[0].Addr().String()
				// It runs iptables in the namespace.
				eventually(t, "no difference", func() bool {
					diff, err := NewClient(m.socket).Diff(ctx)
					return err == nil && len(diff) == 0
				})
				if out, err := m.try("iptables -t nat -S"); !strings.Contains(out, "FLANNEL-POSTRTG") {
					t.Errorf("rules: %s, %v", out, err)
				}
				if out, err := m.try("ss -Hltn sport = " + fmt.Sprint(healthPort)); out == "" {
					t.Errorf("the port of health checks: %s, %v", out, err)
				}
			}
			for i, m := range nodes {
				eventually(t, "packets from node to node", func() bool {
					_, err := m.try("ping -c 1 -W 1 -I " + first[i] + " " + first[1-i])
					return err == nil
				})
			}
			families, err := registry.Gather()
			if err != nil {
				t.Error(err)
			}
			for _, f := range families {
				if f.GetName() == "flannel_peers" && len(f.Metric) != 2 {
					t.Errorf("of two nodes there is %v", f.Metric)
				}
			}

			// This goroutine is at home.
			if out := nstest.Run(t, "ip -o link"); strings.Contains(out, device) {
				t.Errorf("the process's own namespace has\n%s", out)
			}
			if out := nstest.Run(t, "nft list ruleset"); strings.Contains(strings.ToLower(out), "flannel") {
				t.Errorf("the process's own namespace has\n%s", out)
			}
			if out := nstest.Run(t, "ss -Hlntu"); out != "" {
				t.Errorf("in the process's own namespace, there listens\n%s", out)
			}
			if _, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", healthPort)); !errors.Is(err, unix.ECONNREFUSED) &&
				!errors.Is(err, unix.ENETUNREACH) {
				t.Errorf("connecting to health checks from outside: %v", err)
			}
			cancel()
			for _, m := range nodes {
				if err := <-m.done; err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// TestIncompleteOptions: what is missing is an error, not a panic.
func TestIncompleteOptions(t *testing.T) {
	m := subnettest.NewManager(&subnettest.Store{}, "n1")
	defer m.Close()
	for want, o := range map[string]Options{
		"network: Options have no Manager":    {SubnetFile: "/nowhere/subnet.env"},
		"network: Options have no SubnetFile": {Manager: m},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := Run(ctx, o); err == nil || err.Error() != want {
			t.Errorf("Run returned %v, not %s", err, want)
		}
	}
}
