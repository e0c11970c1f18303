package e2e

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// What an intruder in the unit can do, as Documentation/security.md says.
var allowed = []string{
	"write /run/flannel/x",
	"write /run/wireguard/x",
	"read /run/systemd/resolve/stub-resolv.conf",
	"open /dev/net/tun",
	"socket netlink",
	"run iptables -w -t nat -S",
	"run iptables-legacy -w -t nat -S",
	"run nft list tables",
	"lock /run/xtables.lock",
}

// What an intruder in the unit cannot do, and could without a sandbox.
var refused = []string{
	"write /run/x",
	"write /run/udev/rules.d/99-x.rules",
	"write /run/systemd/system/x.service",
	"write /run/systemd/system/flanneld.service.d/x.conf",
	"write /run/systemd/resolve/x",
	"write /run/tmpfiles.d/x.conf",
	"write /etc/x",
	"write /usr/local/bin/x",
	"write /var/lib/x",
	"run systemctl show-environment",
	"run systemctl daemon-reload",
	"socket packet",
	"call mount",
	"call unshare",
	"call mmap",
	"list /proc/1/root/run",
}

// The sockets that root can use to control the host. The test listens there.
var sockets = []string{
	"/run/containerd/containerd.sock",
	"/run/crio/crio.sock",
	"/run/docker.sock",
	"/run/podman/podman.sock",
	"/run/k3s/containerd/containerd.sock",
	"/run/dbus/system_bus_socket",
	"/run/udev/control",
	"/run/user/1000/bus",
	"/run/of-tomorrow/runtime.sock",
	"/var/lib/incus/unix.socket",
	"/var/lib/lxd/unix.socket",
}

// Sockets of systemd itself. Which there are depends on its version.
var systemdSockets = []string{"/run/systemd/private", "/run/systemd/io.system.ManagedOOM",
	"/run/systemd/io.systemd.Manager", "/run/systemd/userdb/io.systemd.DynamicUser"}

// What an intruder in the unit cannot do, and a test does not do to this machine without a sandbox, or a kernel without
// modules or accounting does not know.
var refusedHere = []string{"write /root/x", "write /home/x", "write /boot/x", "write /opt/x", "call init_module",
	"call acct"}

// TestSandbox: an intruder who is in the place of flanneld can do in our unit what flanneld has to do, and little else.
// Without the sandbox, the same attempts succeed.
func TestSandbox(t *testing.T) {
	t.Parallel()
	for _, sandbox := range []bool{true, false} {
		t.Run(map[bool]string{true: "our unit", false: "no sandbox"}[sandbox], func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t, 2*time.Minute)
			s := startIntruder(ctx, t, func(unit string) string {
				head, rest, found := strings.Cut(unit, "# The sandbox limits")
				_, tail, foundEnd := strings.Cut(rest, "\n[Install]")
				if !found || !foundEnd {
					t.Fatalf("the unit has no sandbox:\n%s", unit)
				}
				if sandbox {
					return unit
				}
				return head + "[Install]" + tail
			}, sockets[:len(sockets)/2])
			// Half of the programs have run before the unit, the other half start later.
			for _, path := range sockets[len(sockets)/2:] {
				listen(t, s, path)
			}
			try := enlist(t, s)
			for _, line := range allowed {
				if command, isCommand := strings.CutPrefix(line, "run "); isCommand {
					if _, err := s.Run(ctx, command); err != nil {
						continue // this machine has no iptables-legacy, or its kernel has no tables for that
					}
				}
				if result := try(line); result != "ok" {
					t.Errorf("%s: %s", line, result)
				}
			}
			if out, err := s.Run(ctx, "flock --nonblock /run/xtables.lock true"); err == nil {
				t.Errorf("the lock of iptables is another file in the unit: %s", out)
			}
			if mode := labtest.Must(s.Run(ctx, "stat --format=%a%U /run/xtables.lock"))(t); mode != "600root" {
				t.Errorf("the lock of iptables has the mode and owner %s: others can hold it", mode)
			}
			attempts := slices.Clone(refused)
			for _, path := range slices.Concat(sockets, systemdSockets) {
				if _, err := os.Stat(s.Path(path)); err == nil {
					attempts = append(attempts, "connect "+path)
				}
			}
			if sandbox {
				attempts = slices.Concat(attempts, refusedHere, devices())
			}
			for _, line := range attempts {
				if result := try(line); (result == "ok") == sandbox {
					t.Errorf("%s: %s", line, result)
				}
			}
		})
	}
}

