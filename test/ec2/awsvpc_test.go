package ec2

import (
	"bytes"
	"cmp"
	"context"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/backend"
	_ "github.com/flanneld/flanneld/backend/awsvpc"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/subnet"
)

// The real backend and the real SDK talk to the server over loopback, while the
// clock is a simulated one (testing/synctest): it stands still until nobody
// waits for an answer.

var (
	ipv4 = netip.MustParseAddr("198.18.0.1")
	ipv6 = netip.MustParseAddr("fd18::1")
)

const networks = `"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "fd05::/48"`

func init() {
	var flags flag.FlagSet
	klog.InitFlags(&flags)
	flags.Set("stderrthreshold", "FATAL")
}

// region is an EC2, with the environment of its clients.
type region struct {
	*Server
	eni string // of the instance that the test is on
	log log
}

func newRegion(t *testing.T) *region {
	r := &region{Server: New()}
	r.Local = ipv4
	r.eni = r.Launch("subnet-1", ipv4, ipv6)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		w.Header()["Date"] = nil // the SDK would set the simulated clock right
		r.ServeHTTP(w, q)
	}))
	// A connection that is kept would keep the clock from running.
	server.Config.SetKeepAlivesEnabled(false)
	server.Start()
	t.Cleanup(server.Close)
	for key := range strings.FieldsSeq(strings.Join(os.Environ(), "\n")) {
		if key, _, _ = strings.Cut(key, "="); strings.HasPrefix(key, "AWS_") {
			t.Setenv(key, "")
		}
	}
	nothing := filepath.Join(t.TempDir(), "nothing")
	for key, value := range map[string]string{
		"AWS_ENDPOINT_URL_EC2": server.URL, "AWS_EC2_METADATA_SERVICE_ENDPOINT": server.URL,
		"AWS_CONFIG_FILE": nothing, "AWS_SHARED_CREDENTIALS_FILE": nothing,
	} {
		t.Setenv(key, value)
	}
	// What is of a severity goes where the lesser ones go, too.
	klog.LogToStderr(false)
	klog.SetOutput(io.Discard)
	klog.SetOutputBySeverity("INFO", &r.log)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the log:\n%s", strings.Join(r.log.lines(), "\n"))
		}
	})
	return r
}

// log is what the backend logs.
type log struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

// applied is the log of a step.
var applied = regexp.MustCompile(`^"Applied" command=(".*")$`)

// structured is what retry.LastError logs.
var structured = regexp.MustCompile(`^"(?:Recovered|Failed; retrying)"(?: err=(".*"))? operation="(.*)"$`)

// lines returns them, each as "E text", "E operation: error", or "I command".
func (l *log) lines() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []string
	for line := range strings.Lines(l.text.String()) {
		_, text, _ := strings.Cut(line, "] ")
		text = strings.TrimSpace(text)
		if m := structured.FindStringSubmatch(text); m != nil {
			text, _ = strconv.Unquote(cmp.Or(m[1], `"recovered"`))
			text = m[2] + ": " + text
		} else if m := applied.FindStringSubmatch(text); m != nil {
			text, _ = strconv.Unquote(m[1])
		}
		all = append(all, line[:1]+" "+text)
	}
	return all
}

// overtaken reports whether a line is about a request for metadata that began before
// the service was back: while it was away, the SDK gave up asking for a token, and
// the last of its attempts may meet a service that wants one.
func overtaken(line string) bool {
	return strings.HasPrefix(line, "E Network interface: the instance metadata service does not answer (http response error StatusCode: 401,")
}

