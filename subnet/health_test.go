package subnet

import (
	"bytes"
	"flag"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/klog/v2"
	"k8s.io/klog/v2/textlogger"
)

func TestStoreHealthLogsOnce(t *testing.T) {
	flags := flag.NewFlagSet("", flag.PanicOnError)
	klog.InitFlags(flags)
	flags.Parse([]string{"-logtostderr=false", "-stderrthreshold=FATAL", "-one_output=true"})
	defer flags.Parse([]string{"-logtostderr=true"})
	var log bytes.Buffer
	klog.SetOutput(&log)
	defer klog.SetOutput(nil)

	store := State{Kind: "test", Store: "store at S", Endpoints: []string{"http://s"}, Check: "curl http://s"}
	h := NewStoreHealth(klog.Background(), store)
	if s := h.State(); !reflect.DeepEqual(s, store) {
		t.Errorf("before any request it is %+v", s)
	}
	failed := func(operation, reason string) string {
		return `E "The store cannot be used; retrying" store="store at S" operation="` + operation + `" reason="` + reason +
			`"`
	}
	const settles = "settles"
	const back = `I "The store is back" store="store at S"`
	for _, step := range []struct {
		operation, cause, text string // no text: it succeeds; settles: it is a watch without events
		want                   string
		connected              bool
	}{
		{"read", "", "", "", true},
		{"read", Unreachable, "no answer", failed("read", "no answer"), false},
		{"read", Unreachable, "no answer", "", false},
		{"write", Unreachable, "no answer", "", false},
		{"write", "login", "wrong password", failed("write", "wrong password"), false},
		{"read", Unreachable, "no answer", "", false},
		{"read", "login", "wrong password", "", false},
		{"read", "", "", back, true},
		{"read", "", "", "", true},
		{"read", Unreachable, "no answer", failed("read", "no answer"), false},
		{"write", "", "", back, true},

		// A watch without events says nothing of another one.
		{"watch", Unreachable, "cut off", failed("watch", "cut off"), false},
		{"watch own", "", settles, "", false},
		{"watch", Unreachable, "cut off", "", false},
		{"watch own", Unreachable, "cut off", "", false},
		{"watch", "", settles, "", false},
		{"watch own", "", settles, back, true},
		{"watch", Unreachable, "cut off", failed("watch", "cut off"), false},
		{"watch own", "", "", back, true},

		// What the store refuses for one operation does not end with the success of another.
		{"write", "", "disk full", failed("write", "disk full"), false},
		{"read", "", "", "", false},
		{"write", "", "disk full", "", false},
		{"read", "", "disk full", "", false}, // the same for all operations
		{"read", "", "read-only", failed("read", "read-only"), false},
		{"write", "", "", "", false},
		{"read", "", "", back, true},
	} {
		log.Reset()
		switch step.text {
		case settles:
			h.Settled(step.operation)
		case "":
			h.Succeeded(step.operation)
		default:
			h.Failed(step.operation, step.cause, step.text)
		}
		got := strings.TrimSpace(log.String())
		if severity, message, found := strings.Cut(got, "] "); found { // the rest is klog's header
			got = severity[:1] + " " + message
		}
		if got != step.want {
			t.Errorf("%s, %s:\n got %q\nwant %q", step.operation, step.text, got, step.want)
		}
		if s := h.State(); s.Connected != step.connected || (s.Problem == "") != step.connected || s.Check != store.Check {
			t.Errorf("after %s, %s it is %+v", step.operation, step.text, s)
		}
	}
}

// TestStoreHealthIsBounded: a store that refuses with another text each time is a line a minute, and is not remembered.
func TestStoreHealthIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var text bytes.Buffer
		h := NewStoreHealth(textlogger.NewLogger(textlogger.NewConfig(textlogger.Output(&text))), State{})
		lines := func() int { defer text.Reset(); return strings.Count(text.String(), "\n") }
		for i := range 1000 {
			h.Failed("write", "", fmt.Sprint("request ", i, " is refused"))
		}
		if n := lines(); n != 1 || len(h.failing) != 1 {
			t.Errorf("%d lines, and %d failures are remembered", n, len(h.failing))
		}
		h.Failed("read", "", "refused, too")
		h.Failed("write", "login", "wrong password")
		if n := lines(); n != 2 {
			t.Errorf("another operation and another cause are %d lines", n)
		}
		time.Sleep(recordRest)
		h.Failed("write", "", "another text")
		if n := lines(); n != 1 {
			t.Errorf("a minute later: %d lines", n)
		}
		h.Succeeded("write")
		h.Succeeded("read")
		if len(h.failing)+len(h.refused) != 0 || !h.State().Connected {
			t.Errorf("all is well, and remembered are %v, %v", h.failing, h.refused)
		}
	})
}
