package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
)

// TestMain lets the test binary play all parts, by the name it is started
// under: the plugin, one of its other names, a delegate, or the tests.
func TestMain(m *testing.M) {
	switch filepath.Base(os.Args[0]) {
	case "flannel", "cp", "install-conf":
		main()
	case "bridge":
		fakeDelegate()
	default:
		os.Setenv("GORACE", "atexit_sleep_ms=0") // else each part ends with a second's rest
		os.Exit(m.Run())
	}
}

// fakeDelegate writes down how it is called. It fails as the file COMMAND.error
// says; with picky.error it fails for any namespace that is not there. With the
// file COMMAND.child it leaves a child that keeps its output open.
func fakeDelegate() {
	dir, command, netns := os.Getenv("FAKE"), os.Getenv("CNI_COMMAND"), os.Getenv("CNI_NETNS")
	stdin, _ := io.ReadAll(os.Stdin)
	log, err := os.OpenFile(filepath.Join(dir, "calls"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		panic(err)
	}
	fmt.Fprintf(log, "%s %s of %s in %s\n%s\n",
		command, os.Getenv("CNI_IFNAME"), os.Getenv("CNI_CONTAINERID"), netns, stdin)
	log.Close()
	fail, err := os.ReadFile(filepath.Join(dir, command+".error"))
	if err != nil && netns != "" {
		if _, gone := os.Stat(netns); gone != nil {
			fail, err = os.ReadFile(filepath.Join(dir, "picky.error"))
		}
	}
	if err == nil {
		os.Stdout.Write(fail)
		os.Exit(1)
	}
	if command == "ADD" {
		text, err := os.ReadFile(filepath.Join(dir, "ADD.result"))
		if err != nil {
			text = []byte(theResult)
		}
		os.Stdout.Write(text)
	}
	if _, err := os.Stat(filepath.Join(dir, command+".child")); err == nil {
		child := exec.Command("sleep", "1000")
		child.Stdout = os.Stdout
		if err := child.Start(); err != nil {
			panic(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "child"), fmt.Append(nil, child.Process.Pid), 0o600); err != nil {
			panic(err)
		}
	}
}

const theResult = `{"cniVersion":"1.1.0","ips":[{"address":"10.244.3.7/24"}]}`

const dualEnv = `FLANNEL_NETWORK=10.244.0.0/16
FLANNEL_SUBNET=10.244.3.1/24
FLANNEL_IPV6_NETWORK=fd00:244::/48
FLANNEL_IPV6_SUBNET=fd00:244:0:3::1/64
FLANNEL_MTU=1430
FLANNEL_IPMASQ=true
`

// What the delegate gets for request("cbr0") and dualEnv, in the order of a
// JSON object written by Go, but for what belongs to the call.
const dualConf = `"ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.244.3.0/24"}],[{"subnet":"fd00:244:0:3::/64"}]],` +
	`"routes":[{"dst":"10.244.0.0/16"},{"dst":"fd00:244::/48"}],"type":"host-local"},` +
	`"isGateway":true,"mtu":1430,"name":"cbr0"`

// A node is a directory with subnet.env, the plugins and their state.
type node struct {
	t   *testing.T
	dir string
}

func newNode(t *testing.T) *node {
	n := &node{t, t.TempDir()}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	n.write("subnet.env", dualEnv)
	n.write("netns", "") // the plugin looks at whether it is there
	for _, name := range []string{"flannel", "bridge"} {
		if err := os.Symlink(self, n.path("bin/"+name)); err != nil {
			t.Fatal(err)
		}
	}
	return n
}

func (n *node) path(name string) string {
	path := filepath.Join(n.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		n.t.Fatal(err)
	}
	return path
}

func (n *node) write(name, text string) {
	n.t.Helper()
	if err := os.WriteFile(n.path(name), []byte(text), 0o600); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) remove(name string) {
	n.t.Helper()
	if err := os.Remove(n.path(name)); err != nil {
		n.t.Fatal(err)
	}
}

// request is the plugin's configuration, with more keys as JSON.
func (n *node) request(network string, more ...string) string {
	return fmt.Sprintf(`{"cniVersion": "1.1.0", "name": %q, "type": "flannel", "subnetFile": %q, "dataDir": %q%s}`,
		network, filepath.Join(n.dir, "subnet.env"), filepath.Join(n.dir, "data"),
		strings.Join(append([]string{""}, more...), ", "))
}

// call runs the plugin for eth0 of container c1, unless the environment says
// otherwise. Failure comes as "error CODE: text".
func (n *node) call(command, stdin string, environ ...string) string {
	n.t.Helper()
	cmd := exec.Command(filepath.Join(n.dir, "bin/flannel"))
	cmd.Env = append(append(os.Environ(), "FAKE="+n.dir, "CNI_PATH=/nowhere:"+filepath.Join(n.dir, "bin"),
		"CNI_COMMAND="+command, "CNI_CONTAINERID=c1", "CNI_IFNAME=eth0",
		"CNI_NETNS="+filepath.Join(n.dir, "netns")), environ...)
	cmd.Stdin = strings.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if errs.Len() > 0 {
		n.t.Logf("%s said: %s", command, &errs)
	}
	if err == nil && command == "ADD" {
		var compact bytes.Buffer
		if err := json.Compact(&compact, out.Bytes()); err != nil {
			n.t.Fatalf("ADD printed no result: %v: %s", err, &out)
		}
		return compact.String()
	}
	if err == nil {
		return out.String()
	}
	var e types.Error
	if err := json.Unmarshal(out.Bytes(), &e); err != nil {
		n.t.Fatalf("%s printed neither a result nor an error: %v: %s%s", command, err, &out, &errs)
	}
	return fmt.Sprintf("error %d: %s", e.Code, e.Error())
}

// calls returns, and forgets, how the delegate was called.
func (n *node) calls() string {
	text, err := os.ReadFile(n.path("calls"))
	if err != nil {
		return ""
	}
	n.remove("calls")
	return strings.ReplaceAll(string(text), n.dir, "DIR")
}

// records returns the names of the files in dataDir.
func (n *node) records() string {
	files, _ := os.ReadDir(filepath.Join(n.dir, "data"))
	var names []string
	for _, f := range files {
		names = append(names, f.Name())
	}
	return strings.Join(names, " ")
}

func (n *node) want(what, got, want string) {
	n.t.Helper()
	if got != want {
		n.t.Errorf("%s:\n got %s\nwant %s", what, got, want)
	}
}

func (n *node) wantMode(name string, want os.FileMode) {
	n.t.Helper()
	info, err := os.Stat(filepath.Join(n.dir, name))
	if err != nil {
		n.t.Fatal(err)
	}
	if got := info.Mode().Perm(); got != want {
		n.t.Errorf("%s has mode %v, want %v", name, got, want)
	}
}

// delegated is the delegate's configuration, with what belongs to the call
// around it.
func delegated(before, after string) string {
	return `{` + before + `"cniVersion":"1.1.0",` + dualConf + after + `,"type":"bridge"}`
}

func TestLifeOfAnAttachment(t *testing.T) {
	n := newNode(t)
	n.want("ADD", n.call("ADD", n.request("cbr0", `"args": {"a": 1}`, `"runtimeConfig": {"r": 1}`)), theResult)
	n.want("the delegate's ADD", n.calls(),
		"ADD eth0 of c1 in DIR/netns\n"+delegated(`"args":{"a":1},`, `,"runtimeConfig":{"r":1}`)+"\n")
	n.want("records", n.records(), "c1")
	n.wantMode("data", 0o700)
	n.wantMode("data/c1", 0o600)

	// The node has another subnet meanwhile, and the network another delegate.
	n.write("subnet.env", strings.ReplaceAll(dualEnv, "10.244.3.1", "10.244.99.1"))
	changed := func(more ...string) string {
		return n.request("cbr0", append(more, `"delegate": {"type": "macvlan", "name": "not allowed"}`)...)
	}
	n.want("CHECK", n.call("CHECK", changed(`"prevResult": {"p": 2}`, `"runtimeConfig": {"r": 2}`)), "")
	n.want("the delegate's CHECK", n.calls(), "CHECK eth0 of c1 in DIR/netns\n"+
		delegated(`"args":{"a":1},`, `,"prevResult":{"p":2},"runtimeConfig":{"r":2}`)+"\n")

	n.remove("subnet.env")
	n.want("DEL", n.call("DEL", changed(`"prevResult": {"p": 3}`)), "")
	n.want("the delegate's DEL", n.calls(), "DEL eth0 of c1 in DIR/netns\n"+
		delegated(`"args":{"a":1},`, `,"prevResult":{"p":3},"runtimeConfig":{"r":1}`)+"\n")
	n.want("records", n.records(), "")

	n.want("second DEL", n.call("DEL", changed()), "")
	n.want("the delegate's second DEL", n.calls(), "")
	n.want("CHECK after DEL", n.call("CHECK", changed()), "") // as flannel's plugin
	n.want("the delegate's CHECK after DEL", n.calls(), "")
}

func TestChained(t *testing.T) {
	n := newNode(t)
	n.want("ADD", n.call("ADD", n.request("cbr0", `"prevResult": {"p": 1}`)), theResult)
	n.want("the delegate's ADD", n.calls(), "ADD eth0 of c1 in DIR/netns\n"+delegated("", `,"prevResult":{"p":1}`)+"\n")
	n.want("DEL", n.call("DEL", n.request("cbr0")), "")
	n.want("the delegate's DEL", n.calls(), "DEL eth0 of c1 in DIR/netns\n"+delegated("", "")+"\n")
}

func TestAddFails(t *testing.T) {
	n := newNode(t)
	n.write("ADD.error", `{"code": 11, "msg": "no address", "details": "all 253 are taken"}`)
	const want = "error 11: bridge: no address; all 253 are taken"
	n.want("ADD", n.call("ADD", n.request("cbr0")), want)
	const call = " eth0 of c1 in DIR/netns\n"
	n.want("calls", n.calls(), "ADD"+call+delegated("", "")+"\nDEL"+call+delegated("", "")+"\n")
	n.want("records", n.records(), "")

	n.write("DEL.error", `{"code": 11, "msg": "no address", "details": "all 253 are taken"}`)
	n.want("ADD of what the delegate refuses", n.call("ADD", n.request("cbr0")), want)
	n.want("records", n.records(), "")

	n.write("DEL.error", "no JSON")
	n.want("ADD that cannot be undone", n.call("ADD", n.request("cbr0")), want)
	n.want("records for the DEL to come", n.records(), "c1")
}

// TestAddWithoutResult: a delegate that succeeds must print a result. What it has set up is removed.
func TestAddWithoutResult(t *testing.T) {
	n := newNode(t)
	n.write("ADD.result", "no result")
	n.want("ADD", strings.ReplaceAll(n.call("ADD", n.request("cbr0")), n.dir, "DIR"), "error 999: DIR/bin/bridge ADD: "+
		"failed to unmarshal raw result: invalid character 'o' in literal null (expecting 'u')")
	if calls := n.calls(); !strings.Contains(calls, "DEL eth0 of c1") {
		t.Errorf("the ADD was not undone:\n%s", calls)
	}
	n.want("records", n.records(), "")
}

func TestAddTwice(t *testing.T) {
	n := newNode(t)
	n.want("ADD", n.call("ADD", n.request("cbr0")), theResult)
	n.calls()
	n.write("subnet.env", strings.ReplaceAll(dualEnv, "10.244.3.1", "10.244.99.1"))
	n.write("ADD.error", `{"code": 999, "msg": "eth0 exists"}`)
	n.want("second ADD", n.call("ADD", n.request("cbr0")), "error 999: bridge: eth0 exists")
	if calls := n.calls(); strings.Contains(calls, "DEL") {
		t.Errorf("the first ADD was undone:\n%s", calls)
	}
	n.want("DEL", n.call("DEL", n.request("cbr0")), "")
	n.want("the delegate's DEL", n.calls(), "DEL eth0 of c1 in DIR/netns\n"+delegated("", "")+"\n")
}

// After a reboot the same container may come back, without a DEL.
func TestAddOverAStaleRecord(t *testing.T) {
	n := newNode(t)
	n.write("subnet.env", strings.ReplaceAll(dualEnv, "10.244.3.1", "10.244.99.1"))
	n.want("ADD", n.call("ADD", n.request("cbr0")), theResult)
	n.write("subnet.env", dualEnv)
	n.want("ADD", n.call("ADD", n.request("cbr0")), theResult)
	n.want("records", n.records(), "c1")
	n.calls()
	n.want("DEL", n.call("DEL", n.request("cbr0")), "")
	n.want("the delegate's DEL", n.calls(), "DEL eth0 of c1 in DIR/netns\n"+delegated("", "")+"\n")
}

func TestAddWithout(t *testing.T) {
	n := newNode(t)
	n.remove("bin/bridge")
	n.want("ADD without a delegate", n.call("ADD", n.request("cbr0")), fmt.Sprintf(
		`error 999: there is no plugin "bridge" in /nowhere:%s/bin: install the CNI project's plugins there, `+
			"or set delegate.type to another plugin", n.dir))
	n.want("records", n.records(), "")
	n.remove("subnet.env")
	n.want("ADD without subnet.env", n.call("ADD", n.request("cbr0")), fmt.Sprintf(
		"error 11: flanneld is not ready on this node: %s/subnet.env is missing; "+
			"see `kubectl -n kube-flannel logs ds/kube-flannel-ds` or `journalctl -u flanneld`", n.dir))
	n.want("records", n.records(), "")
}

func TestDelFails(t *testing.T) {
	for _, c := range []struct {
		name, file, text string
		netnsGone        bool
		want             string // of DEL; "" means that the record goes
		calls            string // of the delegate
	}{
		{"an error", "DEL.error", `{"code": 5, "msg": "disk full"}`, false, "error 5: bridge: disk full", "DIR/netns"},
		{"no JSON", "DEL.error", "Segmentation fault\n", false,
			`error 999: DIR/bin/bridge DEL: exit status 1: it printed "Segmentation fault"`, "DIR/netns"},
		{"no error", "DEL.error", `{}`, false, `error 999: DIR/bin/bridge DEL: exit status 1: it printed "{}"`, "DIR/netns"},
		{"an error that paints", "DEL.error", `{"code": 5, "msg": "disk\n\u001b[2Jfull", "details": "\u009b2J\n"}`, false,
			`error 5: bridge: disk; \x1b[2Jfull; \u009b2J`, "DIR/netns"},
		{"a page that paints", "DEL.error", "\x1b[2J\n" + strings.Repeat("x", 1000), false,
			`error 999: DIR/bin/bridge DEL: exit status 1: it printed "\x1b[2J\n` + strings.Repeat("x", 195) + `"… (1005 bytes)`, "DIR/netns"},
		{"an error, and the namespace is gone", "DEL.error", `{"code": 5, "msg": "disk full"}`, true,
			"error 5: bridge: disk full", "DIR/netns,"},
		{"the container is unknown", "DEL.error", `{"code": 3, "msg": "no such container"}`, false, "", "DIR/netns"},
		{"the namespace is gone", "picky.error", `{"code": 999, "msg": "no such namespace"}`, true, "", "DIR/netns,"},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t)
			n.want("ADD", n.call("ADD", n.request("cbr0")), theResult)
			n.calls()
			n.write(c.file, c.text)
			if c.netnsGone {
				n.remove("netns")
			}
			n.want("DEL", strings.ReplaceAll(n.call("DEL", n.request("cbr0")), n.dir, "DIR"), c.want)
			want := "c1"
			if c.want == "" {
				want = ""
			}
			n.want("records", n.records(), want)
			var calls []string
			for line := range strings.Lines(n.calls()) {
				if _, netns, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "DEL eth0 of c1 in "); ok {
					calls = append(calls, netns)
				}
			}
			n.want("namespaces", strings.Join(calls, ","), c.calls)
			if c.want != "" {
				n.remove(c.file)
				n.want("DEL again", n.call("DEL", n.request("cbr0")), "")
				n.want("records", n.records(), "")
			}
		})
	}
}

