package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	cniversion "github.com/containernetworking/cni/pkg/version"

	"github.com/flanneld/flanneld/pkg/command"
	"github.com/flanneld/flanneld/pkg/plain"
)

// delegateLimit is how long the delegate may take. kubelet gives a pod's sandbox four minutes (twice its
// --runtime-request-timeout), in which a DEL may have to undo an ADD.
const delegateLimit = 90 * time.Second

// runAdd runs the delegate's ADD, and returns its result.
func runAdd(conf object) (types.Result, error) {
	d := delegates{verb: "ADD"}
	path, stdin, err := d.prepare(conf)
	if err != nil {
		return nil, err
	}
	result, err := invoke.ExecPluginWithResult(context.Background(), path, stdin, environment(nil), d)
	if e := (*types.Error)(nil); err != nil && !errors.As(err, &e) {
		err = fmt.Errorf("%s ADD: %w", path, err)
	}
	return result, err
}

// run runs the delegate with a CNI command that has no result, such as DEL. environ ("NAME=value") overrides variables
// of this process's environment.
func run(verb string, conf object, environ ...string) error {
	d := delegates{verb: verb}
	path, stdin, err := d.prepare(conf)
	if err != nil {
		return err
	}
	return invoke.ExecPluginWithoutResult(context.Background(), path, stdin, environment(environ), d)
}

// environment is what differs from this process's environment. It implements invoke.CNIArgs.
type environment []string

func (e environment) AsEnv() []string { return e }

// delegates finds and runs delegates with a CNI command. It implements invoke.Exec, whose default waits for a delegate
// without end, and for the children that the delegate leaves.
type delegates struct {
	*cniversion.PluginDecoder
	verb string
}

// prepare returns the path of the delegate, and its input.
func (d delegates) prepare(conf object) (path string, stdin []byte, err error) {
	path, err = d.FindInPath(conf.text("type"), filepath.SplitList(os.Getenv("CNI_PATH")))
	if err != nil {
		return "", nil, err
	}
	stdin, err = json.Marshal(conf)
	return path, stdin, err
}

// FindInPath returns the path of a plugin in one of the directories.
func (delegates) FindInPath(plugin string, dirs []string) (string, error) {
	path, err := invoke.FindInPath(plugin, dirs)
	if err != nil {
		return "", fmt.Errorf("there is no plugin %q in %s: install the CNI project's plugins there, "+
			"or set delegate.type to another plugin", plugin, strings.Join(dirs, string(filepath.ListSeparator)))
	}
	return path, nil
}

// ExecPlugin runs a plugin, and returns its standard output.
func (d delegates) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	name := path + " " + d.verb
	programs := command.Runner{Limit: delegateLimit}
	out, err := programs.Run(ctx, command.Command{
		Path: path, Env: append(environ, "CNI_COMMAND="+d.verb), Stdin: string(stdin),
		Name: name, Stderr: os.Stderr, Operators: true,
	})
	if err != nil {
		failure := &types.Error{}
		if json.Unmarshal(out.Stdout, failure) != nil || failure.Msg == "" {
			return nil, types.NewError(types.ErrInternal,
				fmt.Sprintf("%s: %v: it printed %s", name, err, plain.Quote(bytes.TrimSpace(out.Stdout))), "")
		}
		// The runtime evaluates the code; the operator reads the message, in logs and in Events.
		message := filepath.Base(path) + ": " + failure.Msg
		return nil, types.NewError(failure.Code, plain.Line(message), plain.Line(failure.Details))
	}
	return out.Stdout, nil
}

// code returns the CNI error code that err carries.
func code(err error) uint {
	var e *types.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return types.ErrInternal
}
