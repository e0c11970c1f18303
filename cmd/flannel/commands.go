package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
)

// add attaches a container. The record is written before the delegate runs: a crash in between then leaves a record
// without an address, which is harmless, and not an address without a record, which would never be freed.
func add(args *skel.CmdArgs) error {
	r, err := parse(args.StdinData)
	if err != nil {
		return err
	}
	env, err := r.env()
	if err != nil {
		return err
	}
	conf, err := r.delegate(env)
	if err != nil {
		return err
	}
	a := attachment{args.ContainerID, args.IfName}
	dir := records(r.DataDir)
	path := dir.place(a)
	former, formerErr := read(path)
	if err := dir.write(path, a, conf); err != nil {
		return types.NewError(types.ErrIOFailure, fmt.Sprintf("dataDir: %v", err), "")
	}
	blocked := r.readdress(conf, env)
	result, err := runAdd(r.call(conf))
	if err == nil {
		return result.Print()
	}
	var undo error
	if formerErr == nil {
		// A DEL now might remove what the former ADD has set up. Restore the record for the DEL of the runtime.
		undo = dir.write(path, a, former)
	} else {
		undo = detach(r.call(conf), args.Netns)
		// The same error twice means that the delegate does not exist or rejects its configuration. Every DEL with
		// this record would then fail in the same way, even after the configuration has been corrected.
		if undo == nil || undo.Error() == err.Error() {
			undo = remove(path)
		}
	}
	if undo != nil {
		fmt.Fprintf(os.Stderr, "flannel: undoing the failed ADD: %v\n", undo)
	}
	if blocked != "" {
		return types.NewError(code(err), err.Error()+": "+blocked, "")
	}
	return err
}

// del detaches a container. Without a record, there is nothing to detach.
func del(args *skel.CmdArgs) error {
	r, err := parse(args.StdinData)
	if err != nil {
		return err
	}
	path, conf, err := r.record(attachment{args.ContainerID, args.IfName})
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, errBroken):
		return discard(path, err)
	case err != nil:
		return types.NewError(types.ErrIOFailure, fmt.Sprintf("dataDir: %v", err), "")
	}
	if err := detach(r.call(conf), args.Netns); err != nil {
		return err
	}
	return remove(path)
}

// detach runs the delegate's DEL. It is no error if the interface or the namespace is gone already.
func detach(conf object, netns string, environ ...string) error {
	err := run("DEL", conf, environ...)
	if err != nil && netns != "" {
		if _, gone := os.Stat(netns); errors.Is(gone, fs.ErrNotExist) {
			err = run("DEL", conf, append(environ, "CNI_NETNS=")...) // empty: the namespace is gone
		}
	}
	if err != nil && code(err) == types.ErrUnknownContainer {
		return nil
	}
	return err
}

// check compares a container with the result of its ADD. Without a record there is nothing to compare with: flannel's
// plugin accepts every CHECK.
func check(args *skel.CmdArgs) error {
	r, err := parse(args.StdinData)
	if err != nil {
		return err
	}
	_, conf, err := r.record(attachment{args.ContainerID, args.IfName})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return types.NewError(types.ErrIOFailure, fmt.Sprintf("dataDir: %v", err), "")
	}
	return run("CHECK", r.call(conf))
}

// status returns an error if an ADD would fail.
func status(args *skel.CmdArgs) error {
	r, err := parse(args.StdinData)
	if err != nil {
		return err
	}
	env, err := r.env()
	if err != nil {
		return types.NewError(types.ErrPluginNotAvailable, err.Error(), "")
	}
	conf, err := r.delegate(env)
	if err != nil {
		return err
	}
	err = run("STATUS", r.call(conf))
	if err != nil && code(err) != types.ErrLimitedConnectivity {
		err = types.NewError(types.ErrPluginNotAvailable, err.Error(), "")
	}
	return err
}

// collect detaches the attachments that the runtime no longer knows, and runs the delegate's GC.
func collect(args *skel.CmdArgs) error {
	r, err := parse(args.StdinData)
	if err != nil {
		return err
	}
	var failed []string
	try := func(err error) {
		if err != nil {
			failed = append(failed, err.Error())
		}
	}
	try(r.collectRecords())
	if env, err := r.env(); err != nil {
		try(err)
	} else if conf, err := r.delegate(env); err != nil {
		try(err)
	} else {
		conf.set("cni.dev/valid-attachments", r.ValidAttachments)
		try(run("GC", r.call(conf)))
	}
	if failed != nil {
		return errors.New(strings.Join(failed, "; "))
	}
	return nil
}

// collectRecords detaches each attachment of the network that has a record and is not among the valid attachments.
// Without a list of valid attachments, it detaches none.
func (r *request) collectRecords() error {
	if r.ValidAttachments == nil {
		return nil
	}
	all, err := records(r.DataDir).of(r.Name)
	if err != nil {
		return err
	}
	var failed []error
	for _, a := range all {
		if slices.Contains(r.ValidAttachments, types.GCAttachment{ContainerID: a.containerID, IfName: a.ifName}) {
			continue
		}
		path, conf, err := r.record(a)
		if errors.Is(err, errBroken) {
			err = discard(path, err)
		} else if err == nil {
			err = detach(conf, "", "CNI_CONTAINERID="+a.containerID, "CNI_IFNAME="+a.ifName, "CNI_NETNS=", "CNI_ARGS=")
			if err == nil {
				err = remove(path)
			}
		}
		if err != nil {
			failed = append(failed, fmt.Errorf("%s of container %s: %w", a.ifName, a.containerID, err))
		}
	}
	return errors.Join(failed...)
}

// discard removes a record that can never be used: the runtime must be able to remove the container. flannel's plugin
// leaves such a record when it crashes.
func discard(path string, broken error) error {
	fmt.Fprintf(os.Stderr, "flannel: %v: removing the record; the container's address may stay allocated\n", broken)
	return remove(path)
}

// remove removes a record. It is no error if the record is gone already.
func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return types.NewError(types.ErrIOFailure, fmt.Sprintf("dataDir: %v", err), "")
	}
	return nil
}
