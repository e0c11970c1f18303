package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/flanneld/flanneld/network"
	"github.com/flanneld/flanneld/subnet"
	"github.com/flanneld/flanneld/test/lab"
	"github.com/flanneld/flanneld/test/lab/labtest"
)

// A hostileRecord is a lease in etcd that somebody wrote who may write there, and who means no good. Its node is left
// out; nothing else happens.
type hostileRecord struct {
	name       string
	key, value string // {ip}, {mac}, {key} are the victim's; {own} is the MAC or the key of the node that reads
	reason     string // in flannelctl status; empty: the record is no lease at all
}

var hostileVXLAN = []hostileRecord{
	{"a peer's MAC", "10.5.201.0-24", vxlanRecord("198.18.0.201", "{mac}"), "VTEP MAC"},
	{"our MAC", "10.5.202.0-24", vxlanRecord("198.18.0.202", "{own}"), "this node's own"},
	{"a peer's address", "10.5.203.0-24", vxlanRecord("{ip}", "0e:00:00:00:00:03"), "public address"},
	{"a part of a peer's subnet", "{half}-25", vxlanRecord("198.18.0.204", "0e:00:00:00:00:04"), "subnet"},
	{"loopback", "10.5.205.0-24", vxlanRecord("127.0.0.1", "0e:00:00:00:00:05"), "loopback"},
	{"loopback with our MAC", "10.5.206.0-24", vxlanRecord("127.0.0.1", "{own}"), "loopback"},
	{"multicast", "10.5.207.0-24", vxlanRecord("224.0.0.5", "0e:00:00:00:00:07"), "multicast"},
	{"broadcast", "10.5.208.0-24", vxlanRecord("255.255.255.255", "0e:00:00:00:00:08"), "no host has"},
	{"the uplink's broadcast", "10.5.209.0-24", vxlanRecord("198.18.0.255", "0e:00:00:00:00:09"), "broadcast"},
	{"metadata", "10.5.210.0-24", vxlanRecord("169.254.169.254", "0e:00:00:00:00:10"), "link-local"},
	{"in itself", "10.5.211.0-24", vxlanRecord("10.5.211.7", "0e:00:00:00:00:11"), "its own subnet"},
	{"a group's MAC", "10.5.212.0-24", vxlanRecord("198.18.0.212", "ff:ff:ff:ff:ff:ff"), "VtepMAC"},
	{"everything", "0.0.0.0-0", vxlanRecord("198.18.0.213", "0e:00:00:00:00:13"), ""},
	{"the whole network", "10.5.0.0-16", vxlanRecord("198.18.0.214", "0e:00:00:00:00:14"), "more than a quarter"},
	{"metadata's subnet", "169.254.169.254-32", vxlanRecord("198.18.0.215", "0e:00:00:00:00:15"), "not in the network"},
	{"a line in the backend's name", "10.5.216.0-24", strings.Replace(vxlanRecord("198.18.0.216", "0e:00:00:00:00:16"),
		`"vxlan"`, `"x\nE0101 00:00:00.000000 1 forged.go:1] forged"`, 1), "its backend is"},
	{"escapes in the MAC", "10.5.217.0-24", vxlanRecord("198.18.0.217", `\u001b[2J\u0007forged`), "Ethernet address"},
	{"a command in the MAC", "10.5.218.0-24", vxlanRecord("198.18.0.218", `$(reboot);\n reboot`), "Ethernet address"},
	{"no JSON", "10.5.219.0-24", "{forged\n\x1b[31m", ""},
	{"no text", "10.5.220.0-24", "\xff\x00\xfe", ""},
	{"a line in the key", "10.5.221.0-24\nforged", vxlanRecord("198.18.0.221", "0e:00:00:00:00:21"), ""},
	{"a megabyte", "10.5.222.0-24", vxlanRecord("198.18.0.222", strings.Repeat("forged ", 140000)), ""},
	{"a text for an address", "10.5.224.0-24", vxlanRecord(`198.18.0.224\nE0101 forged\u001b[2J`, "0e:00:00:00:00:24"), ""},
	{"a large MAC", "10.5.223.0-24", vxlanRecord("198.18.0.223", strings.Repeat("forged ", 500)), "backend data"},
}

func vxlanRecord(ip, mac string) string {
	return fmt.Sprintf(`{"PublicIP":"%s","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"%s"}}`, ip, mac)
}

