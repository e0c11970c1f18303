package kernel

import (
	"testing"

	"github.com/flanneld/flanneld/pkg/nstest"
)

// Where the host has IPv6 off for new devices, our own devices have it on, and keep it on.
func TestIPv6OffByDefault(t *testing.T) {
	host(t)
	nstest.Run(t, "sysctl -qw net.ipv6.conf.default.disable_ipv6=1")
	r := start(t)
	before := tables(t)
	nstest.Run(t, "sysctl -qw net/ipv6/conf/flannel-v6.1/disable_ipv6=1")
	if tables(t) == before {
		t.Fatal("IPv6 is off, and nothing is missing")
	}
	settle(t, r, "all to be back", func() bool { return tables(t) == before })
}
