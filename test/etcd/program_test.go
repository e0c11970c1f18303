package etcd_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/flanneld/flanneld/pkg/nstest"
	"github.com/flanneld/flanneld/subnet/etcd"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// versions are the programs that the tests run, the oldest and the newest of
// them unless LONG says otherwise.
var versions = []struct {
	name, path string
	corner     bool
}{
	{"3.4", "../../build/stores/etcd-3.4", true},
	{"3.6", "../../build/stores/etcd-3.6", false},
	{"3.7", "../../build/bin/etcd", true},
}

// ofEachVersion runs a test with each version of etcd.
func ofEachVersion(t *testing.T, test func(t *testing.T, path string)) {
	for _, v := range versions {
		if !labtest.Selected(v.corner) {
			continue
		}
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			if _, err := os.Stat(v.path); err != nil {
				nstest.Missing(t, "make %s: %v", strings.TrimPrefix(v.path, "../../"), err)
			}
			test(t, v.path)
		})
	}
}

// A program is an etcd in a process of its own, which the test may kill. It has
// an address of its own, and so its port is free when it is started again.
type program struct {
	path string
	dir  string
	host string
	args []string
	tls  *tls.Config // nil: without

	members []*program // of its cluster; nil: it is alone

	process *os.Process
	exited  chan struct{}
}

var programs atomic.Int32