// The node had upstream's plugin: its record is the bare configuration.
func TestUpstreamsRecord(t *testing.T) {
	n := newNode(t)
	const theirs = `{"cniVersion":"0.3.1","ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.244.9.0/24"}]],` +
		`"routes":[{"dst":"10.244.0.0/16"}],"type":"host-local"},"isGateway":true,"mtu":1450,"name":"cbr0","type":"bridge"}`
	n.write("data/c1", theirs)
	n.want("CHECK", n.call("CHECK", n.request("cbr0")), "")
	n.want("DEL", n.call("DEL", n.request("cbr0")), "")
	ours := strings.Replace(theirs, "0.3.1", "1.1.0", 1) // as the runtime asks
	const call = " eth0 of c1 in DIR/netns\n"
	n.want("calls", n.calls(), "CHECK"+call+ours+"\nDEL"+call+ours+"\n")
	n.want("records", n.records(), "")

	// The container may have the other interface from upstream's plugin.
	n.write("data/c1", theirs)
	n.want("ADD", n.call("ADD", n.request("cbr0"), "CNI_IFNAME=net1"), theResult)
	n.want("records", n.records(), "c1 c1:net1")
	n.calls()
	n.want("DEL", n.call("DEL", n.request("cbr0"), "CNI_IFNAME=net1"), "")
	n.want("calls", n.calls(), "DEL net1 of c1 in DIR/netns\n"+delegated("", "")+"\n")
	n.want("records", n.records(), "c1")

	n.write("data/c1", `{"cniVersion": "0.3.1", "na`) // written as the power went
	n.want("DEL", n.call("DEL", n.request("cbr0")), "")
	n.want("calls", n.calls(), "")
	n.want("records", n.records(), "")
}

