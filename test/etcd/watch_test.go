package etcd_test

import (
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/subnet/etcd"
)

// A view is what a reader of updates knows.
type view struct {
	t         *testing.T
	updates   <-chan subnet.Update
	leases    map[subnet.Subnets]*subnet.Lease
	count     int // of updates
	snapshots int
}

func newView(t *testing.T, updates <-chan subnet.Update) *view {
	return &view{t: t, updates: updates, leases: map[subnet.Subnets]*subnet.Lease{}}
}

func (v *view) read() {
	v.t.Helper()
	u := receive(v.t, v.updates)
	v.count++
	if u.Snapshot {
		v.snapshots++
		v.leases = map[subnet.Subnets]*subnet.Lease{}
		if u.Gone != nil {
			v.t.Errorf("a snapshot with Gone %v", u.Gone)
		}
	}
	maps.Copy(v.leases, u.Leases)
	for s := range u.Gone {
		delete(v.leases, s)
	}
}

func (v *view) String() string {
	var lines []string
	for s, l := range v.leases {
		lines = append(lines, fmt.Sprintf("%v=%v", s, l.Attrs.PublicIPs()[0]))
	}
	slices.Sort(lines)
	return strings.Join(lines, " ")
}

// until reads until the view is as wanted.
func (v *view) until(want string) {
	v.t.Helper()
	for v.String() != want || v.count == 0 {
		v.read()
	}
}

func TestWatch(t *testing.T) {
	s := newSite(t)
	s.put("subnets/10.5.1.0-24", record("198.18.0.1"))
	v := newView(t, s.manager("a").Watch(t.Context()))
	v.until("10.5.1.0/24=198.18.0.1")
	s.put("subnets/10.5.2.0-24", record("198.18.0.2"))
	v.until("10.5.1.0/24=198.18.0.1 10.5.2.0/24=198.18.0.2")
	s.put("subnets/10.5.2.0-24", record("198.18.0.3"))
	v.until("10.5.1.0/24=198.18.0.1 10.5.2.0/24=198.18.0.3")
	s.delete("subnets/10.5.1.0-24")
	v.until("10.5.2.0/24=198.18.0.3")
	id := s.putLeased("subnets/0.0.0.0-0&fd00:5:0:7::-64", record("fd18::7"))
	v.until("10.5.2.0/24=198.18.0.3 fd00:5:0:7::/64=fd18::7")
	if _, err := s.client.Revoke(s.ctx(), id); err != nil {
		t.Fatal(err)
	}
	v.until("10.5.2.0/24=198.18.0.3")
	if v.snapshots != 1 {
		t.Errorf("%d snapshots", v.snapshots)
	}
}

func TestEmptySnapshotComesToo(t *testing.T) {
	s := newSite(t)
	v := newView(t, s.manager("a").Watch(t.Context()))
	v.read()
	if v.snapshots != 1 || len(v.leases) != 0 {
		t.Errorf("%+v", v)
	}
}

func TestUnreadableRecords(t *testing.T) {
	s := newSite(t)
	s.put("subnets/10.5.1.0-24", record("198.18.0.1"))
	s.put("subnets/10.5.2.0-24", "nonsense")
	s.put("subnets/nonsense", record("198.18.0.3"))
	m := s.manager("a")
	v := newView(t, m.Watch(t.Context()))
	v.until("10.5.1.0/24=198.18.0.1")
	s.put("subnets/10.5.4.0-24", record("198.18.0.4"))
	v.until("10.5.1.0/24=198.18.0.1 10.5.4.0/24=198.18.0.4")
	// A lease that becomes unreadable is gone; the others stay.
	s.put("subnets/10.5.4.0-24", `{"PublicIP":"fd18::4"}`)
	v.until("10.5.1.0/24=198.18.0.1")
	s.put("subnets/10.5.4.0-24", record("198.18.0.5"))
	v.until("10.5.1.0/24=198.18.0.1 10.5.4.0/24=198.18.0.5")
	// Once for each bad record, however often it is read.
	newView(t, m.Watch(t.Context())).read()
	for part, want := range map[string]int{`key="` + s.prefix + "/subnets/10.5.2.0-24": 1, `key="` + s.prefix + "/subnets/nonsense": 1, `key="` + s.prefix + "/subnets/10.5.4.0-24": 1} {
		if said, _ := log.lines(part); len(said) != want {
			t.Errorf("%q is said %d times, want %d", part, len(said), want)
		}
	}
	// Its subnet is not given to anybody.
	cfg := s.configure(`{"Network": "10.5.0.0/16", "SubnetMin": "10.5.1.0", "SubnetMax": "10.5.3.0"}`)
	if l := s.acquire(m, cfg, want("198.18.0.9")); l.Key() != "10.5.3.0-24" {
		t.Errorf("got %v", l.Subnets)
	}
}

