package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/flanneld/flanneld/cmd/internal/settings"
	"github.com/flanneld/flanneld/network"
	"github.com/flanneld/flanneld/subnet"
)

// A tool is what the commands share.
type tool struct {
	options *settings.Options
	envFile string
	direct  bool   // without asking the daemon
	output  string // "": text
	flags   *pflag.FlagSet
	printer
}

// A source tells of a node: its daemon, or we ourselves in its place.
type source interface {
	Status(context.Context) (network.Status, error)
	Leases(context.Context) ([]network.Lease, error)
	Diff(context.Context) ([]string, error)
	Skew(context.Context) (time.Duration, error)
	Close()
}

// shown are the flags of flanneld that the help lists. It takes all the others
// that choose the leases and the uplink as well.
var shown = []string{"subnet-file", "status-socket", "etcd-endpoints", "etcd-prefix", "kube-subnet-mgr", "kubeconfig-file"}

// noUse are flags of flanneld that mean nothing here.
var noUse = []string{"help", "version", "v", "vmodule", "log_backtrace_at", "healthz-ip", "healthz-port"}

func newRoot() *cobra.Command {
	t := &tool{}
	root := &cobra.Command{
		Use:   "flannelctl",
		Short: "What flanneld does on this node, what is wrong, and how to mend it",
		Long: `flannelctl shows what flanneld does on this node, finds what is wrong and says how to mend it.

It asks the daemon by its socket, as root. Where there is none that answers, it looks for itself: it takes the
flags of flanneld that choose leases, uplink and rules, the variables FLANNELD_..., and what /etc/default/flanneld says.

Exit status: 0 all is well, 1 something was found, 2 it could not be found out.`,
		Version:           version,
		SilenceErrors:     true,
		SilenceUsage:      true,
		PersistentPreRunE: t.prepare,
	}
	// No template of cobra's is set: with text/template, which calls methods by
	// name, the linker would have to keep a third more.
	flags := root.PersistentFlags()
	t.flags = flags
	flags.SortFlags = false
	t.addSettings(flags)
	flags.StringVar(&t.envFile, "env-file", "/etc/default/flanneld", "file with the daemon's variables, FLANNELD_NAME=VALUE, if there is one")
	flags.BoolVar(&t.direct, "direct", false, "do not ask the daemon: look for yourself")
	root.AddCommand(t.statusCommand(), t.leasesCommand(), t.diffCommand(), t.doctorCommand(), t.cleanupCommand(), t.validateCommand())
	return root
}

// addSettings adds the flags of flanneld.
func (t *tool) addSettings(flags *pflag.FlagSet) {
	all := pflag.NewFlagSet("flanneld", pflag.ContinueOnError)
	o, err := settings.Flags(all)
	if err != nil {
		panic(err) // a default that is not allowed
	}
	t.options = o
	for _, name := range shown {
		flags.AddFlag(all.Lookup(name))
	}
	all.VisitAll(func(f *pflag.Flag) {
		for _, name := range noUse {
			if f.Name == name {
				return
			}
		}
		if flags.Lookup(f.Name) == nil {
			f.Hidden = true
			flags.AddFlag(f)
		}
	})
}

func (t *tool) prepare(*cobra.Command, []string) error {
	t.printer = newPrinter()
	if t.output != "" && t.output != "json" {
		return fmt.Errorf("--output %q is not known: json, or leave it out", t.output)
	}
	return nil
}

// complete adds to the flags what the environment says. The daemon's variables
// that are no flags, such as WIREGUARD_KEY_FILE, are for the backends.
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
	return t.options.Complete(append(file, env...)) // of two lines the latter counts
}

// environmentFile reads a file as systemd's EnvironmentFile= does, but for what
// nobody needs here.
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
	// The daemon answers at once, unless it stands still.
	daemonPatience = 5 * time.Second
	// storePatience is how long the store may take.
	storePatience = 6 * time.Second
)

// open returns the daemon, or else what we find out without it; the error then
// says why not the daemon.
func (t *tool) open(ctx context.Context) (s source, daemonless error, err error) {
	if err := t.complete(); err != nil {
		return nil, nil, err
	}
	if daemonless = t.askable(ctx); daemonless == nil {
		return network.NewClient(t.options.StatusSocket), nil, nil
	}
	s, err = t.inspect(ctx)
	return s, daemonless, err
}

// askable returns nil if the daemon answers.
func (t *tool) askable(ctx context.Context) error {
	switch {
	case t.direct:
		return errors.New("it was not asked (--direct)")
	case t.options.StatusSocket == "":
		return errors.New("--status-socket is off")
	}
	ctx, cancel := context.WithTimeout(ctx, daemonPatience)
	defer cancel()
	_, err := network.NewClient(t.options.StatusSocket).Status(ctx)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("there is no socket %s", t.options.StatusSocket)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("the socket %s is for root alone", t.options.StatusSocket)
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("nobody answers at %s within %v", t.options.StatusSocket, daemonPatience)
	case err != nil:
		return fmt.Errorf("nobody answers at %s", t.options.StatusSocket)
	}
	return nil
}

// inspection closes the manager as well.
type inspection struct {
	*network.Inspection
	manager subnet.Manager
}

func (i inspection) Close() {
	i.Inspection.Close()
	i.manager.Close()
}

// inspect looks without the daemon.
func (t *tool) inspect(ctx context.Context) (source, error) {
	if os.Getenv("NODE_NAME") == "" {
		if name, err := os.Hostname(); err == nil {
			os.Setenv("NODE_NAME", strings.ToLower(name)) // as kubelet does
		}
	}
	m, err := t.options.Manager(ctx)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, storePatience)
	defer cancel()
	i, err := network.Inspect(ctx, t.options.Network(m))
	if err != nil {
		m.Close()
		return nil, err
	}
	return inspection{i, m}, nil
}

// remark says, on standard error, why the daemon was not asked.
func (t *tool) remark(daemonless error) {
	if daemonless != nil && !t.direct {
		fmt.Fprintf(os.Stderr, "%s flanneld does not answer, so this is what flannelctl finds: %v\n", t.warn("note:"), daemonless)
	}
}

// printJSON prints a value for programs.
func printJSON(v any) error {
	e := json.NewEncoder(os.Stdout)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false) // commands have &&
	return e.Encode(v)
}

// outputFlag gives a command the flag -o.
func (t *tool) outputFlag(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().StringVarP(&t.output, "output", "o", "", "json: for programs")
	cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"json"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}
