package cloud

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

func init() {
	var flags flag.FlagSet
	klog.InitFlags(&flags)
	flags.Set("stderrthreshold", "FATAL")
}

// A provider is what the tests must know of a cloud.
type provider struct {
	backend string // its type
	new     func() (*State, http.Handler)
	env     func(url, nothing string) map[string]string // nothing is a file that is not there
	clear   string                                      // prefix of variables that must not be set

	ipv4Only bool              // routes to instances are IPv4 only
	tables   bool              // RouteTableID chooses the tables; "%s" in a text is the table's ID
	command  map[Action]string // how the commands begin that are logged
	mine     string            // what is wrong where no interface has the uplink's address
	silent   [2]string         // what is wrong where the metadata service, and the API, do not answer
	fix      string            // "%s" is the next hop: the command that allows forwarding; "": AllowForwarding asks nothing
	cannot   string            // why forwarding cannot be allowed
	noTable  string            // what is wrong with a table that is not there
	badID    string            // the ID of such a table
	trouble  []trouble
}

// A trouble is a fault, and what is logged: an operation and an error. "…" stands for anything.
type trouble struct {
	name             string
	action           Action
	fault            Fault
	operation, error string
}

var providers = []provider{aws, gceProvider, ali, tencent}

// eachProvider runs a test for each cloud.
func eachProvider(t *testing.T, f func(*testing.T, *region)) {
	for _, p := range providers {
		t.Run(p.backend, func(t *testing.T) { f(t, newRegion(t, p)) })
	}
}

// A region is a cloud, with the environment of its clients, and the instance that the test is on.
type region struct {
	*State
	provider
	hop string // of the instance
	log log
}

