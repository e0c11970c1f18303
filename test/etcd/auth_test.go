package etcd_test

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/subnet/etcd"
)

// A worker is a node with a lease, which it keeps, and a view of all leases. It
// does all that the daemon does with etcd.
type worker struct {
	*programSite
	store string // as it is named in the log
	lease subnet.Lease
	key   string
	id    int64 // of the etcd lease
	view  *view
	peers int
	lost  <-chan error
}

func (s *programSite) worker(o etcd.Options) *worker {
	s.t.Helper()
	s.put("config", small)
	m := s.managerWith(o)
	cfg, err := m.Config(s.ctx())
	if err != nil {
		s.t.Fatal(err)
	}
	w := &worker{programSite: s, store: "etcd at " + o.Endpoints[0], lease: s.acquire(m, cfg, want("198.18.0.1"))}
	w.key = "subnets/" + w.lease.Key()
	w.id = int64(s.get(w.key).lease)
	w.view = newView(s.t, m.Watch(s.t.Context()))
	w.lost, _ = s.keep(m, w.lease)
	configs := m.Configs(s.t.Context())
	s.t.Cleanup(func() {
		for range configs {
		}
	})
	w.works()
	return w
}

// working is how many requests works may take, most of them the administrator's:
// what a client without a pause makes in some milliseconds.
const working = 50

// works checks that the node learns of a peer, and puts back its lease, which
// hangs on the etcd lease that it had.
func (w *worker) works() {
	w.t.Helper()
	peer := []string{"10.7.1.0", "10.7.2.0"}[w.peers%2]
	other := []string{"10.7.2.0", "10.7.1.0"}[w.peers%2]
	w.peers++
	w.put("subnets/"+peer+"-24", record("198.18.0.7"))
	w.delete("subnets/" + other + "-24")
	own := w.lease.Subnets.String() + "=198.18.0.1"
	w.view.until(own + " " + peer + "/24=198.18.0.7")
	before := w.get(w.key)
	w.delete(w.key)
	w.restored(before)
	w.view.until(own + " " + peer + "/24=198.18.0.7")
}

// restored checks that the lease is there again, after it was as before.
func (w *worker) restored(before entry) {
	w.t.Helper()
	after := w.until(w.key, func(e entry) bool { return e != entry{} && e.created > before.created })
	if after.value != record("198.18.0.1") || int64(after.lease) != w.id {
		w.t.Errorf("the lease was %+v and is %+v, want etcd lease %x", before, after, w.id)
	}
	select {
	case err := <-w.lost:
		w.t.Fatalf("Keep returned: %v", err)
	default:
	}
}

// refused makes a fault that has etcd refuse the node, waits until the node has
// seen that, and repairs the fault. The node is quiet meanwhile, says so once,
// and goes on then.
func (w *worker) refused(why string, fault, repair func()) {
	w.t.Helper()
	began, _ := log.lines("cannot be used", w.store)
	ended, _ := log.lines("is back", w.store)
	before := w.get(w.key)
	fault()
	w.delete(w.key) // which the node sees, and cannot put right
	log.await(w.t, len(began)+1, "cannot be used", w.store)
	w.quiet(6 * time.Second)
	repair()
	w.restored(before)
	log.await(w.t, len(ended)+1, "is back", w.store)
	w.works()
	if lines, _ := log.lines("cannot be used", w.store); len(lines) != len(began)+1 || !strings.Contains(lines[len(began)], why) {
		w.t.Errorf("the log has %q, want one line with %q", lines[len(began):], why)
	}
	if lines, _ := log.lines("is back", w.store); len(lines) != len(ended)+1 {
		w.t.Errorf("the log has %q, want one more", lines)
	}
}

