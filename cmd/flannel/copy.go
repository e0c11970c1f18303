package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/pflag"
)

// copyCommands are names of this program in the image besides "flannel". Manifests that are written for flannel's
// images call these commands in init containers, to install the plugin and its configuration:
//
//	cp -f /flannel /opt/cni/bin/flannel
//	install-conf /etc/kube-flannel/cni-conf.json /etc/cni/net.d/10-flannel.conflist
//
// The image needs no shell and no other program for them.
var copyCommands = map[string]bool{"cp": true, "install-conf": true}

// runCopy is `cp [-f] SOURCE DESTINATION`, and the same as install-conf. It replaces the destination as a whole: a
// runtime that reads meanwhile gets the old file or the new, and a plugin that is running is no obstacle. Of the flags
// that others' cp has, it takes those with which a file is installed in the same way.
func runCopy(name string, args []string) error {
	flags := pflag.NewFlagSet(name, pflag.ContinueOnError)
	flags.SetOutput(os.Stderr)
	if name == "cp" {
		for _, f := range []struct{ name, letter, does string }{
			{"force", "f", "replace the destination"},
			{"verbose", "v", "print what is copied"},
			{"archive", "a", "keep the permissions"},
			{"p", "p", "keep the permissions"},
			{"recursive", "r", "copy a directory, but only files are copied"},
			{"R", "R", "the same"},
			{"dereference", "L", "copy the file that a symbolic link points to"},
		} {
			flags.BoolP(f.name, f.letter, false, f.does)
		}
		flags.String("preserve", "", "keep the permissions")
		flags.Lookup("preserve").NoOptDefVal = "mode"
	}
	flags.Usage = func() {
		fmt.Fprintf(os.Stderr, "%s SOURCE DESTINATION copies one file, with its permissions, and replaces the destination "+
			"atomically. No flag has an effect.\n\n%s", name, flags.FlagUsages())
	}
	if err := flags.Parse(args); errors.Is(err, pflag.ErrHelp) {
		return nil
	} else if err != nil {
		return fmt.Errorf("%w (this is flannel's own %s, which copies one file: `%s --help` lists its flags)",
			err, name, name)
	}
	if flags.NArg() != 2 {
		return fmt.Errorf("want two arguments, SOURCE and DESTINATION, not %q", flags.Args())
	}
	return copyFile(flags.Arg(0), flags.Arg(1))
}

// copyFile copies a file with its permissions. A destination that is a directory gets the file under its own name.
func copyFile(source, destination string) error {
	from, err := os.Open(source)
	if err != nil {
		return err
	}
	defer from.Close()
	info, err := from.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is not a file, and this program copies nothing else", source)
	}
	if to, err := os.Stat(destination); err == nil && to.IsDir() {
		destination = filepath.Join(destination, filepath.Base(source))
	}
	return put(destination, from, info.Mode().Perm())
}
