package network

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/nstest"
	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/subnet"
)

// Whatever somebody does to the subnet file, or to its directory, it is there
// again, and looked after as before.
func TestSubnetFile(t *testing.T) {
	m := newManager(vxlanConfig)
	d := begin(t, m, func(o *Options) { o.KernelResync = time.Hour })
	m.grants <- lease("10.5.1.0-24", "")
	m.updates <- snapshot(peer2)
	eventually(t, "ready", ready)
	dir := filepath.Dir(d.file)
	for _, harm := range []struct {
		what string
		do   func() error
	}{
		{"the file removed", func() error { return os.Remove(d.file) }},
		{"the directory removed", func() error { os.Remove(d.file); return os.RemoveAll(dir) }},
		{"the file removed from the new directory", func() error { return os.Remove(d.file) }},
		{"the directory moved", func() error { return os.Rename(dir, dir+".old") }},
		{"the file emptied in the new directory", func() error { return os.Truncate(d.file, 0) }},
	} {
		if err := harm.do(); err != nil && !os.IsExist(err) { // for it may come back as it goes
			t.Fatalf("%s: %v", harm.what, err)
		}
		eventually(t, "the file after "+harm.what, func() bool {
			env, err := subnet.ReadEnv(d.file)
			return err == nil && env.Subnets.Key() == "10.5.1.0-24"
		})
	}
}

// mkDockerOpts does to a file what mk-docker-opts.sh does to its output, which is the subnet file in some units. flannel's
// script reads the file, empties it, and opens it again for each of Docker's options. Our script, which runs with odd
// numbers here, replaces the file.
const mkDockerOpts = `. "$0"
bip=$FLANNEL_SUBNET mtu=$FLANNEL_MTU to=$0
[ $(($1 % 2)) = 0 ] || to=$0.new
printf '' >"$to"
echo "DOCKER_OPT_BIP=\"--bip=$bip\"" >>"$to"
echo "DOCKER_OPT_MTU=\"--mtu=$mtu\"" >>"$to"
echo "NETWORK_OPTIONS=\" --bip=$bip --mtu=$mtu run=$1\"" >>"$to"
[ "$to" = "$0" ] || mv "$to" "$0"
`