// newProgramSite returns a site whose server is a program that is not running yet.
func newProgramSite(t *testing.T, path string, args ...string) *programSite {
	t.Helper()
	p := newProgram(t, path, args...)
	r, err := newRelay("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &programSite{site: &site{t: t, prefix: "/coreos.com/network", relay: r}, program: p}
	t.Cleanup(r.close)
	return s
}

// newClusterSite returns a site whose server is one of three members, the last, which are not running yet.
func newClusterSite(t *testing.T, path string) (*programSite, []*program) {
	t.Helper()
	s := newProgramSite(t, path)
	members := []*program{newProgram(t, path), newProgram(t, path), s.program}
	for _, p := range members {
		p.members = members
	}
	return s, members
}

func newProgram(t *testing.T, path string, args ...string) *program {
	pid, n := os.Getpid(), programs.Add(1)
	p := &program{path: path, dir: t.TempDir(), host: fmt.Sprintf("127.%d.%d.%d", 1+pid>>8%250, pid&255, n), args: args}
	t.Cleanup(p.kill)
	return p
}

// A programSite is a site whose server is a program.
type programSite struct {
	*site
	program *program
	proxy   *program // which nodes reach the program by; nil: by none
}

// reach leads managers to the program, or its proxy.
func (s *programSite) reach() {
	if s.proxy != nil {
		s.relay.point(s.proxy.addr())
	} else {
		s.relay.point(s.program.addr())
	}
}

func (p *program) addr() string { return net.JoinHostPort(p.host, "2379") }

func (p *program) scheme() string {
	if p.tls != nil {
		return "https://"
	}
	return "http://"
}

func (p *program) peers() string { return "http://" + net.JoinHostPort(p.host, "2380") }

// launch starts the program, and does not wait until it answers.
func (p *program) launch(t *testing.T) {
	t.Helper()
	cluster := ""
	for _, m := range append(p.members, p) {
		if !strings.Contains(cluster, m.peers()) {
			cluster += "," + m.host + "=" + m.peers()
		}
	}
	p.run(t, append([]string{
		"--data-dir", filepath.Join(p.dir, "data"), "--name", p.host, "--logger=zap", "--bcrypt-cost=4",
		"--heartbeat-interval=50", "--election-timeout=500",
		"--listen-peer-urls", p.peers(), "--initial-advertise-peer-urls", p.peers(), "--initial-cluster", cluster[1:],
		"--listen-client-urls", p.scheme() + p.addr(), "--advertise-client-urls", p.scheme() + p.addr(),
		"--listen-metrics-urls", "http://" + net.JoinHostPort(p.host, "2381"),
	}, p.args...)...)
}

// run starts the program with arguments.
func (p *program) run(t *testing.T, args ...string) {
	t.Helper()
	log, err := os.OpenFile(filepath.Join(p.dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(p.path, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		runtime.LockOSThread() // whose death would be the program's
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	p.process, p.exited = cmd.Process, exited
}

// signal stops the program for a while, or has it go on.
func (p *program) signal(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := p.process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// start starts the program, or its cluster, and waits until it answers.
func (s *programSite) start() {
	s.t.Helper()
	all := s.program.members
	if all == nil {
		all = []*program{s.program}
	}
	for _, p := range all {
		p.launch(s.t)
	}
	if s.client == nil {
		s.client = asRoot(s.t, s.program)
	}
	ctx, cancel := context.WithCancel(s.ctx())
	defer cancel()
	exited := s.program.exited // of this start: the goroutine may run when another one has begun
	go func() {
		select {
		case <-exited:
			cancel()
		case <-ctx.Done():
		}
	}()
	for {
		_, err := s.client.Get(ctx, "x")
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			text, _ := os.ReadFile(filepath.Join(s.program.dir, "log"))
			s.t.Fatalf("%s does not answer: %v\n%s", s.program.path, err, text)
		}
	}
}

// kill ends the program at once, and returns when its process is gone.
func (p *program) kill() {
	if p.process != nil {
		p.process.Kill()
		<-p.exited
		p.process = nil
	}
}

// up starts the program and leads managers to it.
func (s *programSite) up() {
	s.t.Helper()
	s.start()
	s.reach()
}

// asRoot returns a client that is root, where authentication is on. It logs in
// for each request, and so nothing that a test does with users troubles it.
func asRoot(t *testing.T, p *program) *clientv3.Client {
	t.Helper()
	login := func(ctx context.Context, c *grpc.ClientConn) (context.Context, error) {
		root := &pb.AuthenticateRequest{Name: "root", Password: "r00t"}
		answer, err := pb.NewAuthClient(c).Authenticate(ctx, root, grpc.WaitForReady(true))
		if errors.Is(rpctypes.Error(err), rpctypes.ErrAuthNotEnabled) {
			return ctx, nil
		}
		if err != nil {
			return nil, err
		}
		return metadata.AppendToOutgoingContext(ctx, rpctypes.TokenFieldNameGRPC, answer.Token), nil
	}
	unary := func(ctx context.Context, method string, req, reply any, c *grpc.ClientConn,
		invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if method != pb.Auth_Authenticate_FullMethodName {
			var err error
			if ctx, err = login(ctx, c); err != nil {
				return err
			}
		}
		return invoke(ctx, method, req, reply, c, opts...)
	}
	stream := func(ctx context.Context, desc *grpc.StreamDesc, c *grpc.ClientConn, method string,
		open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		ctx, err := login(ctx, c)
		if err != nil {
			return nil, err
		}
		return open(ctx, desc, c, method, opts...)
	}
	client, err := clientv3.New(clientv3.Config{
		Endpoints: []string{p.scheme() + p.addr()}, TLS: p.tls, Logger: zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithChainUnaryInterceptor(unary), grpc.WithChainStreamInterceptor(stream)},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

// must fails the test where a step of the administrator's fails.
func must[T any](s *programSite, step func(context.Context) (T, error)) {
	s.t.Helper()
	if _, err := step(s.ctx()); err != nil {
		s.t.Fatal(err)
	}
}

// withUsers makes root, and the user flannel, who may do all under the prefix.
func (s *programSite) withUsers() {
	s.t.Helper()
	c, ctx := s.client, s.ctx()
	all := clientv3.GetPrefixRangeEnd(s.prefix + "/")
	for _, step := range []func() error{
		func() error { _, err := c.RoleAdd(ctx, "root"); return err },
		func() error { _, err := c.UserAdd(ctx, "root", "r00t"); return err },
		func() error { _, err := c.UserGrantRole(ctx, "root", "root"); return err },
		func() error { _, err := c.RoleAdd(ctx, "flannel"); return err },
		func() error {
			_, err := c.RoleGrantPermission(ctx, "flannel", s.prefix+"/", all, clientv3.PermissionType(clientv3.PermReadWrite))
			return err
		},
		func() error { _, err := c.UserAdd(ctx, "flannel", "secret"); return err },
	} {
		if err := step(); err != nil {
			s.t.Fatal(err)
		}
	}
	s.giveRole()
}

func (s *programSite) giveRole() {
	s.t.Helper()
	must(s, func(ctx context.Context) (*clientv3.AuthUserGrantRoleResponse, error) {
		return s.client.UserGrantRole(ctx, "flannel", "flannel")
	})
}

func (s *programSite) takeRole() {
	s.t.Helper()
	must(s, func(ctx context.Context) (*clientv3.AuthUserRevokeRoleResponse, error) {
		return s.client.UserRevokeRole(ctx, "flannel", "flannel")
	})
}

func (s *programSite) password(text string) {
	s.t.Helper()
	must(s, func(ctx context.Context) (*clientv3.AuthUserChangePasswordResponse, error) {
		return s.client.UserChangePassword(ctx, "flannel", text)
	})
}

func (s *programSite) authentication(on bool) {
	s.t.Helper()
	if on {
		must(s, s.client.AuthEnable)
	} else {
		must(s, s.client.AuthDisable)
	}
}

var started = regexp.MustCompile(`^grpc_server_started_total\{grpc_method="(\w+)".*\} ([0-9.e+]+)$`)

// requests returns how many requests the program has had since it started, by
// method.
func (s *programSite) requests() map[string]int {
	s.t.Helper()
	answer, err := http.Get("http://" + net.JoinHostPort(s.program.host, "2381") + "/metrics")
	if err != nil {
		s.t.Fatal(err)
	}
	defer answer.Body.Close()
	counts := map[string]int{}
	for lines := bufio.NewScanner(answer.Body); lines.Scan(); {
		if m := started.FindStringSubmatch(lines.Text()); m != nil {
			n, err := strconv.ParseFloat(m[2], 64)
			if err != nil {
				s.t.Fatal(err)
			}
			counts[m[1]] += int(n)
		}
	}
	return counts
}

// quiet checks that the program gets few requests while nothing happens.
func (s *programSite) quiet(wait time.Duration) {
	s.t.Helper()
	before, began := s.requests(), time.Now()
	time.Sleep(wait)
	s.few(5, before, began)
}

// few checks that, since it had those before, the program has had no more than
// one request a second, and some that the test knows of.
func (s *programSite) few(some int, before map[string]int, began time.Time) {
	s.t.Helper()
	total, detail := 0, ""
	for method, n := range s.requests() {
		if n -= before[method]; n > 0 {
			total += n
			detail += fmt.Sprintf(" %s=%d", method, n)
		}
	}
	took := time.Since(began)
	if most := some + int(took/time.Second); total > most {
		s.t.Errorf("%d requests in %v, want at most %d:%s", total, took, most, detail)
	}
}

// user returns the options of a manager that logs in.
func (s *programSite) user(endpoint string) etcd.Options {
	o := s.options("a")
	o.Endpoints = []string{endpoint}
	o.Username, o.Password = "flannel", "secret"
	return o
}
