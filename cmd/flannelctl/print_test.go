package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/cmd/internal/settings"
	"github.com/flanneld/flanneld/network"
	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/nstest"
)

// hostile is a text that would be lines of its own and paint a terminal.
const hostile = "x\ndaemon-down: flanneld does not run\n    rm -rf /\r\x1b[2J\x1b]0;title\a\u009b2J\u202e"

// forges reports whether what was printed obeys the text: a line of it stands alone, or a terminal would obey a part.
func forges(printed string) bool {
	for line := range strings.Lines(printed) {
		line = strings.TrimSuffix(line, "\n")
		if strings.HasPrefix(line, "daemon-down: flanneld does not run") || strings.HasPrefix(line, "    rm -rf /") ||
			strings.ContainsFunc(strings.NewReplacer("\x1b[31m", "", "\x1b[32m", "", "\x1b[33m", "", "\x1b[1m", "", "\x1b[0m", "").
				Replace(line), func(r rune) bool { return !strconv.IsPrint(r) }) {
			return true
		}
	}
	return false
}

// hostileLease is a lease of which each text is hostile.
var hostileLease = network.Lease{
	Subnets: []netip.Prefix{netip.MustParsePrefix("10.5.2.0/24")}, PublicIPs: []netip.Addr{netip.MustParseAddr("198.18.0.2")},
	Backend: hostile, Problem: hostile, BackendData: []byte(`"\u009b2J"`),
}

// hostileStatus is a status of which each text is hostile.
var hostileStatus = network.Status{
	Daemon: true, Version: hostile, Waiting: hostile, Backend: hostile, Ready: false,
	Uplinks: []network.Uplink{{Name: hostile}}, Lease: &hostileLease, LeftOut: []network.Lease{hostileLease},
	Devices:    []network.Device{{Name: hostile, Type: hostile}},
	Rules:      network.Rules{Mode: hostile},
	SubnetFile: network.SubnetFile{Path: hostile},
	Store:      network.Store{Name: hostile, Trouble: hostile},
	Errors:     map[string]string{hostile: hostile},
}

// TestPeersWithoutSession: a peer that has agreed on keys lately is not looked for at the address in its lease.
func TestPeersWithoutSession(t *testing.T) {
	peer := func(ip string, age time.Duration) network.Lease {
		l := network.Lease{PublicIPs: []netip.Addr{netip.MustParseAddr(ip)}}
		if age > 0 {
			l.Keys = time.Now().Add(-age)
		}
		return l
	}
	leases := []network.Lease{peer("192.168.4.2", time.Minute), peer("198.18.0.2", time.Hour), peer("198.18.0.3", 0)}
	if got := join(publicIPs(withoutSession(leases))); got != "198.18.0.2, 198.18.0.3" {
		t.Errorf("got %s", got)
	}
}

// TestStatusRetired: status says which network the configuration no longer has.
func TestStatusRetired(t *testing.T) {
	gone := netip.MustParsePrefix("10.6.0.0/16")
	var out bytes.Buffer
	(&tool{printer: printer{out: &out}}).status(network.Status{Retired: []netip.Prefix{gone},
		Network: []netip.Prefix{netip.MustParsePrefix("10.5.0.0/16"), gone}})
	if !strings.Contains(out.String(), "no longer in the configuration: 10.6.0.0/16; ") {
		t.Errorf("printed\n%s", &out)
	}
}

// TestPrinterOnTerminal: whatever texts status, leases, doctor and diff are given, a terminal obeys none of them.
func TestPrinterOnTerminal(t *testing.T) {
	for _, coloured := range []bool{false, true} {
		for name, show := range map[string]func(*tool){
			"status":   func(tool *tool) { tool.status(hostileStatus) },
			"leases":   func(tool *tool) { tool.leases([]network.Lease{hostileLease, {Own: true, Backend: hostile}}) },
			"findings": func(tool *tool) { tool.findings([]finding{{hostile, hostile, []string{"echo '\x1b[2J\u009b2J'"}}}, 1) },
			"errors":   func(tool *tool) { tool.printf("flannelctl: %s\n", errors.New(hostile)) },
			"commands": func(tool *tool) { tool.commands("", []string{"nft -f - <<'END'\n# \x1b[2J\u202e\nEND"}) },
			"JSON":     func(tool *tool) { tool.printJSON(hostileStatus) },
			"connectivity": func(tool *tool) {
				tool.printConnectivity(connectivity{Peers: []peerPaths{{
					Subnets: hostileLease.Subnets, Paths: []path{{Overlay: leg{Ping: hostile, UDP: hostile}}},
					Findings: []finding{overlayBlocked(hostileStatus, path{})}, Notes: []string{hostile},
				}}})
			},
		} {
			var out bytes.Buffer
			show(&tool{printer: printer{&out, coloured}})
			if out.Len() == 0 || forges(out.String()) {
				t.Errorf("%s, in colours %t:\n%q", name, coloured, &out)
			}
		}
	}
}

