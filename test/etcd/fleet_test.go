package etcd_test

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// metric returns the sum of a counter of the program, over the labels that contain all parts.
func (s *programSite) metric(name string, parts ...string) (sum float64) {
	s.t.Helper()
	answer, err := http.Get("http://" + net.JoinHostPort(s.program.host, "2381") + "/metrics")
	if err != nil {
		s.t.Fatal(err)
	}
	defer answer.Body.Close()
	for lines := bufio.NewScanner(answer.Body); lines.Scan(); {
		series, value, _ := strings.Cut(lines.Text(), " ")
		labels, ok := strings.CutPrefix(series, name)
		if !ok || slices.ContainsFunc(parts, func(p string) bool { return !strings.Contains(labels, p) }) {
			continue
		}
		n, err := strconv.ParseFloat(value, 64)
		if err != nil {
			s.t.Fatal(err)
		}
		sum += n
	}
	return sum
}

// awaitMetric waits until the counter is more than it was.
func (s *programSite) awaitMetric(was float64, name string, parts ...string) {
	s.t.Helper()
	for ctx := s.ctx(); s.metric(name, parts...) <= was; {
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			s.t.Fatalf("%s of %q stays %v", name, parts, was)
		}
	}
}

// fill writes the leases of n nodes, with data of some size.
func fill(s *site, n, size int) {
	s.t.Helper()
	var puts []clientv3.Op
	for i := range n {
		puts = append(puts, clientv3.OpPut(fmt.Sprintf("%s/subnets/10.%d.%d.0-24", s.prefix, 6+i>>8, i&255), fmt.Sprintf(
			`{"PublicIP":"198.19.%d.%d","BackendType":"vxlan","BackendData":"%s"}`, i>>8, i&255, strings.Repeat("x", size))))
	}
	for some := range slices.Chunk(puts, 125) {
		if _, err := s.client.Txn(s.ctx()).Then(some...).Commit(); err != nil {
			s.t.Fatal(err)
		}
	}
}

// At rest, a node makes one request a beat: it renews its claim.
func TestOneRequestABeat(t *testing.T) {
	t.Parallel()
	ofEachVersion(t, func(t *testing.T, path string) {
		s := newProgramSite(t, path)
		s.up()
		s.put("config", small)
		m := s.manager("a") // the only one, or others would be counted, too
		cfg, err := m.Config(s.ctx())
		if err != nil {
			t.Fatal(err)
		}
		s.keep(m, s.acquire(m, cfg, want("198.18.0.1")))
		const renewals, reads = `"LeaseKeepAlive"`, `"Range"`
		s.awaitMetric(s.metric("grpc_server_started_total", renewals), "grpc_server_started_total", renewals)
		before := s.metric("grpc_server_started_total", reads)
		s.awaitMetric(s.metric("grpc_server_started_total", renewals)+1, "grpc_server_started_total", renewals)
		if n := s.metric("grpc_server_started_total", reads) - before; n > 0 {
			t.Errorf("%v reads beside two renewals of the claim", n)
		}
	})
}

// A node that starts gets the leases of all nodes once, though it needs them for its peers, its previous lease and its
// next one.
func TestStartReadsLeasesOnce(t *testing.T) {
	t.Parallel()
	ofEachVersion(t, func(t *testing.T, path string) {
		s := newProgramSite(t, path)
		s.up()
		const n, size = 300, 2000
		fill(s.site, n, size)
		cfg := s.configure(small)
		m := s.manager("a")
		const sent = "etcd_network_client_grpc_sent_bytes_total"
		before := s.metric(sent)
		v := newView(t, m.Watch(t.Context()))
		if _, err := m.Previous(s.ctx(), want("198.18.0.1").Attrs); err != nil {
			t.Fatal(err)
		}
		s.acquire(m, cfg, want("198.18.0.1"))
		for v.read(); len(v.leases) != n+1; {
			v.read()
		}
		if times := (s.metric(sent) - before) / (n * size); times > 1.5 {
			t.Errorf("etcd sent all leases %.1f times", times)
		}
	})
}

// What happens to other leases while a node acquires its own is seen, whether leases come, change or go.
func TestLeasesThatChangeBeforeAcquire(t *testing.T) {
	s := newSite(t)
	const two = `{"Network": "10.5.0.0/16", "SubnetMin": "10.5.1.0", "SubnetMax": "10.5.2.0", "Backend": {"Type": "vxlan"}}`
	cfg := s.configure(two)
	s.put("subnets/10.5.1.0-24", record("198.18.0.8"))
	m := s.manager("a")
	if _, err := m.Previous(s.ctx(), want("198.18.0.1").Attrs); err != nil {
		t.Fatal(err)
	}
	s.delete("subnets/10.5.1.0-24")
	s.put("subnets/10.5.2.0-24", record("198.18.0.9"))
	if l := s.acquire(m, cfg, want("198.18.0.1")); l.Key() != "10.5.1.0-24" {
		t.Errorf("got %v", l.Subnets)
	}
	if lines, _ := log.lines("No subnet is free", s.prefix+"/"); len(lines) > 0 {
		t.Errorf("the log has %q", lines)
	}
	// A record that was another node's becomes this node's, as an operator's reservation does.
	m = s.manager("b")
	if _, err := m.Previous(s.ctx(), want("198.18.0.2").Attrs); err != nil {
		t.Fatal(err)
	}
	s.put("subnets/10.5.2.0-24", record("198.18.0.2"))
	if l := s.acquire(m, cfg, want("198.18.0.2")); l.Key() != "10.5.2.0-24" {
		t.Errorf("got %v", l.Subnets)
	}
}

