package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// waitLog waits until a node's daemon has logged a text.
func waitLog(ctx context.Context, t *testing.T, n *lab.Node, text string) {
	t.Helper()
	labtest.Do(t, lab.Poll(ctx, n.Hostname+" to log: "+text, func() error {
		if !strings.Contains(n.Log(), text) {
			return fmt.Errorf("it has logged:\n%s", n.Log())
		}
		return nil
	}))
}

// endsWell sends a daemon SIGTERM, after which it may log no error.
func endsWell(ctx context.Context, t *testing.T, n *lab.Node) {
	t.Helper()
	before := len(n.Log())
	labtest.Do(t, n.Stop(ctx))
	ending := n.Log()[before:]
	for line := range strings.Lines(ending) {
		if strings.HasPrefix(line, "E") || strings.Contains(line, "cannot continue") {
			t.Errorf("%s has logged: %s", n.Hostname, line)
		}
	}
	if state := n.Wait(); state.ExitCode() != 0 || !strings.Contains(ending, "flanneld ends") {
		t.Errorf("flanneld on %s: %v, after it has logged:\n%s", n.Hostname, state, ending)
	}
}

// TestEnd: whatever a daemon waits for, SIGTERM ends it, and that is no error.
func TestEnd(t *testing.T) {
	t.Parallel()
	backend := func(text string) string { return fmt.Sprintf(`{%s, "Backend": {%s}}`, ipv4Network, text) }
	etcd := func(do func(context.Context, *lab.Etcd) error) func(context.Context, *lab.Lab) error {
		return func(ctx context.Context, l *lab.Lab) error { return do(ctx, l.Etcd) }
	}
	for name, c := range map[string]struct {
		config string
		before func(context.Context, *lab.Lab) error
		env    []string
		args   []string
		until  string                                // what it logs
		after  func(context.Context, *lab.Lab) error // done then
	}{
		"etcd's answer": {config: vxlanConfig, until: `operation="read the network's configuration"`,
			before: etcd(func(ctx context.Context, e *lab.Etcd) error { return e.Cut(ctx) })},
		"the network's configuration": {config: vxlanConfig, until: "The network is not configured",
			before: etcd(func(ctx context.Context, e *lab.Etcd) error { return e.Delete(ctx, lab.Prefix+"/config") })},
		"an uplink": {config: vxlanConfig, args: []string{"--iface=nosuch"}, until: `operation="Uplink"`},
		"a free subnet": {config: `{"Network": "10.5.0.0/16", "SubnetMin": "10.5.1.0", "SubnetMax": "10.5.1.0", "Backend": {"Type": "vxlan"}}`,
			until: "No subnet is free",
			before: etcd(func(ctx context.Context, e *lab.Etcd) error {
				return e.Put(ctx, lab.Prefix+"/subnets/10.5.1.0-24",
					`{"PublicIP": "198.18.0.99", "BackendType": "vxlan", "BackendData": {"VNI": 1, "VtepMAC": "02:00:00:00:00:99"}}`)
			})},
		"another node to give up the address": {config: vxlanConfig, until: "holds the public address",
			before: etcd(func(ctx context.Context, e *lab.Etcd) error {
				return e.Put(ctx, lab.Prefix+"/nodes/198.18.0.1", `{"Identity": "another", "Hostname": "n99"}`)
			})},
		"what the backend publishes": {config: backend(`"Type": "wireguard"`),
			env:   []string{"WIREGUARD_KEY_FILE=/dev/null/key"},
			until: "Waiting for what this node is to publish"},
		"the backend's command": {config: backend(`"Type": "extension", "PostStartupCommand": "false"`),
			until: "PostStartupCommand"},
		"the cloud": {config: backend(`"Type": "aws-vpc"`), until: "aws-vpc",
			env: []string{"AWS_EC2_METADATA_SERVICE_ENDPOINT=http://198.18.0.254:1",
				"AWS_ENDPOINT_URL_EC2=http://198.18.0.254:1"}},
		"iptables, that hangs": {config: vxlanConfig, env: hanging(t, "iptables-save"), until: "Waiting for a program"},
		"nft, that hangs":      {config: nftablesConfig, env: hanging(t, "nft"), until: "Waiting for a program"},
		"nothing":              {config: vxlanConfig, until: `"Ready" after=`},
		"etcd, that has gone": {config: vxlanConfig, until: `"Ready" after=`,
			after: etcd(func(ctx context.Context, e *lab.Etcd) error { return e.Cut(ctx) })},
		"etcd, that has died": {config: vxlanConfig, until: `"Ready" after=`,
			after: etcd(func(_ context.Context, e *lab.Etcd) error { e.Kill(); return nil })},
	} {
		t.Run("waits for "+name, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t, 2*time.Minute)
			l := labtest.New(ctx, t, c.config, lab.NodeOptions{})
			n := l.Nodes()[0]
			if c.before != nil {
				labtest.Do(t, c.before(ctx, l))
			}
			n.Env = c.env
			labtest.Do(t, n.Start(c.args...))
			waitLog(ctx, t, n, c.until)
			if c.after != nil {
				labtest.Do(t, c.after(ctx, l))
			}
			endsWell(ctx, t, n)
		})
	}
}

