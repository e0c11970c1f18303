package extension

import (
	"cmp"
	"context"
	"fmt"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/command"
	"github.com/flanneld/flanneld/pkg/plain"
)

// maxOutput is how many bytes of each output of a command are kept: somewhat more than fits into a lease.
const maxOutput = maxData + 1<<10

// newRunner returns what runs the commands.
func newRunner() *command.Runner { return &command.Runner{Limit: timeLimit, Grace: graceLimit} }

// run runs a command by sh -c and returns its output. The error is one line, and has the output.
func run(ctx context.Context, r *command.Runner, name, line string, environment []string, stdin string) (
	string, error) {
	out, err := r.Run(ctx, command.Command{
		Path: "sh", Args: []string{"-c", line}, Env: environment, Stdin: stdin + "\n",
		Name: name, Keep: maxOutput, Operators: true,
	})
	if err != nil {
		return "", fmt.Errorf("%s: %w; it printed: %s", name, err, cmp.Or(shown(out), "nothing"))
	}
	klog.FromContext(ctx).Info("Command succeeded", "name", name, "output", shown(out))
	return string(out.Stdout), nil
}

// shown returns the output of a command, which may have printed the data of a peer, as one printable line.
func shown(out command.Output) string { return plain.Line(out.Text()) }
