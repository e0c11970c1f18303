package main

import (
	"context"
	"net/http"
	"net/http/pprof"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	systemd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/cmd/internal/settings"
	"github.com/flanneld/flanneld/network"
	"github.com/flanneld/flanneld/subnet"
)

// options returns the options of network.Run with what belongs to this process: its metrics, its profiles, its memory,
// and systemd, which may be its parent. Started is what collectLater has returned.
func options(ctx context.Context, o *settings.Options, manager subnet.Manager, started func()) network.Options {
	log := klog.FromContext(ctx)
	all := prometheus.NewRegistry()
	all.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	n := o.Network(manager)
	n.Version = version
	n.Metrics, n.Handler = all, handler(all, o.Profile)
	n.Waiting = waiting(log, started)
	n.Heartbeat, n.HeartbeatEvery = func() { notify(log, "WATCHDOG=1") }, watchdog(log)
	return n
}

// handler serves /metrics and, with profile, /debug/pprof. No request changes anything.
func handler(metrics prometheus.Gatherer, profile bool) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", network.MetricsHandler(metrics))
	if profile {
		// Without the command line, which may hold a password.
		mux.HandleFunc("GET /debug/pprof/", pprof.Index)
		mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	}
	return mux
}

// settled is how long after the start the daemon keeps nothing that only the start needs.
const settled = 10 * time.Second

// How much garbage there may be until it is collected, in percent of the memory in use. The start is to be fast: with
// gcAtFirst, nothing is collected before the heap has 16 MB, four times what Go has by default, and a node with few
// peers is ready before that. When all peers are known, little changes, and collecting costs nearly nothing: the memory
// of a node is for pods.
const (
	gcAtFirst = 400
	gcAtStart = 50
	gcAtRest  = 10
)

// collectLater has garbage collected for the first time as gcAtFirst says, and as gcAtStart says from then on, or from
// when started is called.
func collectLater() (started func()) {
	started = sync.OnceFunc(func() { setGCPercent(gcAtStart) })
	setGCPercent(gcAtFirst)
	runtime.AddCleanup(new(struct{ *int }), func(started func()) { started() }, started) // the first garbage
	return started
}

// setGCPercent sets the percentage, unless the operator has.
func setGCPercent(percent int) {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(percent)
	}
}

// waiting returns a function that takes what the node waits for. It calls started when the node is ready.
func waiting(log klog.Logger, started func()) func(what string) {
	ready := false // the node has been
	return func(what string) {
		switch {
		case what != "":
			notify(log, "STATUS=Waiting for "+what)
		case ready:
			notify(log, "STATUS=Ready")
		default:
			ready = true
			notify(log, "READY=1\nSTATUS=Ready")
			// The memory that reading everything took is not needed again. Some of it is kept for seconds: see etcd's listings.
			started()
			setGCPercent(gcAtRest)
			debug.FreeOSMemory()
			time.AfterFunc(settled, debug.FreeOSMemory)
		}
	}
}

// watchdog returns half the time after which systemd takes the daemon for hung; 0 where systemd has no watchdog for the
// daemon.
func watchdog(log klog.Logger) time.Duration {
	limit, err := systemd.SdWatchdogEnabled(false)
	if err != nil {
		log.Error(err, "systemd's WatchdogSec has no effect")
	}
	return limit / 2
}

// notify sends a state to systemd by sd_notify(3), where systemd waits for that.
func notify(log klog.Logger, state string) {
	if _, err := systemd.SdNotify(false, state); err != nil {
		log.Error(err, "Cannot notify systemd")
	}
}
