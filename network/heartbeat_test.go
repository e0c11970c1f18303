package network

import (
	"sync"
	"testing"
	"time"
)

// hangs is a manager that keeps the main loop waiting, once it is ready.
type hangs struct {
	*manager
	hanging, until chan struct{}
}

func (m hangs) Ready() {
	close(m.hanging)
	<-m.until
}

// TestHeartbeat: the heartbeat is the main loop's: there is none while that hangs.
func TestHeartbeat(t *testing.T) {
	const every = 20 * time.Millisecond
	beats := make(chan struct{}, 1000)
	m := hangs{newManager(vxlanConfig), make(chan struct{}), make(chan struct{})}
	begin(t, m.manager, func(o *Options) {
		o.Manager, o.HeartbeatEvery = m, every
		o.Heartbeat = func() { beats <- struct{}{} }
	})
	release := sync.OnceFunc(func() { close(m.until) })
	t.Cleanup(release)
	m.grants <- lease("10.5.1.0-24", "")
	m.updates <- snapshot(peer2)
	<-m.hanging
	for len(beats) > 0 {
		<-beats
	}
	time.Sleep(10 * every)
	if len(beats) > 0 {
		t.Error("the main loop hangs, and its heart beats")
	}
	release()
	for range 3 {
		<-beats
	}
}

// TestWaitingIsALine: what the node waits for is one line, for a probe and for the caller of Run.
func TestWaitingIsALine(t *testing.T) {
	var got []string
	h := newHealth(nil, func(what string) { got = append(got, what) })
	h.waitFor("the device: refused\nMAINPID=1\x1b[2J")
	const want = `the device: refused; MAINPID=1\x1b[2J`
	if len(got) != 1 || got[0] != want || h.waitingFor() != want {
		t.Errorf("Waiting was called with %q, and a probe gets %q", got, h.waitingFor())
	}
}
