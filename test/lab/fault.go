package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ConfigureUplink does what a host's network manager does when it starts: eth0 is set up and gets its addresses and
// the default routes. ipv4 may differ from the node's first address.
func (n *Node) ConfigureUplink(ctx context.Context, ipv4 netip.Addr) error {
	return n.Script(ctx,
		"link set eth0 up",
		"addr replace "+ipv4.String()+"/24 dev eth0",
		"addr replace "+n.IPv6.String()+"/64 dev eth0 nodad",
		"route replace default via "+Gateway.String(),
		"route replace default via "+GatewayV6.String())
}

// PullCable takes eth0's carrier away, PlugCable gives it back.
func (n *Node) PullCable(ctx context.Context) error {
	return n.far.Script(ctx, "link set "+n.Hostname+" down")
}

func (n *Node) PlugCable(ctx context.Context) error {
	return n.far.Script(ctx, "link set "+n.Hostname+" up")
}

// AddSpareUplink gives the node a second interface, eth1, on a subnet of its own
// that the underlay routes, with a default route that is worse than eth0's. It
// returns the interface's address.
func (n *Node) AddSpareUplink(ctx context.Context) (netip.Addr, error) {
	own := netip.AddrFrom4([4]byte{198, 18, byte(100 + n.Number), byte(n.Number)})
	gateway := netip.AddrFrom4([4]byte{198, 18, byte(100 + n.Number), 254})
	port := n.Hostname + "s"
	err := n.lab.net.Script(ctx,
		fmt.Sprintf("link add %s type veth peer name eth1 netns %s", port, n.Namespace.Name),
		fmt.Sprintf("addr add %s/24 dev %s", gateway, port),
		"link set "+port+" up")
	if err != nil {
		return own, err
	}
	return own, n.Script(ctx,
		"link set eth1 up",
		"addr add "+own.String()+"/24 dev eth1",
		"route add default via "+gateway.String()+" metric 200")
}

// MoveIPv6 gives the node a second interface, eth1, to the same switch, and moves the node's IPv6 there: eth0 keeps
// IPv4.
func (n *Node) MoveIPv6(ctx context.Context) error {
	port := n.portV6()
	err := n.lab.net.Script(ctx,
		fmt.Sprintf("link add %s type veth peer name eth1 netns %s", port, n.Namespace.Name),
		"link set "+port+" master br0",
		"link set "+port+" up")
	if err != nil {
		return err
	}
	return errors.Join(n.Script(ctx, "addr del "+n.IPv6.String()+"/64 dev eth0"), n.ConfigureIPv6(ctx, n.IPv6))
}

func (n *Node) portV6() string { return n.Hostname + "v6" }

// ConfigureIPv6 does what a host's network manager does for eth1 when it starts, after MoveIPv6.
func (n *Node) ConfigureIPv6(ctx context.Context, own netip.Addr) error {
	return n.Script(ctx,
		"link set eth1 up",
		"addr replace "+own.String()+"/64 dev eth1 nodad",
		"route replace default via "+GatewayV6.String()+" dev eth1")
}

// PullIPv6 takes eth1 off the network, PlugIPv6 connects it again.
func (n *Node) PullIPv6(ctx context.Context) error {
	return n.lab.net.Script(ctx, "link set "+n.portV6()+" down")
}

func (n *Node) PlugIPv6(ctx context.Context) error {
	return n.lab.net.Script(ctx, "link set "+n.portV6()+" up")
}

// RemoveUplink makes eth0 vanish with all that is on it. ReplaceUplink makes
// another of the same name and MAC, not configured yet.
func (n *Node) RemoveUplink(ctx context.Context) error {
	return n.far.Script(ctx, "link del "+n.Hostname)
}

func (n *Node) ReplaceUplink(ctx context.Context) error {
	return n.lab.net.Script(ctx,
		fmt.Sprintf("link add %s type veth peer name eth0 address 02:00:c6:12:00:%02x netns %s", n.Hostname, n.Number,
			n.Namespace.Name),
		"link set "+n.Hostname+" master br0",
		"link set "+n.Hostname+" up")
}

