package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/flanneld/flanneld/pkg/firewall"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
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
		Long: `cleanup removes what flanneld has left on this node: devices, routes, nexthops, firewall rules, subnet.env. It prints the
commands that would do the same, and asks before it does. The lease stays where it is, and ends by itself.`,
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
	r, err := kernel.New()
	if err != nil {
		return err
	}
	defer r.Close()
	// One that wants nothing. Where there is no subnet.env, routes that upstream's
	// daemon made on others' devices are not known for what they are.
	if env, err := subnet.ReadEnv(c.options.SubnetFile); err == nil {
		r.Networks = env.Networks.Each()
	}
	r.Devices = iface.Overlay
	commands, err := r.Diff()
	if err != nil {
		return err
	}
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
	files := c.files()
	for _, f := range files {
		commands = append(commands, "rm -rf "+f)
	}
	if len(commands) == 0 {
		fmt.Fprintln(c.out, "There is nothing of flanneld's on this node.")
		return nil
	}
	for _, line := range commands {
		fmt.Fprintln(c.out, line)
	}
	if c.dryRun {
		return nil
	}
	if !c.yes {
		if err := confirm(); err != nil {
			return err
		}
	}
	err = r.Apply()
	if rules != nil {
		err = errors.Join(err, rules.Apply(ctx, firewall.Desired{}))
	}
	for _, f := range files {
		err = errors.Join(err, os.RemoveAll(f))
	}
	if err != nil {
		return err
	}
	if left, err := r.Diff(); err != nil || len(left) > 0 {
		return errors.Join(err, fmt.Errorf("not all is gone, something makes it anew: %s", strings.Join(left, "; ")))
	}
	fmt.Fprintln(c.out, c.ok("Done."))
	return nil
}

// files returns those that are there, the directory of subnet.env with it if it
// holds nothing else.
func (c *cleanup) files() []string {
	wanted := []string{c.options.SubnetFile, c.options.StatusSocket}
	if c.cni {
		wanted = append(wanted, c.cniDir)
	}
	var files []string
	for _, f := range wanted {
		if _, err := os.Lstat(f); f != "" && err == nil {
			files = append(files, f)
		}
	}
	dir := filepath.Dir(c.options.SubnetFile)
	if entries, err := os.ReadDir(dir); err == nil && filepath.Base(dir) == "flannel" {
		for _, e := range entries {
			if p := filepath.Join(dir, e.Name()); p != c.options.SubnetFile && p != c.options.StatusSocket {
				return files
			}
		}
		files = append(files, dir)
	}
	return files
}

// stopped returns nil if no daemon runs here.
func (c *cleanup) stopped(ctx context.Context) error {
	pids := daemons()
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