var hostileWireGuard = []hostileRecord{
	{"a peer's key", "10.5.201.0-24", wireguardRecord("198.18.0.201", "{key}"), "public key"},
	{"our key", "10.5.202.0-24", wireguardRecord("198.18.0.202", "{own}"), "this node's own"},
	{"no key", "10.5.203.0-24", wireguardRecord("198.18.0.203", "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="), "PublicKey"},
	{"multicast", "10.5.204.0-24", wireguardRecord("224.0.0.5", "BAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQ="), "multicast"},
}

func wireguardRecord(ip, key string) string {
	return fmt.Sprintf(`{"PublicIP":"%s","PublicIPv6":null,"BackendType":"wireguard","BackendData":{"PublicKey":"%s","Port":51820}}`, ip, key)
}

// TestHostileRecords: whatever records somebody writes to etcd, before a daemon starts or while it runs, pods go on
// talking, the kernel holds nothing of them, status names each, and the log stays readable.
func TestHostileRecords(t *testing.T) {
	t.Parallel()
	for backend, records := range map[string][]hostileRecord{"vxlan": hostileVXLAN, "wireguard": hostileWireGuard} {
		if !labtest.Selected(backend == "vxlan") {
			continue
		}
		t.Run(backend, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t, 2*time.Minute)
			l := labtest.New(ctx, t, fmt.Sprintf(`{%s, "Backend": {"Type": %q}}`, ipv4Network, backend), oneLink...)
			labtest.Start(ctx, t, l, "--ip-masq")
			var own []subnet.Lease
			for _, n := range l.Nodes() {
				_, lease := leaseOf(ctx, t, l, n)
				own = append(own, lease)
			}
			records := forVictim(t, own, records)
			testHostile(ctx, t, l, records, hostileStore{
				put: func(r hostileRecord) error { return l.Etcd.Put(ctx, lab.Prefix+"/subnets/"+r.key, r.value) },
				remove: func(r hostileRecord) error {
					return l.Etcd.Delete(ctx, lab.Prefix+"/subnets/"+r.key)
				},
			}, "--ip-masq")
		})
	}
}

// TestHostileAnnotations: the same for the annotations of Nodes that somebody registers, as a node that was taken over
// may do with its own. What an API server refuses is refused, and nothing else of the records.
func TestHostileAnnotations(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 2*time.Minute)
	l, k := newKube(ctx, t, "", oneLink)
	args := daemonArgs(t, k, vxlanConfig)
	var own []subnet.Lease
	for i, n := range l.Nodes() {
		podCIDR := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 5, byte(i + 1), 0}), 24)
		labtest.Do(t, k.AddNode(ctx, n, podCIDR.String()))
		labtest.Do(t, n.Start(args...))
		labtest.Do(t, n.WaitReady(ctx))
		annotations := labtest.Must(k.Node(ctx, n.Hostname))(t).Metadata.Annotations
		own = append(own, subnet.Lease{Subnets: subnet.Subnets{IPv4: podCIDR}, Attrs: subnet.Attrs{PublicIP: n.IPv4,
			BackendData: json.RawMessage(annotations["flannel.alpha.coreos.com/backend-data"])}})
	}

	// Some records cannot be Nodes. Others are refused before they are leases: the log names them.
	var records []hostileRecord
	said := map[string]string{} // what the log says about a Node, by its name
	// Of two Nodes that were registered within a second, the names decide: those that overlap others come last.
	nodeOf := func(r hostileRecord) string {
		name := "z" + strings.NewReplacer(".", "-", "/", "-").Replace(r.key)
		if !strings.HasSuffix(r.key, "-24") {
			name = "z" + name
		}
		return name
	}
	for _, r := range forVictim(t, own, hostileVXLAN) {
		switch {
		case len(r.value) > 1<<18 || strings.Contains(r.key, "\n"):
			if err := registerHostile(ctx, k, "refused", r); err == nil {
				t.Errorf("the API server takes %s", r.name)
			}
			continue
		case r.reason == "subnet" || r.name == "the whole network":
			r.reason = ""
			said[nodeOf(r)] = `younger="` + nodeOf(r) + `" conflict="podCIDRs that overlap, `
		case r.name == "everything": // a key in etcd has this form without IPv4
			r.reason = "in its own subnet"
		case r.reason == "":
			said[nodeOf(r)] = `node="` + nodeOf(r) + `"`
		}
		records = append(records, r)
	}
	slices.SortStableFunc(records, func(a, b hostileRecord) int {
		return strings.Count(nodeOf(a), "zz") - strings.Count(nodeOf(b), "zz")
	})
	testHostile(ctx, t, l, records, hostileStore{
		put:    func(r hostileRecord) error { return registerHostile(ctx, k, nodeOf(r), r) },
		remove: func(r hostileRecord) error { return k.DeleteNode(ctx, nodeOf(r)) },
		check: func() {
			for _, text := range said {
				waitSaid(ctx, t, l.Nodes()[0], text)
			}
			// The victims are told.
			for _, n := range l.Nodes() {
				waitEvent(ctx, t, k, n.Hostname, "DuplicateIdentity", 1, "claims this node's ")
			}
		},
	}, args...)
}

