package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/flanneld/flanneld/pkg/command"
	"github.com/flanneld/flanneld/pkg/plain"
)

// delegateLimit is how long the delegate may take. kubelet gives a pod's sandbox four minutes (twice its
// --runtime-request-timeout), in which a DEL may have to undo an ADD.
const delegateLimit = 90 * time.Second

// run runs the delegate with a CNI command, such as ADD, and returns its standard output. environ ("NAME=value")
// overrides variables of this process's environment.
//
// The package invoke of the CNI project has functions for this, but it would add a tracing library to a program that
// runs for milliseconds.
func run(verb string, conf object, environ ...string) ([]byte, error) {
	kind := conf.text("type")
	path, err := find(kind)
	if err != nil {
		return nil, err
	}
	stdin, err := json.Marshal(conf)
	if err != nil {
		return nil, err
	}
	programs := command.Runner{Limit: delegateLimit}
	out, err := programs.Run(context.Background(), command.Command{
		Path: path, Env: append([]string{"CNI_COMMAND=" + verb}, environ...), Stdin: string(stdin),
		Name: path + " " + verb, Stderr: os.Stderr, Operators: true,
	})
	if err != nil {
		failure := &types.Error{}
		if json.Unmarshal(out.Stdout, failure) != nil || failure.Msg == "" {
			return nil, fmt.Errorf("%s %s: %w: it printed %s", path, verb, err, plain.Quote(bytes.TrimSpace(out.Stdout)))
		}
		// The runtime evaluates the code; the operator reads the message, in logs and in Events.
		return nil, types.NewError(failure.Code, plain.Line(kind+": "+failure.Msg), plain.Line(failure.Details))
	}
	return out.Stdout, nil
}

// find returns the path of a plugin in the directories of CNI_PATH.
func find(kind string) (string, error) {
	dirs := os.Getenv("CNI_PATH")
	for _, dir := range filepath.SplitList(dirs) {
		path := filepath.Join(dir, kind)
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
			return path, nil
		}
	}
	return "", fmt.Errorf("there is no plugin %q in %s: install the CNI project's plugins there, "+
		"or set delegate.type to another plugin", kind, dirs)
}

// code returns the CNI error code that err carries.
func code(err error) uint {
	var e *types.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return types.ErrInternal
}