// Freeze stops the daemon (SIGSTOP), in all of its threads. Thaw continues it.
func (d *Daemon) Freeze(ctx context.Context) error {
	if err := d.proc.cmd.Process.Signal(unix.SIGSTOP); err != nil {
		return err
	}
	return Poll(ctx, "flanneld to stop", func() error {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", d.proc.cmd.Process.Pid))
		if err != nil {
			return err
		}
		for _, thread := range threads {
			stat, err := os.ReadFile(thread)
			if err != nil {
				return err
			}
			// The state follows the name, which is in brackets (proc_pid_stat(5)).
			if _, state, _ := strings.Cut(string(stat), ") "); !strings.HasPrefix(state, "T ") {
				return fmt.Errorf("%s: %s", thread, stat)
			}
		}
		return nil
	})
}

// PID returns the daemon's process id.
func (d *Daemon) PID() int { return d.proc.cmd.Process.Pid }

func (d *Daemon) Thaw() error { return d.proc.cmd.Process.Signal(unix.SIGCONT) }

// LimitFiles lets the daemon open no file whose descriptor is not below most. Restore ends that.
func (d *Daemon) LimitFiles(most uint64) (restore func() error, err error) {
	pid := d.PID()
	var before unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &before); err != nil {
		return nil, err
	}
	restore = func() error { return unix.Prlimit(pid, unix.RLIMIT_NOFILE, &before, nil) }
	return restore, unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: most, Max: before.Max}, nil)
}

// NetlinkDrops returns how many notifications the namespace's netlink sockets
// have lost so far because their buffers were full.
func (ns *Namespace) NetlinkDrops(ctx context.Context) (int, error) {
	out, err := ns.Run(ctx, "cat /proc/net/netlink")
	if err != nil {
		return 0, err
	}
	lines := strings.Split(out, "\n")
	column := slices.Index(strings.Fields(lines[0]), "Drops")
	drops := 0
	for _, line := range lines[1:] {
		fields := strings.Fields(line)
		if column < 0 || column >= len(fields) {
			return 0, fmt.Errorf("/proc/net/netlink: no drops in %q", line)
		}
		n, err := strconv.Atoi(fields[column])
		if err != nil {
			return 0, fmt.Errorf("/proc/net/netlink: %w", err)
		}
		drops += n
	}
	return drops, nil
}

