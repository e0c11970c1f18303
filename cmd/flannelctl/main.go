// Command flannelctl shows what flanneld does on a node, finds problems, and shows how to fix them.
package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"syscall"

	"github.com/go-logr/logr"
	"k8s.io/klog/v2"

	_ "github.com/flanneld/flanneld/backend/all"
)

// version is set when the program is linked: -ldflags "-X main.version=v1.2.3".
var version = "unknown"

// Exit statuses, as diff(1) has them.
const (
	exitFound   = 1 // there are differences, findings, or errors in a file
	exitTrouble = 2 // the command failed
)

// errFound ends a command that has printed its findings.
var errFound = errors.New("there are findings")

func main() {
	// The daemon's packages log. flannelctl shows their results and errors instead.
	klog.SetLogger(logr.Discard())
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	err := newRoot().ExecuteContext(ctx)
	switch {
	case errors.Is(err, errFound):
		os.Exit(exitFound)
	case err != nil:
		printer{out: os.Stderr}.printf("flannelctl: %s\n", err)
		os.Exit(exitTrouble)
	}
}
