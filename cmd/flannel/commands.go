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

// add attaches a container. The record is written before the delegate runs: a
// crash in between leaves a record too many, not an address that nobody frees.
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
	result, err := run("ADD", r.call(conf))
	if err == nil {
		_, err = os.Stdout.Write(result)
		return err
	}
	var undo error
	if formerErr == nil {
		// What a DEL would remove now may be the work of the former ADD: leave
		// it to the runtime's, which finds the record as it was.
		undo = dir.write(path, a, former)
	} else {
		undo = detach(r.call(conf), args.Netns)
		// The same words twice: there is no such delegate, or it refuses its
		// configuration, and every DEL by this record would end like this,
		// even after a correction.
		if undo == nil || undo.Error() == err.Error() {
			undo = remove(path)
		}
	}
	if undo != nil {
		fmt.Fprintf(os.Stderr, "flannel: undoing the failed ADD: %v\n", undo)
	}
	return err
}

// del detaches a container. No record means that there is nothing to undo.
func del(args *skel.CmdArgs) error {
	r, err := parse(args.StdinData)
	if err != nil {
		return err
	}
	path, conf, err := records(r.DataDir).find(attachment{args.ContainerID, args.IfName})
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, errBroken):
		// A crash while upstream's plugin wrote it. Nothing can be done with
		// it, now or later, and the container must be able to go.
		fmt.Fprintf(os.Stderr, "flannel: %v: removing it; the container's address may stay taken\n", err)
		return remove(path)
	case err != nil:
		return types.NewError(types.ErrIOFailure, fmt.Sprintf("dataDir: %v", err), "")
	}
	if err := detach(r.call(conf), args.Netns); err != nil {
		return err
	}
	return remove(path)
}

// detach runs the delegate's DEL. That what it should remove is gone already is
// no error.
func detach(conf object, netns string, environ ...string) error {
	_, err := run("DEL", conf, environ...)
	if err != nil && netns != "" {
		if _, gone := os.Stat(netns); errors.Is(gone, fs.ErrNotExist) {
			_, err = run("DEL", conf, append(environ, "CNI_NETNS=")...) // which says so
		}
	}
	if err != nil && code(err) == types.ErrUnknownContainer {
		return nil
	}
	return err
}

// check compares a container with what ADD made.
func check(args *skel.CmdArgs) error {
	r, err := parse(args.StdinData)
	if err != nil {
		return err
	}
	_, conf, err := records(r.DataDir).find(attachment{args.ContainerID, args.IfName})
	if errors.Is(err, fs.ErrNotExist) {
		return types.NewError(types.ErrUnknownContainer,
			fmt.Sprintf("dataDir %s has no record of %s of container %s: it was never attached, or was detached; attach it anew", r.DataDir, args.IfName, args.ContainerID), "")
	}
	if err != nil {
		return types.NewError(types.ErrIOFailure, fmt.Sprintf("dataDir: %v", err), "")
	}
	_, err = run("CHECK", r.call(conf))
	return err
}

// status tells whether ADD would work.
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
	_, err = run("STATUS", r.call(conf))
	if err != nil && code(err) != types.ErrLimitedConnectivity {
		err = types.NewError(types.ErrPluginNotAvailable, err.Error(), "")
	}
	return err
}

// collect detaches what the runtime no longer knows, and has the delegate do
// the same.
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
		_, err := run("GC", r.call(conf))
		try(err)
	}
	if failed != nil {
		return errors.New(strings.Join(failed, "; "))
	}
	return nil
}

// collectRecords detaches each attachment of the network that has a record and
// is not valid. Without a list of the valid ones, none is known to be stale.
func (r *request) collectRecords() error {
	if r.ValidAttachments == nil {
		return nil
	}
	dir := records(r.DataDir)
	all, err := dir.of(r.Name)
	if err != nil {
		return err
	}
	var failed []error
	for _, a := range all {
		if slices.Contains(r.ValidAttachments, types.GCAttachment{ContainerID: a.containerID, IfName: a.ifName}) {
			continue
		}
		path, conf, err := dir.find(a)
		if err == nil {
			err = detach(conf, "", "CNI_CONTAINERID="+a.containerID, "CNI_IFNAME="+a.ifName, "CNI_NETNS=", "CNI_ARGS=")
		}
		if err == nil {
			err = remove(path)
		}
		if err != nil {
			failed = append(failed, fmt.Errorf("%s of container %s: %w", a.ifName, a.containerID, err))
		}
	}
	return errors.Join(failed...)
}

// remove removes a record, which may be gone.
func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return types.NewError(types.ErrIOFailure, fmt.Sprintf("dataDir: %v", err), "")
	}
	return nil
}
