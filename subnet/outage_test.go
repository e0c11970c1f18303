package subnet

import (
	"bytes"
	"flag"
	"strings"
	"testing"

	"k8s.io/klog/v2"
)

func TestOutageIsSaidOnce(t *testing.T) {
	flags := flag.NewFlagSet("", flag.PanicOnError)
	klog.InitFlags(flags)
	flags.Parse([]string{"-logtostderr=false", "-stderrthreshold=FATAL", "-one_output=true"})
	defer flags.Parse([]string{"-logtostderr=true"})
	var log bytes.Buffer
	klog.SetOutput(&log)
	defer klog.SetOutput(nil)

	o := Outage{Store: "store at S"}
	if s := o.State(); s != (State{Store: "store at S"}) {
		t.Errorf("before anything was tried it is %+v", s)
	}
	for _, step := range []struct {
		purpose, cause, text string // no text: it succeeds
		want                 string
		connected            bool
	}{
		{"read", "", "", "", true},
		{"read", Away, "no answer", "W store at S: no answer. Waiting to read", false},
		{"read", Away, "no answer", "", false},
		{"write", Away, "no answer", "", false},
		{"write", "login", "wrong password", "W store at S: wrong password. Waiting to write", false},
		{"read", Away, "no answer", "", false},
		{"read", "login", "wrong password", "", false},
		{"read", "", "", "I store at S is back", true},
		{"read", "", "", "", true},
		{"read", Away, "no answer", "W store at S: no answer. Waiting to read", false},
		{"write", "", "", "I store at S is back", true},

		// What the store refuses for one purpose does not end with another's success.
		{"write", "", "disk full", "W store at S: disk full. Waiting to write", false},
		{"read", "", "", "", false},
		{"write", "", "disk full", "", false},
		{"read", "", "disk full", "", false}, // it says so of everything
		{"read", "", "read-only", "W store at S: read-only. Waiting to read", false},
		{"write", "", "", "", false},
		{"read", "", "", "I store at S is back", true},
	} {
		log.Reset()
		if step.text != "" {
			o.Begin(step.purpose, step.cause, step.text)
		} else {
			o.End(step.purpose)
		}
		got := strings.TrimSpace(log.String())
		if severity, message, found := strings.Cut(got, "] "); found { // the rest is klog's header
			got = severity[:1] + " " + message
		}
		if got != step.want {
			t.Errorf("%s, %s:\n got %q\nwant %q", step.purpose, step.text, got, step.want)
		}
		if s := o.State(); s.Connected != step.connected || (s.Trouble == "") != step.connected {
			t.Errorf("after %s, %s it is %+v", step.purpose, step.text, s)
		}
	}
}