func newRegion(t *testing.T, p provider) *region {
	r := &region{provider: p}
	var handler http.Handler
	r.State, handler = p.new()
	r.Local = ipv4
	r.hop = r.Launch("subnet-1", ipv4, ipv6)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		w.Header()["Date"] = nil // an SDK would set the simulated clock right
		handler.ServeHTTP(w, q)
	}))
	// A connection that is kept would keep the clock from running, as would one that is never used, because its request
	// was cancelled.
	server.Config.SetKeepAlivesEnabled(false)
	server.Config.ReadHeaderTimeout = time.Second
	server.Start()
	t.Cleanup(server.Close)
	for key := range strings.FieldsSeq(strings.Join(os.Environ(), "\n")) {
		if key, _, _ = strings.Cut(key, "="); strings.HasPrefix(key, p.clear) {
			t.Setenv(key, "")
		}
	}
	for key, value := range p.env(server.URL, filepath.Join(t.TempDir(), "nothing")) {
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

// config returns a configuration with one network and some keys of the backend, which begin with a comma.
func (r *region) config(keys string) string {
	return fmt.Sprintf(`{"Network": "10.5.0.0/16", "Backend": {"Type": %q%s}}`, r.backend, keys)
}

// dualConfig returns a configuration with networks of all families that the cloud routes.
func (r *region) dualConfig(keys string) string {
	if r.ipv4Only {
		return r.config(keys)
	}
	return fmt.Sprintf(`{"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "fd05::/48",
		"Backend": {"Type": %q%s}}`, r.backend, keys)
}

// dual returns the key of a lease with a subnet of each family that the cloud routes.
func (r *region) dual() string {
	if r.ipv4Only {
		return mine
	}
	return "10.5.1.0-24&fd05:0:0:1::-64"
}

// saidEach returns the line of a log that tells of a step, once for each family that the cloud routes.
func (r *region) saidEach(a Action) []string {
	return slices.Repeat([]string{r.said(a, "")}, len(parse(r.dual()).Each()))
}

// said returns the line of a log that tells of a step.
func (r *region) said(a Action, rest string) string { return "I " + r.command[a] + "…" + rest }

const found = `I "Found this node in the cloud" …`

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
	return strings.HasPrefix(line, "E This node in the cloud: the instance metadata service does not answer (http response error StatusCode: 401,")
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
		matches = matches && match(got[i], want[i])
	}
	if !matches {
		t.Errorf("the log has\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// match reports whether a text is the wanted one, in which each "…" stands for anything.
func match(text, want string) bool {
	parts := strings.Split(want, "…")
	for i, part := range parts {
		parts[i] = regexp.QuoteMeta(part)
	}
	return regexp.MustCompile("^(?s:" + strings.Join(parts, ".*") + ")$").MatchString(text)
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
	b := newBackend(t, config)
	n := &node{t: t, peers: make(chan subnet.Update, 1), done: make(chan error, 1)}
	var ctx context.Context
	ctx, n.cancel = context.WithCancel(t.Context())
	go func() {
		n.done <- b.(backend.Worker).Work(ctx, subnet.Lease{Subnets: parse(key)}, n.peers)
	}()
	t.Cleanup(n.stop)
	return n
}

// newBackend makes the backend of a configuration.
func newBackend(t *testing.T, config string) backend.Backend {
	t.Helper()
	cfg, err := subnet.ParseConfig([]byte(config))
	if err != nil {
		t.Fatal(err)
	}
	b, err := backend.New(cfg, iface.Uplink{
		IPv4: iface.Link{Name: "eth0", Index: 2, MTU: 9001, Addr: ipv4, PublicIP: ipv4},
		IPv6: iface.Link{Name: "eth0", Index: 2, MTU: 9001, Addr: ipv6, PublicIP: ipv6},
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
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
		u.Put(&subnet.Lease{Subnets: parse(key)})
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
	if r.ipv4Only {
		want = slices.DeleteFunc(want, func(route string) bool { return strings.HasPrefix(route, "fd05:") })
	}
	if got := r.Routes(table); !slices.Equal(got, want) {
		t.Errorf("%s has\n\t%s\nwant\n\t%s", table, strings.Join(got, "\n\t"), strings.Join(want, "\n\t"))
	}
}

func route(dst, target string) Route {
	return Route{Dst: netip.MustParsePrefix(dst), Target: target}
}

const mine = "10.5.1.0-24"

// TestStart: the routes are made, and nothing is changed from then on, nor by a daemon that starts again.
func TestStart(t *testing.T) {
	eachProvider(t, func(t *testing.T, r *region) {
		unused := ""
		if r.provider.tables {
			unused = r.AddTable("subnet-2")
		}
		synctest.Test(t, func(t *testing.T) {
			n := work(t, r.dualConfig(""), r.dual())
			pass(20 * time.Second)
			n.know(r.dual())
			r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop, "fd05:0:0:1::/64 "+r.hop)
			if unused != "" {
				r.expectRoutes(t, unused)
			}
			if r.fix != "" && !r.Forwards(r.hop) {
				t.Error("packets of pods are not forwarded")
			}
			first := r.Calls(Read)
			pass(5 * time.Minute)
			n.stop()
			if n := r.Calls(Read) - first; n < 4 || n > 7*first {
				t.Errorf("at first, there are %d calls to read the routes, and %d in the next 5 minutes", first, n)
			}
			pass(time.Minute)
			n = work(t, r.dualConfig(""), r.dual())
			n.know(r.dual())
			pass(5 * time.Minute)
			if r.Calls(Create) != len(r.saidEach(Create)) || r.Calls(Replace)+r.Calls(Delete) > 0 {
				t.Errorf("the routes took %d calls to create, %d to replace, %d to delete", r.Calls(Create), r.Calls(Replace),
					r.Calls(Delete))
			}
			r.log.expect(t, slices.Concat([]string{found}, r.saidEach(Create), []string{found})...)
		})
	})
}

// TestManyNodes: a thousand nodes do not read the routes more often than the cloud takes.
func TestManyNodes(t *testing.T) {
	eachProvider(t, func(t *testing.T, r *region) {
		synctest.Test(t, func(t *testing.T) {
			n := work(t, r.config(""), mine)
			u := subnet.Update{Snapshot: true}
			for i := range 5000 {
				u.Put(&subnet.Lease{Subnets: parse(fmt.Sprintf("10.%d.%d.0-24", 6+i/256, i%256))})
			}
			n.peers <- u
			pass(2 * time.Minute)
			before := r.Calls(Read)
			pass(8 * time.Hour)
			if n := r.Calls(Read) - before; n > 8*60 {
				t.Errorf("in 8 hours, each of 5000 nodes reads the routes %d times", n)
			}
		})
	})
}

// TestOthers: what others do to the routes is put right, and what is theirs is left alone.
func TestOthers(t *testing.T) {
	eachProvider(t, func(t *testing.T, r *region) {
		other := r.Launch("subnet-1", netip.MustParseAddr("198.18.0.2"))
		old, foreign := r.Launch("subnet-1", netip.MustParseAddr("198.18.0.3")), r.Launch("subnet-1", netip.MustParseAddr("198.18.0.4"))
		for _, route := range []Route{
			route("10.5.1.0/24", old), // this node's, from before its instance was replaced
			route("10.5.2.0/24", other),
			route("10.5.3.0/24", old),     // of a node that is gone
			route("10.5.4.0/24", old),     // of one that will be back
			route("10.5.5.0/24", r.hop),   // of an earlier lease
			route("10.5.6.0/24", r.hop),   // of an earlier one, that another node has by now
			route("10.5.0.0/16", old),     // not a subnet's
			route("10.5.8.0/24", foreign), // of a node that we do not know
			route("10.6.0.0/24", old),     // not in the network
			route("0.0.0.0/0", "igw-1"),
			{Dst: netip.MustParsePrefix("10.5.9.0/24"), Target: "vgw-1", Gone: true, Foreign: true},
			{Dst: netip.MustParsePrefix("10.5.10.0/24"), Target: "igw-1", Gone: true},
		} {
			r.Put(r.Main(), route)
		}
		r.Terminate(old)
		kept := []string{
			"0.0.0.0/0 igw-1", "10.5.0.0/16 " + old + " blackhole", "10.5.1.0/24 " + r.hop, "10.5.2.0/24 " + other,
			"10.5.4.0/24 " + old + " blackhole", "10.5.6.0/24 " + r.hop, "10.5.8.0/24 " + foreign,
			"10.5.10.0/24 igw-1 blackhole", "10.6.0.0/24 " + old + " blackhole",
		}
		synctest.Test(t, func(t *testing.T) {
			n := work(t, r.config(""), mine)
			pass(20 * time.Second)
			for _, dst := range []string{"10.5.3.0/24", "10.5.4.0/24", "10.5.5.0/24", "10.5.6.0/24"} {
				if !slices.ContainsFunc(r.Routes(r.Main()), func(route string) bool { return strings.HasPrefix(route, dst) }) {
					t.Errorf("not knowing its peers, the node has deleted the route to %s", dst)
				}
			}
			n.know(mine, "10.5.2.0-24", "10.5.4.0-24", "10.5.6.0-24")
			pass(20 * time.Second)
			r.expectRoutes(t, r.Main(), kept...)

			// In between, others do not rest.
			r.Remove(r.Main(), netip.MustParsePrefix("10.5.1.0/24"))
			pass(100 * time.Second)
			r.expectRoutes(t, r.Main(), kept...)
			r.Put(r.Main(), route("10.5.1.0/24", other))
			pass(100 * time.Second)
			r.expectRoutes(t, r.Main(), kept...)

			// A lease ends whose node is gone.
			n.peers <- subnet.Update{Gone: map[subnet.Subnets]bool{parse("10.5.4.0-24"): true}}
			pass(100 * time.Second)
			kept = slices.Delete(slices.Clone(kept), 4, 5)
			r.expectRoutes(t, r.Main(), kept...)

			// The instance is replaced by another one, with the same address.
			before := r.hop
			r.hop = r.Launch("subnet-1", ipv4, ipv6)
			r.Terminate(before)
			pass(150 * time.Second)
			if !slices.Contains(r.Routes(r.Main()), "10.5.1.0/24 "+r.hop) || r.fix != "" && !r.Forwards(r.hop) {
				t.Errorf("with the next hop %s, which forwards: %v, there is\n%s", r.hop, r.Forwards(r.hop),
					strings.Join(r.Routes(r.Main()), "\n"))
			}
		})
	})
}

// TestRaces: another node is faster, each time.
func TestRaces(t *testing.T) {
	eachProvider(t, func(t *testing.T, r *region) {
		other := r.Launch("subnet-1", netip.MustParseAddr("198.18.0.2"))
		old := r.Launch("subnet-1", netip.MustParseAddr("198.18.0.3"))
		r.Put(r.Main(), route("10.5.1.0/24", other))
		r.Put(r.Main(), route("10.5.3.0/24", old))
		r.Terminate(old)
		raced := map[Action]bool{}
		r.Before(func(a Action) {
			if raced[a] {
				return
			}
			raced[a] = true
			switch a {
			case Create:
				r.Put(r.Main(), route("10.5.1.0/24", other))
			case Replace:
				r.Remove(r.Main(), netip.MustParsePrefix("10.5.1.0/24"))
			case Delete:
				r.Remove(r.Main(), netip.MustParsePrefix("10.5.3.0/24"))
			}
		})
		synctest.Test(t, func(t *testing.T) {
			n := work(t, r.config(""), mine)
			n.know(mine)
			pass(2 * time.Minute)
			r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop)
			for a := range r.command {
				if !raced[a] {
					t.Errorf("there was no race to %s", a)
				}
			}
			for _, line := range r.log.lines() {
				if line[0] != 'I' {
					t.Errorf("a race is logged as %s", line)
				}
			}
		})
	})
}

// TestTroubles: each is logged once, with its remedy, is over by itself when its cause is, and that is logged once, too.
func TestTroubles(t *testing.T) {
	eachProvider(t, func(t *testing.T, r *region) {
		for _, trouble := range r.trouble {
			t.Run(trouble.name, func(t *testing.T) { newRegion(t, r.provider).endure(t, trouble) })
		}
	})
}

// endure has a trouble last for an hour.
func (r *region) endure(t *testing.T, trouble trouble) {
	operation := strings.ReplaceAll(trouble.operation, "%s", r.Main())
	r.Fail(trouble.action, trouble.fault)
	synctest.Test(t, func(t *testing.T) {
		work(t, r.config(""), mine).know(mine)
		pass(time.Hour)
		want := "E " + operation + ": " + trouble.error
		if said := r.errors(); len(said) != 1 || !match(said[0], want) {
			t.Errorf("it says\n%s\nwant\n%s", strings.Join(said, "\n"), want)
		}
		r.Fail(trouble.action, "")
		pass(80 * time.Second)
		r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop)
		if n := r.count(operation + ": recovered"); n != 1 {
			t.Errorf("that it is over is said %d times", n)
		}
		// Some six requests a minute; the pauses, and the SDK's own retries, are random.
		if n := r.Calls(trouble.action); n > 500 {
			t.Errorf("in an hour, it was tried %d times", n)
		}
	})
}

// errors returns the lines that tell of errors.
func (r *region) errors() []string {
	return slices.DeleteFunc(r.log.lines(), func(line string) bool { return line[0] == 'I' })
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

// TestOutage: an hour without the API, or anything else; what happened meanwhile is caught up with.
func TestOutage(t *testing.T) {
	eachProvider(t, func(t *testing.T, r *region) {
		other := r.Launch("subnet-1", netip.MustParseAddr("198.18.0.2"))
		gone := r.Launch("subnet-1", netip.MustParseAddr("198.18.0.3"))
		r.Put(r.Main(), route("10.5.2.0/24", other))
		r.Put(r.Main(), route("10.5.3.0/24", gone))
		synctest.Test(t, func(t *testing.T) {
			n := work(t, r.dualConfig(""), r.dual())
			n.know(r.dual(), "10.5.2.0-24", "10.5.3.0-24")
			pass(20 * time.Second)
			r.log.expect(t, slices.Concat([]string{found}, r.saidEach(Create))...)
			r.Fail(All, Reset)
			r.Fail(Metadata, Reset)
			pass(30 * time.Minute)
			r.Terminate(gone)
			n.know(r.dual(), "10.5.2.0-24")
			r.Put(r.Main(), route("10.5.1.0/24", other))
			r.Remove(r.Main(), netip.MustParsePrefix("fd05:0:0:1::/64"))
			pass(30 * time.Minute)
			r.log.expect(t, "E This node in the cloud: "+r.silent[0], "E Route tables: "+r.silent[1])
			r.Fail(Metadata, "")
			pass(3 * time.Minute)
			r.log.expect(t, "I This node in the cloud: recovered")
			r.Fail(All, "")
			pass(100 * time.Second)
			r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop, "10.5.2.0/24 "+other, "fd05:0:0:1::/64 "+r.hop)
			if said := r.errors(); len(said) > 0 || r.count("Route tables: recovered") != 1 {
				t.Errorf("afterwards, it says\n%s", strings.Join(r.log.lines(), "\n"))
			}
		})
	})
}

// TestForeignInterface: the uplink is none of the instance's interfaces.
func TestForeignInterface(t *testing.T) {
	eachProvider(t, func(t *testing.T, r *region) {
		r.Terminate(r.hop)
		r.Local = netip.MustParseAddr("198.18.0.9")
		r.Launch("subnet-1", r.Local)
		synctest.Test(t, func(t *testing.T) {
			work(t, r.config(""), mine)
			pass(time.Hour)
			r.log.expect(t, "E This node in the cloud: "+r.mine)
		})
	})
}

// TestNotPermittedToForward: that is logged once, and routes are made.
func TestNotPermittedToForward(t *testing.T) {
	eachProvider(t, func(t *testing.T, r *region) {
		if r.fix == "" {
			t.Skip("forwarding is allowed to all instances of this cloud")
		}
		r.Fail(Forward, NotPermitted)
		synctest.Test(t, func(t *testing.T) {
			work(t, r.config(""), mine)
			pass(time.Hour)
			r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop)
			r.log.expect(t, found, `E "Cannot make the cloud accept packets of pods, which it must" err="`+r.cannot+
				`…" fix="`+fmt.Sprintf(r.fix, r.hop)+`"`, r.said(Create, ""))
		})
	})
}

