// Command demo shows a cluster at work: nodes as network namespaces, a real
// etcd, the daemon, and a pod on each node. The environment has the settings:
//
//	NODES=3        how many nodes
//	BACKEND=vxlan  or host-gw, …
//	IPV6=1         both families
//	NFTABLES=1     rules in nftables
//	KEEP=1         leave it running; demo -down takes it down
//
// With -kube it is a whole Kubernetes cluster, NODES=2, whose network is the
// published manifest. NFTABLES=1 is then for kube-proxy.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/flanneld/flanneld/test/lab"
)

// keptName is the lab that KEEP=1 leaves.
const keptName = "fldemo"

func main() {
	down := flag.Bool("down", false, "take down what KEEP=1 left")
	kube := flag.Bool("kube", false, "show a Kubernetes cluster")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	var err error
	if *down {
		err = lab.Remove(ctx, keptName)
	} else {
		err = run(ctx, *kube)
	}
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "\ndemo: %v\n", err)
		os.Exit(1)
	}
}

// settings are from the environment.
type settings struct {
	nodes                int
	backend              string
	ipv6, nftables, keep bool
}

func readSettings(kube bool) (settings, error) {
	s := settings{nodes: 3, backend: "vxlan"}
	if kube {
		s.nodes = 2
	}
	if text := os.Getenv("NODES"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil || n < 2 || n > 100 {
			return s, fmt.Errorf("NODES=%s: it takes 2 to 100 nodes", text)
		}
		s.nodes = n
	}
	if text := os.Getenv("BACKEND"); text != "" {
		s.backend = text
	}
	for name, on := range map[string]*bool{"IPV6": &s.ipv6, "NFTABLES": &s.nftables, "KEEP": &s.keep} {
		if text := os.Getenv(name); text != "" {
			var err error
			if *on, err = strconv.ParseBool(text); err != nil {
				return s, fmt.Errorf("%s=%s: 1 or 0", name, text)
			}
		}
	}
	if kube && (s.ipv6 || s.backend != "vxlan") {
		return s, errors.New("IPV6 and BACKEND are not for a Kubernetes cluster: its network is the published manifest, IPv4 and vxlan")
	}
	return s, nil
}

// config is the network configuration as it goes to etcd.
func (s settings) config() string {
	six := ""
	if s.ipv6 {
		six = `"EnableIPv6": true, "IPv6Network": "fd00:5::/48", `
	}
	return fmt.Sprintf(`{"Network": "10.5.0.0/16", %s"EnableNFTables": %t, "Backend": {"Type": %q}}`, six,
		s.nftables, s.backend)
}

// demo is a running cluster. What goes wrong is shown and counted, and the
// show goes on.
type demo struct {
	*lab.Lab
	pods   []*lab.Pod // one on each node
	failed int
}

func run(ctx context.Context, kube bool) error {
	s, err := readSettings(kube)
	if err != nil {
		return err
	}
	var o lab.Options
	if s.keep {
		if lab.Exists(keptName) {
			return errors.New("one is running already: make demo-down takes it down")
		}
		o.Keep = keptName
	}
	l, err := lab.New(ctx, o)
	if err != nil {
		return err
	}
	d := &demo{Lab: l}
	show, hints := d.show, d.hints
	if kube {
		show, hints = d.showKube, d.hintsKube
	}
	err = show(ctx, s)
	if err == nil && d.failed > 0 {
		err = fmt.Errorf("%d of the above failed", d.failed)
	}
	if !s.keep || ctx.Err() != nil {
		return errors.Join(err, l.Close())
	}
	heading("Still there")
	w := table()
	hints(w)
	fmt.Fprintf(w, "  make demo-down\ttake it all down\n")
	return errors.Join(err, w.Flush())
}

// hints prints what to do with a cluster that stays.
func (d *demo) hints(w io.Writer) {
	fmt.Fprintf(w, "  ip netns exec %s-n1 bash\tenter a node; %s-n2 and others, its pod %s-n1-pod\n", d.Name,
		d.Name, d.Name)
	fmt.Fprintf(w, "  less %s/n1/flanneld.log\tread what its daemon said\n", d.Dir)
}

