package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/fsnotify/fsnotify"
	"github.com/google/renameio/v2"
	"github.com/spf13/pflag"

	"github.com/flanneld/flanneld/pkg/atomicfile"
	"github.com/flanneld/flanneld/pkg/plain"
)

// settle is how long the installer waits after a change before it checks the files. A burst of changes costs one check,
// and if another program removes the files again and again, the installer restores them at most that often.
const settle = 100 * time.Millisecond

// An installer installs this program and the configuration of a network where the container runtime finds them.
type installer struct {
	program string // path of this program; "": it is not installed
	binDir  string // directory for the program, which is installed as "flannel"
	conf    string // path of the configuration, a list of plugins; "": none
	confDir string // directory for the configuration
	name    string // file name of the configuration in confDir
	after   string // the configuration is installed only when this file exists; "": at once

	logged string // the remarks that were logged last
}

// runInstall is `flannel install`.
func runInstall(args []string) error {
	in := installer{}
	keep := false
	flags := pflag.NewFlagSet("flannel install", pflag.ContinueOnError)
	flags.SortFlags = false
	flags.StringVar(&in.binDir, "bin-dir", "/opt/cni/bin", "directory of CNI plugins, where this program is installed")
	flags.StringVar(&in.program, "program", "/proc/self/exe",
		"program to install as \"flannel\"; empty if something else installs the plugin")
	flags.StringVar(&in.conf, "conf", "/etc/kube-flannel/cni-conf.json",
		"configuration of the network, a conflist; empty installs the program alone")
	flags.StringVar(&in.confDir, "conf-dir", "/etc/cni/net.d", "directory where the configuration is installed")
	flags.StringVar(&in.name, "conf-name", "10-flannel.conflist", "file name of the configuration in --conf-dir")
	flags.StringVar(&in.after, "after", "",
		"install the configuration, which makes a node ready for pods, only when this file exists, "+
			"such as /run/flannel/subnet.env; needs --keep")
	flags.BoolVar(&keep, "keep", false, "keep running, and restore files that are removed or changed")
	flags.Usage = func() {
		fmt.Fprintf(os.Stderr, "flannel install installs the plugin and its configuration where the container runtime finds "+
			"them.\n\n%s", flags.FlagUsages())
	}
	if err := flags.Parse(args); errors.Is(err, pflag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("argument %q is not allowed: only flags are, see flannel install --help", flags.Arg(0))
	}
	isConf := slices.Contains([]string{".conflist", ".conf", ".json"}, filepath.Ext(in.name))
	if !isConf || in.name != filepath.Base(in.name) {
		return fmt.Errorf("--conf-name %q is not allowed: want a file name that ends in .conflist, without a directory",
			in.name)
	}
	if !keep {
		if in.after != "" {
			return errors.New("--after needs --keep: without --keep, the file is checked only once")
		}
		return in.install()
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	return in.keep(ctx)
}

// install writes the files that are missing or differ. Each file is replaced atomically, and the program is installed
// before the configuration that names it.
func (in *installer) install() error {
	var conf []byte
	var list *libcni.NetworkConfigList
	if in.conf != "" {
		var err error
		if conf, err = os.ReadFile(in.conf); err != nil {
			return fmt.Errorf("--conf: %w (in a pod, this file comes from the ConfigMap kube-flannel-cfg)", err)
		}
		list, err = libcni.NetworkConfFromBytes(conf)
		if err == nil && len(list.Plugins) == 0 {
			err = errors.New(`plugins: want a list that begins with {"type": "flannel"}`)
		}
		if err != nil {
			return fmt.Errorf("--conf %s: %w", in.conf, err)
		}
	}
	if in.program != "" {
		program, err := os.Open(in.program)
		if err != nil {
			return err
		}
		defer program.Close()
		if err := put(filepath.Join(in.binDir, "flannel"), program, 0o755); err != nil {
			return fmt.Errorf("--bin-dir: %w", err)
		}
	}
	if in.conf == "" {
		return nil
	}
	var remarks []string
	if _, err := os.Stat(in.after); in.after != "" && err != nil {
		remarks = append(remarks,
			fmt.Sprintf("Waiting for %s, which flanneld writes; until then, no pods start on this node", in.after))
	} else if err := put(filepath.Join(in.confDir, in.name), bytes.NewReader(conf), 0o644); err != nil {
		return fmt.Errorf("--conf-dir: %w", err)
	}
	remarks = slices.Concat(remarks, in.missing(list), in.rivals())
	if text := strings.Join(remarks, "\n"); text != in.logged {
		in.logged = text
		for _, r := range remarks {
			log.Print(plain.Line(r)) // it has names of files and plugins
		}
	}
	return nil
}

// keep installs the files, and again whenever something has changed, until ctx ends. It is an error if a directory is
// removed: in a pod, a new directory at the same path becomes visible only when the volumes are mounted again.
func (in *installer) keep(ctx context.Context) error {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return err
	}
	defer w.Close()
	dirs := []string{filepath.Clean(in.binDir), filepath.Clean(in.confDir)}
	for _, file := range []string{in.conf, in.after} {
		if file != "" {
			dirs = append(dirs, filepath.Dir(file))
		}
	}
	for _, dir := range dirs {
		if err := w.Add(dir); err != nil {
			return fmt.Errorf("watching %s: %w", dir, err)
		}
	}
	for {
		if err := in.install(); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case err := <-w.Errors:
			log.Printf("Watching files failed, checking all files: %v", err)
		case e := <-w.Events:
			if slices.Contains(dirs, e.Name) && e.Has(fsnotify.Remove|fsnotify.Rename) {
				return fmt.Errorf("%s was removed", e.Name)
			}
		}
		for quiet := time.After(settle); quiet != nil; {
			select {
			case <-ctx.Done():
				return nil
			case <-w.Errors:
			case <-w.Events:
			case <-quiet:
				quiet = nil
			}
		}
	}
}