// TestRecordOfAProgram: a record decides what DEL, CHECK and GC execute no more than a configuration does. The container
// can be removed all the same.
func TestRecordOfAProgram(t *testing.T) {
	for _, kind := range []string{`"../other/bridge"`, `"/../other/bridge"`, `"bridge/../../other/bridge"`, `"flannel"`,
		`".."`, `"."`, `""`, `7`, `null`} {
		t.Run(kind, func(t *testing.T) {
			n := newNode(t)
			if got := n.call("ADD", n.request("cbr0", `"delegate": {"type": `+kind+`}`)); !strings.HasPrefix(got, "error 7: ") {
				t.Errorf("ADD of such a configuration: %q", got)
			}
			self, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(self, n.path("other/bridge")); err != nil {
				t.Fatal(err)
			}
			// If the record made the plugin execute itself, the plugin would find this record.
			n.write("other/c1", delegated("", ""))
			record := fmt.Sprintf(`{"name": "cbr0", "type": %s, "dataDir": %q, "flannelIfName": "eth0"}`,
				kind, filepath.Join(n.dir, "other"))
			n.write("data/c1", record)
			if got := n.call("CHECK", n.request("cbr0")); !strings.HasPrefix(got, "error 5: dataDir: ") {
				t.Errorf("CHECK: %q", got)
			}
			n.want("records after CHECK", n.records(), "c1")
			n.want("DEL", n.call("DEL", n.request("cbr0")), "")
			n.want("records after DEL", n.records(), "")
			n.want("calls", n.calls(), "")

			n.write("data/c1", record)
			n.want("GC", n.call("GC", n.request("cbr0", `"cni.dev/valid-attachments": []`), "CNI_CONTAINERID=", "CNI_IFNAME="), "")
			if calls := n.calls(); strings.Contains(calls, "DEL") {
				t.Errorf("GC calls\n%s", calls)
			}
		})
	}
}

