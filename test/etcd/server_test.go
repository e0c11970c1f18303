package etcd_test

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/subnet/etcd"
)

// patience bounds every wait: it is for a busy machine, not a measure.
const patience = 60 * time.Second

// log is what the managers of all tests log.
var log = &journal{grown: make(chan struct{})}

func TestMain(m *testing.M) {
	flags := flag.NewFlagSet("", flag.PanicOnError)
	klog.InitFlags(flags)
	flags.Parse([]string{"-logtostderr=false", "-stderrthreshold=FATAL", "-one_output=true"})
	klog.SetOutput(log)
	flag.Parse()
	if flag.Lookup("test.parallel").Value.String() == strconv.Itoa(runtime.GOMAXPROCS(0)) {
		flag.Set("test.parallel", "12") // most of the tests wait for most of the time
	}
	net.DefaultResolver = names.resolver()
	code := m.Run()
	if shared.server != nil {
		shared.server.stop()
		shared.relay.close()
		os.RemoveAll(shared.dir)
	}
	if code == 0 {
		code = leaked()
	}
	os.Exit(code)
}

// leaked fails when a goroutine of a manager outlived it.
func leaked() int {
	deadline := time.Now().Add(patience)
	for {
		stacks := make([]byte, 1<<22)
		stacks = stacks[:runtime.Stack(stacks, true)]
		if !bytes.Contains(stacks, []byte("flanneld/subnet/etcd.")) {
			return 0
		}
		if time.Now().After(deadline) {
			fmt.Printf("goroutines outlived their manager:\n%s\n", stacks)
			return 1
		}
		runtime.Gosched()
	}
}

// A journal collects log lines, and can be waited upon.
type journal struct {
	mu    sync.Mutex
	text  strings.Builder
	grown chan struct{} // closed, and replaced, when lines were added
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.text.Write(p)
	close(j.grown)
	j.grown = make(chan struct{})
	return len(p), nil
}

// lines returns the lines that contain all parts.
func (j *journal) lines(parts ...string) (found []string, grown <-chan struct{}) {
	j.mu.Lock()
	defer j.mu.Unlock()
line:
	for line := range strings.Lines(j.text.String()) {
		for _, part := range parts {
			if !strings.Contains(line, part) {
				continue line
			}
		}
		found = append(found, strings.TrimSuffix(line, "\n"))
	}
	return found, j.grown
}

// await waits until a line that contains all parts has been logged n times.
func (j *journal) await(t *testing.T, n int, parts ...string) []string {
	t.Helper()
	timeout := time.After(patience)
	for {
		found, grown := j.lines(parts...)
		if len(found) >= n {
			return found
		}
		select {
		case <-grown:
		case <-timeout:
			t.Fatalf("not logged %d times: %q; log:\n%s", n, parts, j.text.String())
		}
	}
}

// A server is an etcd in this process.
type server struct {
	dir     string
	options func(*embed.Config) // for TLS
	etcd    *embed.Etcd
}

func (s *server) start() error {
	cfg := embed.NewConfig()
	cfg.Dir = s.dir
	any := url.URL{Scheme: "http", Host: "127.0.0.1:0"}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{any}, []url.URL{any}
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{any}, []url.URL{any}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	cfg.TickMs, cfg.ElectionMs = 10, 100
	cfg.UnsafeNoFsync = true
	cfg.BcryptCost = 4 // the least: a password takes long to check otherwise
	if s.options != nil {
		s.options(cfg)
	}
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return err
	}
	select {
	case <-e.Server.ReadyNotify():
	case err := <-e.Err():
		e.Close()
		return err
	case <-time.After(patience):
		e.Close()
		return fmt.Errorf("etcd is not ready after %v", patience)
	}
	s.etcd = e
	return nil
}

func (s *server) stop() {
	if s.etcd != nil {
		s.etcd.Close()
		s.etcd = nil
	}
}

func (s *server) addr() string { return s.etcd.Clients[0].Addr().String() }

// A relay stands between a manager and the server: it has an address that
// survives the server's restarts, and can be cut.
type relay struct {
	listener net.Listener
	done     sync.WaitGroup

	mu     sync.Mutex
	target string // empty: cut
	open   map[net.Conn]bool
}

func newRelay(network, address string) (*relay, error) {
	l, err := net.Listen(network, address)
	if err != nil {
		return nil, err
	}
	r := &relay{listener: l, open: map[net.Conn]bool{}}
	r.done.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			r.done.Go(func() { r.serve(in) })
		}
	})
	return r, nil
}

func (r *relay) addr() string { return r.listener.Addr().String() }

