package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/pkg/nstest"
	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// A neighbour is another program that manages a host's network or firewall. It is installed beside flanneld on a node,
// started, and then does all that it does on a host.
type neighbour struct {
	name   string
	quick  bool     // make test runs the neighbour, too
	on     scenario // the network
	needs  string   // what the kernel must be able to do, a command; "": nothing more
	acts   []act
	doctor string // what the doctor finds in the end, names of checks; "": nothing
}

// An act is something that a neighbour does.
type act struct {
	name    string
	do      doing
	repairs repairs
}

// repairs tells whether an act changes what is flanneld's, so that flanneld repairs that.
type repairs int

const (
	none repairs = iota
	some
	perhaps // where it depends on what is faster
)

type doing func(context.Context, *neighbourhood) error

// A neighbourhood is a testbed with neighbours on its first node.
type neighbourhood struct {
	*testbed
	debian *lab.Systemd // where the neighbour's programs run; nil before boot
}

var (
	vxlanStreet  = scenario{backend: `{"Type": "vxlan"}`, devices: vteps}
	vxlanNFT     = scenario{backend: `{"Type": "vxlan"}`, devices: vteps, nftables: true}
	hostGWStreet = scenario{backend: `{"Type": "host-gw"}`}
)

// boot boots a Debian with these files and units, where the neighbour is to run. Files of dist/ are given by their names
// there, with a @ in front.
func boot(files map[string]string, units ...string) doing {
	return func(ctx context.Context, s *neighbourhood) (err error) {
		all := map[string]string{}
		for name, text := range files {
			if file, ok := strings.CutPrefix(text, "@"); ok {
				read, err := os.ReadFile(filepath.Join("../../dist", file))
				if err != nil {
					return err
				}
				text = string(read)
			}
			all[name] = text
		}
		s.debian, err = s.node.StartDebian(ctx, all, units...)
		return err
	}
}

// debian runs commands where the neighbour's programs are.
func debian(lines ...string) doing {
	return func(ctx context.Context, s *neighbourhood) error {
		for _, line := range lines {
			if out, err := s.debian.Run(ctx, line); err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
		}
		return nil
	}
}

// host runs commands on the node, with the machine's programs.
func host(lines ...string) doing {
	return func(ctx context.Context, s *neighbourhood) error { return commands(lines...)(ctx, s.testbed) }
}

// together does all of it in turn.
func together(all ...doing) doing {
	return func(ctx context.Context, s *neighbourhood) error {
		for _, do := range all {
			if err := do(ctx, s); err != nil {
				return err
			}
		}
		return nil
	}
}

// until waits until a command prints what matches the expression: with the neighbour's programs where it has its own.
func until(line, expression string) doing {
	return func(ctx context.Context, s *neighbourhood) error {
		run := s.node.Run
		if s.debian != nil {
			run = s.debian.Run
		}
		return lab.Poll(ctx, line+" to print "+expression, func() error {
			out, err := run(ctx, line)
			if err == nil && !regexp.MustCompile(expression).MatchString(out) {
				err = errors.New(out)
			}
			return err
		})
	}
}

// networkdUplink is what systemd-networkd has for the first node's uplink. An address that is there already, with
// another broadcast address, would keep this version busy for good.
const networkdUplink = `[Match]
Name=eth0
[Network]
Address=fd18::1/64
Gateway=198.18.0.254
Gateway=fd18::fe
IPv6AcceptRA=no
[Address]
Address=198.18.0.1/24
Broadcast=no
`

// networkdAll is what some images have: all devices are managed. Without a file of ours, cni0 loses its address.
const networkdAll = `[Match]
Name=*
[Network]
DHCP=yes
`

// networkd are the acts of systemd-networkd with these files.
func networkd(reload, reconfigure repairs, files map[string]string) []act {
	files["/etc/systemd/network/20-eth0.network"] = networkdUplink
	up := until("networkctl status eth0", `State: routable \(configured\)`)
	do := func(lines ...string) doing { return together(debian(lines...), up) }
	return []act{
		{"start", together(boot(files, "dbus.service", "dbus.socket", "systemd-networkd.service"),
			do("systemctl start dbus.socket systemd-networkd")), none},
		{"reload", do("touch /etc/systemd/network/20-eth0.network", "networkctl reload"), reload},
		{"reconfigure", do("networkctl reconfigure eth0"), reconfigure},
		{"restart", do("systemctl restart systemd-networkd"), none},
	}
}

