package etcd_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"github.com/flanneld/flanneld/subnet/etcd"
)

// An authority signs certificates. Files are in PEM.
type authority struct {
	t    *testing.T
	dir  string
	file string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey

	ahead time.Duration // of this host's clock is the authority's own
}

func newAuthority(t *testing.T, name string) *authority {
	t.Helper()
	a := &authority{t: t, dir: t.TempDir()}
	a.file, _, a.cert, a.key = a.issue(name, &x509.Certificate{IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign})
	return a
}

// sign returns the files of a certificate for 127.0.0.1, and more addresses, and
// its key.
func (a *authority) sign(name string, more ...net.IP) (certFile, keyFile string) {
	a.t.Helper()
	certFile, keyFile, _, _ = a.issue(name, &x509.Certificate{
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IPAddresses: append(more, net.IPv4(127, 0, 0, 1)),
	})
	return certFile, keyFile
}

func (a *authority) issue(name string, template *x509.Certificate) (certFile, keyFile string, cert *x509.Certificate,
	key *ecdsa.PrivateKey) {
	a.t.Helper()
	check := func(err error) {
		if err != nil {
			a.t.Fatal(err)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(err)
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.Subject = pkix.Name{CommonName: name}
	now := time.Now().Add(a.ahead)
	template.NotBefore, template.NotAfter = now.Add(-time.Hour), now.Add(time.Hour)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	check(err)
	cert, err = x509.ParseCertificate(der)
	check(err)
	keyDER, err := x509.MarshalECPrivateKey(key)
	check(err)
	certFile, keyFile = filepath.Join(a.dir, name+".crt"), filepath.Join(a.dir, name+".key")
	check(os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	check(os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER}), 0o600))
	return certFile, keyFile, cert, key
}

// secured is a site whose server wants TLS, and client certificates if mutual.
func secured(t *testing.T, ca *authority, mutual bool) *site {
	t.Helper()
	s := newOwnSite(t)
	cert, key := ca.sign("server")
	s.server.options = func(cfg *embed.Config) {
		for i := range cfg.ListenClientUrls {
			cfg.ListenClientUrls[i].Scheme, cfg.AdvertiseClientUrls[i].Scheme = "https", "https"
		}
		cfg.ClientTLSInfo = transport.TLSInfo{CertFile: cert, KeyFile: key}
		if mutual {
			cfg.ClientTLSInfo.TrustedCAFile, cfg.ClientTLSInfo.ClientCertAuth = ca.file, true
		}
	}
	if err := s.server.start(); err != nil {
		t.Fatal(err)
	}
	s.relay.point(s.server.addr())
	return s
}

// answers checks that a manager reaches etcd.
func (s *site) answers(o etcd.Options) {
	s.t.Helper()
	if _, err := s.managerWith(o).Previous(s.ctx(), want("198.18.0.1").Attrs); err != nil {
		s.t.Error(err)
	}
}

func (s *site) https(identity string) etcd.Options {
	o := s.options(identity)
	o.Endpoints = []string{"https://" + s.relay.addr()}
	return o
}