// expect wants exactly these lines since the last time; "…" stands for anything.
func (l *log) expect(t *testing.T, want ...string) {
	t.Helper()
	got := slices.DeleteFunc(l.lines(), overtaken)
	l.mu.Lock()
	l.text.Reset()
	l.mu.Unlock()
	matches := len(got) == len(want)
	for i := range min(len(got), len(want)) {
		from, to, open := strings.Cut(want[i], "…")
		matches = matches && strings.HasPrefix(got[i], from) && (open && strings.HasSuffix(got[i], to) || got[i] == want[i])
	}
	if !matches {
		t.Errorf("the log has\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// A node is the backend at work.
type node struct {
	t      *testing.T
	peers  chan subnet.Update
	cancel context.CancelFunc
	done   chan error
}

// work has the backend work for the lease of a key. It is called in a bubble.
func work(t *testing.T, config, key string) *node {
	t.Helper()
	cfg, err := subnet.ParseConfig([]byte(config))
	if err != nil {
		t.Fatal(err)
	}
	b, err := backend.New(cfg, iface.Uplink{Name: "eth0", Index: 2, MTU: 9001, IPv4: ipv4, IPv6: ipv6, PublicIP: ipv4,
		PublicIPv6: ipv6})
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, peers: make(chan subnet.Update, 1), done: make(chan error, 1)}
	var ctx context.Context
	ctx, n.cancel = context.WithCancel(t.Context())
	go func() {
		n.done <- b.(backend.Worker).Work(ctx, subnet.Lease{Subnets: parse(key)}, n.peers)
	}()
	t.Cleanup(n.stop)
	return n
}

func parse(key string) subnet.Subnets {
	s, err := subnet.ParseKey(key)
	if err != nil {
		panic(err)
	}
	return s
}

func (n *node) stop() {
	n.cancel()
	if err := <-n.done; err != nil {
		n.t.Errorf("Work returned %v", err)
	}
	n.done <- nil
}

// know passes the node its peers.
func (n *node) know(keys ...string) {
	u := subnet.Update{Snapshot: true}
	for _, key := range keys {
		u.Put(subnet.Lease{Subnets: parse(key)})
	}
	n.peers <- u
}

// pass lets the simulated clock run.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func (r *region) expectRoutes(t *testing.T, table string, want ...string) {
	t.Helper()
	if got := r.Routes(table); !slices.Equal(got, want) {
		t.Errorf("%s has\n\t%s\nwant\n\t%s", table, strings.Join(got, "\n\t"), strings.Join(want, "\n\t"))
	}
}

func route(dst, target string) Route {
	return Route{Dst: netip.MustParsePrefix(dst), Target: target, Origin: "CreateRoute"}
}

const (
	dual  = "10.5.1.0-24&fd05:0:0:1::-64"
	plain = `{"Network": "10.5.0.0/16", "Backend": {"Type": "aws-vpc"}}`
)

// TestTables: those of the configuration, or that of the subnet, or the VPC's
// main one; and the role, region and interface that the metadata tell of.
func TestTables(t *testing.T) {
	for _, test := range []struct {
		name, config       string
		tables             func(*region) (used, unused []string)
		described, another int // calls at the start, and in the next 5 minutes
	}{
		{"main", `"Type": "aws-vpc"`, func(r *region) ([]string, []string) {
			return []string{r.Main()}, []string{r.AddTable("subnet-2")}
		}, 2, 5},
		{"of the subnet", `"Type": "aws-vpc"`, func(r *region) ([]string, []string) {
			return []string{r.AddTable("subnet-2", "subnet-1")}, []string{r.Main()}
		}, 1, 5},
		{"one", `"Type": "aws-vpc", "RouteTableID": %q`, func(r *region) ([]string, []string) {
			return []string{r.AddTable("subnet-2")}, []string{r.Main()}
		}, 1, 5},
		{"several", `"Type": "aws-vpc", "RouteTableID": [%q, %q, %q]`, func(r *region) ([]string, []string) {
			return []string{r.AddTable("subnet-2"), r.Main(), r.AddTable()}, []string{r.AddTable("subnet-1")}
		}, 1, 5},
		{"in pages", `"Type": "aws-vpc", "RouteTableID": [%q, %q, %q]`, func(r *region) ([]string, []string) {
			r.PageSize = 2
			return []string{r.AddTable(), r.AddTable(), r.AddTable()}, []string{r.Main()}
		}, 2, 10},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRegion(t)
			used, unused := test.tables(r)
			var ids []any
			for _, id := range used {
				ids = append(ids, id)
			}
			options := test.config
			if strings.Contains(options, "%") {
				options = fmt.Sprintf(options, ids...)
			}
			synctest.Test(t, func(t *testing.T) {
				n := work(t, `{`+networks+`, "Backend": {`+options+`}}`, dual)
				pass(2 * time.Second)
				n.know(dual)
				for _, id := range used {
					r.expectRoutes(t, id, "10.5.1.0/24 "+r.eni, "fd05:0:0:1::/64 "+r.eni)
				}
				for _, id := range unused {
					r.expectRoutes(t, id)
				}
				if r.Checked(r.eni) {
					t.Error("the source/destination check is on")
				}
				if calls := r.Calls("DescribeRouteTables"); calls != test.described {
					t.Errorf("it took %d calls of DescribeRouteTables, want %d", calls, test.described)
				}
				pass(5 * time.Minute)
				if calls := r.Calls("DescribeRouteTables") - test.described; calls < 4*test.another/5 || calls > 7*test.another/5 {
					t.Errorf("5 minutes take %d calls of DescribeRouteTables, want about %d", calls, test.another)
				}
				if calls := r.Calls("CreateRoute"); calls != 2*len(used) || r.Calls("ModifyNetworkInterfaceAttribute") != 1 ||
					r.Calls("ReplaceRoute")+r.Calls("DeleteRoute") > 0 {
					t.Errorf("where nothing changes, there were changes; CreateRoute was called %d times", calls)
				}
			})
		})
	}
}