// TestSandboxDropIn: with the lines that the README of ipsec has for a drop-in, flanneld reaches what listens in /run,
// such as charon, and writes there no more than without.
func TestSandboxDropIn(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, time.Minute)
	const charon = "/run/charon.vici"
	readme := string(labtest.Must(os.ReadFile("../../backend/ipsec/README.md"))(t))
	_, lines, _ := strings.Cut(readme, "```ini\n[Service]\n")
	lines, _, found := strings.Cut(lines, "```")
	if !found {
		t.Fatal("the README of ipsec has no drop-in")
	}
	s := startIntruder(ctx, t, func(unit string) string {
		return strings.Replace(unit, "\n[Install]", lines+"\n[Install]", 1)
	}, []string{charon})
	try := enlist(t, s)
	for line, allowed := range map[string]bool{"connect " + charon: true, "write /run/flannel/x": true,
		"lock /run/xtables.lock": true, "write /run/x": false, "write /run/udev/rules.d/99-x.rules": false} {
		if result := try(line); (result == "ok") != allowed {
			t.Errorf("%s: %s", line, result)
		}
	}
}

// startIntruder starts the intruder in the place of flanneld, in a unit that is ours after a change, while programs
// listen on sockets.
func startIntruder(ctx context.Context, t *testing.T, change func(unit string) string, sockets []string) *lab.Systemd {
	t.Helper()
	l := labtest.New(ctx, t, "{}", lab.NodeOptions{})
	n := l.Nodes()[0]
	self := labtest.Must(os.Executable())(t)
	labtest.Do(t, n.Install(self))
	unit := change(strings.Replace(string(labtest.Must(os.ReadFile("../../dist/flanneld.service"))(t)),
		"ExecStart=/usr/local/bin/flanneld\n", "ExecStart=/usr/local/bin/"+filepath.Base(self)+" -test.run=^TestIntruder$\n"+
			"Environment="+intruderVar+"=1\nStandardOutput=append:"+unitLog(n)+"\nStandardError=inherit\n", 1))
	s := labtest.Must(n.StartSystemd(ctx, map[string]string{"intruder.service": unit}))(t)
	prepare(ctx, t, s)
	for _, path := range sockets {
		listen(t, s, path)
	}
	if out, err := s.Run(ctx, "systemctl start intruder"); err != nil {
		log, _ := os.ReadFile(unitLog(n))
		t.Fatalf("%v\n%s\n%s\n%s", err, out, s.Log(), log)
	}
	return s
}

// prepare makes the directories and files of a host that flanneld has nothing to do with, and those of its resolver.
func prepare(ctx context.Context, t *testing.T, s *lab.Systemd) {
	t.Helper()
	labtest.Must(s.Run(ctx, "mkdir -p /run/udev/rules.d /run/systemd/system/flanneld.service.d /run/systemd/resolve "+
		"/run/tmpfiles.d /var/lib/incus /var/lib/lxd"))(t)
	labtest.Do(t, os.WriteFile(s.Path("/run/systemd/resolve/stub-resolv.conf"), []byte("nameserver 192.0.2.53\n"), 0o644))
}

// listen listens on a socket among systemd's files until the test ends.
func listen(t *testing.T, s *lab.Systemd, path string) {
	t.Helper()
	path = s.Path(path)
	labtest.Do(t, os.MkdirAll(filepath.Dir(path), 0o755))
	l := labtest.Must(net.Listen("unix", path))(t)
	t.Cleanup(func() { l.Close() })
}

// enlist returns a function that has the intruder try something, and returns "ok" or why it failed.
func enlist(t *testing.T, s *lab.Systemd) func(line string) string {
	t.Helper()
	conn := labtest.Must(net.Dial("unix", s.Path(intruderSocket)))(t)
	t.Cleanup(func() { conn.Close() })
	answers := bufio.NewReader(conn)
	return func(line string) string {
		labtest.Must(fmt.Fprintln(conn, line))(t)
		return strings.TrimSpace(labtest.Must(answers.ReadString('\n'))(t))
	}
}

// devices are attempts to open the devices of this machine, but for those that every program may have.
func devices() (attempts []string) {
	files, _ := filepath.Glob("/dev/*")
	harmless := regexp.MustCompile(`^/dev/(full|null|ptmx|random|tty|urandom|zero)$`)
	for _, file := range files {
		if info, err := os.Lstat(file); err == nil && info.Mode()&os.ModeDevice != 0 && !harmless.MatchString(file) {
			attempts = append(attempts, "open "+file)
		}
	}
	return attempts
}
