package etcd

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"strings"
	"testing"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"k8s.io/klog/v2"
)

func TestOutageIsSaidOnce(t *testing.T) {
	flags := flag.NewFlagSet("", flag.PanicOnError)
	klog.InitFlags(flags)
	flags.Parse([]string{"-logtostderr=false", "-stderrthreshold=FATAL", "-one_output=true"})
	defer flags.Parse([]string{"-logtostderr=true"})
	var text bytes.Buffer
	klog.SetOutput(&text)
	defer klog.SetOutput(nil)

	down, refused, full := context.DeadlineExceeded, rpctypes.ErrAuthFailed, errors.New("disk full")
	var o outage
	for _, step := range []struct {
		purpose string
		err     error // nil: it succeeds
		want    string
	}{
		{"read", nil, ""},
		{"read", down, "W etcd at E: no answer within 10s. Waiting to read"},
		{"read", down, ""},
		{"write", down, ""},
		{"write", refused, "W etcd at E: etcdserver: authentication failed, invalid user ID or password: check --etcd-username and --etcd-password. Waiting to write"},
		{"read", down, ""},
		{"read", refused, ""},
		{"read", nil, "I etcd at E is back"},
		{"read", nil, ""},
		{"read", down, "W etcd at E: no answer within 10s. Waiting to read"},
		{"write", nil, "I etcd at E is back"},

		// What etcd refuses one request does not end with the success of another.
		{"write", full, "W etcd at E: disk full. Waiting to write"},
		{"read", nil, ""},
		{"write", full, ""},
		{"write", nil, "I etcd at E is back"},
	} {
		text.Reset()
		if step.err != nil {
			o.say(step.purpose, "E", step.err)
		} else {
			o.end(step.purpose, "E")
		}
		got := strings.TrimSpace(text.String())
		if severity, message, found := strings.Cut(got, "] "); found { // the rest is klog's header
			got = severity[:1] + " " + message
		}
		if got != step.want {
			t.Errorf("%s, %v:\n got %q\nwant %q", step.purpose, step.err, got, step.want)
		}
	}
}