// TestOthers: what others do to the routes is put right, and what is theirs is
// left alone.
func TestOthers(t *testing.T) {
	r := newRegion(t)
	other := r.Launch("subnet-1", netip.MustParseAddr("198.18.0.2"))
	old, foreign := r.Launch("subnet-1"), r.Launch("subnet-1")
	for _, route := range []Route{
		route("10.5.1.0/24", old), // this node's, from before its instance was replaced
		route("10.5.2.0/24", other),
		route("10.5.3.0/24", old),     // of a node that is gone
		route("10.5.4.0/24", old),     // of one that will be back
		route("10.5.5.0/24", r.eni),   // of an earlier lease
		route("10.5.6.0/24", r.eni),   // of an earlier one, that another node has by now
		route("10.5.0.0/16", old),     // not a subnet's
		route("10.5.8.0/24", foreign), // of a node that we do not know
		route("10.6.0.0/24", old),     // not in the network
		route("0.0.0.0/0", "igw-1"),
		{Dst: netip.MustParsePrefix("10.5.9.0/24"), Target: "vgw-1", Gone: true, Origin: "EnableVgwRoutePropagation"},
		{Dst: netip.MustParsePrefix("10.5.10.0/24"), Target: "igw-1", Gone: true, Origin: "CreateRoute"},
	} {
		r.Put(r.Main(), route)
	}
	r.Terminate(old)
	kept := []string{
		"0.0.0.0/0 igw-1", "10.5.0.0/16 " + old + " blackhole", "10.5.1.0/24 " + r.eni, "10.5.2.0/24 " + other,
		"10.5.4.0/24 " + old + " blackhole", "10.5.6.0/24 " + r.eni, "10.5.8.0/24 " + foreign,
		"10.5.10.0/24 igw-1 blackhole", "10.6.0.0/24 " + old + " blackhole",
	}
	synctest.Test(t, func(t *testing.T) {
		n := work(t, plain, "10.5.1.0-24")
		pass(2 * time.Second)
		if calls := r.Calls("DeleteRoute"); calls > 0 {
			t.Errorf("not knowing its peers, the node has called DeleteRoute %d times", calls)
		}
		n.know("10.5.1.0-24", "10.5.2.0-24", "10.5.4.0-24", "10.5.6.0-24")
		pass(2 * time.Second)
		r.expectRoutes(t, r.Main(), kept...)

		// In between, others do not rest.
		r.Remove(r.Main(), netip.MustParsePrefix("10.5.1.0/24"))
		pass(90 * time.Second)
		r.expectRoutes(t, r.Main(), kept...)
		r.Put(r.Main(), route("10.5.1.0/24", other))
		pass(90 * time.Second)
		r.expectRoutes(t, r.Main(), kept...)

		// A lease ends whose node is gone.
		n.peers <- subnet.Update{Gone: map[subnet.Subnets]bool{parse("10.5.4.0-24"): true}}
		pass(90 * time.Second)
		r.expectRoutes(t, r.Main(), slices.Delete(slices.Clone(kept), 4, 5)...)

		// The instance gets another interface, with the same address.
		before := r.eni
		r.eni = r.Launch("subnet-1", ipv4, ipv6)
		r.Terminate(before)
		pass(90 * time.Second)
		if !slices.Contains(r.Routes(r.Main()), "10.5.1.0/24 "+r.eni) || r.Checked(r.eni) {
			t.Errorf("with the interface %s, whose check is on: %v, there is\n%s", r.eni, r.Checked(r.eni),
				strings.Join(r.Routes(r.Main()), "\n"))
		}
	})
}

