package main

import (
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"strings"
	"testing"
	"time"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/cmd/internal/settings"
)

// notifySocket plays systemd: next returns what it receives.
func notifySocket(t *testing.T) (next func() string) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	t.Setenv("NOTIFY_SOCKET", socket)
	return func() string {
		t.Helper()
		buf := make([]byte, 4096)
		l.SetReadDeadline(time.Now().Add(20 * time.Second))
		n, err := l.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		return string(buf[:n])
	}
}

// TestSystemd: systemd receives what the node waits for, and when it is ready: once that flanneld has started. The
// heartbeat of the main loop is the watchdog's.
func TestSystemd(t *testing.T) {
	next := notifySocket(t)
	t.Setenv("WATCHDOG_USEC", "20000")
	t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
	o := options(t.Context(), &settings.Options{}, nil, func() {})
	for _, c := range [][2]string{
		{"a lease", "STATUS=Waiting for a lease"}, {"", "READY=1\nSTATUS=Ready"},
		{"another lease", "STATUS=Waiting for another lease"}, {"", "STATUS=Ready"},
	} {
		o.Waiting(c[0])
		if got := next(); got != c[1] {
			t.Errorf("%q: systemd receives %q, not %q", c[0], got, c[1])
		}
	}
	if o.HeartbeatEvery != 10*time.Millisecond {
		t.Errorf("with a watchdog of 20 ms, the heart beats every %v", o.HeartbeatEvery)
	}
	o.Heartbeat()
	if got := next(); got != "WATCHDOG=1" {
		t.Errorf("systemd receives %q", got)
	}
}

// TestNoWatchdog: without systemd, or with a watchdog for another process, there is no heartbeat.
func TestNoWatchdog(t *testing.T) {
	for _, env := range [][2]string{{"", ""}, {"20000", "1"}, {"nonsense", ""}} {
		t.Setenv("WATCHDOG_USEC", env[0])
		t.Setenv("WATCHDOG_PID", env[1])
		if every := watchdog(klog.Background()); every != 0 {
			t.Errorf("with WATCHDOG_USEC=%s WATCHDOG_PID=%s, the heart beats every %v", env[0], env[1], every)
		}
	}
}

// TestHandler: nothing is served that changes anything, profiles only where the operator wants them, and the metrics of
// the process.
func TestHandler(t *testing.T) {
	for _, profile := range []bool{false, true} {
		handler := options(t.Context(), &settings.Options{Profile: profile}, nil, func() {}).Handler
		answer := func(method, path string) (int, string) {
			w := httptest.NewRecorder()
			handler.ServeHTTP(w, httptest.NewRequest(method, path, nil))
			return w.Code, w.Body.String()
		}
		want := http.StatusNotFound
		if profile {
			want = http.StatusOK
		}
		for path, want := range map[string]int{"/metrics": http.StatusOK, "/debug/pprof/": want, "/debug/pprof/heap": want,
			"/debug/pprof/cmdline": http.StatusNotFound, "/debug/vars": http.StatusNotFound} {
			if code, _ := answer(http.MethodGet, path); code != want {
				t.Errorf("with profile=%t, GET %s: %d, want %d", profile, path, code, want)
			}
		}
		for _, path := range []string{"/metrics", "/debug/pprof/", "/debug/pprof/profile"} {
			for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodDelete} {
				if code, _ := answer(method, path); code != http.StatusMethodNotAllowed && code != http.StatusNotFound {
					t.Errorf("%s %s: %d", method, path, code)
				}
			}
		}
		_, text := answer(http.MethodGet, "/metrics")
		if !strings.Contains(text, "go_goroutines ") || !strings.Contains(text, "process_resident_memory_bytes ") {
			t.Errorf("metrics of the process are missing in\n%s", text)
		}
	}
}

// TestCollectLater: the first garbage collection ends the time in which nothing is collected, and so does the node that
// is ready. What the node is given then stays.
func TestCollectLater(t *testing.T) {
	t.Setenv("GOGC", "")
	defer debug.SetGCPercent(debug.SetGCPercent(100))
	percent := func() uint64 {
		s := []metrics.Sample{{Name: "/gc/gogc:percent"}}
		metrics.Read(s)
		return s[0].Value.Uint64()
	}
	expect := func(want uint64) {
		t.Helper()
		if got := percent(); got != want {
			t.Errorf("garbage may be %d percent, want %d", got, want)
		}
	}
	started := collectLater()
	expect(gcAtFirst)
	runtime.GC()
	for deadline := time.Now().Add(20 * time.Second); percent() != gcAtStart; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("after a collection, garbage may be %d percent", percent())
		}
	}
	runtime.KeepAlive(started)

	started = collectLater()
	ready := options(t.Context(), &settings.Options{}, nil, started).Waiting
	ready("")
	expect(gcAtRest)
	started() // as the first collection does, which may end later
	expect(gcAtRest)

	t.Setenv("GOGC", "100")
	debug.SetGCPercent(100)
	collectLater()()
	expect(100)
}
