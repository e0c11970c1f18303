package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/flanneld/flanneld/pkg/plain"
)

// run runs the delegate with a CNI command, and returns its standard output. environ ("NAME=value") overrides variables
// of this process's environment.
//
// The package invoke of the CNI project has functions for this, but it would add a tracing library to a program that
// runs for milliseconds.
func run(command string, conf object, environ ...string) ([]byte, error) {
	kind := conf.text("type")
	path, err := find(kind)
	if err != nil {
		return nil, err
	}
	stdin, err := json.Marshal(conf)
	if err != nil {
		return nil, err
	}
	var stdout bytes.Buffer
	cmd := exec.Command(path)
	cmd.Env = append(append(os.Environ(), "CNI_COMMAND="+command), environ...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		failure := &types.Error{}
		if json.Unmarshal(stdout.Bytes(), failure) != nil || failure.Msg == "" {
			return nil, fmt.Errorf("%s %s: %w: it printed %s", path, command, err, plain.Quote(bytes.TrimSpace(stdout.Bytes())))
		}
		// The runtime evaluates the code; the operator reads the message, in logs and in Events.
		return nil, types.NewError(failure.Code, plain.Line(kind+": "+failure.Msg), plain.Line(failure.Details))
	}
	return stdout.Bytes(), nil
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