// registerHostile registers a Node that has what a record in etcd would have.
func registerHostile(ctx context.Context, k *lab.Kube, name string, r hostileRecord) error {
	var attrs struct {
		PublicIP, BackendType string
		BackendData           json.RawMessage
	}
	if err := json.Unmarshal([]byte(r.value), &attrs); err != nil { // no JSON at all
		attrs.PublicIP, attrs.BackendType, attrs.BackendData = "198.18.0.200", "vxlan", json.RawMessage(r.value)
	}
	prefix := "flannel.alpha.coreos.com/"
	podCIDR := strings.Replace(r.key, "-", "/", 1)
	body, err := json.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Node",
		"metadata": map[string]any{"name": name, "annotations": map[string]string{
			prefix + "kube-subnet-manager": "true", prefix + "public-ip": attrs.PublicIP,
			prefix + "backend-type": attrs.BackendType, prefix + "backend-data": string(attrs.BackendData)}},
		"spec": map[string]any{"podCIDR": podCIDR, "podCIDRs": []string{podCIDR}},
	})
	if err != nil {
		return err
	}
	_, err = k.Do(ctx, "POST", "/api/v1/nodes", body)
	return err
}

// A hostileStore writes records as somebody does who may write into the store of leases.
type hostileStore struct {
	put, remove func(hostileRecord) error
	check       func() // that the records are in the store; nil: nothing else is to be checked
}

// testHostile lets somebody write records while the first node's daemon runs, and starts the daemon again with all
// records there. The daemons run with args already.
func testHostile(ctx context.Context, t *testing.T, l *lab.Lab, records []hostileRecord, store hostileStore,
	args ...string) {
	t.Helper()
	pods := addPods(ctx, t, l)
	labtest.Do(t, pods[0].WaitPing(ctx, pods[1].IPv4))
	node := l.Nodes()[0]
	labtest.Do(t, waitDiff(ctx, node, ""))
	before := labtest.Must(node.Holds(ctx))(t)
	ping := labtest.Must(pods[0].StartPing(ctx, pods[1].IPv4))(t)

	for _, r := range records {
		labtest.Do(t, store.put(r))
	}
	waitLeftOut(ctx, t, node, records)
	expectUnharmed(ctx, t, node, before)
	if got := labtest.Must(ping.Stop())(t); len(got.Lost) > 0 {
		t.Errorf("lost %d of %d packets, numbers %v", len(got.Lost), got.Sent, got.Lost)
	}
	// The victim goes on renewing its lease, and the daemon starts again, with all records there.
	labtest.Do(t, node.Stop(ctx))
	labtest.Do(t, node.Start(args...))
	labtest.Do(t, node.WaitReady(ctx))
	waitLeftOut(ctx, t, node, records)
	expectUnharmed(ctx, t, node, before)
	labtest.Do(t, pods[0].WaitPing(ctx, pods[1].IPv4))
	labtest.Must(pods[0].Ping(ctx, pods[1].IPv4, lab.PingOptions{Count: 25}))(t)
	if store.check != nil {
		store.check()
	}
	checkLog(t, node)
	for _, command := range []string{"status", "leases", "diff", "doctor"} {
		out, _, err := node.Ctl(ctx, command)
		if command != "doctor" { // which may have findings
			labtest.Do(t, err)
		}
		if strings.ContainsFunc(out, notPlain) || strings.Contains(out, "\nforged") || len(out) > 20000 {
			t.Errorf("flannelctl %s prints %d bytes: %q", command, len(out), out[:min(len(out), 20000)])
		}
		for _, r := range records {
			if command != "diff" && !strings.Contains(out, r.reason) {
				t.Errorf("flannelctl %s does not print %q for %s:\n%s", command, r.reason, r.name, out)
			}
		}
	}

	for _, r := range records {
		labtest.Do(t, store.remove(r))
	}
	waitLeftOut(ctx, t, node, nil)
	expectUnharmed(ctx, t, node, before)
}

