package etcd_test

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/flanneld/flanneld/subnet/etcd"
)

// secure has the program want TLS and certificates of the CA, and returns the
// options of a manager that has one.
func (s *programSite) secure(ca *authority) etcd.Options {
	s.t.Helper()
	certFile, keyFile := ca.sign("server", net.ParseIP(s.program.host))
	s.program.args = append(s.program.args,
		"--cert-file", certFile, "--key-file", keyFile, "--trusted-ca-file", ca.file, "--client-cert-auth")
	o := s.https("a")
	o.CAFile = ca.file
	o.CertFile, o.KeyFile = ca.sign("client")
	pair, err := tls.LoadX509KeyPair(o.CertFile, o.KeyFile)
	if err != nil {
		s.t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	s.program.tls = &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}}
	return o
}

// What nodes meet in the life of a cluster, with each version of etcd and each
// way to reach it.
func TestEveryVersion(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		prepare func(*programSite) etcd.Options
		users   bool
	}{
		{"plain", func(s *programSite) etcd.Options { return s.options("a") }, false},
		{"TLS", func(s *programSite) etcd.Options { return s.secure(newAuthority(s.t, "ca")) }, false},
		{"password", func(s *programSite) etcd.Options { return s.user("http://" + s.relay.addr()) }, true},
		{"TLS and password", func(s *programSite) etcd.Options {
			o := s.secure(newAuthority(s.t, "ca"))
			o.Username, o.Password = "flannel", "secret"
			return o
		}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			ofEachVersion(t, func(t *testing.T, path string) {
				s := newProgramSite(t, path)
				life(s, c.prepare(s), c.users)
			})
		})
	}
}

func life(s *programSite, o etcd.Options, users bool) {
	// The daemon is there before etcd is, and etcd before its users and the
	// configuration are.
	early := s.managerWith(o)
	configured := make(chan error, 1)
	go func() {
		_, err := early.Config(s.ctx())
		configured <- err
	}()
	log.await(s.t, 1, "cannot be used", "etcd at "+o.Endpoints[0])
	s.up()
	if users {
		s.withUsers()
		s.authentication(true)
	}
	w := s.worker(o)
	if err := receive(s.t, configured); err != nil {
		s.t.Error(err)
	}

	// An outage, and a compaction behind which the watches are.
	s.relay.cut()
	s.put("subnets/10.7.5.0-24", record("198.18.0.5"))
	got, err := s.client.Get(s.ctx(), "x")
	if err != nil {
		s.t.Fatal(err)
	}
	if _, err := s.client.Compact(s.ctx(), got.Header.Revision, clientv3.WithCompactPhysical()); err != nil {
		s.t.Fatal(err)
	}
	s.reach()
	s.delete("subnets/10.7.5.0-24")
	w.works()

	s.program.kill()
	s.up()
	w.works()

	// Another node comes, and leaves for good.
	o.Identity = "b"
	other := s.managerWith(o)
	cfg, err := other.Config(s.ctx())
	if err != nil {
		s.t.Fatal(err)
	}
	lease := s.acquire(other, cfg, want("198.18.0.2"))
	for _, known := w.view.leases[lease.Subnets]; !known; _, known = w.view.leases[lease.Subnets] {
		w.view.read()
	}
	other.Close()
	s.until("nodes/198.18.0.2", func(e entry) bool { return e == entry{} })
	if _, err := s.client.Revoke(s.ctx(), s.get("subnets/"+lease.Key()).lease); err != nil {
		s.t.Fatal(err)
	}
	w.works()
}
