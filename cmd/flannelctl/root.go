package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/flanneld/flanneld/cmd/internal/settings"
	"github.com/flanneld/flanneld/network"
	"github.com/flanneld/flanneld/subnet"
)

// A tool is the state that the commands share: flags and output.
type tool struct {
	options *settings.Options
	envFile string
	direct  bool   // do not use the daemon
	output  string // "": text
	flags   *pflag.FlagSet
	printer
}

// A source returns the state of a node: the daemon, or an inspection without the daemon.
type source interface {
	Status(context.Context) (network.Status, error)
	Leases(context.Context) ([]network.Lease, error)
	Diff(context.Context) ([]string, error)
	Skew(context.Context) (time.Duration, error)
	Close()
}

var (
	// listedFlags are the flags of flanneld that the help lists. flannelctl accepts all others but unusedFlags too.
	listedFlags = []string{"subnet-file", "status-socket", "etcd-endpoints", "discovery-srv", "etcd-prefix",
		"kube-subnet-mgr", "kubeconfig-file"}
	// unusedFlags are the flags of flanneld that flannelctl has no use for.
	unusedFlags = []string{"help", "version", "v", "vmodule", "log_backtrace_at", "healthz-ip", "healthz-port"}
)

func newRoot() *cobra.Command {
	t := &tool{}
	root := &cobra.Command{
		Use:   "flannelctl",
		Short: "Show what flanneld does on this node, find problems, and show how to fix them",
		Long: `flannelctl shows what flanneld does on this node, finds problems, and shows how to fix them.

It gets the state from the daemon's socket, which only root can use. If the daemon does not reply, flannelctl checks
the node itself. For this, it reads flanneld's settings from flags, variables FLANNELD_... and /etc/default/flanneld.

Exit status: 0 no problem, 1 problems or differences were found, 2 the command failed.`,
		Version:           version,
		SilenceErrors:     true,
		SilenceUsage:      true,
		PersistentPreRunE: t.prepare,
	}
	// Templates of cobra are not used: text/template calls methods by name, so that the linker cannot drop unused
	// methods, and the program would be a third larger.
	flags := root.PersistentFlags()
	t.flags = flags
	flags.SortFlags = false
	t.addSettings(flags)
	flags.StringVar(&t.envFile, "env-file", "/etc/default/flanneld",
		"file with the daemon's variables, FLANNELD_NAME=VALUE; may be missing")
	flags.BoolVar(&t.direct, "direct", false, "check the node without the daemon")
	root.AddCommand(t.statusCommand(), t.leasesCommand(), t.diffCommand(), t.doctorCommand(),
		t.connectivityCommand(), t.cleanupCommand(), t.validateCommand())
	return root
}

// addSettings adds the flags of flanneld.
func (t *tool) addSettings(flags *pflag.FlagSet) {
	all := pflag.NewFlagSet("flanneld", pflag.ContinueOnError)
	o, err := settings.Flags(all)
	if err != nil {
		panic(err) // a default is not valid
	}
	t.options = o
	for _, name := range listedFlags {
		flags.AddFlag(all.Lookup(name))
	}
	all.VisitAll(func(f *pflag.Flag) {
		if flags.Lookup(f.Name) == nil && !slices.Contains(unusedFlags, f.Name) {
			f.Hidden = true
			flags.AddFlag(f)
		}
	})
}

func (t *tool) prepare(*cobra.Command, []string) error {
	t.printer = newPrinter()
	if t.output != "" && t.output != "json" {
		return fmt.Errorf("--output %q is not known: the only format is json", t.output)
	}
	return nil
}

// complete reads the settings that flags do not have from the environment and the environment file. It also sets the
// file's other variables, such as WIREGUARD_KEY_FILE, for the backends.
func (t *tool) complete() error {
	env := os.Environ()
	file, err := environmentFile(t.envFile)
	if err != nil && (!errors.Is(err, os.ErrNotExist) || t.flags.Changed("env-file")) {
		return fmt.Errorf("--env-file: %w", err)
	}
	for _, line := range file {
		name, value, _ := strings.Cut(line, "=")
		if _, set := os.LookupEnv(name); !set {
			if err := os.Setenv(name, value); err != nil {
				return fmt.Errorf("--env-file: %s: %w", name, err)
			}
		}
	}
	settings.RegisterBackends()
	settings.ClearEnvironment()
	return t.options.Complete(append(file, env...)) // the later line wins
}