// The node gets upstream's plugin: it takes the record as it is, by the name
// of the container.
func TestRecordForUpstream(t *testing.T) {
	n := newNode(t)
	n.want("ADD", n.call("ADD", n.request("cbr0", `"prevResult": {}`)), theResult)
	record, err := os.ReadFile(n.path("data/c1"))
	if err != nil {
		t.Fatal(err)
	}
	n.want("record", string(record), strings.Replace(delegated("", ""), `"ipMasq"`, `"flannelIfName":"eth0","ipMasq"`, 1))
}

func TestTwoInterfaces(t *testing.T) {
	for _, first := range []string{"eth0", "net1"} {
		t.Run(first+" goes first", func(t *testing.T) {
			n := newNode(t)
			network := map[string]string{"eth0": "cbr0", "net1": "storage"}
			for _, ifName := range []string{"eth0", "net1"} {
				n.want("ADD", n.call("ADD", n.request(network[ifName]), "CNI_IFNAME="+ifName), theResult)
			}
			n.want("records", n.records(), "c1 c1:net1")
			n.calls()
			second := map[string]string{"eth0": "net1", "net1": "eth0"}[first]
			for _, ifName := range []string{first, first, second} {
				n.want("DEL", n.call("DEL", n.request(network[ifName]), "CNI_IFNAME="+ifName), "")
			}
			var want string
			for _, ifName := range []string{first, second} {
				want += "DEL " + ifName + " of c1 in DIR/netns\n" +
					strings.Replace(delegated("", ""), "cbr0", network[ifName], 1) + "\n"
			}
			n.want("calls", n.calls(), want)
			n.want("records", n.records(), "")
		})
	}
}