// Holds returns what the daemon keeps in the node's kernel, sorted: devices
// with their addresses, neighbours and FDB entries, routes, rules. What the
// kernel chooses, such as numbers of devices, is left out, so that equal state
// is equal text.
func (n *Node) Holds(ctx context.Context) (string, error) {
	var lines []string
	for _, show := range []struct{ stdin, command, tables string }{
		{"link show type vxlan\nlink show type ipip\naddr show scope global\nroute show\nneigh show nud permanent",
			"ip -d -o -4 -force -batch -", ""},
		{"addr show scope global\nroute show\nneigh show nud permanent", "ip -o -6 -force -batch -", ""},
		{"", "bridge fdb show", ""},
		{"", "nft -s list ruleset", ""},
		{"", "iptables-legacy-save", "ip_tables_names"},
		{"", "ip6tables-legacy-save", "ip6_tables_names"},
	} {
		if show.tables != "" && n.lacks(show.tables) {
			continue // a program that is not started takes no time
		}
		out, err := n.run(ctx, show.stdin, strings.Fields(show.command)...)
		if err != nil {
			return "", err
		}
		lines = append(lines, keep(out)...)
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n"), nil
}

// lacks reports whether a list of the namespace in /proc/net is empty or missing.
func (ns *Namespace) lacks(list string) bool {
	var text []byte
	err := ns.Do(func() (err error) {
		text, err = os.ReadFile("/proc/thread-self/net/" + list)
		return err
	})
	return err != nil || len(text) == 0
}

// Others returns what of the node's kernel is not the daemon's: links, addresses, routes, rules and all else that other
// programs set, or that the kernel sets for these. What changes by itself is left out. Numbers of devices are in it, so
// that a link that was replaced shows.
func (n *Node) Others(ctx context.Context) (string, error) {
	kernel, err := n.OtherObjects(ctx)
	if err != nil {
		return "", err
	}
	rules, err := n.others(ctx, []show{
		{"", "nft -s list ruleset"},
		{"", "iptables-legacy-save"},
		{"", "ip6tables-legacy-save"},
	})
	return kernel + rules, err
}

// OtherObjects is Others without the rules of firewalls.
func (n *Node) OtherObjects(ctx context.Context) (string, error) {
	return n.others(ctx, []show{
		{"link show\naddr show\nroute show table all\nrule show\nnexthop show\nneigh show nud permanent", "ip -d -o -force -batch -"},
		{"route show table all\nrule show\nneigh show nud permanent", "ip -d -o -6 -force -batch -"},
		{"", "ip xfrm policy list nosock"},
		{"", "bridge fdb show"},
	})
}

// A show is a command that shows something, and its input.
type show struct{ stdin, command string }

func (n *Node) others(ctx context.Context, shows []show) (string, error) {
	var b strings.Builder
	for _, show := range shows {
		out, err := n.run(ctx, show.stdin, strings.Fields(show.command)...)
		if err != nil {
			return "", err
		}
		lines := leaveOut(out)
		slices.Sort(lines)
		fmt.Fprintf(&b, "# %s\n%s\n", show.command, strings.Join(lines, "\n"))
	}
	return b.String(), nil
}

// byItself matches what changes by itself in the lines of Others.
var byItself = regexp.MustCompile(`\b(valid_lft|preferred_lft|expires|qdisc|state|qlen|\w+_timer) \S+|\blinkdown\b|<\S*>|` +
	`\[[0-9:]+\]|\b(numtxqueues|bridge_id) .*`)

// leaveOut returns the lines that are not the daemon's: the counterpart of keep.
func leaveOut(out string) (lines []string) {
	table, chain := false, false
	for line := range strings.Lines(out) {
		text := strings.Join(strings.Fields(line), " ")
		ours := ofDaemon.MatchString(text)
		switch {
		case strings.HasPrefix(text, "table "):
			table, chain = ours, false
		case strings.HasPrefix(text, "chain "):
			chain = ours
		case text == "}":
			chain = false
			continue
		case text == "" || strings.HasPrefix(text, "#"), strings.Contains(line, "Peer netns reference is invalid"):
			continue
		}
		learned := strings.Contains(text, " master ") && strings.Contains(text, " dev ") &&
			!strings.Contains(text, "permanent") && !strings.Contains(text, "static")
		if !table && !chain && !ours && !learned {
			lines = append(lines, strings.Join(strings.Fields(byItself.ReplaceAllString(text, "")), " "))
		}
	}
	return lines
}

var (
	// ofDaemon matches what the daemon's objects have in their lines.
	ofDaemon = regexp.MustCompile(`\bflannel|FLANNEL|proto 70`)
	// ofKernel matches what comes and goes with the kernel's own addresses.
	ofKernel = regexp.MustCompile(`^33:33:|^01:00:5e:|proto kernel`)
	// byKernel matches what the kernel chooses each time.
	byKernel = regexp.MustCompile(`^[0-9]+: |@\S+|\bnhid [0-9]+ |\bnumtxqueues.*|\bsrcport [0-9 ]+|\bqdisc \S+|\bstate \S+|\bqlen [0-9]+|\balias \S+|\bpref \S+|\blinkdown\b`)
)

// A shown is a line that a program printed.
type shown struct {
	text               string // without what the kernel chooses
	ofDaemon, ofKernel bool
}

// known are the lines that were read before. The state of a node is read again and again, and only few of thousands of
// lines differ. A regular expression takes long, above all with the race detector.
var known sync.Map // shown, by the line as it was printed

func read(line string) shown {
	if l, ok := known.Load(line); ok {
		return l.(shown)
	}
	l := shown{text: strings.Join(strings.Fields(byKernel.ReplaceAllString(strings.TrimRight(line, "\n"), "")), " ")}
	l.ofDaemon, l.ofKernel = ofDaemon.MatchString(l.text), ofKernel.MatchString(l.text)
	known.Store(line, l)
	return l
}

// keep returns the lines that the daemon keeps: of its tables and chains all.
func keep(out string) (lines []string) {
	table, chain := false, false
	for line := range strings.Lines(out) {
		l := read(line)
		switch {
		case strings.HasPrefix(l.text, "table "):
			table, chain = l.ofDaemon, false
		case strings.HasPrefix(l.text, "chain "):
			chain = l.ofDaemon
		case l.text == "}":
			chain = false
			continue
		case l.text == "" || strings.HasPrefix(l.text, "#"):
			continue
		}
		if (table || chain || l.ofDaemon) && !l.ofKernel {
			lines = append(lines, l.text)
		}
	}
	return lines
}

// A Probe asks a mirror again and again, each time from a new port, so that neither connection tracking nor a cached
// route answers for the path. What is answered later than probeWait is lost.
type Probe struct {
	What string // from where to where

	ns   *Namespace
	dst  netip.Addr
	size int        // of the packet, the IP header included
	as   netip.Addr // what the mirror must see; invalid: any

	stop chan struct{}
	done sync.WaitGroup

	mu   sync.Mutex
	sent []attempt
}

const probeWait = 300 * time.Millisecond

// An attempt is one packet of a Probe.
type attempt struct {
	at       time.Time
	over     bool // answered, or given up
	answered bool
}

// StartProbe probes the mirror at dst, once in each interval, with packets of that size, which may not be fragmented.
func (ns *Namespace) StartProbe(dst netip.Addr, size int, as netip.Addr, interval time.Duration) *Probe {
	p := &Probe{What: ns.Name + " to " + dst.String(), ns: ns, dst: dst, size: size, as: as, stop: make(chan struct{})}
	p.done.Go(func() {
		tick := time.NewTicker(Patiently(interval))
		defer tick.Stop()
		for i := 0; ; i++ {
			p.mu.Lock()
			p.sent = append(p.sent, attempt{at: time.Now()})
			p.mu.Unlock()
			p.done.Go(func() {
				answered := p.ask() == nil
				p.mu.Lock()
				defer p.mu.Unlock()
				p.sent[i].over, p.sent[i].answered = true, answered
			})
			select {
			case <-tick.C:
			case <-p.stop:
				return
			}
		}
	})
	return p
}

// ask sends one packet and waits for the answer.
func (p *Probe) ask() error {
	network, level, option, value, headers := "udp4", unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE, 20+8
	if p.dst.Is6() {
		network, level, option, value, headers = "udp6", unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE, 40+8
	}
	dialer := net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
		failed := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, option, value) })
		return errors.Join(failed, err)
	}}
	var conn net.Conn
	err := p.ns.Do(func() (err error) {
		conn, err = dialer.Dial(network, netip.AddrPortFrom(p.dst, mirrorPort).String())
		return err
	})
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(probeWait))
	if _, err := conn.Write(make([]byte, p.size-headers)); err != nil {
		return err
	}
	var buf [64]byte
	n, err := conn.Read(buf[:])
	if err != nil {
		return err
	}
	seen, err := netip.ParseAddrPort(string(buf[:n]))
	if err == nil && p.as.IsValid() && seen.Addr().Unmap() != p.as {
		err = fmt.Errorf("seen as %s", seen)
	}
	return err
}

