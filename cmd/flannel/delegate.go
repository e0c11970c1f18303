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
)

// run has the delegate carry out a command, in this process's environment but
// for the variables given as "NAME=value", and returns what it prints.
//
// This is invoke.DelegateAdd and its kin. That package would bring a tracing
// library into a program that runs for milliseconds.
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
		said := &types.Error{}
		if json.Unmarshal(stdout.Bytes(), said) != nil || said.Msg == "" {
			return nil, fmt.Errorf("%s %s: %w: %s", path, command, err, bytes.TrimSpace(stdout.Bytes()))
		}
		// Its code is for the runtime, its words are for the operator.
		return nil, types.NewError(said.Code, kind+": "+said.Msg, said.Details)
	}
	return stdout.Bytes(), nil
}

// find returns the path of a plugin, which the runtime keeps in CNI_PATH.
func find(kind string) (string, error) {
	dirs := os.Getenv("CNI_PATH")
	for _, dir := range filepath.SplitList(dirs) {
		path := filepath.Join(dir, kind)
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
			return path, nil
		}
	}
	return "", fmt.Errorf("there is no plugin %q in %s: install the CNI project's plugins there, or name another one as delegate.type", kind, dirs)
}

// code returns the CNI error code that err carries.
func code(err error) uint {
	var e *types.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return types.ErrInternal
}