func TestCheckFails(t *testing.T) {
	n := newNode(t)
	n.want("ADD", n.call("ADD", n.request("cbr0")), theResult)
	n.write("CHECK.error", `{"code": 100, "msg": "eth0 has lost its address"}`)
	n.want("CHECK", n.call("CHECK", n.request("cbr0")), "error 100: bridge: eth0 has lost its address")
	n.want("records", n.records(), "c1")
}

func TestStatus(t *testing.T) {
	n := newNode(t)
	n.want("STATUS", n.call("STATUS", n.request("cbr0")), "")
	n.want("the delegate's STATUS", n.calls(), "STATUS eth0 of c1 in DIR/netns\n"+delegated("", "")+"\n")
	for _, c := range []struct{ said, want string }{
		{`{"code": 50, "msg": "no addresses"}`, "error 50: bridge: no addresses"},
		{`{"code": 51, "msg": "no addresses", "details": "and no routes"}`, "error 51: bridge: no addresses; and no routes"},
		{`{"code": 1, "msg": "incompatible CNI versions"}`, "error 50: bridge: incompatible CNI versions"},
	} {
		n.write("STATUS.error", c.said)
		n.want("STATUS", n.call("STATUS", n.request("cbr0")), c.want)
	}
	n.remove("STATUS.error")
	n.want("STATUS of a configuration that cannot work", n.call("STATUS", n.request("cbr0", `"delegate": {"name": "x"}`)),
		"error 7: delegate.name is not allowed: leave it out; the delegate gets the name of the network, cbr0")
	n.remove("bin/bridge")
	n.want("STATUS without a delegate", n.call("STATUS", n.request("cbr0")), fmt.Sprintf(
		`error 50: there is no plugin "bridge" in /nowhere:%s/bin: install the CNI project's plugins there, `+
			"or set delegate.type to another plugin", n.dir))
	n.write("subnet.env", "FLANNEL_MTU=1450\n")
	n.want("STATUS with half a subnet.env", n.call("STATUS", n.request("cbr0")), fmt.Sprintf(
		"error 50: flanneld is not ready on this node: %s/subnet.env is missing FLANNEL_NETWORK, FLANNEL_IPV6_NETWORK, "+
			"FLANNEL_SUBNET, FLANNEL_IPV6_SUBNET, FLANNEL_IPMASQ; "+
			"see `kubectl -n kube-flannel logs ds/kube-flannel-ds` or `journalctl -u flanneld`", n.dir))
	n.remove("subnet.env")
	n.want("STATUS without subnet.env", n.call("STATUS", n.request("cbr0")), fmt.Sprintf(
		"error 50: flanneld is not ready on this node: %s/subnet.env is missing; "+
			"see `kubectl -n kube-flannel logs ds/kube-flannel-ds` or `journalctl -u flanneld`", n.dir))
}

