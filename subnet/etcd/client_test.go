package etcd

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/retry"
	"github.com/flanneld/flanneld/subnet"
)

func TestOptionsThatCannotWork(t *testing.T) {
	dir := t.TempDir()
	nonsense := filepath.Join(dir, "nonsense.pem")
	if err := os.WriteFile(nonsense, []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	missing := filepath.Join(dir, "missing.pem")
	https := []string{"https://127.0.0.1:2379"}
	for _, c := range []struct {
		options Options
		want    string
	}{
		{Options{}, "--etcd-endpoints is empty: give at least one, such as http://127.0.0.1:2379"},
		{Options{Endpoints: https, DiscoverySRV: "example.com"},
			"--etcd-endpoints and --discovery-srv both set where etcd is: give only one of them"},
		{Options{Endpoints: []string{"http://127.0.0.1:2379", ""}},
			`--etcd-endpoints: "" is not an endpoint such as http://127.0.0.1:2379`},
		{Options{Endpoints: []string{" http://127.0.0.1:2379"}},
			`--etcd-endpoints: " http://127.0.0.1:2379" is not an endpoint such as http://127.0.0.1:2379`},
		{Options{Endpoints: []string{"ftp://127.0.0.1"}},
			`--etcd-endpoints: "ftp://127.0.0.1" begins neither with http:// nor with https://`},
		{Options{Endpoints: https, Username: "flannel"},
			"--etcd-username and --etcd-password go together: one of them is missing"},
		{Options{Endpoints: https, CAFile: missing}, "--etcd-cafile: open " + missing + ": no such file or directory"},
		{Options{Endpoints: https, CAFile: nonsense}, "--etcd-cafile: " + nonsense + " holds no certificate in PEM form"},
		{Options{Endpoints: https, CertFile: nonsense},
			"--etcd-certfile and --etcd-keyfile go together: one of them is missing"},
		{Options{Endpoints: https, KeyFile: nonsense},
			"--etcd-certfile and --etcd-keyfile go together: one of them is missing"},
		{Options{Endpoints: https, CertFile: missing, KeyFile: nonsense}, "--etcd-certfile, --etcd-keyfile: open " + missing +
			": no such file or directory"},
		{Options{Endpoints: https, CertFile: nonsense, KeyFile: nonsense},
			"--etcd-certfile, --etcd-keyfile: tls: failed to find any PEM data in certificate input"},
	} {
		c.options.Identity = "a"
		m, err := New(t.Context(), c.options)
		if err == nil {
			m.Close()
			t.Errorf("%+v: no error", c.options)
		} else if err.Error() != c.want {
			t.Errorf("%+v:\n got %s\nwant %s", c.options, err, c.want)
		}
	}
}

// What a program leaves out has the defaults of flanneld's flags.
func TestDefaults(t *testing.T) {
	o := Options{Endpoints: []string{"http://127.0.0.1:1"}, Prefix: "/coreos.com/network"}
	if _, err := New(t.Context(), o); err == nil || !strings.Contains(err.Error(), "Options have no Identity") {
		t.Errorf("without an identity: %v", err)
	}
	o.Identity = "a"
	m, err := New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if m.options.RenewMargin != time.Hour {
		t.Errorf("leases are renewed %v before their end", m.options.RenewMargin)
	}
}

// The advice is what an operator acts upon. That these are the errors that a
// real etcd gives is shown in the tests with one.
func TestExplain(t *testing.T) {
	unavailable := func(text string) error {
		return status.Error(codes.Unavailable, `connection error: desc = "`+text+`"`)
	}
	for _, c := range []struct {
		err         error
		cause, want string
	}{
		{unavailable("transport: Error while dialing: dial tcp 127.0.0.1:2379: connect: connection refused"),
			subnet.Unreachable, "Error while dialing: dial tcp 127.0.0.1:2379: connect: connection refused"},
		{context.DeadlineExceeded, subnet.Unreachable, "no answer within 10s"},
		{rpctypes.ErrNoLeader, subnet.Unreachable, "etcdserver: no leader"},
		{rpctypes.ErrGRPCNoLeader, subnet.Unreachable, "etcdserver: no leader"},
		{rpctypes.ErrTimeout, subnet.Unreachable, "etcdserver: request timed out"},
		{rpctypes.ErrAuthFailed, "login", "--etcd-password"},
		{rpctypes.ErrGRPCAuthFailed, "login", "--etcd-password"},
		{rpctypes.ErrUserEmpty, "login", "--etcd-username"},
		{rpctypes.ErrPermissionDenied, "", "role grant-permission"},
		{status.Error(codes.Unknown, context.DeadlineExceeded.Error()), subnet.Unreachable, "no answer within 10s"},
		{status.Error(codes.Canceled, "grpc: the client connection is closing"), subnet.Unreachable,
			"connections were replaced"},
		{rpctypes.ErrGRPCInvalidAuthToken, "login", "invalid auth token"},
		{rpctypes.ErrNoSpace, "", "etcdserver: mvcc: database space exceeded: compact and defragment etcd"},
		{errors.New("something else"), "", "something else"},
		{unavailable("transport: authentication handshake failed: tls: failed to verify certificate: x509: certificate signed by unknown authority"), "certificate", "--etcd-cafile"},
		{unavailable("error reading server preface: remote error: tls: certificate required"), "certificate",
			"--etcd-certfile"},
		{unavailable("transport: authentication handshake failed: tls: failed to verify certificate: x509: certificate has expired or is not yet valid: current time 2026-11-29T23:00:00Z is after 2025-11-29T23:00:00Z"),
			"certificate", "check this host's clock"},
		{unavailable("error reading server preface: remote error: tls: expired certificate"), "certificate", "the server's clock"},
		{unavailable("error reading server preface: EOF"), "scheme", "https://"},
	} {
		cause, text := explain(c.err)
		if cause != c.cause || !strings.Contains(text, c.want) {
			t.Errorf("%v: got %q, %q; want %q, %q", c.err, cause, text, c.cause, c.want)
		}
	}
}

// However many wait, there is one attempt at a time; and when one succeeds, the
// others do not wait for long.
func TestQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue()
		begun := time.Now()
		var away atomic.Bool
		var attempts atomic.Int32
		away.Store(true)
		var waiting sync.WaitGroup
		for range 8 {
			waiting.Go(func() {
				err := q.retry(t.Context(), subnet.Backoff(), func() error {
					attempts.Add(1)
					if away.Load() {
						return errors.New("away")
					}
					return nil
				})
				if err != nil {
					t.Error(err)
				}
			})
		}
		const minute = 60
		retry.Sleep(t.Context(), minute*time.Second)
		if n := attempts.Load(); n < minute/3 || n > minute {
			t.Errorf("%d attempts in a minute, want one in 1.5 to 3 s", n)
		}
		away.Store(false)
		waiting.Wait()
		if took := time.Since(begun); took > (minute+4)*time.Second {
			t.Errorf("the last one was done after %v", took)
		}

		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := q.retry(ctx, subnet.Backoff(), func() error { return nil }); !errors.Is(err, context.Canceled) {
			t.Errorf("with a context that ended: %v", err)
		}
	})
}

