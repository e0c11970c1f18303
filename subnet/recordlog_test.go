package subnet

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/klog/v2/textlogger"
)

// recordLog returns a RecordLog, and what it has logged since the last call.
func recordLog() (*RecordLog, func() string) {
	var text bytes.Buffer
	l := NewRecordLog(textlogger.NewLogger(textlogger.NewConfig(textlogger.Output(&text))))
	return l, func() string {
		defer text.Reset()
		var lines []string
		for line := range strings.Lines(text.String()) {
			_, line, _ = strings.Cut(line, "recordlog_test.go:") // where it is called
			_, line, _ = strings.Cut(strings.TrimSpace(line), "] ")
			lines = append(lines, line)
		}
		return strings.Join(lines, "\n")
	}
}

func TestRecordLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, logged := recordLog()
		bad := errors.New("bad")
		expect := func(what, want string) {
			t.Helper()
			if got := logged(); got != want {
				t.Errorf("%s: logged\n%s\nwant\n%s", what, got, want)
			}
		}
		const line = `"Message" err="bad" key="a"`
		wrong := func(record string, state any) { l.Error(record, state, bad, "Message", "key", record) }
		wrong("a", 1)
		expect("a record", line)
		wrong("b", 1)
		expect("another record", strings.Replace(line, `"a"`, `"b"`, 1))
		wrong("a", 1)
		time.Sleep(recordRest)
		wrong("a", 1)
		expect("the same state", "")
		wrong("a", 2)
		expect("another state, a minute later", line)
		wrong("a", 3)
		expect("another state, too soon", "")
		time.Sleep(recordRest - 1)
		wrong("a", 3)
		expect("still too soon", "")
		time.Sleep(time.Nanosecond)
		wrong("a", 3)
		expect("not any more", line)
		wrong("a", int64(3))
		expect("too soon, with a state of another type", "")

		l.Forget("a")
		wrong("a", 3)
		expect("gone and back within the minute", "")
		time.Sleep(recordRest)
		l.Forget("a")
		wrong("a", 3)
		expect("gone and back later", line)

		l.ForgetOthers(slices.Values([]string{"a"}))
		time.Sleep(recordRest)
		if l.Forget("c"); l.Len() != 1 {
			t.Errorf("records that are gone are kept: %v", l.logged)
		}
		if l.ForgetOthers(slices.Values([]string(nil))); l.Len() != 0 {
			t.Errorf("records that are gone are kept: %v", l.logged)
		}
	})
}

// TestManyRecords: thousands of bad records, or records that come and go, are a few lines.
func TestManyRecords(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, logged := recordLog()
		flood := func(first, last int) (lines int) {
			for i := first; i < last; i++ {
				l.Error(fmt.Sprint(i), 1, nil, "Message")
				l.Forget(fmt.Sprint(i))
			}
			return strings.Count(logged(), "\n") + 1
		}
		if got := flood(0, 10000); got != recordLines+1 {
			t.Errorf("10000 records are %d lines, want %d and one about the rest", got, recordLines)
		}
		time.Sleep(recordRest)
		if got := flood(10000, 10000+recordLines-1); got != recordLines-1 {
			t.Errorf("a minute later, %d records are %d lines", recordLines-1, got)
		}
		if l.Len() != recordLines-1 {
			t.Errorf("%d records are kept", l.Len())
		}
	})
}
