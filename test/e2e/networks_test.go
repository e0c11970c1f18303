package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// Two networks on the same hosts, as flannel's documentation has them: each with a prefix in etcd, a subnet file and a
// VNI of its own. Neither daemon undoes what the other does, pods of the one lose no packet, and a second daemon of the
// same network waits until it can take over.
func TestTwoNetworks(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, time.Minute)
	l := labtest.New(ctx, t, configuration(ipv4Network, `{"Type": "vxlan"}`, false), lab.NodeOptions{}, lab.NodeOptions{})
	const prefix = "/blue/network"
	labtest.Do(t, l.Etcd.Put(ctx, prefix+"/config", `{"Network": "10.99.0.0/16", "Backend": {"Type": "vxlan", "VNI": 2}}`))
	labtest.Start(ctx, t, l, "--ip-masq")
	pods := addPods(ctx, t, l)
	lossless := startPings(ctx, t, pods)
	program := labtest.Must(l.Program("bin/flanneld"))(t)

	start := func(n *lab.Node, log string, args ...string) *exec.Cmd {
		t.Helper()
		file := labtest.Must(os.Create(filepath.Join(n.Dir, log)))(t)
		defer file.Close()
		cmd := exec.Command(program, append(args, "--etcd-endpoints="+lab.Endpoint, "--ip-masq")...)
		cmd.Stdout, cmd.Stderr = file, file
		p := labtest.Must(n.Launch(cmd))(t)
		t.Cleanup(p.Kill)
		return cmd
	}
	envs := map[*lab.Node]subnet.Env{}
	for _, n := range l.Nodes() {
		file := filepath.Join(n.Dir, "blue.env")
		start(n, "blue.log", "--etcd-prefix="+prefix, "--subnet-file="+file)
		labtest.Do(t, lab.Poll(ctx, file, func() (err error) {
			envs[n], err = subnet.ReadEnv(file)
			return err
		}))
	}
	a, b := l.Nodes()[0], l.Nodes()[1]
	there := envs[b].Subnets.IPv4.Addr()
	labtest.Do(t, lab.Poll(ctx, "the blue network", func() error {
		_, err := a.Run(ctx, "ping -c1 -W1 "+there.String())
		return err
	}))
	// Both daemons of a node find everything in order, also after both have started again.
	inOrder := func() {
		t.Helper()
		for _, n := range l.Nodes() {
			for _, args := range [][]string{{"diff"}, {"diff", "--etcd-prefix=" + prefix, "--subnet-file=" + n.Dir + "/blue.env"}} {
				labtest.Do(t, lab.Poll(ctx, n.Hostname+" to be in order", func() error {
					out, _, err := n.Ctl(ctx, args...)
					if err == nil && strings.TrimSpace(out) != "" && !strings.Contains(out, "as it should be") {
						err = errors.New(out)
					}
					return err
				}))
			}
		}
	}
	inOrder()
	labtest.Do(t, a.Restart(ctx))
	labtest.Do(t, a.WaitReady(ctx))
	labtest.Must(a.Run(ctx, "ping -c1 -W5 "+there.String()))(t)

	// A second daemon of the first network waits, and takes over when the first is killed.
	second := start(a, "second.log", "--subnet-file="+a.SubnetFile())
	log := func() string {
		text, _ := os.ReadFile(filepath.Join(a.Dir, "second.log"))
		return string(text)
	}
	said := func(what string) {
		t.Helper()
		labtest.Do(t, lab.Poll(ctx, "the second daemon to log "+what, func() error {
			if !strings.Contains(log(), what) {
				return errors.New(log())
			}
			return nil
		}))
	}
	said(`holder="process ` + fmt.Sprint(a.PID()))
	a.Kill()
	said(`"Ready"`)
	lossless()
	labtest.Must(a.Run(ctx, "ip link del flannel.1"))(t)
	labtest.Do(t, lab.Poll(ctx, "the second daemon to restore the device", func() error {
		_, err := a.Run(ctx, "ip link show flannel.1")
		return err
	}))
	labtest.Do(t, second.Process.Signal(unix.SIGTERM))
	for _, n := range l.Nodes() {
		text := labtest.Must(os.ReadFile(filepath.Join(n.Dir, "blue.log")))(t)
		if strings.Contains(string(text), "it was missing") || strings.Contains(string(text), "another program changed") {
			t.Errorf("%s: the other daemon has undone something:\n%s", n.Hostname, text)
		}
	}
}
