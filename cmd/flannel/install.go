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
)

// settle is how long the installer lets a burst of changes go on before it
// looks, and so bounds how often it fights somebody who removes its files over
// and over.
const settle = 100 * time.Millisecond

// An installer puts this program, and a network's configuration, where the
// container runtime looks for them.
type installer struct {
	program string // this executable
	binDir  string // it goes here, as "flannel"
	conf    string // the configuration, a list of plugins; "": none
	confDir string // it goes here
	name    string // as this
	after   string // but not before this file is there; "": at once

	said string // the last remarks
}

// runInstall is `flannel install`.
func runInstall(args []string) error {
	in := installer{program: "/proc/self/exe"}
	keep := false
	flags := pflag.NewFlagSet("flannel install", pflag.ContinueOnError)
	flags.SortFlags = false
	flags.StringVar(&in.binDir, "bin-dir", "/opt/cni/bin", "the directory of CNI plugins that gets this program")
	flags.StringVar(&in.conf, "conf", "/etc/kube-flannel/cni-conf.json", "the network's configuration, a conflist; empty: install the program alone")
	flags.StringVar(&in.confDir, "conf-dir", "/etc/cni/net.d", "the directory that gets the configuration")
	flags.StringVar(&in.name, "conf-name", "10-flannel.conflist", "its name there")
	flags.StringVar(&in.after, "after", "", "install the configuration, which makes a node ready for pods, only once this file is there; such as /run/flannel/subnet.env, with --keep")
	flags.BoolVar(&keep, "keep", false, "stay, and put back what is removed or changed")
	flags.Usage = func() {
		fmt.Fprintf(os.Stderr, "flannel install puts the plugin and its configuration where the container runtime finds them.\n\n%s", flags.FlagUsages())
	}
	if err := flags.Parse(args); errors.Is(err, pflag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("argument %q is not allowed: there are only flags, see flannel install --help", flags.Arg(0))
	}
	if !slices.Contains([]string{".conflist", ".conf", ".json"}, filepath.Ext(in.name)) || in.name != filepath.Base(in.name) {
		return fmt.Errorf("--conf-name %q is not allowed: want a file name that ends in .conflist, without a directory", in.name)
	}
	if !keep {
		if in.after != "" {
			return errors.New("--after needs --keep: nobody would look for the file later")
		}
		return in.install()
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	return in.keep(ctx)
}

// install writes what is not there yet, or differs. Each file is whole at any
// moment, and the program is there before the configuration that names it.
func (in *installer) install() error {
	var conf []byte
	var list *libcni.NetworkConfigList
	if in.conf != "" {
		var err error
		if conf, err = os.ReadFile(in.conf); err != nil {
			return fmt.Errorf("--conf: %w (in a pod, the ConfigMap kube-flannel-cfg has it)", err)
		}
		list, err = libcni.NetworkConfFromBytes(conf)
		if err == nil && len(list.Plugins) == 0 {
			err = errors.New(`plugins: want a list that begins with {"type": "flannel"}`)
		}
		if err != nil {
			return fmt.Errorf("--conf %s: %w", in.conf, err)
		}
	}
	program, err := os.Open(in.program)
	if err != nil {
		return err
	}
	defer program.Close()
	if err := put(filepath.Join(in.binDir, "flannel"), program, 0o755); err != nil {
		return fmt.Errorf("--bin-dir: %w", err)
	}
	if in.conf == "" {
		return nil
	}
	var remarks []string
	if _, err := os.Stat(in.after); in.after != "" && err != nil {
		remarks = append(remarks, fmt.Sprintf("Waiting for %s, which flanneld writes, before pods may start here", in.after))
	} else if err := put(filepath.Join(in.confDir, in.name), bytes.NewReader(conf), 0o644); err != nil {
		return fmt.Errorf("--conf-dir: %w", err)
	}
	remarks = slices.Concat(remarks, in.missing(list), in.rivals())
	if said := strings.Join(remarks, "\n"); said != in.said {
		in.said = said
		for _, r := range remarks {
			log.Print(r)
		}
	}
	return nil
}

// keep installs, and again whenever something has changed, until ctx ends. A
// directory that was removed is an error: another one at its place can only be
// seen after a new start, when a pod's volumes are mounted anew.
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
			log.Printf("Looking again: %v", err)
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

// put makes path hold what content reads, and says so when it did not.
func put(path string, content io.ReadSeeker, mode fs.FileMode) error {
	if equal(path, content, mode) {
		return nil
	}
	if _, err := content.Seek(0, io.SeekStart); err != nil {
		return err
	}
	t, err := renameio.NewPendingFile(path, renameio.WithTempDir(filepath.Dir(path)), renameio.WithStaticPermissions(mode))
	if err != nil {
		return err
	}
	defer t.Cleanup()
	if _, err := io.Copy(t, content); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if err := t.CloseAtomicallyReplace(); err != nil {
		return err
	}
	log.Printf("Installed %s", path)
	return nil
}

// equal tells whether path is a file of that content and mode.
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

// ended tells that io.ReadFull has read all there was.
func ended(err error) bool { return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) }

// missing remarks on the plugins that the configuration needs and bin-dir lacks.
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

// rivals remarks on configurations that the runtime takes rather than ours: it
// goes by the first name.
func (in *installer) rivals() []string {
	var remarks []string
	files, err := libcni.ConfFiles(in.confDir, []string{".conf", ".conflist", ".json"})
	if err != nil {
		return []string{fmt.Sprintf("%s: %v", in.confDir, err)}
	}
	for _, f := range files {
		if name := filepath.Base(f); name < in.name {
			remarks = append(remarks, fmt.Sprintf("The container runtime uses %s rather than %s, which comes after it: remove it unless it is meant to", f, in.name))
		}
	}
	return remarks
}