// TestManyLargeRecords: records of etcd's largest size take no more memory when they are many.
func TestManyLargeRecords(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t, 2*time.Minute)
	l := labtest.New(ctx, t, vxlanConfig, oneLink[:1]...)
	n := l.Nodes()[0]
	large := vxlanRecord("198.18.0.99", strings.Repeat("forged ", 200000))
	for i := range 60 {
		key := fmt.Sprintf("%s/subnets/10.5.%d.0-24", lab.Prefix, 100+i)
		labtest.Do(t, lab.Poll(ctx, "etcd to take a record", func() error { return l.Etcd.Put(ctx, key, large) }))
	}
	labtest.Do(t, n.Start("--ip-masq"))
	labtest.Do(t, n.WaitReady(ctx))
	// The records are 84 MB.
	status := string(labtest.Must(os.ReadFile(fmt.Sprintf("/proc/%d/status", n.PID())))(t))
	var most int
	_, peak, _ := strings.Cut(status, "VmHWM:")
	if _, err := fmt.Sscan(peak, &most); err != nil || most > 128<<10 {
		t.Errorf("flanneld has taken %d kB of memory, %v", most, err)
	}
	t.Logf("flanneld has taken %d kB of memory", most)
	checkLog(t, n)
}

// forVictim fills in what records take from others. The second of two leases is the victim's, the first one that of the
// node that reads.
func forVictim(t *testing.T, own []subnet.Lease, records []hostileRecord) []hostileRecord {
	t.Helper()
	var data [2]struct{ VtepMAC, PublicKey string }
	for i := range data {
		labtest.Do(t, json.Unmarshal(own[i].Attrs.BackendData, &data[i]))
	}
	half := own[1].IPv4.Addr().As4()
	half[3] = 128
	fill := strings.NewReplacer("{ip}", own[1].Attrs.PublicIP.String(), "{mac}", data[1].VtepMAC,
		"{key}", data[1].PublicKey, "{own}", data[0].VtepMAC+data[0].PublicKey, "{half}", netip.AddrFrom4(half).String())
	var filled []hostileRecord
	for _, r := range records {
		r.key, r.value = fill.Replace(r.key), fill.Replace(r.value)
		filled = append(filled, r)
	}
	return filled
}

// waitLeftOut waits until status names the leases of these records, and no others, each with its reason.
func waitLeftOut(ctx context.Context, t *testing.T, n *lab.Node, records []hostileRecord) {
	t.Helper()
	labtest.Do(t, lab.Poll(ctx, n.Hostname+" to leave the records out", func() error {
		text, _, err := n.Ctl(ctx, "status", "-o", "json")
		if err != nil {
			return err
		}
		var s network.Status
		if err := json.Unmarshal([]byte(text), &s); err != nil {
			return fmt.Errorf("%w: %s", err, text)
		}
		problems := map[string]string{}
		for _, l := range s.LeftOut {
			problems[l.Lease().Subnets.String()] = l.Problem
		}
		for _, r := range records {
			subnet := strings.Replace(r.key, "-", "/", 1)
			if problem := problems[subnet]; r.reason == "" && problem != "" || !strings.Contains(problem, r.reason) {
				return fmt.Errorf("%s: the problem of %s is %q, want %q", r.name, subnet, problem, r.reason)
			}
			delete(problems, subnet)
		}
		if len(problems) > 0 {
			return fmt.Errorf("others are left out: %q", problems)
		}
		return nil
	}))
}

// expectUnharmed checks that a node's kernel holds what it held before.
func expectUnharmed(ctx context.Context, t *testing.T, n *lab.Node, before string) {
	t.Helper()
	if now := labtest.Must(n.Holds(ctx))(t); now != before {
		t.Errorf("the kernel of %s holds\n%s\nwant\n%s", n.Hostname, now, before)
	}
	labtest.Do(t, waitDiff(ctx, n, ""))
}

// notPlain tells whether a terminal does more than to show a character.
func notPlain(r rune) bool { return r != '\t' && r != '\n' && !unicode.IsPrint(r) }

// logLine is how a line of klog begins.
var logLine = regexp.MustCompile(`^[IWEF]\d{4} \d\d:\d\d:\d\d\.\d{6} +\d+ \S+:\d+\] `)

// checkLog checks that each line of a log is the daemon's, and one that a terminal can show.
func checkLog(t *testing.T, n *lab.Node) {
	t.Helper()
	for line := range strings.Lines(n.Log()) {
		line = strings.TrimSuffix(line, "\n")
		switch {
		case len(line) > 2000:
			t.Errorf("a line of the log has %d bytes: %.200s", len(line), line)
		case strings.ContainsFunc(line, notPlain):
			t.Errorf("a line of the log is not plain: %q", line)
		case strings.Contains(line, "forged") && !logLine.MatchString(line):
			t.Errorf("a line of the log is forged: %q", line)
		}
	}
}