// TestRaces: another node is faster, each time.
func TestRaces(t *testing.T) {
	r := newRegion(t)
	other := r.Launch("subnet-1", netip.MustParseAddr("198.18.0.2"))
	old := r.Launch("subnet-1")
	r.Put(r.Main(), route("10.5.3.0/24", old))
	r.Terminate(old)
	raced := map[string]bool{}
	r.Before(func(action string) {
		if raced[action] {
			return
		}
		raced[action] = true
		switch action {
		case "CreateRoute":
			r.Put(r.Main(), route("10.5.1.0/24", other))
		case "ReplaceRoute":
			r.Remove(r.Main(), netip.MustParsePrefix("10.5.1.0/24"))
		case "DeleteRoute":
			r.Remove(r.Main(), netip.MustParsePrefix("10.5.3.0/24"))
		}
	})
	synctest.Test(t, func(t *testing.T) {
		n := work(t, plain, "10.5.1.0-24")
		n.know("10.5.1.0-24")
		pass(20 * time.Second)
		r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.eni)
		if len(raced) < 4 {
			t.Errorf("there were races for %v alone", raced)
		}
		r.log.expect(t, `I "Found the network interface" interface="`+r.eni+`" subnet="subnet-1" vpc="`+VPC+`"`,
			"I aws ec2 create-route --route-table-id "+r.Main()+" --destination-cidr-block 10.5.1.0/24 --network-interface-id "+r.eni)
	})
}

// TestTroubles: each is said once, with its remedy, is over by itself when its
// cause is, and that is said once, too.
func TestTroubles(t *testing.T) {
	for _, test := range []struct {
		name           string
		action, fault  string
		duty, complain string // what is said
	}{
		{"no permission", "CreateRoute", "UnauthorizedOperation", "Route table %s",
			"the IAM policy of this node's role lacks ec2:CreateRoute: add it (backend/awsvpc/README.md has the whole policy); EC2 says: You are not authorized to perform this operation."},
		{"no permission to read", "DescribeRouteTables", "UnauthorizedOperation", "Route tables",
			"the IAM policy of this node's role lacks ec2:DescribeRouteTables: …"},
		{"the API away", "DescribeRouteTables", Reset, "Route tables",
			"EC2's API in eu-test-1 does not answer DescribeRouteTables (EOF): can this node reach it, through a NAT gateway or a VPC endpoint for EC2?"},
		{"the API broken", "DescribeRouteTables", "InternalError", "Route tables",
			"DescribeRouteTables fails: EC2 says: InternalError: An internal error has occurred"},
		{"bad credentials", "DescribeRouteTables", "AuthFailure", "Route tables",
			"EC2 refuses this node's credentials for DescribeRouteTables (AuthFailure): check …"},
		{"the table gone", "CreateRoute", "InvalidRouteTableID.NotFound", "Route table %s",
			"there is no such route table in eu-test-1 (InvalidRouteTableID): …"},
		{"the table full", "CreateRoute", "RouteLimitExceeded", "Route table %s",
			`the table is full, this node's pods cannot be reached through it: raise the quota "Routes per route table" (1000 at most), aws service-quotas …`},
		{"no metadata", "metadata", Reset, "AWS", "the instance metadata service does not answer (EOF): …--http-put-response-hop-limit 2 --instance-id …"},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRegion(t)
			duty := test.duty
			if strings.Contains(duty, "%s") {
				duty = fmt.Sprintf(duty, r.Main())
			}
			r.Fail(test.action, test.fault)
			synctest.Test(t, func(t *testing.T) {
				work(t, plain, "10.5.1.0-24").know("10.5.1.0-24")
				pass(time.Hour)
				var said []string
				for _, line := range r.log.lines() {
					if line[0] != 'I' {
						said = append(said, line)
					}
				}
				from, to, open := strings.Cut("E "+duty+": "+test.complain, "…")
				if len(said) != 1 || !strings.HasPrefix(said[0], from) || open && !strings.HasSuffix(said[0], to) || !open &&
					said[0] != from {
					t.Errorf("it says\n%s\nwant\nE %s: %s", strings.Join(said, "\n"), duty, test.complain)
				}
				r.Fail(test.action, "")
				pass(80 * time.Second)
				r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.eni)
				if n := r.count(duty + ": recovered"); n != 1 {
					t.Errorf("that it is over is said %d times", n)
				}
				// Some six requests a minute; the pauses, and the SDK's own retries, are random.
				if n := r.Calls(test.action); n > 500 {
					t.Errorf("in an hour, it was tried %d times", n)
				}
			})
		})
	}
}

