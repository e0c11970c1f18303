package e2e

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// TestIdleConnections: clients that connect to the health server and send nothing take neither the descriptors that a
// repair needs nor the server from others.
func TestIdleConnections(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, time.Minute)
	l := labtest.New(ctx, t, vxlanConfig, lab.NodeOptions{})
	n := l.Nodes()[0]
	labtest.Start(ctx, t, l, "--ip-masq")
	labtest.Must(n.LimitFiles(128))(t)
	var conns []net.Conn
	defer func() {
		for _, conn := range conns {
			conn.Close()
		}
	}()
	for range 1000 {
		conns = append(conns, labtest.Must(n.Dial(ctx, "tcp", n.Health()))(t))
	}
	const rules = "iptables -t nat -S FLANNEL-POSTRTG"
	before := labtest.Must(n.Run(ctx, rules))(t)
	labtest.Must(n.Run(ctx, "iptables -t nat -F FLANNEL-POSTRTG"))(t)
	labtest.Do(t, lab.Poll(ctx, "the rules to return", func() error {
		if now, err := n.Run(ctx, rules); now != before {
			return fmt.Errorf("the rules are\n%s\n%w", now, err)
		}
		return nil
	}))
	labtest.Do(t, n.Ready(ctx))
	if log := n.Log(); strings.Contains(log, "too many open files") {
		t.Errorf("descriptors were missing:\n%s", log)
	}
}