// TestMissingTable: one of two is not there, the other is kept.
func TestMissingTable(t *testing.T) {
	eachProvider(t, func(t *testing.T, r *region) {
		if !r.provider.tables {
			t.Skip("this cloud has no route tables to choose from")
		}
		synctest.Test(t, func(t *testing.T) {
			work(t, r.config(fmt.Sprintf(`, "RouteTableID": [%q, %q]`, r.badID, r.Main())), mine)
			pass(time.Hour)
			r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop)
			if said := r.errors(); len(said) != 1 || !match(said[0], "E Route table "+r.badID+": "+r.noTable) {
				t.Errorf("it says\n%s", strings.Join(said, "\n"))
			}
		})
	})
}

// TestFull: there is room once a blackhole is removed, and not before.
func TestFull(t *testing.T) {
	eachProvider(t, func(t *testing.T, r *region) {
		r.SetQuota(2)
		other := r.Launch("subnet-1", netip.MustParseAddr("198.18.0.2"))
		gone := r.Launch("subnet-1", netip.MustParseAddr("198.18.0.3"))
		r.Put(r.Main(), route("10.5.2.0/24", other))
		r.Put(r.Main(), route("10.5.3.0/24", gone))
		synctest.Test(t, func(t *testing.T) {
			n := work(t, r.config(""), mine)
			n.know(mine, "10.5.2.0-24", "10.5.3.0-24")
			pass(time.Hour)
			r.expectRoutes(t, r.Main(), "10.5.2.0/24 "+other, "10.5.3.0/24 "+gone)
			r.Terminate(gone)
			n.know(mine, "10.5.2.0-24")
			pass(100 * time.Second)
			r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+r.hop, "10.5.2.0/24 "+other)
		})
	})
}

