// Without this setting, the Go runtime counts the processors again each second.
//go:debug updatemaxprocs=0

// Command flanneld leases a subnet for this node, and connects the subnet with the subnets of the other nodes.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"syscall"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/cmd/internal/settings"
	"github.com/flanneld/flanneld/network"
	"github.com/flanneld/flanneld/pkg/plain"

	_ "github.com/flanneld/flanneld/backend/all"
)

// version is set when the program is linked: -ldflags "-X main.version=v1.2.3".
var version = "unknown"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	started := collectLater()
	o, err := settings.Parse(os.Args[1:], os.Environ())
	switch {
	case errors.Is(err, settings.ErrHelp):
		fmt.Print(settings.Help())
		return
	case errors.Is(err, settings.ErrVersion):
		fmt.Println(version)
		return
	case err != nil:
		fmt.Fprintf(os.Stderr, "flanneld: %v\n", err)
		os.Exit(2)
	}
	settings.ClearEnvironment()
	if !o.Profile {
		runtime.MemProfileRate = 0 // the records of where memory is allocated take a megabyte
	}
	log := plain.Logger(klog.Background()) // the one of all packages
	err = run(klog.NewContext(ctx, log), o, started)
	if ctx.Err() != nil {
		err = nil // the error follows from the signal
	}
	if err != nil {
		log.Error(err, "flanneld cannot continue")
	} else {
		log.Info("flanneld ends; the network stays as it is")
	}
	klog.Flush()
	if err != nil {
		os.Exit(1)
	}
}

func run(ctx context.Context, o *settings.Options, started func()) error {
	log := klog.FromContext(ctx)
	log.Info("flanneld starts", "version", version, "go", runtime.Version(), "settings", o.String())
	for _, w := range o.Warnings {
		log.Error(nil, "Check the settings", "reason", w)
	}
	settings.RegisterBackends()
	manager, err := o.Manager(ctx)
	if err != nil {
		return err
	}
	defer manager.Close()
	return network.Run(ctx, options(ctx, o, manager, started))
}
