package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// TestReserve: an operator on a machine without a daemon reserves subnets and releases them. Nodes take what is reserved
// for them, keep what they have, and are cut off only when the operator has confirmed that.
func TestReserve(t *testing.T) {
	t.Parallel()
	for _, backend := range []string{"vxlan", "host-gw"} {
		t.Run(backend, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t, 2*time.Minute)
			l := labtest.New(ctx, t, fmt.Sprintf(dualConfig, backend), make([]lab.NodeOptions, 4)...)
			n1, n2, n3 := l.Nodes()[0], l.Nodes()[1], l.Nodes()[2]
			for _, n := range []*lab.Node{n1, n2} {
				labtest.Do(t, n.Start("--ip-masq"))
			}
			for _, n := range []*lab.Node{n1, n2} {
				labtest.Do(t, n.WaitReady(ctx))
			}
			o := operator{T: t, ctx: ctx, lab: l, machine: l.Nodes()[3]}

			// For a node that has not started yet. No other node takes the reservation for a faulty lease.
			const free = "10.5.200.0/24,fd00:5:0:c8::/64"
			o.does("reserve", free, addresses(n3))
			o.lists(free, "reserved, not used yet")
			s := getStatus(ctx, t, n1)
			if len(s.LeftOut) > 0 || s.Peers != 1 {
				t.Errorf("the others have %d peers, and leave out %+v", s.Peers, s.LeftOut)
			}
			labtest.Do(t, n3.Start("--ip-masq"))
			labtest.Do(t, n3.WaitReady(ctx))
			if got := o.subnets(n3); got != free {
				t.Errorf("the node has %s", got)
			}
			o.lists(free, n3.Hostname, "reserved")

			// The lease of a node that works.
			pods := addPodsTo(ctx, t, []*lab.Node{n1, n2, n3})
			for _, p := range pods {
				for _, to := range pods[0].Addrs() {
					labtest.Do(t, p.WaitPing(ctx, to))
				}
			}
			lossless := startPings(ctx, t, pods)
			first := o.subnets(n1)
			o.does("reserve", first, addresses(n1))
			o.lists(first, n1.Hostname, "never", "reserved")
			labtest.Do(t, lab.Poll(ctx, "the daemon to know", func() error {
				if s := getStatus(ctx, t, n1); !s.Lease.Expires.IsZero() {
					return fmt.Errorf("the lease ends at %v", s.Lease.Expires)
				}
				return nil
			}))
			o.does("release", strings.Split(first, ",")[1])
			o.lists(first, n1.Hostname, "23h59m")
			o.refuses("flanneld runs on "+n1.IPv4.String(), "release", first, "--yes")
			lossless()

			o.cutsOff(n2, "10.5.201.0/24,fd00:5:0:c9::/64")
			o.refuses("is reserved for "+n2.IPv4.String(), "reserve", o.subnets(n2), "198.18.99.9,fd18::99", "--yes")
			o.does("release", o.subnets(n2))
			o.cutsOff(n2, o.subnets(n2))

			// A node that is gone.
			labtest.Do(t, n3.Stop(ctx))
			o.refuses("no terminal", "release", free)
			o.does("release", free, "--yes")
			if out := o.list(); strings.Contains(out, "10.5.200.0/24") {
				t.Errorf("there is\n%s", out)
			}
			o.refuses("is not what a node can have", "reserve", "10.5.200.0/25,fd00:5:0:c8::/64", addresses(n3))
			o.refuses("etcd at http://198.18.0.254:1: ", "list", "--etcd-endpoints=http://198.18.0.254:1")
		})
	}
}

// addresses are what a node is known by.
func addresses(n *lab.Node) string { return n.IPv4.String() + "," + n.IPv6.String() }

// An operator runs flannelctl leases on a machine that is no node, as a user who is not root.
type operator struct {
	*testing.T
	ctx     context.Context
	lab     *lab.Lab
	machine *lab.Node
}

var notRoot = []string{"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"}

func (o operator) does(args ...string) string {
	o.Helper()
	return labtest.Must(first(o.machine.CtlBy(o.ctx, notRoot, append([]string{"leases"}, args...)...)))(o.T)
}