// A claim lasts longer the more nodes there are, also one that was made while there were few.
func TestClaimsOfManyNodes(t *testing.T) {
	s := newSite(t)
	granted := func(lease clientv3.LeaseID) int64 {
		t.Helper()
		answer, err := s.client.TimeToLive(s.ctx(), lease)
		if err != nil {
			t.Fatal(err)
		}
		return answer.GrantedTTL
	}
	cfg := s.configure(small)
	m := s.manager("a")
	v := newView(t, m.Watch(t.Context()))
	s.keep(m, s.acquire(m, cfg, want("198.18.7.1")))
	before := s.get("nodes/198.18.7.1")
	if ttl := granted(before.lease); ttl != 30 {
		t.Errorf("alone, a claim lasts %d s", ttl)
	}
	const nodes = 4500
	fill(s, nodes, 1)
	for len(v.leases) != nodes+1 {
		v.read()
	}
	after := s.until("nodes/198.18.7.1", func(e entry) bool { return e.lease != before.lease })
	if ttl := granted(after.lease); ttl != 90 {
		t.Errorf("among %d nodes, a claim lasts %d s", nodes, ttl)
	}
	if lines, _ := log.lines("Another daemon with this machine's identity", "198.18.7.1"); len(lines) > 0 {
		t.Errorf("the log has %q", lines)
	}
	late := s.manager("b")
	if _, err := late.Previous(s.ctx(), want("198.18.7.2").Attrs); err != nil {
		t.Fatal(err)
	}
	s.acquire(late, cfg, want("198.18.7.2"))
	if ttl := granted(s.get("nodes/198.18.7.2").lease); ttl != 90 {
		t.Errorf("a new node's claim lasts %d s", ttl)
	}
}

// Where many leases change at once in a large network, a node takes them in few messages, and misses none.
func TestManyChangesComeTogether(t *testing.T) {
	t.Parallel()
	ofEachVersion(t, func(t *testing.T, path string) {
		s := newProgramSite(t, path)
		s.up()
		const nodes, more = 2500, 200 // of which 2 are taken one by one, and 4 a second later on
		fill(s.site, nodes, 0)
		v := newView(t, s.manager("a").Watch(t.Context()))
		for len(v.leases) != nodes {
			v.read()
		}
		s.put("subnets/10.5.1.0-24", record("198.18.0.1"))
		for len(v.leases) != nodes+1 { // there is a watch
			v.read()
		}
		const sent = "grpc_server_msg_sent_total"
		before := s.metric(sent, `"Watch"`)
		for i := range more {
			s.put(fmt.Sprintf("subnets/10.200.%d.0-24", i), record(fmt.Sprintf("198.18.9.%d", i)))
		}
		for len(v.leases) != nodes+1+more {
			v.read()
		}
		if n := s.metric(sent, `"Watch"`) - before; n > more/2 {
			t.Errorf("%v messages about %d leases", n, more)
		}
		if v.snapshots != 1 {
			t.Errorf("%d snapshots, though nothing was missed", v.snapshots)
		}
	})
}

// While etcd has no leader, it ends all watches. That is no reason for all nodes to read all leases again.
func TestWatchGoesOnAfterAnElection(t *testing.T) {
	t.Parallel()
	ofEachVersion(t, func(t *testing.T, path string) {
		s, members := newClusterSite(t, path)
		s.start()
		s.put("subnets/10.5.1.0-24", record("198.18.0.1"))
		o := s.options("a")
		o.Endpoints = []string{"http://" + s.program.addr()}
		v := newView(t, s.managerWith(o).Watch(t.Context()))
		v.until("10.5.1.0/24=198.18.0.1")
		s.put("subnets/10.5.2.0-24", record("198.18.0.2"))
		v.until("10.5.1.0/24=198.18.0.1 10.5.2.0/24=198.18.0.2") // so there is a watch

		const ended = "grpc_server_handled_total"
		before := s.metric(ended, `"Watch"`, `"Unavailable"`)
		members[0].signal(t, syscall.SIGSTOP)
		members[1].signal(t, syscall.SIGSTOP)
		s.awaitMetric(before, ended, `"Watch"`, `"Unavailable"`)
		members[0].signal(t, syscall.SIGCONT)
		members[1].signal(t, syscall.SIGCONT)
		s.settle()
		s.put("subnets/10.5.3.0-24", record("198.18.0.3"))
		s.delete("subnets/10.5.1.0-24")
		v.until("10.5.2.0/24=198.18.0.2 10.5.3.0/24=198.18.0.3")
		if v.snapshots != 1 {
			t.Errorf("%d snapshots, though nothing was missed", v.snapshots)
		}
	})
}