func TestTLS(t *testing.T) {
	t.Run("CA file alone", func(t *testing.T) {
		ca := newAuthority(t, "ca")
		s := secured(t, ca, false)
		o := s.https("a")
		o.CAFile = ca.file
		s.answers(o)
	})
	t.Run("client certificate", func(t *testing.T) {
		ca := newAuthority(t, "ca")
		s := secured(t, ca, true)
		o := s.https("a")
		o.CAFile = ca.file
		o.CertFile, o.KeyFile = ca.sign("client")
		s.answers(o)
	})
	t.Run("client certificate missing", func(t *testing.T) {
		ca := newAuthority(t, "ca")
		s := secured(t, ca, true)
		o := s.https("a")
		o.CAFile = ca.file
		s.waits(o, o.Endpoints[0], "check --etcd-certfile and --etcd-keyfile")
	})
	t.Run("client certificate of another time", func(t *testing.T) {
		ca := newAuthority(t, "ca")
		s := secured(t, ca, true)
		ca.ahead = 25 * time.Hour
		o := s.https("a")
		o.CAFile = ca.file
		o.CertFile, o.KeyFile = ca.sign("client")
		s.waits(o, o.Endpoints[0], "expired certificate", "the server's clock")
	})
	t.Run("another CA", func(t *testing.T) {
		s := secured(t, newAuthority(t, "ca"), false)
		o := s.https("a")
		o.CAFile = newAuthority(t, "another").file
		s.waits(o, o.Endpoints[0], "x509", "check --etcd-cafile")
	})
	for name, ahead := range map[string]time.Duration{"a clock that is behind": 25 * time.Hour, "a clock that is ahead": -25 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			ca := newAuthority(t, "ca")
			ca.ahead = ahead
			s := secured(t, ca, false)
			o := s.https("a")
			o.CAFile = ca.file
			s.waits(o, o.Endpoints[0], "current time", "check this host's clock")
		})
	}
	t.Run("system roots", func(t *testing.T) {
		s := secured(t, newAuthority(t, "ca"), false)
		o := s.https("a")
		s.waits(o, o.Endpoints[0], "x509", "check --etcd-cafile")
	})
	t.Run("http to an https server", func(t *testing.T) {
		s := secured(t, newAuthority(t, "ca"), false)
		o := s.options("a")
		s.waits(o, o.Endpoints[0], "--etcd-endpoints should begin with https://")
	})
	t.Run("https to an http server", func(t *testing.T) {
		s := newOwnSite(t)
		s.up()
		o := s.https("a")
		s.waits(o, o.Endpoints[0], "--etcd-endpoints should begin with http://")
	})
}