const nmUplink = `[connection]
id=uplink
type=ethernet
interface-name=eth0
[ipv4]
method=manual
address1=198.18.0.1/24,198.18.0.254
[ipv6]
method=manual
address1=fd18::1/64,fd18::fe
`

// networkManager are the acts of NetworkManager with these files.
func networkManager(files map[string]string) []act {
	files["/etc/NetworkManager/system-connections/uplink.nmconnection"] = nmUplink
	up := until("nmcli --get-values GENERAL.STATE device show eth0", `100 \(connected\)`)
	do := func(lines ...string) doing { return together(debian(lines...), up) }
	return []act{
		{name: "start", do: together(boot(files, "dbus.service", "dbus.socket", "NetworkManager.service"),
			do("systemctl start dbus.socket NetworkManager"))},
		{name: "reload", do: do("nmcli general reload")},
		{name: "reapply", do: do("nmcli device reapply eth0")},
		// This takes the uplink's addresses away, and what depends on them.
		{"connection up", do("nmcli connection up uplink"), perhaps},
		{name: "restart", do: do("systemctl restart NetworkManager")},
	}
}

// firewalld are the acts of firewalld with a backend of its own. With iptables, it removes all rules of iptables before
// it sets its own. systemctl may return before firewalld has written its rules; firewall-cmd gets an answer after that.
func firewalld(backend string, r repairs) []act {
	return []act{
		{"start and configure", together(
			boot(map[string]string{
				"/etc/firewalld/firewalld.conf": "DefaultZone=public\nFirewallBackend=" + backend + "\n",
				"/root/flannel-zone.xml":        "@firewalld/flannel-zone.xml",
				"/root/flannel-service.xml":     "@firewalld/flannel-service.xml",
			}, "dbus.service", "dbus.socket", "firewalld.service"),
			debian("systemctl start dbus.socket firewalld",
				"firewall-cmd --permanent --new-zone-from-file=/root/flannel-zone.xml --name=flannel",
				"firewall-cmd --permanent --new-service-from-file=/root/flannel-service.xml --name=flannel",
				"firewall-cmd --permanent --zone=flannel --add-source=10.4.0.0/14",
				"firewall-cmd --permanent --zone=flannel --add-source=fd00:5::/48",
				"firewall-cmd --permanent --add-service=flannel",
				"firewall-cmd --reload")), r},
		{"reload", debian("firewall-cmd --reload"), r},
		{"reload all", debian("firewall-cmd --complete-reload"), r},
		{"uplink to another zone", debian("firewall-cmd --zone=internal --add-service=flannel",
			"firewall-cmd --zone=internal --change-interface=eth0"), r},
		{"restart", debian("systemctl restart firewalld", "firewall-cmd --state"), r},
		{"stop", debian("systemctl stop firewalld"), r},
		{"start again", debian("systemctl start firewalld", "firewall-cmd --state"), r},
	}
}

const keepalivedConf = `global_defs {
	router_id lab
}
vrrp_instance lab {
	interface eth0
	state MASTER
	virtual_router_id 51
	priority 200
	advert_int 1
	virtual_ipaddress {
		198.18.0.240/24
	}
	virtual_ipaddress_excluded {
		fd18::240/64
	}
}
`

// serveDHCP has the second node answer DHCP, with the address that the first one has anyway. The lease is short.
func serveDHCP(_ context.Context, s *neighbourhood) error {
	_, err := s.peer.LaunchDebian("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--interface=eth0",
		"--bind-interfaces", "--dhcp-range=198.18.0.1,static,255.255.255.0,2m",
		"--dhcp-host=02:00:c6:12:00:01,198.18.0.1", "--dhcp-option=option:router,198.18.0.254", "--leasefile-ro", "--no-ping",
		"--user=root", "--dhcp-authoritative", "--pid-file=", "--log-facility=-")
	return err
}

func service(line string) string { return "[Service]\nExecStart=" + line + "\n" }

// dhcpcd are the acts of dhcpcd with this configuration. Without our line, dhcpcd sets addresses and routes on flannel's
// devices again and again, and flanneld removes them.
func dhcpcd(conf string) []act {
	up := until("ip -4 route show default", "proto dhcp")
	return []act{
		{name: "start", do: together(serveDHCP, boot(map[string]string{"/etc/dhcpcd.conf": conf,
			"/units/dhcpcd.service": service("/usr/sbin/dhcpcd --nobackground --nodev")}), debian("systemctl start dhcpcd"), up)},
		{name: "renew", do: together(debian("dhcpcd --rebind eth0"), up)},
		{name: "restart", do: together(debian("systemctl restart dhcpcd"), up)},
	}
}