// TestEndKubernetes: the same where leases come from Nodes.
func TestEndKubernetes(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 3*time.Minute)
	l, k := newKube(ctx, t, "", make([]lab.NodeOptions, 1))
	n := l.Nodes()[0]
	args := daemonArgs(t, k, vxlanConfig)
	through := func(until string) {
		t.Helper()
		labtest.Do(t, n.Start(args...))
		waitLog(ctx, t, n, until)
		endsWell(ctx, t, n)
	}
	labtest.Do(t, k.Cut(ctx))
	through("API server at ")
	labtest.Do(t, k.Restore(ctx))
	through(`missing="Node n1"`)
	labtest.Do(t, k.AddNode(ctx, n))
	through(`missing="spec.podCIDR of Node n1"`)
}

// nftablesConfig is vxlanConfig with nftables.
const nftablesConfig = `{` + ipv4Network + `, "EnableNFTables": true, "Backend": {"Type": "vxlan"}}`

// hanging returns the environment for a daemon on whose host a program hangs, and leaves a child that cannot be ended
// together with the program, and keeps the program's output open.
func hanging(t *testing.T, program string) []string {
	t.Helper()
	dir := t.TempDir()
	script := "#!/bin/sh\nsetsid sleep 1000 &\nexec sleep 1000\n"
	labtest.Do(t, os.WriteFile(filepath.Join(dir, program), []byte(script), 0o755))
	return []string{"PATH=" + dir + ":" + os.Getenv("PATH")}
}

// TestSecondSignal: a second signal ends a daemon at once, whatever the daemon waits for.
func TestSecondSignal(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		program, config string
	}{
		"ShutdownCommand hangs":             {},
		"ShutdownCommand and iptables hang": {program: "iptables-restore"},
		"ShutdownCommand and nft hang":      {program: "nft", config: `"EnableNFTables": true,`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t, time.Minute)
			pidFile := filepath.Join(t.TempDir(), "pid")
			command := fmt.Sprintf("echo $$ >%[1]s.new; mv %[1]s.new %[1]s; exec sleep 600", pidFile)
			config := fmt.Sprintf(`{%s, %s "Backend": {"Type": "extension", "RunShutdownCommand": true,
				"ShutdownCommand": %q}}`, ipv4Network,
				c.config, command)
			l := labtest.New(ctx, t, config, lab.NodeOptions{})
			n := l.Nodes()[0]
			if c.program == "" {
				labtest.Start(ctx, t, l)
			} else {
				n.Env = hanging(t, c.program)
				labtest.Do(t, n.Start())
				waitLog(ctx, t, n, "Waiting for a program")
			}
			labtest.Do(t, n.Signal(syscall.SIGTERM))
			var pid int
			labtest.Do(t, lab.Poll(ctx, "ShutdownCommand", func() error {
				text, err := os.ReadFile(pidFile)
				if err == nil {
					pid, err = strconv.Atoi(strings.TrimSpace(string(text)))
				}
				return err
			}))
			t.Cleanup(func() { syscall.Kill(pid, syscall.SIGKILL) })
			if n.Exited() {
				t.Fatal("flanneld has not waited for ShutdownCommand")
			}
			labtest.Do(t, n.Signal(syscall.SIGTERM))
			if status := n.Wait().Sys().(syscall.WaitStatus); !status.Signaled() || status.Signal() != syscall.SIGTERM {
				t.Errorf("flanneld: %v", n.Wait())
			}
		})
	}
}
