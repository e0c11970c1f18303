package e2e

import (
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// TestDocker: mk-docker-opts.sh configures a real engine for the node's subnet. Containers get addresses of the subnet,
// and those of two nodes reach each other with their own addresses, although Docker drops forwarded packets.
func TestDocker(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 3*time.Minute)
	l := labtest.New(ctx, t, `{`+ipv4Network+`, `+ipv6Network+`, "Backend": {"Type": "vxlan"}}`,
		make([]lab.NodeOptions, 2)...)
	labtest.Start(ctx, t, l, "--ip-masq")
	var addresses [2][]string
	for i, n := range l.Nodes() {
		file := filepath.Join(n.Dir, "docker.env")
		labtest.Must(n.Run(ctx, "sh ../../dist/mk-docker-opts.sh -c -6 -f "+n.SubnetFile()+" -d "+file))(t)
		// As systemd reads an EnvironmentFile, and splits $DOCKER_OPTS.
		text := strings.TrimSpace(string(labtest.Must(os.ReadFile(file))(t)))
		options := strings.Fields(strings.Trim(strings.TrimPrefix(text, "DOCKER_OPTS="), `"`))
		labtest.Do(t, n.StartDocker(ctx, options...))
		// docker0 has its MTU from the first container.
		if out, _, err := n.Ctl(ctx, "doctor"); err != nil || strings.Contains(out, "mtu-bridge") {
			t.Errorf("%v\n%s", err, out)
		}
		addresses[i] = labtest.Must(n.RunEcho(ctx, "echo"+n.Hostname))(t)
		env := labtest.Must(n.SubnetEnv())(t)
		if len(addresses[i]) != 2 {
			t.Fatalf("the container on %s has the addresses %v, with %s", n.Hostname, addresses[i], text)
		}
		for j, subnet := range env.Subnets.Each() {
			if ip := netip.MustParseAddr(addresses[i][j]); !subnet.Contains(ip) {
				t.Errorf("the container on %s has the address %s, not of %s", n.Hostname, ip, subnet)
			}
		}
		if policy := labtest.Must(n.Run(ctx, "iptables -S FORWARD"))(t); !strings.Contains(policy, "-P FORWARD DROP") {
			t.Errorf("the test proves less than it could: Docker leaves forwarding open\n%s", policy)
		}
	}
	for i, n := range l.Nodes() {
		peer := l.Nodes()[1-i]
		for j, dst := range addresses[1-i] {
			want := "echo" + peer.Hostname + " " + addresses[i][j]
			labtest.Do(t, lab.Poll(ctx, "the container on "+peer.Hostname, func() error {
				got, err := n.Docker(ctx, "exec echo"+n.Hostname+" /echo "+net.JoinHostPort(dst, "8080"))
				if err == nil && got != want {
					t.Errorf("%s answers %q, want %q", dst, got, want)
				}
				return err
			}))
		}
	}
}
