package etcd

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"k8s.io/klog/v2/textlogger"

	"github.com/flanneld/flanneld/subnet"
)

// A reader reads records, as a manager does.
type reader struct {
	*Manager
	log      bytes.Buffer
	revision int64
}

func newReader() *reader {
	r := &reader{}
	log := textlogger.NewLogger(textlogger.NewConfig(textlogger.Output(&r.log)))
	r.Manager = &Manager{log: log, options: Options{Prefix: "/net"}, records: subnet.NewRecordLog(log)}
	return r
}

// put returns the event of a key that was written. The key is behind the prefix of leases.
func (r *reader) put(key, value string) *clientv3.Event {
	r.revision++
	return &clientv3.Event{Type: mvccpb.PUT, Kv: &mvccpb.KeyValue{Key: []byte("/net/subnets/" + key), Value: []byte(value),
		CreateRevision: r.revision, ModRevision: r.revision, Lease: 7}}
}

func (r *reader) deleted(key string) *clientv3.Event {
	return &clientv3.Event{Type: mvccpb.DELETE, Kv: &mvccpb.KeyValue{Key: []byte("/net/subnets/" + key)}}
}

// logged returns the lines that were logged since the last time.
func (r *reader) logged() []string {
	defer r.log.Reset()
	return slices.Collect(strings.Lines(r.log.String()))
}

// hostile are values of which no part may be shown as it is.
var hostile = map[string]string{
	"no JSON":                     "\nE0101 00:00:00.000000       1 main.go:1] \"forged\"\n\x1b[2J",
	"an address":                  `{"PublicIP":"198.18.0.2\n\u001b[2J\u009b2J"}`,
	"a number":                    `{"PublicIP":` + strings.Repeat("7", 10000) + `}`,
	"a backend's name":            `{"PublicIP":"198.18.0.2","BackendType":"` + strings.Repeat("x", 10000) + `"}`,
	"data of a MB":                `{"PublicIP":"198.18.0.2","BackendType":"vxlan","BackendData":"` + strings.Repeat("x", 1<<20) + `"}`,
	"a MB of nothing":             strings.Repeat(" ", 1<<20),
	"a MB of what is not text":    strings.Repeat("\x00\xff\n", 1<<20/3),
	"what is nested 20000 levels": `{"PublicIP":"198.18.0.2","BackendData":` + strings.Repeat("[", 20000) + strings.Repeat("]", 20000) + `}`,
	"nothing":                     "",
}

// TestHostileRecords: a record that cannot be read is no lease, and one short line, whatever is in it.
func TestHostileRecords(t *testing.T) {
	for name, value := range hostile {
		r := newReader()
		u := r.updateOf([]*clientv3.Event{r.put("10.5.2.0-24", value)})
		if len(u.Leases) > 0 || len(u.Gone) != 1 {
			t.Errorf("%s: it is the update %.200v", name, u)
		}
		if lines := r.logged(); len(lines) != 1 || len(lines[0]) > 600 || !strings.Contains(lines[0], "/net/subnets/10.5.2.0-24") ||
			strings.ContainsAny(lines[0], "\x1b\u009b") {
			t.Errorf("%s: logged %.2000q", name, lines)
		}
	}
	for _, key := range []string{"\nE0101 forged", "\x1b[2J", "\u009b2J\u202e", strings.Repeat("10.", 1<<19) + "0-24",
		"10.5.2.0-" + strings.Repeat("2", 1<<20), "10.5.2.0-24'; reboot; '", "../config"} {
		r := newReader()
		if u := r.updateOf([]*clientv3.Event{r.put(key, "")}); len(u.Leases)+len(u.Gone) > 0 {
			t.Errorf("%.100q: it is the update %.200v", key, u)
		}
		if lines := r.logged(); len(lines) != 1 || len(lines[0]) > 1200 || strings.ContainsAny(lines[0], "\x1b\u009b\u202e") {
			t.Errorf("%.100q: logged %.2000q", key, lines)
		}
	}
}

// TestRewrittenRecords: a record that is written again and again is a line a minute, many records are a few lines, and
// nothing is remembered of records that are gone.
func TestRewrittenRecords(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReader()
		for range 100 {
			r.updateOf([]*clientv3.Event{r.put("10.5.2.0-24", "nonsense")})
		}
		if lines := r.logged(); len(lines) != 1 {
			t.Errorf("within a moment, logged %q", lines)
		}
		time.Sleep(time.Minute)
		r.updateOf([]*clientv3.Event{r.put("10.5.2.0-24", "nonsense")})
		if lines := r.logged(); len(lines) != 1 {
			t.Errorf("a minute later, logged %q", lines)
		}
		time.Sleep(time.Minute)
		var events []*clientv3.Event
		for i := range 10000 {
			events = append(events, r.put(fmt.Sprint("malformed ", i), strings.Repeat("x", 100)))
		}
		r.updateOf(events)
		lines := r.logged()
		if size := len(strings.Join(lines, "")); len(lines) > 25 || size > 10000 {
			t.Errorf("10000 malformed keys are %d lines, %d bytes", len(lines), size)
		}
		for i, e := range events {
			events[i] = r.deleted(strings.TrimPrefix(string(e.Kv.Key), "/net/subnets/"))
		}
		time.Sleep(time.Minute)
		r.updateOf(append(events, r.deleted("10.5.2.0-24")))
		if n := r.records.Len(); n != 0 {
			t.Errorf("all are gone, and %d are remembered", n)
		}
	})
}
