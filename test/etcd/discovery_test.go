package etcd_test

import (
	"context"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/server/v3/embed"

	"github.com/flanneld/flanneld/pkg/nstest"
	"github.com/flanneld/flanneld/subnet/etcd"
)

// names is the DNS server that this process asks.
var names dnsServer

// A dnsServer is CoreDNS with one zone, at an address that the process's resolver asks in place of those of
// /etc/resolv.conf.
type dnsServer struct {
	address atomic.Value // string
	program *program
	serial  int
}

// resolver returns the resolver that asks the server.
func (d *dnsServer) resolver() *net.Resolver {
	d.address.Store("127.0.0.1:1")
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, d.address.Load().(string))
	}}
}

// prepare gives the test a server, which does not run yet.
func (d *dnsServer) prepare(t *testing.T) {
	t.Helper()
	const path = "../../build/conformance/coredns"
	if _, err := os.Stat(path); err != nil {
		nstest.Missing(t, "make %s: %v", strings.TrimPrefix(path, "../../"), err)
	}
	d.program, d.serial = newProgram(t, path), 0
	d.address.Store(net.JoinHostPort(d.program.host, "5300"))
}

// serve writes the zone etcd.test, and returns when the server answers with it. Records are lines of a zone file. More
// are more blocks of CoreDNS's configuration.
func (d *dnsServer) serve(s *site, records []string, more ...string) {
	s.t.Helper()
	d.serial++
	zone := filepath.Join(d.program.dir, "zone")
	text := fmt.Sprintf("@ 1 IN SOA ns hostmaster %d 1 1 1 1\n@ 1 IN NS ns\nns 1 IN A 127.0.0.1\nserial 1 IN TXT %[1]d\n%s\n",
		d.serial, strings.Join(records, "\n"))
	config := fmt.Sprintf("etcd.test:5300 {\n bind %s\n file %s {\n  reload 100ms\n }\n}\n%s\n", d.program.host, zone,
		strings.Join(more, "\n"))
	for name, text := range map[string]string{zone: "$ORIGIN etcd.test.\n" + text, zone + ".conf": config} {
		if err := os.WriteFile(name+".new", []byte(text), 0o600); err != nil {
			s.t.Fatal(err)
		}
		if err := os.Rename(name+".new", name); err != nil {
			s.t.Fatal(err)
		}
	}
	if d.program.process == nil {
		d.program.run(s.t, "-conf", zone+".conf")
	}
	for ctx := s.ctx(); ; {
		got, err := net.DefaultResolver.LookupTXT(ctx, "serial.etcd.test.")
		if err == nil && got[0] == fmt.Sprint(d.serial) {
			return
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			log, _ := os.ReadFile(filepath.Join(d.program.dir, "log"))
			s.t.Fatalf("the DNS server does not answer with the new zone: %v\n%s", err, log)
		}
	}
}

// srv returns the records of a service whose endpoint is at an address.
func srv(service, address string) []string {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		panic(err)
	}
	return []string{
		fmt.Sprintf("_%s._tcp 1 IN SRV 10 10 %s m%[2]s", service, port),
		fmt.Sprintf("m%s 1 IN A %s", port, host),
	}
}

func discovering(s *site) etcd.Options {
	o := s.options("a")
	o.Endpoints, o.DiscoverySRV = nil, "etcd.test"
	return o
}

// at returns the endpoint that srv makes of an address.
func at(scheme, address string) string {
	_, port, _ := net.SplitHostPort(address)
	return fmt.Sprintf("%s://m%s.etcd.test:%[2]s", scheme, port)
}

// withName has a server show a certificate for a name.
func withName(ca *authority, name string) func(*embed.Config) {
	certFile, keyFile, _, _ := ca.issue(name, &x509.Certificate{KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, DNSNames: []string{name}})
	return func(cfg *embed.Config) {
		for i := range cfg.ListenClientUrls {
			cfg.ListenClientUrls[i].Scheme, cfg.AdvertiseClientUrls[i].Scheme = "https", "https"
		}
		cfg.ClientTLSInfo = transport.TLSInfo{CertFile: certFile, KeyFile: keyFile}
	}
}