func TestGC(t *testing.T) {
	n := newNode(t)
	for _, a := range [][3]string{
		{"c1", "eth0", "cbr0"}, {"c1", "net1", "cbr0"}, {"c2", "eth0", "cbr0"}, {"c3", "eth0", "storage"},
	} {
		n.want("ADD", n.call("ADD", n.request(a[2]), "CNI_CONTAINERID="+a[0], "CNI_IFNAME="+a[1]), theResult)
	}
	n.write("data/upstreams", delegated("", ""))
	n.write("data/broken", "{")
	const all = "broken c1 c1:net1 c2 c3 upstreams"
	n.want("records", n.records(), all)
	n.calls()
	gc := func(valid string) string {
		return n.call("GC", n.request("cbr0", valid), "CNI_CONTAINERID=", "CNI_IFNAME=")
	}
	forwarded := func(valid string) string {
		return "GC  of  in DIR/netns\n{\"cni.dev/valid-attachments\":" + valid + ",\"cniVersion\":\"1.1.0\"," +
			dualConf + ",\"type\":\"bridge\"}\n"
	}

	n.want("GC without a list", gc(`"x": 0`), "")
	n.want("calls", n.calls(), forwarded("null"))
	n.want("records", n.records(), all)

	const valid = `[{"containerID":"c1","ifname":"eth0"}]`
	n.write("DEL.error", `{"code": 5, "msg": "disk full"}`)
	n.write("GC.error", `{"code": 5, "msg": "disk full too"}`)
	n.want("GC", gc(`"cni.dev/valid-attachments": `+valid),
		"error 999: net1 of container c1: bridge: disk full\neth0 of container c2: bridge: disk full; bridge: disk full too")
	n.want("records", n.records(), all)
	n.calls()

	n.remove("DEL.error")
	n.remove("GC.error")
	n.want("GC", gc(`"cni.dev/valid-attachments": `+valid), "")
	stale := strings.Replace(delegated("", ""), `"ipMasq"`, `"flannelIfName":"net1","ipMasq"`, 1)
	n.want("calls", n.calls(), "DEL net1 of c1 in \n"+stale+"\n"+
		"DEL eth0 of c2 in \n"+strings.Replace(stale, "net1", "eth0", 1)+"\n"+forwarded(valid))
	n.want("records", n.records(), "broken c1 c3 upstreams")

	n.remove("subnet.env")
	if got := gc(`"cni.dev/valid-attachments": []`); !strings.HasPrefix(got, "error 999: flanneld is not ready") {
		t.Errorf("GC without subnet.env: %q", got)
	}
	n.want("records", n.records(), "broken c3 upstreams")
}

func TestVersionAndHint(t *testing.T) {
	n := newNode(t)
	n.want("VERSION", n.call("VERSION", ""),
		`{"cniVersion":"1.1.0","supportedVersions":["0.1.0","0.2.0","0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]}`+"\n")
	plugin := filepath.Join(n.dir, "bin/flannel")
	out, err := exec.Command(plugin, "--version").Output()
	if err != nil || string(out) != "unknown\n" {
		t.Errorf("--version: %v: %q", err, out)
	}
	out, err = exec.Command(plugin).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "CNI_COMMAND=STATUS") {
		t.Errorf("by hand: %v: %s", err, out)
	}
}

// A delegate that has ended is not waited for, although a child of it keeps its output open.
func TestDelegateLeavesChild(t *testing.T) {
	n := newNode(t)
	n.write("ADD.child", "")
	t.Cleanup(func() {
		text, _ := os.ReadFile(n.path("child"))
		if pid, err := strconv.Atoi(string(text)); err == nil {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	})
	result := make(chan string, 1)
	go func() { result <- n.call("ADD", n.request("cbr0")) }()
	select {
	case got := <-result:
		n.want("ADD", got, theResult)
	case <-time.After(30 * time.Second):
		t.Error("the plugin waits for the child")
	}
}