// environmentFile reads a file as systemd's EnvironmentFile= does, without escapes and continuation lines.
func environmentFile(path string) ([]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var env []string
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		name, value, ok := strings.Cut(strings.TrimSpace(lines.Text()), "=")
		if !ok || !variableName.MatchString(name) {
			continue
		}
		if n := len(value); n >= 2 && (value[0] == '"' || value[0] == '\'') && value[n-1] == value[0] {
			value = value[1 : n-1]
		}
		env = append(env, name+"="+value)
	}
	return env, lines.Err()
}

var variableName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

const (
	// The daemon replies at once, unless it hangs.
	daemonTimeout = 5 * time.Second
	// storeTimeout is the limit for requests to the store.
	storeTimeout = 6 * time.Second
)

// open returns the daemon as the source, or else an inspection without the daemon. daemonErr is then the reason why the
// daemon is not used.
func (t *tool) open(ctx context.Context) (s source, daemonErr error, err error) {
	if err := t.complete(); err != nil {
		return nil, nil, err
	}
	if daemonErr = t.checkDaemon(ctx); daemonErr == nil {
		return network.NewClient(t.options.StatusSocket), nil, nil
	}
	s, err = t.inspect(ctx)
	return s, daemonErr, err
}

// checkDaemon returns nil if the daemon replies.
func (t *tool) checkDaemon(ctx context.Context) error {
	switch {
	case t.direct:
		return errors.New("--direct is set")
	case t.options.StatusSocket == "":
		return errors.New("--status-socket is off")
	}
	ctx, cancel := context.WithTimeout(ctx, daemonTimeout)
	defer cancel()
	_, err := network.NewClient(t.options.StatusSocket).Status(ctx)
	var refusal network.Refusal
	switch {
	case errors.As(err, &refusal):
		return fmt.Errorf("flanneld cannot report its state: %w", refusal)
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("there is no socket %s", t.options.StatusSocket)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("the socket %s is for root only", t.options.StatusSocket)
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("no reply at %s within %v", t.options.StatusSocket, daemonTimeout)
	case err != nil:
		return fmt.Errorf("no reply at %s", t.options.StatusSocket)
	}
	return nil
}

// An inspection is a source without the daemon. It also closes the manager.
type inspection struct {
	*network.Inspection
	manager subnet.Manager
}

func (i inspection) Close() {
	i.Inspection.Close()
	i.manager.Close()
}

// manager returns the subnet manager that the options choose.
func (t *tool) manager(ctx context.Context) (subnet.Manager, error) {
	if os.Getenv("NODE_NAME") == "" {
		if name, err := os.Hostname(); err == nil {
			os.Setenv("NODE_NAME", strings.ToLower(name)) // as kubelet does
		}
	}
	return t.options.Manager(ctx)
}

// inspect reads the state of the node from the host and the store, without the daemon.
func (t *tool) inspect(ctx context.Context) (source, error) {
	m, err := t.manager(ctx)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	i, err := network.Inspect(ctx, t.options.Network(m))
	if err != nil {
		m.Close()
		return nil, err
	}
	return inspection{i, m}, nil
}

// noteInspection prints on standard error why the daemon is not used.
func (t *tool) noteInspection(daemonErr error) {
	if daemonErr != nil && !t.direct {
		printer{os.Stderr, t.coloured}.printf("%s flannelctl checks the node without flanneld: %s\n", t.warn("note:"), daemonErr)
	}
}

// outputFlag gives a command the flag -o.
func (t *tool) outputFlag(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().StringVarP(&t.output, "output", "o", "", "output format: json; default: text")
	cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"json"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}