// Steady reports whether packets that were sent after that time are answered:
// a few, the latest of which it is known.
func (p *Probe) Steady(since time.Time) bool {
	const few = 5
	p.mu.Lock()
	defer p.mu.Unlock()
	good := 0
	for _, a := range slices.Backward(p.sent) {
		switch {
		case a.at.Before(since) || a.over && !a.answered:
			return false
		case a.over:
			if good++; good == few {
				return true
			}
		}
	}
	return false
}

// Silence returns how long after that time the last packet was sent that got no answer: up to the next packet. Zero:
// all were answered. Silence waits until all packets that are sent by now are answered or lost.
func (p *Probe) Silence(ctx context.Context, since time.Time) (silence time.Duration, err error) {
	now := time.Now()
	err = Poll(ctx, p.What+" to be answered or not", func() error {
		p.mu.Lock()
		defer p.mu.Unlock()
		silence = 0
		for i, a := range p.sent {
			switch {
			case a.at.Before(since) || a.at.After(now):
			case !a.over:
				return errors.New("some are on their way")
			case !a.answered && i+1 < len(p.sent):
				silence = p.sent[i+1].at.Sub(since)
			}
		}
		return nil
	})
	return silence, err
}

// Stop ends the probe.
func (p *Probe) Stop() {
	close(p.stop)
	p.done.Wait()
}

// LimitHop sets the MTU of the underlay's end of the node's cable: larger packets get lost there, in both directions,
// and nobody is told.
func (n *Node) LimitHop(ctx context.Context, mtu int) error {
	return n.far.Script(ctx, fmt.Sprintf("link set %s mtu %d", n.Hostname, mtu))
}