// TestThrottling: whatever is throttled is said once. The clock is the real one:
// the SDK counts the nanoseconds until it may ask again.
func TestThrottling(t *testing.T) {
	r := newRegion(t)
	r.Fail("*", "RequestLimitExceeded")
	n := work(t, plain, "10.5.1.0-24")
	n.know("10.5.1.0-24")
	throttled := []string{"Source/destination check: EC2 throttles ModifyNetworkInterfaceAttribute",
		"Route tables: EC2 throttles DescribeRouteTables"}
	eventually(t, "two looks that fail", func() bool {
		return r.Calls("DescribeRouteTables") > 5 &&
			r.count(throttled[1]) > 0
	})
	r.Fail("*", "")
	eventually(t, "the route", func() bool { return slices.Equal(r.Routes(r.Main()), []string{"10.5.1.0/24 " + r.eni}) })
	n.stop()
	for _, text := range throttled {
		if n := r.count(text + " (RequestLimitExceeded): it is tried again, less and less often"); n != 1 {
			t.Errorf("%s is said %d times", text, n)
		}
	}
}

// count returns how many lines of the log have a text.
func (r *region) count(text string) int {
	count := 0
	for _, line := range r.log.lines() {
		if strings.Contains(line, text) {
			count++
		}
	}
	return count
}

// eventually waits, by the real clock.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited a minute for %s", what)
		}
	}
}

// TestOutage: an hour without the API, or anything else; what happened meanwhile
// is caught up with.
func TestOutage(t *testing.T) {
	r := newRegion(t)
	other, gone := r.Launch("subnet-1", netip.MustParseAddr("198.18.0.2")), r.Launch("subnet-1")
	r.Put(r.Main(), route("10.5.2.0/24", other))
	r.Put(r.Main(), route("10.5.3.0/24", gone))
	synctest.Test(t, func(t *testing.T) {
		n := work(t, `{`+networks+`, "Backend": {"Type": "aws-vpc"}}`, dual)
		n.know(dual, "10.5.2.0-24", "10.5.3.0-24")
		pass(10 * time.Second)
		r.log.expect(t, `I "Found the network interface" interface="`+r.eni+`"…`, "I aws ec2 create-route … "+r.eni,
			"I aws ec2 create-route …--destination-ipv6-cidr-block fd05:0:0:1::/64 --network-interface-id "+r.eni)
		r.Fail("*", Reset)
		r.Fail("metadata", Reset)
		pass(30 * time.Minute)
		r.Terminate(gone)
		n.know(dual, "10.5.2.0-24")
		r.Put(r.Main(), route("10.5.1.0/24", other))
		r.Remove(r.Main(), netip.MustParsePrefix("fd05:0:0:1::/64"))
		pass(30 * time.Minute)
		r.log.expect(t, "E Network interface: the instance metadata service does not answer (EOF): …",
			"E Route tables: EC2's API in eu-test-1 does not answer …")
		r.Fail("metadata", "")
		pass(3 * time.Minute)
		r.log.expect(t, "I Network interface: recovered")
		r.Fail("*", "")
		pass(80 * time.Second)
		r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.eni, "10.5.2.0/24 "+other, "fd05:0:0:1::/64 "+r.eni)
		r.log.expect(t, "I Route tables: recovered",
			"I aws ec2 delete-route --route-table-id "+r.Main()+" --destination-cidr-block 10.5.3.0/24",
			"I aws ec2 replace-route …", "I aws ec2 create-route …")
	})
}