var dhclient = []act{
	{name: "start", do: together(serveDHCP, boot(map[string]string{
		"/units/dhclient.service": service("/usr/sbin/dhclient -d eth0")}), debian("systemctl start dhclient"),
		until("cat /var/lib/dhcp/dhclient.leases", "lease {"))},
	{name: "restart", do: debian("systemctl restart dhclient")},
	{name: "release and start", do: debian("dhclient -r eth0", "systemctl restart dhclient")},
}

// kubeProxy are the acts of kube-proxy in a mode. Pods then also talk by way of a service.
func kubeProxy(mode string) []act {
	var k *lab.Kube
	var proxy *lab.Process
	start := func(ctx context.Context, s *neighbourhood) (err error) {
		if proxy, err = s.node.StartProxy(k, mode, "10.4.0.0/14"); err != nil {
			return err
		}
		return lab.Poll(ctx, "kube-proxy to set its rules", func() error {
			text, err := getFrom(ctx, s.node, "http://127.0.0.1:10249/metrics")
			last := regexp.MustCompile(`(?m)^kubeproxy_sync_proxy_rules_last_timestamp_seconds\S* (.)`).FindAllStringSubmatch(text, -1)
			if err == nil && (len(last) == 0 || slices.ContainsFunc(last, func(m []string) bool { return m[1] == "0" })) {
				err = errors.New("it has not yet")
			}
			return err
		})
	}
	return []act{
		{name: "start", do: together(func(ctx context.Context, s *neighbourhood) (err error) {
			if k, err = s.NewKube(ctx, ""); err != nil {
				return err
			}
			if err := errors.Join(k.AddUser(lab.KubeProxy), k.AddNode(ctx, s.node)); err != nil {
				return err
			}
			const ip = "198.19.128.10"
			if _, err = k.KubectlApply(ctx, fmt.Sprintf(proxyService, ip, s.pods[1].IPv4)); err != nil {
				return err
			}
			s.probes = append(s.probes, s.pods[0].StartProbe(netip.MustParseAddr(ip), 100, s.pods[0].IPv4, s.interval))
			return nil
		}, start)},
		{name: "restart", do: together(func(ctx context.Context, s *neighbourhood) error { return proxy.Stop(ctx) }, start)},
		{name: "kill", do: together(func(ctx context.Context, s *neighbourhood) error { proxy.Kill(); return nil }, start)},
	}
}

// proxyService is a service of the pod of the second node: its address, and that of the pod.
const proxyService = `apiVersion: v1
kind: Service
metadata: {name: mirror, namespace: default}
spec:
  clusterIP: %s
  ports: [{port: 7007, protocol: UDP}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: mirror, namespace: default, labels: {kubernetes.io/service-name: mirror}}
addressType: IPv4
endpoints: [{addresses: [%s], conditions: {ready: true}}]
ports: [{port: 7007, protocol: UDP}]
`

// cron is a firewall script that replaces all rules of nftables, as many hosts run it at intervals.
var cron = []act{
	{"flush", host("nft flush ruleset"), some},
	{"again", host("nft flush ruleset"), some},
	{"and again", host("nft flush ruleset"), some},
}

