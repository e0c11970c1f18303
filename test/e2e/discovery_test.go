package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// Nodes find etcd by the SRV records of a domain: they ask the DNS server in /etc/resolv.conf, which starts after them.
func TestDiscovery(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, time.Minute)
	l := labtest.New(ctx, t, configuration(ipv4Network, `{"Type": "vxlan"}`, false), lab.NodeOptions{}, lab.NodeOptions{})
	a, b := l.Nodes()[0], l.Nodes()[1]
	write := func(name, text string) string {
		path := filepath.Join(a.Dir, name)
		labtest.Do(t, os.WriteFile(path, []byte(text), 0o644))
		return path
	}
	zone := write("zone", `$ORIGIN lab.test.
@ 5 IN SOA ns hostmaster 1 1 1 1 1
@ 5 IN NS ns
ns 5 IN A 198.18.0.1
_etcd-client._tcp 5 IN SRV 0 0 2379 etcd
etcd 5 IN A 198.18.0.254
`)
	config := write("dns.conf", fmt.Sprintf("lab.test {\n bind %s\n file %s\n}\n", a.IPv4, zone))
	resolv := write("resolv.conf", fmt.Sprintf("nameserver %s\n", a.IPv4))
	const flag = "--discovery-srv=lab.test"
	for _, n := range l.Nodes() {
		labtest.Must(n.Run(ctx, "mount --bind "+resolv+" /etc/resolv.conf"))(t) // the node's own
		labtest.Do(t, n.Start(flag))
		labtest.Do(t, lab.Poll(ctx, n.Hostname+" to miss DNS", func() error {
			if log := n.Log(); !strings.Contains(log, "lookup of the SRV record _etcd-client-ssl._tcp.lab.test") {
				return errors.New(log)
			}
			return nil
		}))
	}
	server := labtest.Must(a.Launch(exec.Command(labtest.Must(l.Program("conformance/coredns"))(t), "-conf", config)))(t)
	t.Cleanup(server.Kill)
	for _, n := range l.Nodes() {
		labtest.Do(t, n.WaitReady(ctx))
	}
	out, _, err := b.Ctl(ctx, "status")
	if want := "etcd at http://etcd.lab.test:2379 (" + flag + ")"; err != nil || !strings.Contains(out, want) {
		t.Errorf("the status has no %q: %v\n%s", want, err, out)
	}
	out, _, err = b.Ctl(ctx, "leases", "list")
	if err != nil || strings.Count(out, "198.18.0.") != len(l.Nodes()) {
		t.Errorf("the leases: %v\n%s", err, out)
	}
}
