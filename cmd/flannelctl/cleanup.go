package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/firewall"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/pkg/proc"
	"github.com/flanneld/flanneld/subnet"
)

// A cleanup removes what flanneld, ours or upstream's, has left on this node.
type cleanup struct {
	*tool
	yes, dryRun, cni bool
	cniDir           string
}

func (t *tool) cleanupCommand() *cobra.Command {
	c := &cleanup{tool: t}
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove every trace of flanneld from this node",
		Long: `cleanup removes what flanneld has left on this node, whichever backend it had: devices, routes, nexthops, IPsec policies,
firewall rules, the charon that it started, what SubnetAddCommand has added, its files, and among them the private key of WireGuard: if the node comes
back, peers learn of a new one. It prints the commands that would do the same, and asks before it does. What is for others to remove it names. The
lease stays where it is, and ends by itself.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return c.run(cmd.Context()) },
	}
	cmd.Flags().BoolVarP(&c.yes, "yes", "y", false, "do not ask")
	cmd.Flags().BoolVarP(&c.dryRun, "dry-run", "n", false, "print the commands, and do nothing")
	cmd.Flags().BoolVar(&c.cni, "cni", false, "remove what the CNI plugin keeps, too: pods that still run can then not be detached")
	cmd.Flags().StringVar(&c.cniDir, "cni-data-dir", "/var/lib/cni/flannel", "where the CNI plugin keeps it (dataDir)")
	return cmd
}

func (c *cleanup) run(ctx context.Context) error {
	if err := c.complete(); err != nil {
		return err
	}
	if !c.dryRun {
		if !c.yes && !isTerminal(os.Stdin) {
			return errors.New("nothing was removed: there is no terminal to ask on, give --yes, or --dry-run to see what would be")
		}
		if err := c.stopped(ctx); err != nil {
			return err
		}
	}
	r, err := kernel.New(klog.FromContext(ctx))
	if err != nil {
		return err
	}
	defer r.Close()
	// One that wants nothing. Where the network is not known, routes that upstream's
	// daemon made on others' devices, and IPsec's policies, are not known for what
	// they are.
	cfg := c.config(ctx)
	env, err := subnet.ReadEnv(c.options.SubnetFile)
	if err != nil && cfg != nil {
		env.Networks = cfg.Networks()
	}
	r.Networks = env.Networks.Each()
	r.Devices = backend.Device
	left, err := backend.CleanupAll(ctx, cfg, env)
	if err != nil {
		return err
	}
	var commands []string
	for _, s := range left.Steps {
		commands = append(commands, s.Command)
	}
	more, err := r.Diff()
	if err != nil {
		return err
	}
	commands = append(commands, more...)
	rules, err := firewall.New(ctx, false)
	if err != nil {
		if rules, err = firewall.New(ctx, true); err != nil {
			rules = nil // nobody can have written any
		}
	}
	if rules != nil {
		more, err := rules.Plan(ctx, firewall.Desired{})
		if err != nil {
			return err
		}
		commands = append(commands, more...)
	}
	files := c.files(left.Files, left.Dirs)
	for _, f := range files {
		commands = append(commands, "rm -rf "+f)
	}
	if len(commands) == 0 {
		fmt.Fprintln(c.out, "There is nothing of flanneld's on this node.")
	}
	for _, line := range commands {
		fmt.Fprintln(c.out, line)
	}
	for _, note := range append(left.Notes, installed()...) {
		fmt.Fprintf(c.out, "%s %s\n", c.warn("left to you:"), note)
	}
	if c.dryRun || len(commands) == 0 {
		return nil
	}
	if !c.yes {
		if err := confirm(); err != nil {
			return err
		}
	}
	var errs []error
	for _, s := range left.Steps {
		errs = append(errs, s.Do(ctx))
	}
	errs = append(errs, r.Reconcile())
	if rules != nil {
		errs = append(errs, rules.Apply(ctx, firewall.Desired{}))
	}
	for _, f := range files {
		errs = append(errs, os.RemoveAll(f))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if left, err := r.Diff(); err != nil || len(left) > 0 {
		return errors.Join(err, fmt.Errorf("not all is gone, something makes it anew: %s", strings.Join(left, "; ")))
	}
	fmt.Fprintln(c.out, c.ok("Done."))
	return nil
}

// config returns the network's configuration, for what it says of things that
// are not on the node; nil where it cannot be had.
func (c *cleanup) config(ctx context.Context) *subnet.Config {
	ctx, cancel := context.WithTimeout(ctx, storePatience)
	defer cancel()
	m, err := c.options.Manager(ctx)
	if err != nil {
		return nil
	}
	defer m.Close()
	cfg, err := m.Config(ctx)
	if err != nil {
		return nil
	}
	return cfg
}

// files returns those that are there, and the directories that flanneld makes for
// them if they hold nothing else.
func (c *cleanup) files(patterns, dirs []string) []string {
	patterns = append([]string{c.options.SubnetFile, c.options.StatusSocket}, patterns...)
	if c.cni {
		patterns = append(patterns, c.cniDir)
	}
	var files []string
	for _, pattern := range patterns {
		found, _ := filepath.Glob(pattern) // fails only for a bad pattern
		files = append(files, found...)
		if dir := filepath.Dir(pattern); filepath.Base(dir) == "flannel" && !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		other := func(e os.DirEntry) bool { return !slices.Contains(files, filepath.Join(dir, e.Name())) }
		if err == nil && !slices.ContainsFunc(entries, other) && !mounted(dir) {
			files = append(files, dir)
		}
	}
	return files
}

// mounted tells whether something is mounted on a directory, as containers have
// the host's. Linux before 5.8 does not tell.
func mounted(dir string) bool {
	var s unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, dir, 0, unix.STATX_BASIC_STATS, &s)
	return err == nil && s.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}

// installed tells of what others have put there for flanneld: systemd's units,
// what containers get it by.
func installed() []string {
	var notes []string
	for _, f := range []struct{ path, what, remove string }{
		{"/etc/systemd/system/flanneld.service", "the unit", "systemctl disable flanneld; rm %s; systemctl daemon-reload"},
		{"/usr/local/lib/systemd/system/flanneld.service", "the unit", "systemctl disable flanneld; rm %s; systemctl daemon-reload"},
		{"/usr/lib/systemd/system/flanneld.service", "the unit", "systemctl disable flanneld    # and remove the package that has %s"},
		{"/etc/systemd/system/docker.service.d/flannel.conf", "what has Docker use its subnet", "rm %s; systemctl daemon-reload; systemctl restart docker"},
		{"/etc/default/flanneld", "its settings", "rm %s"},
		{"/etc/cni/net.d/10-flannel.conflist", "what has pods use it", "rm %s    # new pods then have no network, until there is another"},
		{"/opt/cni/bin/flannel", "the CNI plugin", "rm %s    # once no pod is left that it has attached"},
	} {
		if _, err := os.Stat(f.path); err == nil {
			notes = append(notes, f.what+": "+fmt.Sprintf(f.remove, f.path))
		}
	}
	return notes
}

// stopped returns nil if no daemon runs here.
func (c *cleanup) stopped(ctx context.Context) error {
	pids := proc.Find("flanneld")
	if len(pids) > 0 {
		return fmt.Errorf("flanneld runs on this node (process %d): stop it first, with systemctl stop flanneld or by taking the node out of the DaemonSet", pids[0])
	}
	if c.askable(ctx) == nil {
		return fmt.Errorf("flanneld runs on this node (it answers at %s): stop it first", c.options.StatusSocket)
	}
	return nil
}

// confirm asks on the terminal.
func confirm() error {
	fmt.Fprint(os.Stderr, "Do all of this? [y/N] ")
	answer, _ := bufio.NewReader(os.Stdin).ReadString('\n')
	if a := strings.ToLower(strings.TrimSpace(answer)); a != "y" && a != "yes" {
		return errors.New("nothing was removed")
	}
	return nil
}