// TestForeignInterface: the uplink is none of the instance's interfaces.
func TestForeignInterface(t *testing.T) {
	r := newRegion(t)
	r.Terminate(r.eni)
	r.Local = netip.MustParseAddr("198.18.0.9")
	r.Launch("subnet-1", r.Local)
	synctest.Test(t, func(t *testing.T) {
		work(t, plain, "10.5.1.0-24")
		pass(time.Hour)
		r.log.expect(t, "E Network interface: no network interface of this instance has the address of the uplink eth0 198.18.0.1, fd18::1, mtu 9001; they have 198.18.0.9: …")
	})
}

// TestNotPermittedToForward: that is a warning, no more.
func TestNotPermittedToForward(t *testing.T) {
	r := newRegion(t)
	r.Fail("ModifyNetworkInterfaceAttribute", "UnauthorizedOperation")
	synctest.Test(t, func(t *testing.T) {
		work(t, plain, "10.5.1.0-24")
		pass(time.Hour)
		r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.eni)
		r.log.expect(t, `I "Found the network interface" …`,
			`E "Cannot turn the source/destination check off, which must be off" err="the IAM policy of this node's role lacks ec2:ModifyNetworkInterfaceAttribute: …" fix="aws ec2 modify-network-interface-attribute --no-source-dest-check --network-interface-id `+r.eni+`"`,
			"I aws ec2 create-route …")
	})
}

// TestMissingTable: one of two is not there, the other is kept.
func TestMissingTable(t *testing.T) {
	r := newRegion(t)
	synctest.Test(t, func(t *testing.T) {
		work(t, `{"Network": "10.5.0.0/16", "Backend": {"Type": "aws-vpc", "RouteTableID": ["rtb-00000000000000bad", "`+r.Main()+`"]}}`, "10.5.1.0-24")
		pass(time.Hour)
		r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.eni)
		var said []string
		for _, line := range r.log.lines() {
			if line[0] == 'E' {
				said = append(said, line)
			}
		}
		if len(said) != 1 || !strings.HasPrefix(said[0], "E Route table rtb-00000000000000bad: there is no such route table in eu-test-1 (InvalidRouteTableID): correct RouteTableID") {
			t.Errorf("it says\n%s", strings.Join(said, "\n"))
		}
	})
}

// TestFull: there is room once a blackhole is removed, and not before.
func TestFull(t *testing.T) {
	r := newRegion(t)
	r.SetQuota(2)
	other, gone := r.Launch("subnet-1", netip.MustParseAddr("198.18.0.2")), r.Launch("subnet-1")
	r.Put(r.Main(), route("10.5.2.0/24", other))
	r.Put(r.Main(), route("10.5.3.0/24", gone))
	synctest.Test(t, func(t *testing.T) {
		n := work(t, plain, "10.5.1.0-24")
		n.know("10.5.1.0-24", "10.5.2.0-24", "10.5.3.0-24")
		pass(time.Hour)
		r.expectRoutes(t, r.Main(), "10.5.2.0/24 "+other, "10.5.3.0/24 "+gone)
		r.Terminate(gone)
		n.know("10.5.1.0-24", "10.5.2.0-24")
		pass(80 * time.Second)
		r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.eni, "10.5.2.0/24 "+other)
	})
}

// TestStop: the end does not wait for an answer, and that there was none is no
// trouble to speak of.
func TestStop(t *testing.T) {
	r := newRegion(t)
	r.Fail("DescribeRouteTables", Hang)
	cfg, err := subnet.ParseConfig([]byte(plain))
	if err != nil {
		t.Fatal(err)
	}
	b, err := backend.New(cfg, iface.Uplink{Name: "eth0", MTU: 9001, IPv4: ipv4})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- b.(backend.Worker).Work(ctx, subnet.Lease{Subnets: parse("10.5.1.0-24")}, nil) }()
	eventually(t, "the call", func() bool { return r.Calls("DescribeRouteTables") > 0 })
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Work returned %v", err)
	}
	r.log.expect(t, `I "Found the network interface" …`)
}
