package etcd_test

import (
	"net"
	"testing"
)

// startProxy starts etcd's grpc-proxy, and leads managers to it. The program need not run yet.
func (s *programSite) startProxy() {
	s.t.Helper()
	if s.proxy == nil {
		s.proxy = newProgram(s.t, s.program.path)
	}
	members := s.program.members
	if members == nil {
		members = []*program{s.program}
	}
	endpoints := ""
	for _, p := range members {
		endpoints += "," + p.scheme() + p.addr()
	}
	s.proxy.run(s.t, append([]string{"grpc-proxy", "start", "--endpoints=" + endpoints[1:], "--data-dir=" + s.proxy.dir,
		"--listen-addr=" + s.proxy.addr(), "--advertise-client-url=" + s.proxy.addr()}, s.proxy.args...)...)
	s.reach()
}

// restartProxy ends the proxy as a crash would, and starts it again.
func (s *programSite) restartProxy() {
	s.t.Helper()
	s.proxy.kill()
	s.startProxy()
}

// What nodes meet in the life of a cluster, by way of etcd's grpc-proxy.
func TestProxy(t *testing.T) {
	t.Parallel()
	ofEachVersion(t, func(t *testing.T, path string) {
		s := newProgramSite(t, path)
		s.startProxy()
		life(s, s.options("a"), false)
	})
}

// The proxy starts again, and all that nodes have under way with it ends.
func TestProxyRestarts(t *testing.T) {
	t.Parallel()
	ofEachVersion(t, func(t *testing.T, path string) {
		s := newProgramSite(t, path)
		s.up()
		s.startProxy()
		w := s.worker(s.options("a"))
		for range 3 {
			s.restartProxy()
			w.works()
		}
		if w.view.snapshots != 1 {
			t.Errorf("%d snapshots, though nothing was missed", w.view.snapshots)
		}
	})
}

// The leader of the members behind a proxy is lost, and then another.
func TestProxyOfMembers(t *testing.T) {
	t.Parallel()
	ofEachVersion(t, func(t *testing.T, path string) {
		s, members := newClusterSite(t, path)
		s.start()
		s.startProxy()
		w := s.worker(s.options("a"))
		for _, p := range members[:2] {
			p.kill()
			s.settle()
			w.works()
			p.launch(t)
			s.settle()
			w.works()
		}
	})
}

// With TLS, a proxy has a certificate for nodes, and one for the members, which must have no name.
func TestProxyWithTLS(t *testing.T) {
	t.Parallel()
	ofEachVersion(t, func(t *testing.T, path string) {
		s, ca := newProgramSite(t, path), newAuthority(t, "ca")
		o := s.secure(ca)
		s.up()
		s.proxy = newProgram(t, path)
		client, clientKey := ca.sign("")
		certFile, keyFile := ca.sign("proxy", net.ParseIP(s.proxy.host))
		s.proxy.args = []string{"--cert=" + client, "--key=" + clientKey, "--cacert=" + ca.file,
			"--cert-file=" + certFile, "--key-file=" + keyFile, "--trusted-ca-file=" + ca.file}
		s.startProxy()
		w := s.worker(o)
		w.works()
		s.restartProxy()
		w.works()
	})
}
