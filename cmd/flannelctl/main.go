// Command flannelctl shows what flanneld does on a node, finds what is wrong and
// says how to mend it.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"k8s.io/klog/v2"

	_ "github.com/flanneld/flanneld/backend/all"
)

// version is set when the program is linked: -ldflags "-X main.version=v1.2.3".
var version = "unknown"

// Exit statuses, as diff(1) has them.
const (
	exitFound   = 1 // there are differences, findings, errors in a file
	exitTrouble = 2 // it could not be found out
)

// errFound ends a command that has said what it found.
var errFound = errors.New("something was found")

func main() {
	// What the daemon's parts log is for its log; here, what they find is shown.
	klog.LogToStderr(false)
	klog.SetOutput(io.Discard)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	err := newRoot().ExecuteContext(ctx)
	stop()
	switch {
	case errors.Is(err, errFound):
		os.Exit(exitFound)
	case err != nil:
		fmt.Fprintf(os.Stderr, "flannelctl: %v\n", err)
		os.Exit(exitTrouble)
	}
}