func (r *relay) serve(in net.Conn) {
	defer in.Close()
	r.mu.Lock()
	if r.target == "" {
		r.mu.Unlock()
		return
	}
	out, err := net.Dial("tcp", r.target)
	if err != nil {
		r.mu.Unlock()
		return
	}
	r.open[in], r.open[out] = true, true
	r.mu.Unlock()
	r.done.Go(func() {
		io.Copy(out, in)
		out.Close()
		in.Close()
	})
	io.Copy(in, out)
	out.Close()
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.open, in)
	delete(r.open, out)
}

// point leads connections to the target; those that are open break.
func (r *relay) point(target string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.target = target
	for c := range r.open {
		c.Close()
	}
}

// divert leads new connections to the target; those that are open stay.
func (r *relay) divert(target string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.target = target
}

func (r *relay) cut() { r.point("") }

func (r *relay) close() {
	r.listener.Close()
	r.cut()
	r.done.Wait()
}

// A site is an etcd with a network configuration, of one test.
type site struct {
	t      *testing.T
	prefix string
	server *server
	relay  *relay
	client *clientv3.Client // goes to the server directly
}

var shared struct {
	once   sync.Once
	sites  atomic.Int64 // so that a repeated test does not meet its own keys
	dir    string
	server *server
	relay  *relay
	err    error
}

// newSite returns a site on the server that all tests share.
func newSite(t *testing.T) *site {
	t.Helper()
	t.Parallel()
	shared.once.Do(func() {
		if shared.dir, shared.err = os.MkdirTemp("", "subnet-etcd-"); shared.err != nil {
			return
		}
		s := &server{dir: shared.dir}
		if shared.err = s.start(); shared.err != nil {
			return
		}
		if shared.relay, shared.err = newRelay("tcp", "127.0.0.1:0"); shared.err != nil {
			return
		}
		shared.relay.point(s.addr())
		shared.server = s
	})
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	s := &site{t: t, prefix: fmt.Sprintf("/%d/%s", shared.sites.Add(1), t.Name()), server: shared.server,
		relay: shared.relay}
	s.connect()
	return s
}

// newOwnSite returns a site whose server the test may stop.
func newOwnSite(t *testing.T) *site {
	t.Helper()
	t.Parallel()
	return ownSite(t)
}

// ownSite is newOwnSite for a test that is not parallel to others.
func ownSite(t *testing.T) *site {
	t.Helper()
	s := &site{t: t, prefix: "/coreos.com/network", server: &server{dir: filepath.Join(t.TempDir(), "data")}}
	var err error
	if s.relay, err = newRelay("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.server.stop(); s.relay.close() })
	return s
}

// up starts the server and leads managers to it.
func (s *site) up() {
	s.t.Helper()
	if err := s.server.start(); err != nil {
		s.t.Fatal(err)
	}
	s.connect()
	s.relay.point(s.server.addr())
}

// down stops the server.
func (s *site) down() {
	s.t.Helper()
	s.relay.cut()
	s.client.Close()
	s.server.stop()
}

func (s *site) connect() {
	s.t.Helper()
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{s.server.addr()}, Logger: zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithUserAgent(testAgent)}})
	if err != nil {
		s.t.Fatal(err)
	}
	s.client = c
	s.t.Cleanup(func() { c.Close() })
}

func (s *site) options(identity string) etcd.Options {
	return etcd.Options{
		Endpoints:   []string{"http://" + s.relay.addr()},
		Prefix:      s.prefix,
		Identity:    identity,
		RenewMargin: time.Hour,
	}
}

// manager returns a manager for a machine, closed when the test ends.
func (s *site) manager(identity string) *etcd.Manager { return s.managerWith(s.options(identity)) }

func (s *site) managerWith(o etcd.Options) *etcd.Manager {
	s.t.Helper()
	m, err := etcd.New(s.t.Context(), o)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { m.Close() })
	return m
}

// ctx ends with the test, or when patience does.
func (s *site) ctx() context.Context {
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	s.t.Cleanup(cancel)
	return ctx
}

func (s *site) put(key, value string, options ...clientv3.OpOption) {
	s.t.Helper()
	if _, err := s.client.Put(s.ctx(), s.prefix+"/"+key, value, options...); err != nil {
		s.t.Fatal(err)
	}
}

// putLeased puts a key that hangs on an etcd lease of its own.
func (s *site) putLeased(key, value string) clientv3.LeaseID {
	s.t.Helper()
	l, err := s.client.Grant(s.ctx(), 3600)
	if err != nil {
		s.t.Fatal(err)
	}
	s.put(key, value, clientv3.WithLease(l.ID))
	return l.ID
}