// The subtests share the process's resolver, and run one after the other.
func TestDiscovery(t *testing.T) {
	t.Parallel()
	// The daemon is there before DNS, DNS before the records, and the records before etcd.
	t.Run("nothing is there at the start", func(t *testing.T) {
		s := ownSite(t)
		names.prepare(t)
		m := s.managerWith(discovering(s))
		read := make(chan error, 1)
		go func() {
			_, err := m.Previous(s.ctx(), want("198.18.0.1").Attrs)
			read <- err
		}()
		const store = "etcd, whose endpoints --discovery-srv=etcd.test is to name"
		log.await(t, 1, "cannot be used", store, "lookup of the SRV record _etcd-client-ssl._tcp.etcd.test",
			": connection refused: check --discovery-srv and /etc/resolv.conf")
		names.serve(s, nil)
		s.untilProblem(m, "DNS has neither an SRV record _etcd-client-ssl._tcp.etcd.test nor _etcd-client._tcp.etcd.test")
		if lines, _ := log.lines(store); len(lines) != 1 {
			t.Errorf("the log has %q, want one line", lines)
		}
		names.serve(s, srv("etcd-client", s.relay.addr()))
		s.up()
		if err := receive(t, read); err != nil {
			t.Fatal(err)
		}
		endpoint := at("http", s.relay.addr())
		state := m.State()
		if want := "etcd at " + endpoint + " (--discovery-srv=etcd.test)"; state.Store != want || !state.Connected ||
			len(state.Endpoints) != 1 || state.Endpoints[0] != endpoint ||
			state.Check != "etcdctl --endpoints="+endpoint+" endpoint health" {
			t.Errorf("the state is %+v, want %s", state, want)
		}
		log.await(t, 1, "The store is back", state.Store)
		if _, err := m.Clock(s.ctx()); err != nil {
			t.Error(err)
		}
	})

	// The members are elsewhere now. The watch goes on from where it was.
	t.Run("records change", func(t *testing.T) {
		s := ownSite(t)
		s.up()
		names.prepare(t)
		names.serve(s, srv("etcd-client", s.relay.addr()))
		m := s.managerWith(discovering(s))
		v := newView(t, m.Watch(t.Context()))
		s.put("subnets/10.5.1.0-24", record("198.18.0.1"))
		v.until("10.5.1.0/24=198.18.0.1")
		other, err := newRelay("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(other.close)
		other.point(s.server.addr())
		names.serve(s, srv("etcd-client", other.addr()))
		s.relay.cut()
		s.put("subnets/10.5.2.0-24", record("198.18.0.2"))
		v.until("10.5.1.0/24=198.18.0.1 10.5.2.0/24=198.18.0.2")
		if v.snapshots != 1 {
			t.Errorf("%d snapshots, though nothing was missed", v.snapshots)
		}

		// DNS is away: what it said last stays in force.
		if _, err := m.Expiries(s.ctx(), subnets("10.9.9.0/24")); err != nil {
			t.Fatal(err)
		}
		names.program.kill()
		other.cut()
		log.await(t, 1, "cannot be used", at("http", other.addr()))
		names.serve(s, srv("etcd-client", other.addr()))
		other.point(s.server.addr())
		s.put("subnets/10.5.3.0-24", record("198.18.0.3"))
		v.until("10.5.1.0/24=198.18.0.1 10.5.2.0/24=198.18.0.2 10.5.3.0/24=198.18.0.3")
	})

	t.Run("TLS comes first", func(t *testing.T) {
		s, ca := ownSite(t), newAuthority(t, "ca")
		_, port, _ := net.SplitHostPort(s.relay.addr())
		s.server.options = withName(ca, "m"+port+".etcd.test")
		s.up()
		names.prepare(t)
		names.serve(s, append(srv("etcd-client-ssl", s.relay.addr()), srv("etcd-client", "127.0.0.1:1")...))
		o := discovering(s)
		o.CAFile = ca.file
		m := s.managerWith(o)
		if _, err := m.Previous(s.ctx(), want("198.18.0.1").Attrs); err != nil {
			t.Error(err)
		}
		if got := m.State().Endpoints; len(got) != 1 || got[0] != at("https", s.relay.addr()) {
			t.Errorf("the endpoints are %q", got)
		}
	})

	// Somebody who forges answers of DNS gets neither a connection without TLS nor one to a host of another name.
	t.Run("the certificate is another host's", func(t *testing.T) {
		s, ca := ownSite(t), newAuthority(t, "ca")
		s.server.options = withName(ca, "etcd.test")
		s.up()
		names.prepare(t)
		names.serve(s, srv("etcd-client-ssl", s.relay.addr()))
		o := discovering(s)
		o.CAFile = ca.file
		s.waits(o, at("https", s.relay.addr()), "x509", "check --etcd-cafile and the names of the endpoints")
	})
	t.Run("no TLS though there are files", func(t *testing.T) {
		s, ca := ownSite(t), newAuthority(t, "ca")
		s.up()
		names.prepare(t)
		names.serve(s, srv("etcd-client-blue", s.relay.addr()))
		o := discovering(s)
		o.CAFile, o.DiscoverySRVName = ca.file, "blue"
		s.waits(o, "DNS has no SRV record _etcd-client-ssl-blue._tcp.etcd.test, which --etcd-cafile and --etcd-certfile require")
		o.CAFile = ""
		s.answers(o)
	})
	t.Run("the lookup for TLS fails", func(t *testing.T) {
		s := ownSite(t)
		s.up()
		names.prepare(t)
		names.serve(s, srv("etcd-client", s.relay.addr()),
			fmt.Sprintf("_etcd-client-ssl._tcp.etcd.test:5300 {\n bind %s\n forward . 127.0.0.1:1\n}", names.program.host))
		s.waits(discovering(s), "lookup of the SRV record _etcd-client-ssl._tcp.etcd.test", "server misbehaving")
	})

	// A cluster gives up TLS. Here it has never worked.
	t.Run("TLS is given up", func(t *testing.T) {
		s, secure := ownSite(t), ownSite(t)
		secure.server.options = withName(newAuthority(t, "ca"), "etcd.test")
		secure.up()
		s.up()
		names.prepare(t)
		names.serve(s, srv("etcd-client-ssl", secure.relay.addr()))
		o := discovering(s)
		s.waits(o, at("https", secure.relay.addr()), "x509")
		m := s.managerWith(o)
		read := make(chan error, 1)
		go func() {
			_, err := m.Previous(s.ctx(), want("198.18.0.1").Attrs)
			read <- err
		}()
		log.await(t, 2, "cannot be used", at("https", secure.relay.addr()))
		names.serve(s, srv("etcd-client", s.relay.addr()))
		if err := receive(t, read); err != nil {
			t.Fatal(err)
		}
	})
}

// untilProblem waits until a manager's problem is as described.
func (s *site) untilProblem(m *etcd.Manager, part string) {
	s.t.Helper()
	for ctx := s.ctx(); !strings.Contains(m.State().Problem, part); {
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			s.t.Fatalf("the problem is %q, want %q", m.State().Problem, part)
		}
	}
}