// withTokens runs a test with each version of etcd and each kind of token, which
// lives for so many seconds.
func withTokens(t *testing.T, seconds string, test func(*programSite)) {
	t.Parallel()
	key := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(key, []byte("to sign tokens with"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, args := range map[string][]string{
		"simple": {"--auth-token=simple", "--auth-token-ttl=" + seconds},
		"JWT":    {"--auth-token=jwt,sign-method=HS256,priv-key=" + key + ",ttl=" + seconds + "s"},
	} {
		t.Run(name, func(t *testing.T) {
			ofEachVersion(t, func(t *testing.T, path string) {
				s := newProgramSite(t, path, args...)
				s.up()
				s.withUsers()
				s.authentication(true)
				test(s)
			})
		})
	}
}

func TestTokenExpiresDuringAPartition(t *testing.T) {
	withTokens(t, "2", func(s *programSite) {
		w := s.worker(s.user("http://" + s.relay.addr()))
		s.relay.cut()
		time.Sleep(6 * time.Second) // nothing shows when the token is over
		before, began := s.requests(), time.Now()
		s.relay.point(s.program.addr())
		w.works()
		s.few(working, before, began)
	})
}

// New watches begin while older ones go on that were begun with an old token.
func TestTokenExpiresWhileWatching(t *testing.T) {
	withTokens(t, "2", func(s *programSite) {
		w := s.worker(s.user("http://" + s.program.addr()))
		for range 2 {
			s.quiet(6 * time.Second)
			w.works()
		}
		s.quiet(6 * time.Second)
	})
}

func TestServerKilled(t *testing.T) {
	withTokens(t, "300", func(s *programSite) {
		w := s.worker(s.user("http://" + s.program.addr()))
		s.program.kill()
		log.await(s.t, 1, "cannot be used", w.store)
		s.start()
		began := time.Now()
		w.works()
		log.await(s.t, 1, "is back", w.store)
		s.few(working, nil, began)
		if lines, _ := log.lines("cannot be used", w.store); len(lines) != 1 {
			s.t.Errorf("the log has %q, want one line", lines)
		}
	})
}

// A member knows its tokens no more after its restart, and other members may have forgotten them long before.
func TestWatchGoesOnWithAnotherToken(t *testing.T) {
	withTokens(t, "300", func(s *programSite) {
		s.put("subnets/10.5.1.0-24", record("198.18.0.1"))
		v := newView(s.t, s.managerWith(s.user("http://"+s.program.addr())).Watch(s.t.Context()))
		v.until("10.5.1.0/24=198.18.0.1")
		s.program.signal(s.t, syscall.SIGTERM) // a member that is killed may read its tokens again
		<-s.program.exited
		s.start()
		s.put("subnets/10.5.2.0-24", record("198.18.0.2"))
		v.until("10.5.1.0/24=198.18.0.1 10.5.2.0/24=198.18.0.2")
		if v.snapshots != 1 {
			s.t.Errorf("%d snapshots, though nothing was missed", v.snapshots)
		}
	})
}

func TestPasswordChangedAndChangedBack(t *testing.T) {
	withTokens(t, "300", func(s *programSite) {
		w := s.worker(s.user("http://" + s.program.addr()))
		w.refused("check --etcd-username and --etcd-password",
			func() { s.password("changed") }, func() { s.password("secret") })
	})
}

func TestRoleWithdrawnAndGivenBack(t *testing.T) {
	withTokens(t, "300", func(s *programSite) {
		w := s.worker(s.user("http://" + s.program.addr()))
		w.refused("etcdctl role grant-permission", s.takeRole, s.giveRole)
	})
}

func TestAuthenticationSwitchedOffAndOn(t *testing.T) {
	withTokens(t, "300", func(s *programSite) {
		w := s.worker(s.user("http://" + s.program.addr()))
		for _, on := range []bool{false, true} {
			s.authentication(on)
			before, began := s.requests(), time.Now()
			w.works()
			s.few(working, before, began)
		}
		if lines, _ := log.lines("cannot be used", w.store); len(lines) != 0 {
			s.t.Errorf("the log has %q", lines)
		}
	})
}

// A daemon with a client certificate and a password is connected already. Without a token, its requests are those of
// the certificate's user, whom etcd does not know.
func TestAuthenticationSwitchedOnBesideCertificates(t *testing.T) {
	t.Parallel()
	ofEachVersion(t, func(t *testing.T, path string) {
		s := newProgramSite(t, path)
		o := s.secure(newAuthority(t, "ca"))
		o.Username, o.Password = "flannel", "secret"
		s.up()
		s.put("config", small)
		m := s.managerWith(o)
		for _, change := range []func(){func() {}, func() { s.withUsers(); s.authentication(true) }} {
			change()
			if _, err := m.Config(s.ctx()); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func TestAuthenticationSwitchedOnForNobody(t *testing.T) {
	withTokens(t, "300", func(s *programSite) {
		s.authentication(false)
		o := s.options("a")
		o.Endpoints = []string{"http://" + s.program.addr()}
		w := s.worker(o)
		w.refused("set --etcd-username and --etcd-password",
			func() { s.authentication(true) }, func() { s.authentication(false) })
	})
}