// Docker's options in the subnet file stay there, beside our lines, as long as the node's subnet and MTU are the same. A
// program that writes them is no rival, however often it runs.
func TestSubnetFileWithDockersOptions(t *testing.T) {
	nstest.Need(t, "sh")
	log := &nstest.Log{}
	m := newManager(vxlanConfig)
	d := beginIn(log.Context(t.Context()), t, m, func(o *Options) { o.KernelResync = 50 * time.Millisecond })
	m.grants <- lease("10.5.1.0-24", "")
	<-m.wants
	m.updates <- snapshot(peer2)
	eventually(t, "ready", ready)
	const (
		runs = 500 // takes longer than 20 bursts of 50 ms, after which undoing is a fight
		all  = "--bip=10.5.1.1/24 --mtu=1450 run="
	)
	has := func(run int, harm string) {
		t.Helper()
		want := []string{`DOCKER_OPT_BIP="--bip=10.5.1.1/24"`, `DOCKER_OPT_MTU="--mtu=1450"`,
			fmt.Sprintf(`NETWORK_OPTIONS=" %s%d"`, all, run)}
		var text []byte
		for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
			text, _ = os.ReadFile(d.file)
			f, err := subnet.ParseEnvFile(text)
			if err == nil && f.Env.MTU == 1450 && len(f.Missing) == 0 && slices.Equal(f.Others, want) {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s of run %d, the file has\n%s", harm, run, text)
			}
		}
	}
	for run := range runs {
		if out, err := exec.Command("sh", "-c", mkDockerOpts, d.file, strconv.Itoa(run)).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		has(run, "after the end")
	}
	// Another program changes our lines.
	text, err := os.ReadFile(d.file)
	if err == nil {
		err = os.WriteFile(d.file, bytes.ReplaceAll(text, []byte("MTU=1450"), []byte("MTU=1400")), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	has(runs-1, "after a change to our lines")
	if lines := log.Lines("again and again"); len(lines) > 0 {
		t.Errorf("logged %q", lines)
	}

	// The options are wrong for another MTU.
	m.configure(t, `{"Network": "10.5.0.0/16", "Backend": {"Type": "host-gw"}}`)
	<-m.wants
	m.grants <- lease("10.5.1.0-24", "")
	eventually(t, "the MTU of host-gw, and no option of Docker", func() bool {
		f, err := subnet.ReadEnvFile(d.file)
		return err == nil && f.MTU == 1500 && len(f.Others) == 0
	})
}

// A program that changes the subnet file whenever flanneld has written it is noticed: that is logged once, and flanneld
// writes the file more slowly.
func TestSubnetFileFight(t *testing.T) {
	log := &nstest.Log{}
	m := newManager(vxlanConfig)
	socket := filepath.Join(t.TempDir(), "sock")
	d := beginIn(log.Context(t.Context()), t, m, func(o *Options) {
		o.KernelResync, o.StatusSocket = time.Hour, socket
	})
	m.grants <- lease("10.5.1.0-24", "")
	m.updates <- snapshot(peer2)
	eventually(t, "ready", ready)
	written := func() bool {
		env, err := subnet.ReadEnv(d.file)
		return err == nil && env.MTU == 1450
	}
	undo := func() {
		t.Helper()
		eventually(t, "the file", written)
		env, err := subnet.ReadEnv(d.file)
		if err == nil {
			env.MTU = 1400
			err = env.WriteFile(d.file)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	const begins = "again and again"
	for i := 0; len(log.Lines(begins)) == 0; i++ {
		if i == 1000 { // a fight has 20 bursts of 50 ms
			t.Fatal("nothing is noticed")
		}
		undo()
	}
	changes := len(log.Lines("writing it again"))
	for range 3 { // from now on, each is a second apart
		undo()
	}
	if lines := log.Lines("subnet.env"); len(lines) != changes+1 || len(log.Lines(begins)) != 1 {
		t.Errorf("after %d lines on changes: %q", changes, lines)
	}
	s, err := NewClient(socket).Status(t.Context())
	if _, text := get("/metrics"); err != nil || !strings.Contains(s.Errors["Subnet file"], begins) || attempts(text) < 3 {
		t.Errorf("status: %q, %v; %d attempts", s.Errors, err, attempts(text))
	}
	eventually(t, "the file", written)
}

// What is undone within a second waits for the next retry, when it is fought over.
func TestSubnetFilePace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newManager(`{"Network": "10.5.0.0/16", "Backend": {"Type": "toy"}}`)
		cfg, err := m.Config(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		own := lease("10.5.1.0-24", "")
		n := &node{
			Options: Options{Manager: m, SubnetFile: filepath.Join(t.TempDir(), "subnet.env")},
			state:   state{setup: setup{cfg: cfg, backend: &toy{}}, own: &own},
			health:  newHealth(m, nil), metrics: newMetrics(m, ""), errors: retry.LastErrors[string]{}, fileFights: newFileFights(klog.Background()),
		}
		undo := func() {
			n.writeFile()
			if err := os.Remove(n.SubnetFile); err != nil {
				t.Fatal(err)
			}
			n.checkFile()
		}
		for range n.fileFights.Times {
			if n.filePaced {
				t.Fatal("what is no fight waits")
			}
			time.Sleep(n.fileFights.Burst)
			undo()
		}
		if !n.filePaced || n.fileFight == "" {
			t.Error("a fight does not wait")
		}
		time.Sleep(n.fileFights.Calm + 1)
		n.fileFights.Forget()
		if n.recordFileFight(); n.fileFight != "" {
			t.Error("a fight does not end")
		}
	})
}

// A fileKeeper is a manager with a file beside the subnet file.
type fileKeeper struct {
	*manager
	file string
}

func (k fileKeeper) RestoreFile() {
	if _, err := os.Lstat(k.file); err != nil {
		os.WriteFile(k.file, nil, 0o600)
	}
}

// The manager restores its file as the subnet file is restored: when it was removed, and where it could not be written.
func TestFileBesideTheSubnetFile(t *testing.T) {
	m := newManager(vxlanConfig)
	k := fileKeeper{manager: m}
	d := begin(t, m, func(o *Options) {
		o.KernelResync = time.Hour
		k.file = o.SubnetFile + ".lease"
		o.Manager = k
	})
	m.grants <- lease("10.5.1.0-24", "")
	m.updates <- snapshot(peer2)
	eventually(t, "ready", ready)
	dir := filepath.Dir(d.file)
	remove := func() error { return os.Remove(k.file) }
	for i, harm := range []func() error{
		remove, remove, remove, // no event of the subnet file is left
		func() error { return errors.Join(os.Remove(d.file), os.Remove(k.file)) },
		func() error { return os.Rename(dir, dir+".old") },
	} {
		if err := harm(); err != nil {
			t.Fatal(i, err)
		}
		eventually(t, fmt.Sprint("both files after harm ", i), func() bool { return exists(k.file) && exists(d.file) })
	}
}

func exists(path string) bool { _, err := os.Lstat(path); return err == nil }

// As long as the subnet file cannot be written, that is logged once, however often flanneld tries.
func TestSubnetFileCannotBeWritten(t *testing.T) {
	nstest.NeedRoot(t)
	const often = 50 * time.Millisecond
	for _, c := range []struct {
		name   string
		dir    string                  // of the subnet file, in the file system
		size   string                  // of the file system
		before func(root string) error // makes writing impossible
		after  func(root string) error // makes writing possible again
		want   string                  // the error, after the path

		resync   time.Duration // at which flanneld tries, too
		attempts int           // that are made meanwhile
	}{
		{"full", ".", "size=4096",
			func(root string) error { return os.WriteFile(filepath.Join(root, "big"), make([]byte, 4096), 0o600) },
			func(root string) error { return os.Remove(filepath.Join(root, "big")) },
			"no space left on device", often, 10},
		{"without a free inode", ".", "nr_inodes=1",
			func(root string) error { return nil },
			func(root string) error { return unix.Mount("", root, "", unix.MS_REMOUNT, "nr_inodes=9") },
			"no space left on device", often, 10},
		{"read-only", ".", "", readOnly, writable, "read-only file system", often, 10},
		{"read-only, without the directory", "flannel", "", readOnly, writable, "read-only file system",
			time.Hour, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := t.TempDir()
			if err := unix.Mount("tmpfs", root, "tmpfs", 0, c.size); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = unix.Unmount(root, unix.MNT_DETACH) })
			if err := c.before(root); err != nil {
				t.Fatal(err)
			}
			log := &nstest.Log{}
			m := newManager(vxlanConfig)
			file := filepath.Join(root, c.dir, "subnet.env")
			d := beginIn(log.Context(t.Context()), t, m, func(o *Options) {
				o.SubnetFile, o.KernelResync = file, c.resync
			})
			m.grants <- lease("10.5.1.0-24", "")
			m.updates <- snapshot(peer2)
			eventually(t, "many attempts", func() bool {
				_, text := get("/metrics")
				return attempts(text) >= c.attempts
			})
			errors := log.Lines(`operation="Subnet file"`)
			if len(errors) != 1 || !strings.Contains(errors[0], c.want) || !strings.Contains(errors[0], root) {
				t.Errorf("logged %q", errors)
			}
			if others := log.Lines(root); len(others) != 1 {
				t.Errorf("logged %q", others)
			}
			if err := c.after(root); err != nil {
				t.Fatal(err)
			}
			eventually(t, "ready", ready)
			if errors := log.Lines(`operation="Subnet file"`); len(errors) != 2 || !strings.Contains(errors[1], "Recovered") {
				t.Errorf("logged in the end %q", errors)
			}
			// From now on, the file is watched.
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the file", func() bool { _, err := subnet.ReadEnv(file); return err == nil })
			d.stop()
			d.done <- nil
		})
	}
}

// attempts returns how often writing the subnet file has failed.
func attempts(metrics string) int {
	_, after, _ := strings.Cut(metrics, `flannel_errors_total{operation="subnet_file"} `)
	number, _, _ := strings.Cut(after, "\n")
	n, _ := strconv.Atoi(number)
	return n
}

func readOnly(root string) error { return unix.Mount("", root, "", unix.MS_REMOUNT|unix.MS_RDONLY, "") }
func writable(root string) error { return unix.Mount("", root, "", unix.MS_REMOUNT, "") }

// That the file is no longer watched when flanneld ends is no failure.
func TestSubnetFileAtTheEnd(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	f, err := watchFile(ctx, filepath.Join(t.TempDir(), "subnet.env"))
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	eventually(t, "the end of the watch", func() bool { return errors.Is(f.Add(f.dir), fsnotify.ErrClosed) })
	if err := f.again(); err != nil {
		t.Error(err)
	}
}
