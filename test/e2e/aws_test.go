package e2e

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/test/cloud"
	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// Where daemons find EC2, in any lab: tests that run side by side share the
// environment. There are no credentials in it, so that those of the instance's
// role are used.
const ec2Address = "198.19.0.1:8773"

func init() {
	for key, value := range map[string]string{
		"AWS_ENDPOINT_URL_EC2": "http://" + ec2Address, "AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://" + ec2Address,
		"AWS_CONFIG_FILE": "/nowhere", "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
	} {
		os.Setenv(key, value)
	}
}

// A vpc is a lab whose underlay has the routes of the main route table of a cloud.
type vpc struct {
	*cloud.State
	lab  *lab.Lab
	hops map[*lab.Node]string // what routes to nodes lead to
}

func newAWS(ctx context.Context, t *testing.T, nodes int) *vpc {
	s := cloud.NewEC2()
	return newCloud(ctx, t, nodes, "aws-vpc", s.State, s, ec2Address)
}

// newCloud returns a lab whose nodes have a backend, and whose cloud's server is at an address.
func newCloud(ctx context.Context, t *testing.T, nodes int, backend string, state *cloud.State, handler http.Handler,
	address string) *vpc {
	t.Helper()
	options := make([]lab.NodeOptions, nodes)
	for i := range options {
		options[i].Routed = true
	}
	v := &vpc{state, labtest.New(ctx, t, `{`+ipv4Network+`, `+ipv6Network+`, "Backend": {"Type": "`+backend+`"}}`,
		options...), map[*lab.Node]string{}}
	var routed map[netip.Prefix]netip.Addr
	v.Forward(func(gateways map[netip.Prefix]netip.Addr) {
		script := ""
		for dst, via := range gateways {
			script += fmt.Sprintf("route replace %s via %s\n", dst, via)
		}
		for dst := range routed {
			if !gateways[dst].IsValid() {
				script += fmt.Sprintf("route del %s\n", dst)
			}
		}
		routed = gateways
		v.underlay(ctx, t, script)
	})
	for _, n := range v.lab.Nodes() {
		v.hops[n] = v.Launch("subnet-1", n.IPv4, n.IPv6)
	}
	v.serve(t, handler, address)
	return v
}

// underlay runs commands of ip on the underlay.
func (v *vpc) underlay(ctx context.Context, t *testing.T, script string) {
	cmd := exec.CommandContext(ctx, "ip", "-n", v.lab.Name+"-net", "-batch", "-")
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil && ctx.Err() == nil {
		t.Errorf("the underlay: %v: %s\n%s", err, out, script)
	}
}

// serve serves a cloud at an address outside.
func (v *vpc) serve(t *testing.T, handler http.Handler, address string) {
	t.Helper()
	var listener net.Listener
	labtest.Do(t, v.lab.Outside.Do(func() (err error) {
		listener, err = net.Listen("tcp", address)
		return err
	}))
	server := &http.Server{Handler: handler}
	go server.Serve(listener)
	t.Cleanup(func() { server.Close() })
}

// routes waits until the route table has the two routes of each of the nodes,
// and no more.
func (v *vpc) routes(ctx context.Context, t *testing.T, nodes ...*lab.Node) {
	t.Helper()
	labtest.Do(t, lab.Poll(ctx, "the VPC's routes", func() error {
		var want []string
		for _, n := range nodes {
			env, err := n.SubnetEnv()
			if err != nil {
				return err
			}
			for _, s := range env.Subnets.Each() {
				want = append(want, s.String()+" "+v.hops[n])
			}
		}
		got := v.Routes(v.Main())
		slices.Sort(want)
		slices.Sort(got)
		if !slices.Equal(got, want) {
			return fmt.Errorf("they are\n\t%s\nwant\n\t%s", strings.Join(got, "\n\t"), strings.Join(want, "\n\t"))
		}
		return nil
	}))
}