// A request that its caller gave up says nothing of whether the client gets
// answers.
func TestGivenUp(t *testing.T) {
	c := newConnection(klog.Logger{}, clientConfig{Endpoints: []string{"http://127.0.0.1:1"}}, "", "")
	defer c.close()
	c.unanswered = 1
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	c.attempt(ctx, func(ctx context.Context, _ *clientv3.Client) error {
		<-ctx.Done()
		return ctx.Err()
	})
	if c.unanswered != 1 {
		t.Errorf("%d requests in a row count as not answered", c.unanswered)
	}
}

// script is a channel with a state for each minute.
type script struct {
	states []connectivity.State
	begun  time.Time
	resets []int // by minute
}

func (s *script) minute() int { return int(time.Since(s.begun) / time.Minute) }

func (s *script) GetState() connectivity.State { return s.states[s.minute()] }
func (s *script) ResetConnectBackoff()         { s.resets[s.minute()]++ }

func (s *script) WaitForStateChange(ctx context.Context, _ connectivity.State) bool {
	return retry.Sleep(ctx, time.Until(s.begun.Add(time.Duration(s.minute()+1)*time.Minute))) == nil
}

// While one server can be reached, the others are left alone.
func TestHasten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &script{begun: time.Now(), states: []connectivity.State{connectivity.Idle, connectivity.Connecting,
			connectivity.TransientFailure, connectivity.Ready, connectivity.TransientFailure, connectivity.Ready,
			connectivity.Ready}}
		s.resets = make([]int, len(s.states))
		ctx, cancel := context.WithTimeout(t.Context(), 6*time.Minute)
		defer cancel()
		shortenPauses(ctx, s)
		for i, resets := range s.resets {
			least, most := 0, 1 // one may be under way when the state changes
			if s.states[i] == connectivity.TransientFailure {
				least, most = 5, 12 // one in 5 to 10 s
			}
			if resets < least || resets > most {
				t.Errorf("minute %d, %v: pauses started again %d times, want %d to %d", i, s.states[i], resets, least, most)
			}
		}
	})
}

// The command that doctor advises is one that etcd answers.
func TestCheckCommand(t *testing.T) {
	one := []string{"http://192.0.2.1:2379"}
	for want, o := range map[string]Options{
		"etcdctl --endpoints=http://192.0.2.1:2379 endpoint health": {Endpoints: one},
		"etcdctl --endpoints=http://192.0.2.1:2379,http://192.0.2.2:2379 --cacert=/ca --cert=/cert --key=/key --user=u endpoint health": {
			Endpoints: append(one, "http://192.0.2.2:2379"), CAFile: "/ca", CertFile: "/cert", KeyFile: "/key", Username: "u",
			Password: "p"},
		"etcdctl --discovery-srv=example.com --discovery-srv-name=blue --cacert=/ca endpoint health": {
			DiscoverySRV: "example.com", DiscoverySRVName: "blue", CAFile: "/ca"},
	} {
		if got := checkCommand(o, o.Endpoints); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}