func TestSlowReaderGetsChangesMerged(t *testing.T) {
	s := newSite(t)
	s.put("subnets/10.5.1.0-24", record("198.18.0.1"))
	slow := newView(t, s.manager("a").Watch(t.Context()))
	quick := newView(t, s.manager("b").Watch(t.Context()))
	slow.read()
	for i := range 100 {
		s.put("subnets/10.5.2.0-24", record(fmt.Sprintf("198.18.1.%d", i+1)))
		s.put("subnets/10.5.3.0-24", record("198.18.0.3"))
		s.delete("subnets/10.5.3.0-24")
	}
	s.put("subnets/10.5.4.0-24", record("198.18.0.4"))
	const final = "10.5.1.0/24=198.18.0.1 10.5.2.0/24=198.18.1.100 10.5.4.0/24=198.18.0.4"
	quick.until(final)
	slow.until(final)
	// How many updates there are to read depends on when the events arrived,
	// but it is nowhere near one for each of the 301 changes.
	if slow.count > 150 || slow.snapshots != 1 {
		t.Errorf("%d updates, %d snapshots", slow.count, slow.snapshots)
	}
}

func TestCompactionBehindABrokenConnection(t *testing.T) {
	s := newOwnSite(t)
	s.up()
	s.put("subnets/10.5.1.0-24", record("198.18.0.1"))
	s.put("subnets/10.5.2.0-24", record("198.18.0.2"))
	v := newView(t, s.manager("a").Watch(t.Context()))
	v.until("10.5.1.0/24=198.18.0.1 10.5.2.0/24=198.18.0.2")

	s.relay.cut()
	s.delete("subnets/10.5.1.0-24")
	s.put("subnets/10.5.3.0-24", record("198.18.0.3"))
	got, err := s.client.Get(s.ctx(), "x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.client.Compact(s.ctx(), got.Header.Revision, clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	s.relay.point(s.server.addr())
	v.until("10.5.2.0/24=198.18.0.2 10.5.3.0/24=198.18.0.3")
	if v.snapshots != 2 {
		t.Errorf("%d snapshots", v.snapshots)
	}
}

func TestServerRestart(t *testing.T) {
	s := newOwnSite(t)
	s.up()
	s.put("subnets/10.5.1.0-24", record("198.18.0.1"))
	v := newView(t, s.manager("a").Watch(t.Context()))
	v.until("10.5.1.0/24=198.18.0.1")
	s.down()
	s.up()
	s.put("subnets/10.5.2.0-24", record("198.18.0.2"))
	v.until("10.5.1.0/24=198.18.0.1 10.5.2.0/24=198.18.0.2")
	if v.snapshots != 1 {
		t.Errorf("%d snapshots, though nothing was missed", v.snapshots)
	}
}

// An etcd that lost its disk starts from revision 1. A watch that goes on from
// where it was says nothing until that revision comes again, and never of what
// happened before it.
func TestServerWithANewDisk(t *testing.T) {
	for _, c := range []struct {
		name          string
		kept          bool // a lease is kept, and so there is a claim to miss
		before, after int  // how much else happens to etcd
	}{
		{"behind the old", true, 100, 0},
		{"ahead of the old", true, 0, 300},
		{"without a lease", false, 100, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newOwnSite(t)
			s.up()
			m := s.manager("a")
			own, key := "", ""
			if c.kept {
				l := s.acquire(m, s.configure(small), want("198.18.0.1"))
				s.keep(m, l)
				own, key = fmt.Sprintf("%v=198.18.0.1 ", l.Subnets), "subnets/"+l.Key()
			}
			s.put("subnets/10.6.2.0-24", record("198.18.0.2"))
			for range c.before {
				s.put("unrelated", "")
			}
			v := newView(t, m.Watch(t.Context()))
			v.until(own + "10.6.2.0/24=198.18.0.2")

			s.down()
			if err := os.RemoveAll(s.server.dir); err != nil {
				t.Fatal(err)
			}
			if err := s.server.start(); err != nil {
				t.Fatal(err)
			}
			s.connect()
			s.put("subnets/10.6.3.0-24", record("198.18.0.3"))
			for range c.after {
				s.put("unrelated", "")
			}
			s.relay.point(s.server.addr())
			v.until(own + "10.6.3.0/24=198.18.0.3")
			if !c.kept {
				return
			}
			s.until("nodes/198.18.0.1", func(e entry) bool { return strings.Contains(e.value, `"Identity":"a"`) })
			if e := s.get(key); e.value != record("198.18.0.1") || e.lease == clientv3.NoLease {
				t.Errorf("our lease is %+v", e)
			}
		})
	}
}

func BenchmarkSnapshot20000(b *testing.B) {
	s := &server{dir: b.TempDir()}
	if err := s.start(); err != nil {
		b.Fatal(err)
	}
	defer s.stop()
	endpoint := "http://" + s.addr()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}})
	if err != nil {
		b.Fatal(err)
	}
	defer client.Close()
	for i := 0; i < 20000; {
		var puts []clientv3.Op
		for ; len(puts) < 125; i++ {
			puts = append(puts, clientv3.OpPut(fmt.Sprintf("/net/subnets/10.%d.%d.0-24", i>>8, i&255),
				record(fmt.Sprintf("198.18.%d.%d", i>>8, i&255))))
		}
		if _, err := client.Txn(b.Context()).Then(puts...).Commit(); err != nil {
			b.Fatal(err)
		}
	}
	m, err := etcd.New(b.Context(), etcd.Options{Endpoints: []string{endpoint}, Prefix: "/net", Identity: "a"})
	if err != nil {
		b.Fatal(err)
	}
	defer m.Close()
	for b.Loop() {
		ctx, cancel := context.WithCancel(b.Context())
		if u := <-m.Watch(ctx); len(u.Leases) != 20000 {
			b.Fatalf("%d leases", len(u.Leases))
		}
		cancel()
	}
}