// TestAWS: whatever happens to daemons, instances and the API, there is one
// right route a node and family in the end, and pods reach each other by it.
func TestAWS(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 5*time.Minute)
	v := newAWS(ctx, t, 3)
	nodes := v.lab.Nodes()
	first, second, third := nodes[0], nodes[1], nodes[2]
	labtest.Start(ctx, t, v.lab, "--ip-masq")
	v.routes(ctx, t, nodes...)
	for _, n := range nodes {
		if !v.Forwards(v.hops[n]) {
			t.Errorf("the source/destination check of %s is on", n.Hostname)
		}
		key, _ := leaseOf(ctx, t, v.lab, n)
		if value := labtest.Must(v.lab.Etcd.Get(ctx, key))(t); strings.Contains(value, "Backend") {
			t.Errorf("%s has published %s", n.Hostname, value)
		}
		expectNoPath(ctx, t, n)
	}
	pods := addPods(ctx, t, v.lab)
	checkPaths(ctx, t, v.lab, pods)

	// A daemon starts again: nothing needs to be done.
	lossless := startPings(ctx, t, pods)
	looks := v.Calls(cloud.Read)
	labtest.Do(t, first.Restart(ctx))
	labtest.Do(t, first.WaitReady(ctx))
	labtest.Do(t, lab.Poll(ctx, "the daemon to look at the routes", func() error {
		if n := v.Calls(cloud.Read); n == looks {
			return fmt.Errorf("it was called %d times", n)
		}
		return nil
	}))
	v.routes(ctx, t, nodes...)
	if created, others := v.Calls(cloud.Create), v.Calls(cloud.Replace)+v.Calls(cloud.Delete); created != 6 ||
		others != 0 {
		t.Errorf("six routes took %d calls of CreateRoute, and %d of others", created, others)
	}
	lossless()

	// An instance is replaced: another network interface, the same address.
	subnets := labtest.Must(second.SubnetEnv())(t).Subnets
	v.Terminate(v.hops[second])
	labtest.Do(t, second.Reboot(ctx))
	v.hops[second] = v.Launch("subnet-1", second.IPv4, second.IPv6)
	labtest.Do(t, second.Start("--ip-masq"))
	labtest.Do(t, second.WaitReady(ctx))
	if again := labtest.Must(second.SubnetEnv())(t).Subnets; again != subnets {
		t.Errorf("the replaced instance has %s, before %s", again, subnets)
	}
	v.routes(ctx, t, nodes...)
	pods[1] = labtest.Must(second.AddPod(ctx, "pod"))(t)
	for _, dst := range pods[1].Addrs() {
		labtest.Do(t, pods[0].WaitPing(ctx, dst))
	}
	v.removeNode(ctx, t, first, second, third)
	v.fillTable(ctx, t, first, second, third, pods)

	// What a node has left in the cloud is removed with the rest.
	labtest.Do(t, first.Stop(ctx))
	out, _, err := first.Ctl(ctx, "cleanup", "--yes")
	if err != nil || strings.Count(out, "aws ec2 delete-route ") != 2 {
		t.Errorf("cleanup: %v\n%s", err, out)
	}
	v.routes(ctx, t, second, third)
}

// removeNode removes a node. Its routes in the table are deleted with its lease.
func (v *vpc) removeNode(ctx context.Context, t *testing.T, first, second, third *lab.Node) {
	key, _ := leaseOf(ctx, t, v.lab, third)
	labtest.Do(t, third.Stop(ctx))
	v.Terminate(v.hops[third])
	labtest.Do(t, first.Restart(ctx))
	labtest.Do(t, first.WaitReady(ctx))
	if n := len(v.Routes(v.Main())); n != 6 {
		t.Errorf("while there is a lease, there are %d routes", n)
	}
	labtest.Do(t, v.lab.Etcd.Delete(ctx, key))
	labtest.Do(t, first.Restart(ctx))
	v.routes(ctx, t, first, second)

}

