package retry

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/klog/v2/textlogger"
)

func TestBackoff(t *testing.T) {
	fresh := Backoff{First: 3 * time.Second, Most: 20 * time.Second}
	want := []time.Duration{3 * time.Second, 6 * time.Second, 12 * time.Second, 20 * time.Second, 20 * time.Second}
	b := fresh
	for _, what := range []string{"from the start", "after Reset"} {
		var got []time.Duration
		for range want {
			got = append(got, b.Next())
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
		b.Reset()
	}
	b.Next()
	if b = fresh; b.Next() != b.First {
		t.Error("the copy of a fresh one does not start from First")
	}
	if b = (Backoff{}); b.Next() != time.Second || b.Next() != 2*time.Second {
		t.Error("the zero value does not start from a second")
	}
	for range 10 {
		b.Next()
	}
	if pause := b.Next(); pause != 30*time.Second {
		t.Errorf("the zero value ends with %v", pause)
	}
	if b = (Backoff{First: time.Minute, Most: time.Second}); b.Next() != time.Second {
		t.Error("a pause is longer than Most")
	}
}

func TestJitter(t *testing.T) {
	b := Backoff{First: time.Second, Most: 8 * time.Second, Jitter: true}
	seen := map[time.Duration]bool{}
	for i := range 1000 {
		whole := min(time.Second<<min(i, 10), b.Most)
		pause := b.Next()
		if pause < whole/2 || pause > whole {
			t.Fatalf("pause %d is %v, not between half of %v and all of it", i+1, pause, whole)
		}
		seen[pause] = true
	}
	if len(seen) < 900 {
		t.Errorf("of 1000 pauses, %d differ", len(seen))
	}
}

func TestSleep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		b := Backoff{First: time.Second, Most: time.Minute}
		for range 3 {
			if err := b.Sleep(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(start); took != 7*time.Second {
			t.Errorf("three pauses took %v", took)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := b.Sleep(ctx); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != 8*time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
}

// Each change is logged once, whether one operation is watched or several are.
func TestLastError(t *testing.T) {
	var log bytes.Buffer
	logger := textlogger.NewLogger(textlogger.NewConfig(textlogger.Output(&log)))
	var last, logged LastError
	several := LastErrors[int]{2: "full"}
	for i, c := range []struct {
		err     error
		changed bool
	}{
		{nil, false},
		{errors.New("full"), true},
		{errors.New("full"), false},
		{errors.New("away"), true},
		{errors.New("full"), true},
		{nil, true},
		{nil, false},
		{errors.New("full"), true},
	} {
		if last.Changed(c.err) != c.changed {
			t.Errorf("%d, %v: changed is %t", i, c.err, !c.changed)
		}
		want := ""
		switch {
		case c.changed && c.err == nil:
			want = `"Recovered" operation="%s"`
		case c.changed:
			want = `"Failed; retrying" err="` + c.err.Error() + `" operation="%s"`
		}
		logged.Log(logger, "Rules", c.err)
		expect(t, &log, strings.Replace(want, "%s", "Rules", 1))
		several.Log(logger, 1, c.err)
		expect(t, &log, strings.Replace(want, "%s", "1", 1))
		if c.err == nil && len(several) != 1 {
			t.Errorf("%d: the map has %v", i, several)
		}
	}
	if last != "full" || several[1] != "full" || several[2] != "full" {
		t.Errorf("in the end it is %q, and %v", last, several)
	}
}

// expect checks that one line was logged, by this file, or none.
func expect(t *testing.T, log *bytes.Buffer, want string) {
	t.Helper()
	got := log.String()
	log.Reset()
	if (got == "") != (want == "") || !strings.HasSuffix(got, want+"\n") && want != "" || strings.Count(got, "\n") > 1 ||
		want != "" && !strings.Contains(got, " retry_test.go:") {
		t.Errorf("logged %q, want %q", got, want)
	}
}
