package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// TestSystemd: with our unit a real systemd starts the daemon in its sandbox,
// which leaves it all that it needs; keeps the subnet file; and starts a daemon
// again that hangs.
func TestSystemd(t *testing.T) {
	t.Parallel()
	for name, config := range map[string]string{
		"vxlan, iptables": `{` + ipv4Network + `, ` + ipv6Network + `, "Backend": {"Type": "vxlan"}}`,
		"udp, nftables":   `{` + ipv4Network + `, "EnableNFTables": true, "Backend": {"Type": "udp"}}`,
		"wireguard":       `{` + ipv4Network + `, "Backend": {"Type": "wireguard"}}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t, 2*time.Minute)
			l := labtest.New(ctx, t, config, make([]lab.NodeOptions, 2)...)
			other, n := l.Nodes()[0], l.Nodes()[1]
			labtest.Do(t, other.Start())
			labtest.Do(t, other.WaitReady(ctx))
			s := startUnit(ctx, t, l, n)

			first := labtest.Must(s.Run(ctx, "cat /run/flannel/subnet.env"))(t)
			routes := labtest.Must(n.Run(ctx, "ip route"))(t)
			if !strings.Contains(first, "FLANNEL_SUBNET=10.5.") || !strings.Contains(routes, "dev flannel") {
				t.Errorf("the subnet file has\n%s\nand the routes are\n%s", first, routes)
			}
			command := "iptables -t nat -S FLANNEL-POSTRTG"
			if strings.Contains(name, "nftables") {
				command = "nft list table ip flannel-ipv4"
			}
			if rules := labtest.Must(n.Run(ctx, command))(t); !strings.Contains(strings.ToLower(rules), "masquerade") {
				t.Errorf("%s says\n%s", command, rules)
			}
			if name == "wireguard" {
				// Also where it runs in user space, and wg finds it by a socket.
				if out := labtest.Must(s.Run(ctx, "wg show flannel-wg peers"))(t); len(strings.Fields(out)) != 1 {
					t.Errorf("wg shows the peers %q", out)
				}
			}
			for _, want := range []string{"NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0000000000003000"} {
				if status := labtest.Must(s.Run(ctx, "cat /proc/"+mainPID(ctx, t,
					s)+"/status"))(t); !strings.Contains(status, want) {
					t.Errorf("of the daemon it is not true that %s:\n%s", want, status)
				}
			}

			labtest.Must(s.Run(ctx, "systemctl stop flanneld"))(t)
			if kept := labtest.Must(s.Run(ctx, "cat /run/flannel/subnet.env"))(t); kept != first {
				t.Errorf("when the daemon has ended the subnet file has\n%s", kept)
			}
			labtest.Must(s.Run(ctx, "systemctl start flanneld"))(t)
			if again := labtest.Must(s.Run(ctx, "cat /run/flannel/subnet.env"))(t); again != first {
				t.Errorf("when the daemon has started again the subnet file has\n%s\nrather than\n%s", again, first)
			}

			hung := mainPID(ctx, t, s)
			labtest.Must(s.Run(ctx, "kill -STOP "+hung))(t)
			labtest.Do(t, lab.Poll(ctx, "systemd to end the daemon that hangs, and start it again", func() error {
				state, err := s.Run(ctx, "systemctl is-active flanneld")
				if pid := mainPID(ctx, t, s); pid == hung || pid == "0" || state != "active" {
					return fmt.Errorf("process %s is %s: %w", pid, state, err)
				}
				return nil
			}))
			text := string(labtest.Must(os.ReadFile(unitLog(n)))(t))
			for line := range strings.Lines(text) {
				for _, sign := range []string{"not permitted", "denied", "Read-only", "No such device"} {
					if strings.Contains(line, sign) {
						t.Errorf("the sandbox is in the way: %s", line)
					}
				}
			}
			if !strings.Contains(text, "SIGABRT: abort") {
				t.Error("the daemon that hung has left no trace")
			}
			if t.Failed() {
				t.Logf("systemd said:\n%s\nand the daemon:\n%s", s.Log(), text)
			}
		})
	}
}

// oldDockerOptions does to the subnet file what flannel's mk-docker-opts.sh does to its output: it reads the file, empties
// it, and opens it again for each line.
const oldDockerOptions = `#!/bin/sh
. /run/flannel/subnet.env
options="$DOCKER_NETWORK_OPTIONS "
printf '' >/run/flannel/subnet.env
for option in --bip=$FLANNEL_SUBNET --mtu=$FLANNEL_MTU; do
	echo "DOCKER_OPT=\"$option\"" >>/run/flannel/subnet.env
	options="$options$option "
done
echo "DOCKER_NETWORK_OPTIONS=\"$options\"" >>/run/flannel/subnet.env
`

// TestOldUnit: a unit as people wrote it for flannel has Docker's options written to the subnet file, from which Docker's
// unit reads them. Docker gets them, once each, also when flanneld has started again, and the file has our lines, too.
func TestOldUnit(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, time.Minute)
	l := labtest.New(ctx, t, `{`+ipv4Network+`, "Backend": {"Type": "vxlan"}}`, make([]lab.NodeOptions, 2)...)
	for i, post := range []string{"old-docker-options",
		"mk-docker-opts.sh -m -k DOCKER_NETWORK_OPTIONS -d /run/flannel/subnet.env"} {
		n := l.Nodes()[i]
		labtest.Do(t, n.Install(labtest.Must(l.Program("bin/flanneld"))(t)))
		labtest.Do(t, n.Install("../../dist/mk-docker-opts.sh"))
		script := filepath.Join(t.TempDir(), "old-docker-options")
		labtest.Do(t, os.WriteFile(script, []byte(oldDockerOptions), 0o755))
		labtest.Do(t, n.Install(script))
		s := labtest.Must(n.StartSystemd(ctx, map[string]string{
			"flanneld.service": "[Service]\nType=notify\nExecStart=/usr/local/bin/flanneld --ip-masq --etcd-endpoints=" +
				lab.Endpoint + "\nExecStartPost=/usr/local/bin/" + post + "\n",
			"docker.service": "[Unit]\nRequires=flanneld.service\nAfter=flanneld.service\n" +
				"[Service]\nType=oneshot\nEnvironmentFile=/run/flannel/subnet.env\n" +
				"ExecStart=/bin/sh -c 'echo $DOCKER_NETWORK_OPTIONS >/run/options'\n",
		}))(t)
		for range 3 {
			out, err := s.Run(ctx, "systemctl restart flanneld docker")
			if err != nil {
				t.Fatalf("%v\n%s\n%s", err, out, s.Log())
			}
			var file string
			labtest.Do(t, lab.Poll(ctx, "our lines in the subnet file", func() error {
				file = labtest.Must(s.Run(ctx, "cat /run/flannel/subnet.env"))(t)
				if f, err := subnet.ParseEnvFile([]byte(file)); err != nil || f.MTU != 1450 || len(f.Missing) > 0 {
					return fmt.Errorf("%w\n%s", err, file)
				}
				return nil
			}))
			_, bip, _ := strings.Cut(file, "FLANNEL_SUBNET=")
			bip, _, _ = strings.Cut(bip, "\n")
			want := "--bip=" + bip + " --mtu=1450"
			if got := strings.TrimSpace(labtest.Must(s.Run(ctx, "cat /run/options"))(t)); got != want {
				t.Errorf("%s: Docker gets %q, want %q", post, got, want)
			}
			if !strings.Contains(file, "DOCKER_NETWORK_OPTIONS=\" "+want) {
				t.Errorf("%s: the subnet file has\n%s", post, file)
			}
		}
	}
}

// TestReadme: the lines of the README for systemd, word for word, on a node that
// has nothing yet. All that is other than there is where etcd is, and that sudo
// is a program of the test's.
func TestReadme(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 2*time.Minute)
	l := labtest.New(ctx, t, "", lab.NodeOptions{})
	n := l.Nodes()[0]
	readme := string(labtest.Must(os.ReadFile("../../README.md"))(t))
	_, rest, _ := strings.Cut(readme, "\nWith systemd, ")
	_, rest, _ = strings.Cut(rest, "\n```\n")
	lines, _, _ := strings.Cut(rest, "```\n")
	if !strings.Contains(lines, "http://192.0.2.10:2379") {
		t.Fatalf("the README's lines for systemd are not found, or tell of no etcd:\n%s", lines)
	}
	lines = strings.ReplaceAll(lines, "http://192.0.2.10:2379", lab.Endpoint)

	bin := t.TempDir()
	labtest.Do(t, os.WriteFile(filepath.Join(bin, "sudo"), []byte("#!/bin/sh\nexec \"$@\"\n"), 0o755))
	etcdctl := labtest.Must(l.Program("bin/etcdctl"))(t)
	labtest.Do(t, os.Symlink(etcdctl, filepath.Join(bin, "etcdctl")))
	script := filepath.Join(bin, "readme")
	labtest.Do(t, os.WriteFile(script, fmt.Appendf(nil, "set -ex\nexport PATH=%s:$PATH ETCDCTL_ENDPOINTS=%s\ncd '%s'\n%s",
		bin, lab.Endpoint, labtest.Must(filepath.Abs("../.."))(t), lines), 0o644))
	s := labtest.Must(n.StartSystemd(ctx, nil))(t)
	out, err := s.Run(ctx, "sh "+script)
	if err != nil || !strings.Contains(out, "lease") || !strings.Contains(out, "10.5.") {
		t.Errorf("%v\n%s\n%s", err, out, s.Log())
	}
	for command, want := range map[string]string{"systemctl is-enabled flanneld": "enabled",
		"systemctl is-active flanneld": "active"} {
		if out, err := s.Run(ctx, command); out != want {
			t.Errorf("%s says %q: %v", command, out, err)
		}
	}
}

// startUnit starts the daemon by our unit, with flags and time limits of the test.
func startUnit(ctx context.Context, t *testing.T, l *lab.Lab, n *lab.Node) *lab.Systemd {
	t.Helper()
	unit := string(labtest.Must(os.ReadFile("../../dist/flanneld.service"))(t))
	// The program is where users install it: in its sandbox the unit does not see /tmp, where the build may be.
	labtest.Do(t, n.Install(labtest.Must(l.Program("bin/flanneld"))(t)))
	for _, change := range [][2]string{
		{"ExecStart=/usr/local/bin/flanneld\n", "ExecStart=/usr/local/bin/flanneld --ip-masq --etcd-endpoints=" + lab.Endpoint +
			"\nStandardOutput=append:" + unitLog(n) + "\nStandardError=inherit\n"},
		{"WatchdogSec=60\n", "WatchdogSec=3\n"},
		{"RestartSec=5\n", "RestartSec=0\n"},
	} {
		if !strings.Contains(unit, change[0]) {
			t.Fatalf("the unit has no line %q", change[0])
		}
		unit = strings.Replace(unit, change[0], change[1], 1)
	}
	s := labtest.Must(n.StartSystemd(ctx, map[string]string{"flanneld.service": unit}))(t)
	if out, err := s.Run(ctx, "systemctl start flanneld"); err != nil {
		log, _ := os.ReadFile(unitLog(n))
		t.Fatalf("%v\n%s\n%s\n%s", err, out, s.Log(), log)
	}
	return s
}

func unitLog(n *lab.Node) string { return filepath.Join(n.Dir, "unit.log") }

func mainPID(ctx context.Context, t *testing.T, s *lab.Systemd) string {
	t.Helper()
	return labtest.Must(s.Run(ctx, "systemctl show --property=MainPID --value flanneld"))(t)
}