// TestDiff: what flannelctl diff shows changes nothing.
func TestDiff(t *testing.T) {
	eachProvider(t, func(t *testing.T, r *region) {
		other := r.Launch("subnet-1", netip.MustParseAddr("198.18.0.2"))
		r.Put(r.Main(), route("10.5.1.0/24", other))
		r.Put(r.Main(), route("10.5.5.0/24", r.hop)) // of an earlier lease; other nodes delete these
		b := newBackend(t, r.dualConfig("")).(backend.Differ)
		commands, err := b.Diff(t.Context(), subnet.Lease{Subnets: parse(r.dual())}, nil)
		if err != nil || len(commands) < len(r.saidEach(Create)) {
			t.Fatalf("the node's routes are wrong: %q, %v", commands, err)
		}
		r.expectRoutes(t, r.Main(), "10.5.1.0/24 "+other, "10.5.5.0/24 "+r.hop)
	})
}

// TestStop: the end does not wait for an answer, and that there was none is not logged.
func TestStop(t *testing.T) {
	eachProvider(t, func(t *testing.T, r *region) {
		r.Fail(Read, Hang)
		b := newBackend(t, r.config("")).(backend.Worker)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- b.Work(ctx, subnet.Lease{Subnets: parse(mine)}, nil) }()
		eventually(t, "the call", func() bool { return r.Calls(Read) > 0 })
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Work returned %v", err)
		}
		r.log.expect(t, found)
	})
}