// TestJSONIsUnchanged: a program reads from JSON what was there.
func TestJSONIsUnchanged(t *testing.T) {
	want := map[string]string{"text": hostile + "\U000e0001 größer 日本 <&>\u2028\x7f"}
	var out bytes.Buffer
	var got map[string]string
	if err := (printer{out: &out}).printJSON(want); err != nil || json.Unmarshal(out.Bytes(), &got) != nil || got["text"] != want["text"] {
		t.Errorf("%s is read as %q, %v", &out, got, err)
	}
	if !strings.Contains(out.String(), "größer 日本 <&>") {
		t.Errorf("got %s", &out)
	}
}

// TestTableOfHostileCells: columns are aligned as they are shown.
func TestTableOfHostileCells(t *testing.T) {
	var out bytes.Buffer
	printer{out: &out}.table([]string{"A", "B"}, [][]cell{{{"\x1b[2J", nil}, {"b", nil}}, {{"a\nb", nil}, {"b", nil}}})
	if want := "A        B\n\\x1b[2J  b\na; b     b\n"; out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", &out, want)
	}
}

// TestDaemonRefuses: a daemon that answers with an error is no daemon that has to be restarted.
func TestDaemonRefuses(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "flanneld.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "the answer cannot be written: "+hostile, http.StatusInternalServerError)
	})}
	go server.Serve(l)
	defer server.Close()
	err = (&tool{options: &settings.Options{StatusSocket: socket}}).checkDaemon(t.Context())
	var refusal network.Refusal
	if !errors.As(err, &refusal) || !strings.HasPrefix(err.Error(), "flanneld cannot report its state: the answer cannot be written: x; ") ||
		forges(err.Error()) {
		t.Errorf("got %v", err)
	}
}

// TestUplinkOfEachFamily: each uplink must carry the packets of its own family.
func TestUplinkOfEachFamily(t *testing.T) {
	four, six := netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("fd18::1")
	d := &diagnosis{status: network.Status{
		MTU: 1430, Overhead: family.Pair[int]{IPv4: 50, IPv6: 70},
		Uplinks: []network.Uplink{
			{Name: "eth0", MTU: 1480, Addresses: []netip.Addr{four}},
			{Name: "eth1", MTU: 1499, Addresses: []netip.Addr{six}},
		},
	}}
	found := mtuUplink(d)
	if len(found) != 1 || !strings.Contains(found[0].text, "(1500 with encapsulation), but the MTU of the uplink eth1 is 1499") {
		t.Errorf("found %+v", found)
	}
	d.status.Uplinks = []network.Uplink{{Name: "eth0", MTU: 1499, Addresses: []netip.Addr{four, six}}}
	if found := mtuUplink(d); len(found) != 1 || !strings.Contains(found[0].text, "uplink eth0 is 1499") {
		t.Errorf("with one uplink: found %+v", found)
	}
}

// TestFixesAreQuoted: names of devices, tables and chains may be almost any text. A shell gets each as one word.
func TestFixesAreQuoted(t *testing.T) {
	nstest.Need(t, "bash")
	const programs = `ip() { printf '%s\n' "$@"; }; nft() { ip "$@"; }; ethtool() { ip "$@"; }; `
	for _, name := range []string{"eth0", "e;ip 'forged'", "$(ip forged)", "e\x1b[2J", "e\nip forged"} {
		d := &diagnosis{status: network.Status{MTU: 9000, Uplinks: []network.Uplink{{Name: name, MTU: 1500}}}}
		var commands []string
		for _, p := range mtuUplink(d) {
			commands = append(commands, p.fix...)
		}
		commands = append(commands, ruleset{program: "nft", family: "ip", table: name, chains: map[string]*chain{"c": {hook: "input"}}}.
			insertAccept("input", "", "udp dport 8472"))
		commands = append(commands, ruleset{program: "nft", family: "ip", table: "t", chains: map[string]*chain{name: {hook: "input"}}}.
			insertAccept("input", "", "udp dport 8472"))
		commands = append(commands, checksumWrong(d.status, leg{Device: name}, leg{}).Fix...)
		if len(commands) != 4 {
			t.Fatalf("the commands are %q", commands)
		}
		for _, command := range commands {
			out, err := exec.Command("bash", "-c", programs+command).CombinedOutput()
			if err != nil || !strings.Contains("\n"+string(out), "\n"+name+"\n") || strings.Contains("\n"+string(out), "\nforged\n") || forges(command) {
				t.Errorf("%s prints the words %q, %v", command, out, err)
			}
		}
	}
}
