package network

import (
	"bytes"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2/textlogger"

	"github.com/flanneld/flanneld/pkg/nstest"
	"github.com/flanneld/flanneld/pkg/probe"
	"github.com/flanneld/flanneld/subnet"
)

// Peers that packets do not reach are an event, and a line of the log, as long as that lasts. A peer that is silent as a
// whole may be switched off: that is a line of the log alone.
func TestReachabilityIsRecorded(t *testing.T) {
	var log bytes.Buffer
	m := &eventManager{manager: newManager(vxlanConfig), events: make(chan string, 10)}
	n := &node{Options: Options{Manager: m}, log: textlogger.NewLogger(textlogger.NewConfig(textlogger.Output(&log)))}
	own := lease("10.5.1.0-24", `{"PublicIP":"198.18.0.1","PublicIPv6":null,"BackendType":"vxlan"}`)
	n.setup, n.own, n.leases = vxlanSetup(t), &own, map[subnet.Subnets]*subnet.Lease{}
	alarms := func(state probe.State, count int) map[string][]probe.Result {
		all := map[string][]probe.Result{}
		for i := range count {
			l := lease(fmt.Sprintf("10.5.%d.0-24", i+2), fmt.Sprintf(`{"PublicIP":"198.18.0.%d","PublicIPv6":null,"BackendType":"vxlan"}`, i+2))
			n.leases[l.Subnets] = &l
			all[l.Subnets.String()] = []probe.Result{{State: state, Path: probe.Path{Public: l.Attrs.PublicIP}}}
		}
		return all
	}
	next := func(begins, contains string) {
		t.Helper()
		if event := m.next(t); !strings.HasPrefix(event, "reachability PeersUnreachable "+begins) ||
			!strings.Contains(event, contains) || event == "reachability PeersUnreachable " && begins != "" {
			t.Errorf("got the event %q", event)
		}
	}
	n.recordReachability(alarms(probe.HostOnly, 1))
	next("10.5.2.0/24: 198.18.0.2 replies, but not through the overlay. Either UDP port 8472", "198.18.0.1")
	n.recordReachability(alarms(probe.HostOnly, 1))
	n.recordReachability(alarms(probe.HostOnly, 5))
	next("10.5.2.0/24: ", "; and 2 other peers: see flannelctl leases")
	n.recordReachability(alarms(probe.Silent, 5))
	next("", "")
	n.recordReachability(nil)
	if len(m.events) > 0 {
		t.Errorf("there is another event: %s", <-m.events)
	}
	for _, text := range []string{"Peers are not reached", "count=5", "nothing from 198.18.0.2 arrives any more", "All peers are reached again"} {
		if !strings.Contains(log.String(), text) {
			t.Errorf("the log lacks %q:\n%s", text, log.String())
		}
	}
	if lines := strings.Count(log.String(), "\n"); lines != 4 {
		t.Errorf("%d lines are logged, want 4:\n%s", lines, log.String())
	}
}

// However often peers fail and recover, that is recorded once a minute.
func TestReportsPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &node{prober: probe.New(time.Second, probe.Observers{})}
		began := time.Now()
		n.takeReport()
		if n.events.probes != nil {
			t.Error("the next report is taken at once")
		}
		if <-n.events.reported; time.Since(began) != reportPause {
			t.Errorf("the next report is taken after %v", time.Since(began))
		}
	})
}

// That peers cannot be probed is an error in the daemon's status.
func TestCannotProbe(t *testing.T) {
	nstest.NeedRoot(t)
	n := &node{prober: probe.New(time.Second, probe.Observers{}), health: newHealth(newManager(vxlanConfig), nil)}
	if errors := n.view().errors; len(errors) > 0 {
		t.Errorf("before the prober runs: %v", errors)
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine, since it has no capabilities
		header, none := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, [2]unix.CapUserData{}
		if err := unix.Capset(&header, &none[0]); err != nil {
			t.Error(err)
		}
		done <- n.prober.Run(t.Context())
	}()
	if err := <-done; err == nil {
		t.Error("Run returns no error")
	}
	if text := n.view().errors["Probes"]; !strings.Contains(text, "flanneld needs CAP_NET_RAW") {
		t.Errorf("got %q", text)
	}
}