func (d *demo) show(ctx context.Context, s settings) error {
	if err := d.start(ctx, s); err != nil {
		return err
	}
	for _, part := range []func(context.Context){d.roundTrips, d.sources, d.kernel, d.throughput} {
		if part(ctx); ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return nil
}

func heading(text string) {
	if out, err := os.Stdout.Stat(); err == nil && out.Mode()&os.ModeCharDevice != 0 {
		text = "\033[1m" + text + "\033[m" // bold on a terminal
	}
	fmt.Printf("\n%s\n", text)
}

func (d *demo) fail(err error) {
	fmt.Printf("  FAILED  %v\n", err)
	d.failed++
}

// table returns a writer that aligns columns, indented by two; Flush ends it.
func table() *tabwriter.Writer {
	return tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', 0)
}

// start starts all daemons at once, and adds the pods.
func (d *demo) start(ctx context.Context, s settings) error {
	config := s.config()
	heading("Configuration")
	fmt.Printf("  %s\n", config)
	if err := d.Etcd.Configure(ctx, config); err != nil {
		return err
	}
	for range s.nodes {
		if _, err := d.AddNode(ctx, lab.NodeOptions{}); err != nil {
			return err
		}
	}
	nodes := d.Nodes()
	ready, errs := make([]time.Duration, s.nodes), make([]error, s.nodes)
	var wg sync.WaitGroup
	for i, n := range nodes {
		started := time.Now()
		if err := n.Start("--ip-masq"); err != nil {
			return err
		}
		wg.Go(func() {
			errs[i] = n.WaitReady(ctx)
			ready[i] = time.Since(started)
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for _, n := range nodes {
		p, err := n.AddPod(ctx, "pod")
		if err != nil {
			return err
		}
		d.pods = append(d.pods, p)
	}

	heading("Nodes")
	w := table()
	fmt.Fprintln(w, "  node\taddress\tsubnet\tpod\tMTU\tready after")
	for i, n := range nodes {
		env, err := n.SubnetEnv()
		if err != nil {
			return err
		}
		fmt.Fprintf(w, "  %s\t%s\t%s\t%s\t%d\t%d ms\n", n.Hostname, join(n.Addrs()[:len(env.Subnets.Each())]), env.Subnets,
			join(d.pods[i].Addrs()), env.MTU, ready[i].Milliseconds())
	}
	return w.Flush()
}

func join(ips []netip.Addr) string {
	var texts []string
	for _, ip := range ips {
		texts = append(texts, ip.String())
	}
	return strings.Join(texts, ",")
}

// roundTrips has every pod ping every other.
func (d *demo) roundTrips(ctx context.Context) {
	for f := range d.pods[0].Addrs() {
		heading("Round trips between pods, IPv" + map[bool]string{true: "4", false: "6"}[d.pods[0].Addrs()[f].Is4()])
		var errs []error
		w := table()
		for _, n := range d.Nodes() {
			fmt.Fprintf(w, "\tto %s", n.Hostname)
		}
		fmt.Fprintln(w)
		for i, from := range d.pods {
			fmt.Fprintf(w, "  from %s", d.Nodes()[i].Hostname)
			for j, to := range d.pods {
				if i == j {
					fmt.Fprint(w, "\t·")
					continue
				}
				dst := to.Addrs()[f]
				err := from.WaitPing(ctx, dst) // neighbours find each other
				var got lab.Pings
				if err == nil {
					got, err = from.Ping(ctx, dst, lab.PingOptions{Count: 5})
				}
				if err != nil {
					errs = append(errs, err)
					fmt.Fprint(w, "\tFAILED")
					continue
				}
				fmt.Fprintf(w, "\t%.2f ms", float64(got.RTT)/float64(time.Millisecond))
			}
			fmt.Fprintln(w)
		}
		w.Flush()
		for _, err := range errs {
			d.fail(err)
		}
	}
}

// sources shows as whom the first node's pod is seen.
func (d *demo) sources(ctx context.Context) {
	heading("Source addresses")
	for _, ns := range []*lab.Namespace{d.Outside, d.pods[1].Namespace} {
		if err := ns.Mirror(); err != nil {
			d.fail(err)
			return
		}
	}
	pod, node := d.pods[0], d.Nodes()[0]
	for f, own := range pod.Addrs() {
		outside, host := lab.Outside, node.IPv4
		if own.Is6() {
			outside, host = lab.OutsideV6, node.IPv6
		}
		for _, c := range []struct {
			whom      string
			dst, want netip.Addr
			as        string
		}{
			{"n2's pod", d.pods[1].Addrs()[f], own, "itself"},
			{"the host outside", outside, host, "its node"},
		} {
			switch seen, err := pod.SeenAs(ctx, "tcp", c.dst); {
			case err != nil:
				d.fail(err)
			case seen != c.want:
				d.fail(fmt.Errorf("n1's pod %s is seen by %s as %s, not as %s, %s", own, c.whom, seen, c.as, c.want))
			default:
				fmt.Printf("  n1's pod %s is seen by %s as %s, %s\n", own, c.whom, c.as, seen)
			}
		}
	}
}

// kernel shows what the first node's kernel holds for its peers.
func (d *demo) kernel(ctx context.Context) {
	n := d.Nodes()[0]
	for _, show := range []struct{ command, only string }{
		{"ip -4 route show", ""},
		{"ip -6 route show", " via "},
		{"bridge fdb show", " dst "},
	} {
		out, err := n.Run(ctx, show.command)
		if err != nil {
			d.fail(err)
			continue
		}
		var lines []string
		for line := range strings.Lines(out) {
			if strings.Contains(line, show.only) {
				lines = append(lines, "  "+strings.TrimSpace(line))
			}
		}
		if len(lines) > 0 {
			heading("n1: " + show.command)
			fmt.Println(strings.Join(lines, "\n"))
		}
	}
}

// throughput measures between the first two pods.
func (d *demo) throughput(ctx context.Context) {
	heading("Throughput from n1's pod to n2's, TCP, 2 s")
	for _, dst := range d.pods[1].Addrs() {
		bits, err := d.pods[0].Throughput(ctx, d.pods[1].Namespace, dst, 2)
		if err != nil {
			d.fail(err)
			continue
		}
		fmt.Printf("  %.2f Gbit/s to %s\n", bits/1e9, dst)
	}
}
