package network

import (
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/klog/v2"
)

// hangs is a manager that keeps the main loop waiting, once it is ready.
type hangs struct {
	*manager
	until chan struct{}
}

func (m hangs) Ready() { <-m.until }

// systemd's watchdog hears of the main loop, and nothing while that hangs.
func TestWatchdog(t *testing.T) {
	next := notifySocket(t)
	const limit = 20 * time.Millisecond
	t.Setenv("WATCHDOG_USEC", strconv.FormatInt(limit.Microseconds(), 10))
	t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
	m := hangs{newManager(vxlanConfig), make(chan struct{})}
	begin(t, m.manager, func(o *Options) { o.Manager = m })
	release := sync.OnceFunc(func() { close(m.until) })
	t.Cleanup(release)
	m.grants <- lease("10.5.1.0-24", "")
	m.updates <- snapshot(peer2)
	for got := ""; !strings.Contains(got, "READY=1"); {
		got = next()
	}
	time.Sleep(10 * limit) // in which it would have said so twenty times
	notify("STATUS=as the test says")
	if got := next(); got != "STATUS=as the test says" {
		t.Errorf("while the main loop hangs, systemd is told %s", got)
	}
	release()
	for range 3 {
		if got := next(); got != "WATCHDOG=1" {
			t.Errorf("systemd is told %s", got)
		}
	}
}

// Without systemd, or with a watchdog that is another's, nothing ticks.
func TestNoWatchdog(t *testing.T) {
	for _, env := range [][2]string{{"", ""}, {"20000", "1"}, {"nonsense", ""}} {
		t.Setenv("WATCHDOG_USEC", env[0])
		t.Setenv("WATCHDOG_PID", env[1])
		if watchdog(klog.Background()) != nil {
			t.Errorf("it ticks with WATCHDOG_USEC=%s WATCHDOG_PID=%s", env[0], env[1])
		}
	}
}

// TestWaitingIsALine: what the node waits for is one field of what systemd is told, and one line for a probe.
func TestWaitingIsALine(t *testing.T) {
	next := notifySocket(t)
	h := &health{missing: "to start"}
	h.waitFor("the device: refused\nMAINPID=1\x1b[2J")
	const want = `the device: refused; MAINPID=1\x1b[2J`
	if got := next(); got != "STATUS=Waiting for "+want || h.waitingFor() != want {
		t.Errorf("systemd is told %q, and a probe %q", got, h.waitingFor())
	}
}