var neighbours = []neighbour{
	{name: "systemd-networkd", quick: true, on: vxlanStreet, acts: networkd(none, none, map[string]string{})},
	{name: "systemd-networkd manages all but ours", on: vxlanStreet,
		acts: networkd(none, none, map[string]string{"/etc/systemd/network/99-all.network": networkdAll,
			"/etc/systemd/network/10-flannel.network": "@networkd/10-flannel.network"})},
	{name: "systemd-networkd and host-gw", on: hostGWStreet, acts: networkd(some, some, map[string]string{})},
	{name: "systemd-networkd and host-gw, with our files", on: hostGWStreet, acts: networkd(none, perhaps, map[string]string{
		"/etc/systemd/network/10-flannel.network":   "@networkd/10-flannel.network",
		"/etc/systemd/networkd.conf.d/flannel.conf": "@networkd/flannel.conf"})},
	{name: "NetworkManager", on: vxlanStreet, acts: networkManager(map[string]string{})},
	{name: "NetworkManager, with our file", on: vxlanStreet, acts: networkManager(map[string]string{
		"/etc/NetworkManager/conf.d/flannel.conf": "@NetworkManager/flannel.conf"})},
	{name: "NetworkManager and host-gw", on: hostGWStreet, acts: networkManager(map[string]string{
		"/etc/NetworkManager/conf.d/flannel.conf": "@NetworkManager/flannel.conf"})},
	{name: "firewalld, nftables", on: vxlanNFT, acts: firewalld("nftables", none)},
	{name: "firewalld, iptables", on: vxlanStreet, acts: firewalld("iptables", perhaps)},
	{name: "ufw", on: vxlanStreet, acts: []act{
		{name: "enable", do: together(boot(nil, "ufw.service"), debian("ufw --force enable", "ufw allow 8472/udp",
			"ufw route allow from 10.4.0.0/14", "ufw route allow to 10.4.0.0/14",
			"ufw route allow from fd00:5::/48", "ufw route allow to fd00:5::/48"))},
		{name: "reload", do: debian("ufw reload")},
		{name: "restart", do: debian("systemctl restart ufw")},
		{name: "disable and enable", do: debian("ufw disable", "ufw --force enable")},
	}},
	{name: "keepalived", on: vxlanStreet, acts: []act{
		{name: "start", do: together(boot(map[string]string{"/etc/keepalived/keepalived.conf": keepalivedConf},
			"keepalived.service"), debian("systemctl start keepalived"), until("ip addr show eth0", "198.18.0.240"))},
		{name: "reload", do: debian("systemctl reload keepalived")},
		{name: "restart", do: together(debian("systemctl restart keepalived"), until("ip addr show eth0", "198.18.0.240"))},
		{name: "stop", do: together(debian("systemctl stop keepalived"), until("ip addr show eth0", "198.18.0.1/24"))},
		{name: "start again", do: together(debian("systemctl start keepalived"), until("ip addr show eth0", "198.18.0.240"))},
	}},
	{name: "dhcpcd, with our line", on: vxlanStreet, acts: dhcpcd("@dhcpcd/flannel.conf")},
	{name: "dhclient", on: vxlanStreet, acts: dhclient},
	{name: "dockerd", on: vxlanStreet, acts: []act{
		{name: "start", do: func(ctx context.Context, s *neighbourhood) error { return s.node.StartDocker(ctx) }},
		{name: "restart", do: func(ctx context.Context, s *neighbourhood) error { return s.node.RestartDocker(ctx) }},
	}},
	{name: "kube-proxy, iptables", on: vxlanStreet, acts: kubeProxy("iptables")},
	{name: "kube-proxy, nftables", on: vxlanNFT, acts: kubeProxy("nftables")},
	{name: "kube-proxy, ipvs", on: vxlanStreet, needs: "ls /proc/sys/net/ipv4/vs", acts: kubeProxy("ipvs")},
	{name: "nft flush by cron", quick: true, on: vxlanNFT, acts: cron},
	{name: "nft flush by cron, iptables", on: vxlanStreet, acts: cron},
	{name: "BIRD", on: vxlanStreet, acts: bird},
	{name: "BIRD, routes to pods", on: scenario{backend: `{"Type": "vxlan"}`, devices: vteps, ipv4: true}, acts: birdAll},
	{name: "FRR", on: vxlanNFT, acts: frr},
}

// TestNeighbours: each neighbour is started, reloaded and restarted beside flanneld. Pods talk after each act, flanneld
// and the neighbour do not undo each other's changes again and again, what is the neighbour's stays when flanneld
// repairs and restarts, and the doctor finds nothing but what is to be configured.
func TestNeighbours(t *testing.T) {
	t.Parallel()
	for _, b := range neighbours {
		if !labtest.Selected(b.quick) {
			continue
		}
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			if b.needs != "" {
				labtest.NeedKernel(t, b.needs)
			}
			if _, err := lab.Program("debian/lib/systemd/systemd"); err != nil {
				nstest.Missing(t, "%v", err)
			}
			ctx := labtest.Context(t, 4*time.Minute)
			s := &neighbourhood{testbed: newTestbed(ctx, t, b.on, 60*time.Millisecond)}
			defer func() {
				if t.Failed() {
					s.report(t)
				}
			}()
			repaired := 0
			for _, a := range b.acts {
				s.perform(ctx, t, a, &repaired)
			}
			s.expectFindings(ctx, t, b.doctor)

			before := ""
			labtest.Do(t, lab.Poll(ctx, "the neighbour to have done all that it does", func() error {
				last := before
				before = labtest.Must(s.node.Others(ctx))(t)
				if before != last {
					return errors.New("there are changes yet")
				}
				return nil
			}))
			fix := commands("ip route flush proto 70")
			if hasDevice(b.on) {
				fix = commands("ip link del {dev}")
			}
			labtest.Do(t, s.all(ctx, fix, restart))
			labtest.Do(t, s.node.WaitReady(ctx))
			labtest.Do(t, s.waitRestored(ctx))
			labtest.Do(t, s.waitTraffic(ctx, time.Now()))
			if after := labtest.Must(s.node.Others(ctx))(t); after != before {
				t.Errorf("flanneld has repaired its own, and has been restarted. Of what is not flanneld's, this has changed:%s",
					difference(before, after))
			}
			for _, n := range s.Nodes() {
				labtest.Do(t, waitDiff(ctx, n, ""))
			}
			s.expectNoFight(ctx, t)
			s.expectFindings(ctx, t, b.doctor)
		})
	}
}

