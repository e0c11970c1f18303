package main

import (
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
	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/pkg/proc"
	"github.com/flanneld/flanneld/subnet"
)

// A cleanup removes everything that flanneld, ours or upstream's, has left on this node.
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
		Long: `cleanup removes everything that flanneld has left on this node, with any backend: devices, routes,
nexthops, policy rules, IPsec policies, firewall rules, the charon that flanneld started, peers that SubnetAddCommand
added, a cloud's routes, and flanneld's files. The private key of WireGuard is among the files: if the node comes back, it has a new key. cleanup
prints the commands that would do the same, and waits for your confirmation. It also lists what you must remove by hand.
The lease stays in the store, and expires by itself.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return c.run(cmd.Context()) },
	}
	cmd.Flags().BoolVarP(&c.yes, "yes", "y", false, "do not wait for confirmation")
	cmd.Flags().BoolVarP(&c.dryRun, "dry-run", "n", false, "print the commands, and change nothing")
	cmd.Flags().BoolVar(&c.cni, "cni", false,
		"also remove the records of the CNI plugin: running pods can then not be detached")
	cmd.Flags().StringVar(&c.cniDir, "cni-data-dir", "/var/lib/cni/flannel",
		"directory of the CNI plugin's records (dataDir)")
	return cmd
}

func (c *cleanup) run(ctx context.Context) error {
	if err := c.complete(); err != nil {
		return err
	}
	if !c.dryRun {
		if !c.yes && !isTerminal(os.Stdin) {
			return errors.New("nothing was removed, as there is no terminal for the confirmation: " +
				"use --yes, or --dry-run to print the commands")
		}
		if err := c.stopped(ctx); err != nil {
			return err
		}
	}
	r, err := c.plan(ctx)
	if err != nil {
		return err
	}
	defer r.kernel.Close()
	if len(r.commands) == 0 {
		c.printf("Nothing of flanneld is on this node.\n")
	}
	c.commands("", r.commands)
	for _, note := range r.notes {
		c.printf("%s %s\n", c.warn("to remove by hand:"), note)
	}
	if c.dryRun || len(r.commands) == 0 {
		return nil
	}
	if !c.yes {
		if !confirm("Run these commands?") {
			return errors.New("nothing was removed")
		}
	}
	if err := r.execute(ctx); err != nil {
		return err
	}
	c.printf("%s\n", c.ok("Done."))
	return nil
}

// A removal is what a cleanup removes, and the commands that would do the same.
type removal struct {
	steps    []backend.CleanupStep
	kernel   *kernel.Reconciler // its desired state is empty
	rules    []*firewall.Driver // of each network; none: this node has no firewall program
	files    []string
	notes    []string // on what the operator must remove
	commands []string
}

// plan finds everything that flanneld has left on this node.
func (c *cleanup) plan(ctx context.Context) (_ *removal, err error) {
	r := &removal{}
	if r.kernel, err = kernel.New(klog.FromContext(ctx)); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			r.kernel.Close()
		}
	}()
	// Without the network, cleanup cannot recognise IPsec's policies, and routes of upstream's daemon on devices that
	// are not flannel's.
	cfg := c.config(ctx)
	env, envErr := subnet.ReadEnv(c.options.SubnetFile)
	if envErr != nil && cfg != nil {
		env.Networks = cfg.Networks()
	}
	r.kernel.SetNetworks(env.Networks.Each(), nil)
	r.kernel.Devices = backend.Device
	left, err := backend.CleanupAll(ctx, cfg, env)
	if err != nil {
		return nil, err
	}
	r.steps, r.notes = left.Steps, append(left.Notes, installed()...)
	for _, s := range r.steps {
		r.commands = append(r.commands, s.Command)
	}
	commands, err := r.kernel.Diff()
	if err != nil {
		return nil, err
	}
	r.commands = append(r.commands, commands...)
	for _, network := range slices.Compact([]string{"", c.options.NetworkName()}) {
		if err := r.planRules(ctx, network); err != nil {
			return nil, err
		}
	}
	r.files = c.files(left.Files, left.Dirs)
	for _, f := range r.files {
		r.commands = append(r.commands, "rm -rf "+plain.Shell(f))
	}
	return r, nil
}

// planRules adds the firewall rules of a network to the plan.
func (r *removal) planRules(ctx context.Context, network string) error {
	for _, nftables := range []bool{false, true} {
		rules, err := firewall.New(ctx, network, nftables)
		if err != nil {
			continue // without the program, nothing can have written rules
		}
		commands, err := rules.Plan(ctx, firewall.Desired{})
		if err != nil {
			return err
		}
		r.rules, r.commands = append(r.rules, rules), append(r.commands, commands...)
		break
	}
	return nil
}

// execute removes all of the plan. An error does not keep the rest from being removed.
func (r *removal) execute(ctx context.Context) error {
	var errs []error
	for _, s := range r.steps {
		errs = append(errs, s.Do(ctx))
	}
	errs = append(errs, r.kernel.Reconcile())
	for _, rules := range r.rules {
		errs = append(errs, rules.Apply(ctx, firewall.Desired{}))
	}
	for _, f := range r.files {
		errs = append(errs, os.RemoveAll(f))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if left, err := r.kernel.Diff(); err != nil || len(left) > 0 {
		return errors.Join(err, fmt.Errorf("some things are still there, another program restores them: %s",
			strings.Join(left, "; ")))
	}
	return nil
}

// config returns the network's configuration from the store, nil if it cannot be read. The backends need it for what
// is not on the node.
func (c *cleanup) config(ctx context.Context) *subnet.Config {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
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

// files returns the files that exist, and the directories that flanneld creates for them if these contain nothing else.
func (c *cleanup) files(patterns, dirs []string) []string {
	patterns = append([]string{c.options.SubnetFile, c.options.LeaseFile(), c.options.StatusSocket}, patterns...)
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

// mounted reports whether a directory is a mount point, as directories of the host are in containers. Before Linux 5.8,
// mounted always returns false.
func mounted(dir string) bool {
	var s unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, dir, 0, unix.STATX_BASIC_STATS, &s)
	return err == nil && s.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}

// installed returns notes on files that the administrator or a package installed for flanneld.
func installed() []string {
	var notes []string
	for _, f := range []struct{ path, what, remove string }{
		{"/etc/systemd/system/flanneld.service", "the unit",
			"systemctl disable flanneld; rm %s; systemctl daemon-reload"},
		{"/usr/local/lib/systemd/system/flanneld.service", "the unit",
			"systemctl disable flanneld; rm %s; systemctl daemon-reload"},
		{"/usr/lib/systemd/system/flanneld.service", "the unit",
			"systemctl disable flanneld    # and remove the package that contains %s"},
		{"/etc/systemd/system/docker.service.d/flannel.conf", "the drop-in for Docker",
			"rm %s; systemctl daemon-reload; systemctl restart docker"},
		{"/etc/default/flanneld", "the settings", "rm %s"},
		{"/etc/cni/net.d/10-flannel.conflist", "the CNI configuration",
			"rm %s    # new pods then have no network until there is another CNI configuration"},
		{"/opt/cni/bin/flannel", "the CNI plugin", "rm %s    # when no pod is left that the plugin attached"},
	} {
		if _, err := os.Stat(f.path); err == nil {
			notes = append(notes, f.what+": "+fmt.Sprintf(f.remove, f.path))
		}
	}
	return notes
}

// stopped returns nil if flanneld does not run on this node.
func (c *cleanup) stopped(ctx context.Context) error {
	pids := proc.Find("flanneld")
	if len(pids) > 0 {
		return fmt.Errorf("flanneld runs on this node (process %d): stop flanneld first, "+
			"with systemctl stop flanneld, or exclude the node from the DaemonSet", pids[0])
	}
	if c.checkDaemon(ctx) == nil {
		return fmt.Errorf("flanneld runs on this node (it replies at %s): stop flanneld first", c.options.StatusSocket)
	}
	return nil
}
