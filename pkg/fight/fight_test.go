package fight

import (
	"bytes"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/klog/v2/textlogger"
)

const (
	times = 20
	burst = 50 * time.Millisecond
	calm  = time.Minute
	pace  = time.Second
)

// start returns a Detector, and what it has logged.
func start() (*Detector[string, string], *bytes.Buffer) {
	var log bytes.Buffer
	logger := textlogger.NewLogger(textlogger.NewConfig(textlogger.Output(&log)))
	return New[string, string](logger, Options{
		Times: times, Burst: burst, Calm: calm, Pace: pace, Message: "It is undone", Key: "command", Fix: "Stop",
	}), &log
}

// fight has a change undone and restored n times, and returns how often it had
// to wait.
func fight(d *Detector[string, string], k string, n int) (waited int) {
	for range n {
		time.Sleep(burst)
		if d.Undone(k, "set "+k) {
			waited++
		}
		d.Restored(k)
	}
	return waited
}

// lines checks that exactly these lines were logged since the last call.
func lines(t *testing.T, log *bytes.Buffer, want ...string) {
	t.Helper()
	got := strings.SplitAfter(log.String(), "\n")
	log.Reset()
	if len(got)-1 != len(want) {
		t.Errorf("%d lines, want %d: %q", len(got)-1, len(want), got)
		return
	}
	for i, w := range want {
		if !strings.Contains(got[i], w) {
			t.Errorf("line %d: %q does not have %q", i, got[i], w)
		}
	}
}

// The last time that makes a fight is the first to wait; the fight is logged
// once, and its end once.
func TestFight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, log := start()
		if waited := fight(d, "a", times-1); waited != 0 || d.Count() != 0 || d.Restored("a") {
			t.Errorf("after %d times: waited %d times, %d fights", times-1, waited, d.Count())
		}
		d.LogNew()
		lines(t, log)
		if waited := fight(d, "a", 1); waited != 1 || d.Count() != 1 || !d.Restored("a") || d.Latest() != "" {
			t.Errorf("after %d times: waited %d times, %d fights, %q", times, waited, d.Count(), d.Latest())
		}
		fight(d, "b", times)
		d.LogNew()
		fight(d, "a", times)
		d.LogNew()
		lines(t, log, `"It is undone" command="set a" count=20 period="950ms" more=1 fix="Stop"`)
		if d.Count() != 2 || d.Latest() != "set a" {
			t.Errorf("%d fights, the latest over %q", d.Count(), d.Latest())
		}
		d.End("c")
		d.End("b")
		lines(t, log, `no longer undo what they fought over" count=1`)
		d.End("b")
		lines(t, log)
		if d.Count() != 1 || d.Latest() != "set a" {
			t.Errorf("after the end of one: %d fights, the latest over %q", d.Count(), d.Latest())
		}
		d.End("a")
		if d.Count() != 0 || d.Latest() != "" {
			t.Errorf("after the end: %d fights, the latest over %q", d.Count(), d.Latest())
		}
		if waited := fight(d, "a", times-1); waited != 0 {
			t.Error("after the end, the first times wait")
		}
	})
}

// Some programs remove a route ten times before they pause: that counts once.
func TestBurst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, _ := start()
		for range 3 * times {
			time.Sleep(burst / (3 * times))
			d.Undone("a", "")
		}
		for range times - 2 {
			time.Sleep(burst)
			d.Undone("a", "")
		}
		if d.Count() != 0 {
			t.Error("a burst counts more than once")
		}
		time.Sleep(burst)
		d.Undone("a", "")
		if d.Count() != 1 {
			t.Error("a burst does not count")
		}
	})
}

// Only what is undone soon after it was restored waits.
func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, _ := start()
		fight(d, "a", times)
		time.Sleep(pace - 1)
		if !d.Undone("a", "") {
			t.Error("undone within a second, it does not wait")
		}
		time.Sleep(1 * time.Nanosecond)
		if d.Undone("a", "") {
			t.Error("undone after a second, it waits")
		}
	})
}

// A fight ends when the change was left alone, whether this is found by looking
// or when it is undone again. Without Calm, it does not.
func TestCalm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, log := start()
		fight(d, "a", times)
		fight(d, "b", 1)
		time.Sleep(calm - burst)
		d.Forget() // calm for less than that
		if d.Count() != 1 {
			t.Error("forgotten too soon")
		}
		time.Sleep(2 * burst)
		d.Forget()
		lines(t, log, `no longer undo what they fought over" count=1`)
		if len(d.records) != 0 {
			t.Errorf("%d records stay", len(d.records))
		}

		fight(d, "a", times)
		time.Sleep(calm + 1)
		if d.Undone("a", "") || d.Count() != 0 {
			t.Error("undone after a calm minute, it is still a fight")
		}
		lines(t, log, `no longer undo what they fought over" count=1`)

		d.Calm = 0
		fight(d, "a", times)
		time.Sleep(time.Hour)
		d.Forget()
		if d.Undone("a", ""); d.Count() != 1 {
			t.Error("without Calm, a fight ends by itself")
		}
	})
}