// refuses runs a command that must fail with one line, and change nothing.
func (o operator) refuses(why string, args ...string) {
	o.Helper()
	before := labtest.Must(o.lab.Etcd.List(o.ctx, lab.Prefix+"/subnets/"))(o.T)
	out, status, err := o.machine.CtlBy(o.ctx, notRoot, append([]string{"leases"}, args...)...)
	if status != 2 || !strings.Contains(err.Error(), why) || strings.Count(strings.TrimSpace(err.Error()), "\n") > 0 || out != "" {
		o.Errorf("%v: status %d, %v, want %q; printed\n%s", args, status, err, why, out)
	}
	if now := labtest.Must(o.lab.Etcd.List(o.ctx, lab.Prefix+"/subnets/"))(o.T); fmt.Sprint(now) != fmt.Sprint(before) {
		o.Errorf("%v: there was %v, and is %v", args, before, now)
	}
}

// answers runs a command on a terminal, and answers its question.
func (o operator) answers(answer string, args ...string) (out string, status int, err error) {
	o.Helper()
	terminal := labtest.Must(os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0))(o.T)
	defer terminal.Close()
	labtest.Do(o.T, unix.IoctlSetPointerInt(int(terminal.Fd()), unix.TIOCSPTLCK, 0))
	number := labtest.Must(unix.IoctlGetInt(int(terminal.Fd()), unix.TIOCGPTN))(o.T)
	labtest.Must(terminal.WriteString(answer + "\n"))(o.T)
	by := []string{"sh", "-c", fmt.Sprintf(`exec "$@" </dev/pts/%d`, number), "sh"}
	return o.machine.CtlBy(o.ctx, by, append([]string{"leases"}, args...)...)
}

// cutsOff reserves subnets for a node that is not there, which another node has, or for that node, which has others: the
// operator must confirm that.
func (o operator) cutsOff(n *lab.Node, subnets string) {
	o.Helper()
	had, ips := o.subnets(n), addresses(n)
	if subnets == had {
		ips = "198.18.99.9,fd18::99"
	}
	o.refuses("there is no terminal for the confirmation (use --yes): "+n.IPv4.String()+" ("+n.Hostname+") has the lease of "+had,
		"reserve", subnets, ips)
	before := labtest.Must(o.lab.Etcd.Leases(o.ctx))(o.T)
	if out, status, err := o.answers("n", "reserve", subnets, ips); status != 2 ||
		!strings.Contains(err.Error(), "nothing was changed") || !strings.Contains(out, "are cut off until they are started again") {
		o.Errorf("after no: status %d, %v\n%s", status, err, out)
	}
	if now := labtest.Must(o.lab.Etcd.Leases(o.ctx))(o.T); fmt.Sprint(now) != fmt.Sprint(before) {
		o.Errorf("after no, there is %v", now)
	}
	labtest.Must(first(o.answers("y", "reserve", subnets, ips)))(o.T)
	if subnets != had {
		labtest.Do(o.T, n.Restart(o.ctx))
		had = ""
	}
	labtest.Do(o.T, lab.Poll(o.ctx, n.Hostname+" to have other subnets", func() error {
		if got := o.subnets(n); got == had || had == "" && got != subnets {
			return fmt.Errorf("it has %s", got)
		}
		return nil
	}))
}

func (o operator) subnets(n *lab.Node) string {
	o.Helper()
	return labtest.Must(n.SubnetEnv())(o.T).Subnets.String()
}

func (o operator) list() string { return o.does("list") }

// lists checks the line about subnets in what list prints, and that JSON has the same.
func (o operator) lists(subnets string, parts ...string) {
	o.Helper()
	first, _, _ := strings.Cut(subnets, ",")
	line := ""
	for l := range strings.Lines(o.list()) {
		if strings.HasPrefix(l, first+" ") {
			line = l
		}
	}
	for _, part := range append(parts, strings.Split(subnets, ",")...) {
		if !strings.Contains(line, part) {
			o.Errorf("the line about %s is %q, and has no %q", subnets, line, part)
		}
	}
	var all []struct {
		Subnets  []netip.Prefix
		Reserved bool
	}
	labtest.Do(o.T, json.Unmarshal([]byte(o.does("list", "-o", "json")), &all))
	for _, h := range all {
		if h.Subnets[0].String() == first && h.Reserved != strings.Contains(line, "reserved") {
			o.Errorf("in JSON: %+v", h)
		}
	}
}