// fillTable: the table is full when the node returns. The other nodes are not affected.
func (v *vpc) fillTable(ctx context.Context, t *testing.T, first, second, third *lab.Node, pods []*lab.Pod) {
	v.SetQuota(2)
	labtest.Do(t, third.Reboot(ctx))
	v.hops[third] = v.Launch("subnet-1", third.IPv4, third.IPv6)
	lossless := startPings(ctx, t, pods)
	labtest.Do(t, third.Start("--ip-masq"))
	labtest.Do(t, third.WaitReady(ctx))
	said(ctx, t, third, `err="the table is full, this node's pods cannot be reached through it: raise the quota \"Routes per route table\"`)
	v.routes(ctx, t, first, second)
	lossless()
	v.SetQuota(50)
	v.routes(ctx, t, first, second, third)
	said(ctx, t, third, `"Recovered" operation="Route table `+v.Main()+`"`)
}

// TestAWSThrottled: 30 seconds of throttling, in which daemons start and
// another program removes routes.
func TestAWSThrottled(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 5*time.Minute)
	v := newAWS(ctx, t, 3)
	nodes := v.lab.Nodes()
	for _, n := range nodes[:2] {
		labtest.Do(t, n.Start("--ip-masq"))
	}
	for _, n := range nodes[:2] {
		labtest.Do(t, n.WaitReady(ctx))
	}
	v.routes(ctx, t, nodes[:2]...)
	pods := addPodsTo(ctx, t, nodes[:2])
	lossless := startPings(ctx, t, pods)
	v.Fail(cloud.All, cloud.Throttled)
	end := time.After(30 * time.Second)
	labtest.Do(t, nodes[0].Restart(ctx))
	labtest.Do(t, nodes[2].Start("--ip-masq"))
	for _, n := range nodes {
		labtest.Do(t, n.WaitReady(ctx)) // a lease and the kernel's part are not AWS's business
	}
	for _, n := range []*lab.Node{nodes[0], nodes[2]} {
		said(ctx, t, n, `err="EC2 throttles DescribeRouteTables (RequestLimitExceeded)`)
	}
	<-end
	lossless()
	v.Remove(v.Main(), labtest.Must(nodes[1].SubnetEnv())(t).Subnets.IPv4)
	v.Fail(cloud.All, "")
	for len(v.Routes(v.Main())) != 6 && ctx.Err() == nil { // for longer than lab.Poll has patience
		<-time.After(100 * time.Millisecond)
	}
	v.routes(ctx, t, nodes...)
	for _, n := range nodes {
		for _, line := range []string{"EC2 throttles DescribeRouteTables", "EC2 throttles ModifyNetworkInterfaceAttribute"} {
			if count := strings.Count(n.Log(), line); count > 1 {
				t.Errorf("%s says %d times that %s", n.Hostname, count, line)
			}
		}
	}
	pods = append(pods, labtest.Must(nodes[2].AddPod(ctx, "pod"))(t))
	for _, dst := range pods[2].Addrs() {
		for _, from := range pods[:2] {
			labtest.Do(t, from.WaitPing(ctx, dst))
		}
	}
}

// said waits until a daemon has said something, and wants it said once.
func said(ctx context.Context, t *testing.T, n *lab.Node, text string) {
	t.Helper()
	labtest.Do(t, lab.Poll(ctx, n.Hostname+" to say: "+text, func() error {
		if count := strings.Count(n.Log(), text); count != 1 {
			return fmt.Errorf("it has said so %d times", count)
		}
		return nil
	}))
}

// TestAWSLean: of the hundreds of calls of EC2's client, those that are used are
// linked. What has the linker keep all of them (the SDK's paginators, for one)
// makes the daemon more than twice as large.
func TestAWSLean(t *testing.T) {
	t.Parallel()
	program := labtest.Must(os.ReadFile("../../build/bin/flanneld"))(t)
	if !bytes.Contains(program, []byte("ec2.(*Client).CreateRoute")) {
		t.Error("the daemon has no CreateRoute: is the name of the function another one?")
	}
	if bytes.Contains(program, []byte("ec2.(*Client).RunInstances")) {
		t.Error("the daemon has all calls of EC2's client")
	}
}
