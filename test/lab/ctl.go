package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
)

// Ctl runs build/bin/flannelctl on the node with the daemon's flags, and returns
// what it prints and its exit status. Status 2, that something could not be found
// out, is an error.
func (n *Node) Ctl(ctx context.Context, args ...string) (out string, status int, err error) {
	return n.CtlBy(ctx, nil, args...)
}

// CtlBy is Ctl by way of another program, which runs its last arguments.
func (n *Node) CtlBy(ctx context.Context, by []string, args ...string) (out string, status int, err error) {
	program, err := n.lab.Program("bin/flannelctl")
	if err != nil {
		return "", 0, err
	}
	full := slices.Concat(by, []string{program, "--env-file=/dev/null"}, args)
	for _, given := range append(n.args, "--etcd-endpoints="+Endpoint, "--subnet-file="+n.SubnetFile()) {
		name, _, _ := strings.Cut(given, "=")
		if !strings.HasPrefix(name, "--healthz") && !sets(full, name) {
			full = append(full, given)
		}
	}
	var text, errput bytes.Buffer
	cmd := exec.CommandContext(ctx, full[0], full[1:]...)
	cmd.Env = append(os.Environ(), "WIREGUARD_KEY_FILE="+n.KeyFile())
	cmd.Stdout, cmd.Stderr = &text, &errput
	p, err := n.Launch(cmd)
	if err != nil {
		return "", 0, err
	}
	err = p.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 1 {
		return text.String(), 1, nil
	}
	if err != nil {
		return text.String(), 2, fmt.Errorf("%s: flannelctl %s: %w: %s", n.Hostname, strings.Join(args, " "), err,
			errput.Bytes())
	}
	return text.String(), 0, nil
}