// put replaces the file at path, and logs this, unless the file has the content already.
func put(path string, content io.ReadSeeker, mode fs.FileMode) error {
	if equal(path, content, mode) {
		return nil
	}
	if _, err := content.Seek(0, io.SeekStart); err != nil {
		return err
	}
	t, err := renameio.NewPendingFile(path,
		renameio.WithTempDir(filepath.Dir(path)), renameio.WithStaticPermissions(mode))
	if err != nil {
		return atomicfile.NameError(err, path)
	}
	defer t.Cleanup()
	if _, err := io.Copy(t, content); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if err := t.CloseAtomicallyReplace(); err != nil {
		return atomicfile.NameError(err, path)
	}
	log.Printf("Installed %s", path)
	return nil
}

// equal reports whether path is a file with this content and mode.
func equal(path string, content io.Reader, mode fs.FileMode) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || info.Mode() != mode {
		return false
	}
	const size = 64 << 10
	a, b := make([]byte, size), make([]byte, size)
	for {
		n, errA := io.ReadFull(f, a)
		m, errB := io.ReadFull(content, b)
		if !bytes.Equal(a[:n], b[:m]) {
			return false
		}
		if errA != nil || errB != nil {
			return ended(errA) && ended(errB)
		}
	}
}

// ended reports whether err of io.ReadFull means the end of the file.
func ended(err error) bool { return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) }

// missing returns a remark for each plugin that the configuration needs and that is not in binDir.
func (in *installer) missing(list *libcni.NetworkConfigList) []string {
	var remarks []string
	lacks := func(plugin string) {
		if info, err := os.Stat(filepath.Join(in.binDir, plugin)); err != nil || info.Mode()&0o111 == 0 {
			remarks = append(remarks, fmt.Sprintf("Pods will not start: the CNI plugin %s is not in %s on this node. "+
				"Install the standard plugins there (package kubernetes-cni or containernetworking-plugins)", plugin, in.binDir))
		}
	}
	for _, p := range list.Plugins {
		lacks(p.Network.Type)
		if p.Network.Type != "flannel" {
			continue
		}
		r, err := parse(p.Bytes)
		if err != nil {
			remarks = append(remarks, fmt.Sprintf("Pods will not start: %s: %v", in.conf, err))
			continue
		}
		delegate, _ := parseObject("delegate", r.Delegate)
		ipam, _ := parseObject("ipam", r.IPAM)
		for _, plugin := range []struct {
			conf  object
			usual string
		}{{delegate, "bridge"}, {ipam, "host-local"}} {
			plugin.conf.setDefault("type", plugin.usual)
			lacks(plugin.conf.text("type"))
		}
	}
	return remarks
}

// rivals returns a remark for each configuration that the runtime uses instead of ours, because its name comes first.
func (in *installer) rivals() []string {
	var remarks []string
	files, err := libcni.ConfFiles(in.confDir, []string{".conf", ".conflist", ".json"})
	if err != nil {
		return []string{fmt.Sprintf("%s: %v", in.confDir, err)}
	}
	for _, f := range files {
		if name := filepath.Base(f); name < in.name {
			remarks = append(remarks, fmt.Sprintf("The container runtime uses %[1]s instead of %[2]s, "+
				"because its name comes first: remove %[1]s unless the runtime should use it", f, in.name))
		}
	}
	return remarks
}
