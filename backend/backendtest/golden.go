// Package backendtest checks backends against scenarios that can be read:
// leases in, ip and bridge commands out.
package backendtest

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/subnet"
)

// Update is the flag -update: tests write what they get into scenarios and pages.
var Update = flag.Bool("update", false, "write what the code answers into scenarios and pages")

const separator = "\n----\n"

// Golden runs the scenarios of testdata/*.txt. Each is a file of lines that
// begin with
//
//	config  the network's configuration
//	uplink  name, MTU, addresses with prefix lengths, "public" and the addresses peers use; then, if
//	        the other family has another interface, the same of that one
//	own     a lease: the last element of its etcd key, and its value
//	peer    likewise
//	#       a remark
//
// and, after a line of dashes, what the backend answers. "go test -update"
// writes the latter.
func Golden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenarios in testdata: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			scenario, want, _ := strings.Cut(string(text), separator)
			got, err := answer(scenario)
			if err != nil {
				t.Fatal(err)
			}
			if *Update {
				if err := os.WriteFile(file, []byte(strings.TrimRight(scenario, "\n")+"\n"+separator+got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if got != want {
				t.Errorf("want\n%s\ngot\n%s", want, got)
			}
		})
	}
}

// answer returns what the backend of a scenario wants of the kernel.
func answer(scenario string) (string, error) {
	var cfg *subnet.Config
	var uplink iface.Uplink
	var own subnet.Lease
	var peers []subnet.Lease
	for n, line := range strings.Split(scenario, "\n") {
		word, rest, _ := strings.Cut(line, " ")
		rest = strings.TrimSpace(rest)
		var err error
		switch word {
		case "config":
			cfg, err = subnet.ParseConfig([]byte(rest))
		case "uplink":
			uplink, err = ParseUplink(rest)
		case "own":
			own, err = ParseLease(rest)
		case "peer":
			var l subnet.Lease
			l, err = ParseLease(rest)
			peers = append(peers, l)
		case "", "#":
		default:
			err = fmt.Errorf("unknown word %q", word)
		}
		if err != nil {
			return "", fmt.Errorf("line %d: %w", n+1, err)
		}
	}
	if cfg == nil {
		return "", fmt.Errorf("no config")
	}
	var out bytes.Buffer
	b, err := backend.New(cfg, uplink)
	for _, w := range cfg.Warnings {
		fmt.Fprintf(&out, "warning: %s\n", w)
	}
	if err != nil {
		fmt.Fprintf(&out, "error: %v\n", err)
		return out.String(), nil
	}
	attrs, err := b.Attrs(context.Background(), own.Attrs)
	if err != nil {
		return "", err
	}
	published, err := json.Marshal(attrs)
	if err != nil {
		return "", err
	}
	info := b.Info()
	fmt.Fprintf(&out, "# pods: mtu %d, overhead %d\n", info.MTU, max(info.Overhead.IPv4, info.Overhead.IPv6))
	for _, e := range info.Endpoints {
		program := ""
		if e.Program != "" {
			program = " of " + e.Program
		}
		fmt.Fprintf(&out, "# peers send to: %s, protocol %s, port %d%s\n", e.Addr, e.Protocol, e.Port, program)
	}
	fmt.Fprintf(&out, "# published, but for the addresses: %s\n", published)
	for _, o := range b.Local(own) {
		fmt.Fprintln(&out, o)
	}
	for _, p := range peers {
		fmt.Fprintf(&out, "# peer %s\n", p.Subnets)
		objects, err := b.Peer(own, p)
		for _, o := range objects {
			fmt.Fprintln(&out, o)
		}
		if err != nil {
			fmt.Fprintf(&out, "error: %v\n", err)
		}
	}
	return out.String(), nil
}

// ParseLease reads the last element of a lease's etcd key, and its value.
func ParseLease(text string) (subnet.Lease, error) {
	key, value, _ := strings.Cut(text, " ")
	s, err := subnet.ParseKey(key)
	if err != nil {
		return subnet.Lease{}, err
	}
	l := subnet.Lease{Subnets: s}
	return l, json.Unmarshal([]byte(value), &l.Attrs)
}

// ParseUplink reads the uplink of a scenario, see Golden.
func ParseUplink(text string) (iface.Uplink, error) {
	var links family.Pair[iface.Link]
	var l iface.Link // without addresses
	public := false
	for _, word := range strings.Fields(text) {
		p, isPrefix := netip.ParsePrefix(word)
		ip, isAddr := netip.ParseAddr(word)
		mtu, isNumber := strconv.Atoi(word)
		switch {
		case word == "public":
			public = true
		case isPrefix == nil:
			of := links.At(family.Of(p.Addr()))
			prefixes := append(of.Prefixes, p.Masked())
			*of = l
			of.Addr, of.PublicIP, of.Prefixes = p.Addr(), p.Addr(), prefixes
		case isAddr == nil && public:
			links.At(family.Of(ip)).PublicIP = ip
		case isNumber == nil:
			l.MTU = mtu
		case isAddr == nil:
			return iface.Uplink{}, fmt.Errorf("%s has no prefix length", ip)
		default:
			l, public = iface.Link{Name: word, Index: l.Index + 2}, false
		}
	}
	return iface.Uplink(links), nil
}
