package e2e

import (
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// A hardened host has IPv6 off, and the network has both families. The node works with IPv4, says that IPv6 does not
// work, and works with both as soon as the uplink has IPv6, although new devices still have it off.
func TestIPv6Off(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, time.Minute)
	l := labtest.New(ctx, t, configuration(`"Network": "10.4.0.0/14", `+ipv6Network, `{"Type": "vxlan"}`, false),
		lab.NodeOptions{}, lab.NodeOptions{})
	a, b := l.Nodes()[0], l.Nodes()[1]
	labtest.Must(a.Run(ctx, "sysctl -qw net.ipv6.conf.default.disable_ipv6=1 net.ipv6.conf.eth0.disable_ipv6=1"))(t)
	labtest.Start(ctx, t, l)
	env := labtest.Must(b.SubnetEnv())(t)
	reach := func(ip string) {
		t.Helper()
		labtest.Do(t, lab.Poll(ctx, ip+" to answer", func() error {
			_, err := a.Run(ctx, "ping -c1 -W1 "+ip)
			return err
		}))
	}
	reach(env.Subnets.IPv4.Addr().String()) // on the peer's device
	readyz := func() string {
		client := &http.Client{Transport: &http.Transport{DialContext: a.Dial, DisableKeepAlives: true}}
		answer := labtest.Must(client.Get("http://" + a.Health() + "/readyz"))(t)
		defer answer.Body.Close()
		return string(labtest.Must(io.ReadAll(answer.Body))(t))
	}
	if text := readyz(); !strings.HasPrefix(text, "ok\nIPv6 does not work on this node") {
		t.Errorf("/readyz: %s", text)
	}
	if out, _, err := a.Ctl(ctx, "doctor"); err != nil || !strings.Contains(out, "IPv6 does not work on this node") {
		t.Errorf("doctor: %v\n%s", err, out)
	}
	labtest.Must(a.Run(ctx, "sysctl -qw net.ipv6.conf.eth0.disable_ipv6=0"))(t)
	labtest.Do(t, a.ConfigureUplink(ctx, a.IPv4))
	reach(env.Subnets.IPv6.Addr().String())
	labtest.Do(t, lab.Poll(ctx, "/readyz", func() error {
		if text := readyz(); text != "ok\n" {
			return errors.New(text)
		}
		return nil
	}))
}