// perform has the neighbour act, and waits until pods talk and all that is flanneld's is as before. before is how often
// flanneld has repaired something so far.
func (s *neighbourhood) perform(ctx context.Context, t *testing.T, a act, before *int) {
	t.Helper()
	start := time.Now()
	labtest.Do(t, a.do(ctx, s))
	if a.repairs == some {
		labtest.Do(t, lab.Poll(ctx, a.name+" to change what is flanneld's", func() error {
			now, err := s.repaired(ctx)
			if err == nil && now == *before {
				err = errors.New("flanneld has repaired nothing")
			}
			return err
		}))
	}
	if err := errors.Join(s.waitRestored(ctx), s.waitTraffic(ctx, time.Now())); err != nil {
		t.Fatalf("%s: %v", a.name, err)
	}
	now := labtest.Must(s.repaired(ctx))(t)
	if a.repairs == none && now != *before {
		t.Errorf("%s: flanneld had to repair %d objects", a.name, now-*before)
	}
	silence := time.Duration(0)
	for _, p := range s.probes {
		silence = max(silence, labtest.Must(p.Silence(ctx, start))(t))
	}
	t.Logf("%s: pods were silent until %v after its begin; repairs: %d", a.name, silence.Round(time.Millisecond), now-*before)
	*before = now
	s.expectNoFight(ctx, t)
}

// report logs what the neighbour has logged, and the firewall's rules on its node. The test's time may be over.
func (s *neighbourhood) report(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
	defer cancel()
	if s.debian != nil {
		t.Logf("systemd's log:\n%s", s.debian.Log())
		for _, name := range []string{"/var/log/services.log", "/var/log/firewalld"} {
			if log, err := os.ReadFile(s.debian.Path(name)); err == nil {
				t.Logf("%s:\n%s", name, log)
			}
		}
	}
	for _, line := range []string{"iptables-save --counters", "ip6tables-save --counters", "nft list ruleset"} {
		out, err := s.node.Run(ctx, line)
		t.Logf("%s: %v\n%s", line, err, out)
	}
}

// repaired returns how often the daemon has repaired an object of the kernel, or the firewall's rules.
func (s *neighbourhood) repaired(ctx context.Context) (int, error) {
	return s.sum(ctx, "flannel_kernel_repairs_total", "flannel_rules_repairs_total")
}

// sum adds up metrics of the daemon, with all labels.
func (s *neighbourhood) sum(ctx context.Context, metrics ...string) (sum int, err error) {
	text, err := getFrom(ctx, s.node, "http://"+s.node.Health()+"/metrics")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(text) {
		words := strings.Fields(line)
		if name, _, _ := strings.Cut(words[0], "{"); slices.Contains(metrics, name) {
			value, err := strconv.ParseFloat(words[len(words)-1], 64)
			if err != nil {
				return 0, err
			}
			sum += int(value)
		}
	}
	return sum, nil
}

func (s *neighbourhood) expectNoFight(ctx context.Context, t *testing.T) {
	t.Helper()
	fights := labtest.Must(s.sum(ctx, "flannel_kernel_fights"))(t)
	if log := s.node.Log(); fights != 0 || strings.Contains(log, "again and again") {
		t.Errorf("the metric says %d fights, and the log\n%s", fights, log)
	}
}

// expectFindings expects findings of the doctor, by the names of their checks.
func (s *neighbourhood) expectFindings(ctx context.Context, t *testing.T, want string) {
	t.Helper()
	labtest.Do(t, lab.Poll(ctx, "the doctor to find "+want, func() error {
		out, _, err := s.node.Ctl(ctx, "doctor")
		var checks []string
		for line := range strings.Lines(out) {
			if name, _, ok := strings.Cut(line, ": "); ok && !strings.Contains(name, " ") && !slices.Contains(checks, name) {
				checks = append(checks, name)
			}
		}
		if got := strings.Join(checks, " "); err == nil && got != want {
			err = fmt.Errorf("it finds %q, not %q:\n%s", got, want, out)
		}
		return err
	}))
}