func (s *site) delete(key string) {
	s.t.Helper()
	if _, err := s.client.Delete(s.ctx(), s.prefix+"/"+key); err != nil {
		s.t.Fatal(err)
	}
}

// entry is a key as etcd has it.
type entry struct {
	key, value       string
	created, changed int64
	lease            clientv3.LeaseID
}

func (s *site) list(under string) []entry {
	s.t.Helper()
	got, err := s.client.Get(s.ctx(), s.prefix+"/"+under, clientv3.WithPrefix())
	if err != nil {
		s.t.Fatal(err)
	}
	var entries []entry
	for _, kv := range got.Kvs {
		entries = append(entries, entry{strings.TrimPrefix(string(kv.Key), s.prefix+"/"), string(kv.Value),
			kv.CreateRevision, kv.ModRevision, clientv3.LeaseID(kv.Lease)})
	}
	return entries
}

// get returns a key; the zero entry if it is not there.
func (s *site) get(key string) entry {
	s.t.Helper()
	for _, e := range s.list(key) {
		if e.key == key {
			return e
		}
	}
	return entry{}
}

// until waits until a key satisfies ok, and returns it.
func (s *site) until(key string, ok func(entry) bool) entry {
	s.t.Helper()
	ctx := s.ctx()
	for {
		got, err := s.client.Get(ctx, s.prefix+"/"+key)
		if err != nil {
			s.t.Fatal(err)
		}
		e := s.get(key)
		if ok(e) {
			return e
		}
		watching, stop := context.WithCancel(ctx)
		_, open := <-s.client.Watch(watching, s.prefix+"/"+key, clientv3.WithRev(got.Header.Revision+1))
		stop()
		if !open || ctx.Err() != nil {
			s.t.Fatalf("key %s is not what it should be: %+v", key, e)
		}
	}
}

// configure writes the network's configuration and returns it as a manager does.
func (s *site) configure(text string) *subnet.Config {
	s.t.Helper()
	return s.configureAs(s.options("configurer"), text)
}

func (s *site) configureAs(o etcd.Options, text string) *subnet.Config {
	s.t.Helper()
	s.put("config", text)
	cfg, err := s.managerWith(o).Config(s.ctx())
	if err != nil {
		s.t.Fatal(err)
	}
	return cfg
}

// want is a node's wish for any subnet.
func want(ip string) subnet.Lease {
	a := netip.MustParseAddr(ip)
	if a.Is6() {
		return subnet.Lease{Attrs: subnet.Attrs{PublicIPv6: a, BackendType: "vxlan"}}
	}
	return subnet.Lease{Attrs: subnet.Attrs{PublicIP: a, BackendType: "vxlan", BackendData: []byte(`{"VNI":1}`)}}
}

func subnets(prefixes ...string) subnet.Subnets {
	var s subnet.Subnets
	for _, text := range prefixes {
		if p := netip.MustParsePrefix(text); p.Addr().Is4() {
			s.IPv4 = p
		} else {
			s.IPv6 = p
		}
	}
	return s
}

// acquired is the result of an Acquire that runs.
type acquired struct {
	lease subnet.Lease
	err   error
}

func (s *site) acquireLater(ctx context.Context, m *etcd.Manager, cfg *subnet.Config,
	want subnet.Lease) <-chan acquired {
	done := make(chan acquired, 1)
	go func() {
		l, err := m.Acquire(ctx, cfg, want)
		done <- acquired{l, err}
	}()
	return done
}

func (s *site) acquire(m *etcd.Manager, cfg *subnet.Config, want subnet.Lease) subnet.Lease {
	s.t.Helper()
	l, err := m.Acquire(s.ctx(), cfg, want)
	if err != nil {
		s.t.Fatal(err)
	}
	return l
}

// keep runs Keep until the test ends, or stop is called; it then waits for Keep.
func (s *site) keep(m *etcd.Manager, lease subnet.Lease) (done <-chan error, stop func()) {
	ctx, cancel := context.WithCancel(s.t.Context())
	result := make(chan error, 1)
	over := make(chan struct{})
	go func() {
		defer close(over)
		result <- m.Keep(ctx, lease)
	}()
	stop = func() { cancel(); <-over }
	s.t.Cleanup(stop)
	return result, stop
}

// receive waits for a value.
func receive[T any](t *testing.T, from <-chan T) T {
	t.Helper()
	select {
	case v := <-from:
		return v
	case <-time.After(patience):
		t.Fatalf("nothing came within %v; log:\n%s", patience, log.text.String())
		panic("unreachable")
	}
}