// Certificates of another CA take the place of those there are, while the
// manager runs.
func TestNewCA(t *testing.T) {
	first, second := newAuthority(t, "ca"), newAuthority(t, "ca")
	s := secured(t, first, true)
	o := s.https("a")
	o.CAFile = filepath.Join(t.TempDir(), "ca.crt")
	o.CertFile, o.KeyFile = first.sign("client")
	replace := func(file string, text []byte) {
		t.Helper()
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	read := func(file string) []byte {
		t.Helper()
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	replace(o.CAFile, read(first.file))
	m := s.managerWith(o)
	works := func() {
		t.Helper()
		s.relay.point(s.server.addr()) // with new connections
		if _, err := m.Previous(s.ctx(), want("198.18.0.1").Attrs); err != nil {
			t.Error(err)
		}
		if _, err := m.Clock(s.ctx()); err != nil {
			t.Error(err)
		}
	}
	works()

	// Files that another program is writing.
	pair := read(o.KeyFile)
	replace(o.KeyFile, nil)
	replace(o.CAFile, nil)
	works()
	replace(o.CAFile, append(read(second.file), read(first.file)[:200]...))
	works()
	for _, parts := range [][]string{
		{o.CAFile + " holds no certificate", "stays in force"}, {o.CAFile + " ends in the middle", "stays in force"},
	} {
		if lines, _ := log.lines(parts...); len(lines) != 1 {
			t.Errorf("logged, want one line: %q", lines)
		}
	}
	replace(o.KeyFile, pair)

	cert, key := second.sign("server")
	replace(s.server.etcd.Config().ClientTLSInfo.CertFile, read(cert))
	replace(s.server.etcd.Config().ClientTLSInfo.KeyFile, read(key))
	replace(o.CAFile, read(second.file))
	works()
}

// waits checks that a manager logs why it cannot use etcd, once, and waits.
func (s *site) waits(o etcd.Options, parts ...string) {
	s.t.Helper()
	done := make(chan error, 1)
	m := s.managerWith(o)
	go func() {
		_, err := m.Previous(s.t.Context(), want("198.18.0.1").Attrs)
		done <- err
	}()
	log.await(s.t, 1, append(parts, `operation="read the leases"`)...)
	select {
	case err := <-done:
		s.t.Errorf("did not wait: %v", err)
	default:
	}
}

// grantPrefix lets flannel's role read and write the keys with a prefix.
func (s *site) grantPrefix(prefix string) error {
	_, err := s.client.RoleGrantPermission(s.ctx(), "flannel", s.prefix+prefix, clientv3.GetPrefixRangeEnd(s.prefix+prefix),
		clientv3.PermissionType(clientv3.PermReadWrite))
	return err
}

func TestPassword(t *testing.T) {
	s := newOwnSite(t)
	s.up()
	s.put("subnets/10.5.1.0-24", record("198.18.0.1"))
	ctx := s.ctx()
	for _, step := range []func() error{
		func() error { _, err := s.client.RoleAdd(ctx, "root"); return err },
		func() error { _, err := s.client.UserAdd(ctx, "root", "r00t"); return err },
		func() error { _, err := s.client.UserGrantRole(ctx, "root", "root"); return err },
		func() error { _, err := s.client.RoleAdd(ctx, "flannel"); return err },
		// As Documentation/configuration.md has it.
		func() error {
			_, err := s.client.RoleGrantPermission(ctx, "flannel", s.prefix+"/config", "", clientv3.PermissionType(clientv3.PermRead))
			return err
		},
		func() error { return s.grantPrefix("/subnets/") },
		func() error { return s.grantPrefix("/nodes/") },
		func() error { _, err := s.client.UserAdd(ctx, "flannel", "secret"); return err },
		func() error { _, err := s.client.UserAdd(ctx, "stranger", "secret"); return err },
		func() error { _, err := s.client.UserGrantRole(ctx, "flannel", "flannel"); return err },
		func() error { _, err := s.client.AuthEnable(ctx); return err },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}

	o := s.options("a")
	s.waits(o, o.Endpoints[0], "set --etcd-username and --etcd-password")
	o.Username, o.Password = "flannel", "wrong"
	s.waits(o, o.Endpoints[0], "check --etcd-username and --etcd-password")
	o.Username, o.Password = "stranger", "secret"
	s.waits(o, o.Endpoints[0], "permission denied", "etcdctl role grant-permission --prefix")

	o.Username, o.Password = "flannel", "secret"
	m := s.managerWith(o)
	v := newView(t, m.Watch(t.Context()))
	v.until("10.5.1.0/24=198.18.0.1")
	root, err := clientv3.New(clientv3.Config{Endpoints: []string{s.server.addr()}, Username: "root", Password: "r00t",
		Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	s.client = root
	cfg := s.configureAs(o, small)
	l := s.acquire(m, cfg, want("198.18.0.1"))
	s.keep(m, l)
	s.delete("subnets/10.5.1.0-24")
	s.until("subnets/10.5.1.0-24", func(e entry) bool { return e.value == record("198.18.0.1") })

	// A node that was taken over may not run commands on the others.
	node, err := clientv3.New(clientv3.Config{Endpoints: []string{s.server.addr()}, Username: "flannel", Password: "secret",
		Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	if _, err := node.Put(ctx, s.prefix+"/config", `{"Backend": {"Type": "extension"}}`); !errors.Is(err, rpctypes.ErrPermissionDenied) {
		t.Errorf("writing the configuration as a node: %v, want %v", err, rpctypes.ErrPermissionDenied)
	}

	// The password is put right while we wait.
	o.Password = "changed"
	late := s.managerWith(o)
	got := make(chan error, 1)
	go func() {
		_, err := late.Previous(s.ctx(), l.Attrs)
		got <- err
	}()
	log.await(t, 2, o.Endpoints[0], rpctypes.ErrorDesc(rpctypes.ErrAuthFailed))
	if _, err := root.UserChangePassword(ctx, "flannel", "changed"); err != nil {
		t.Fatal(err)
	}
	if err := receive(t, got); err != nil {
		t.Error(err)
	}
}
