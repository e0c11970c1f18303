package cni

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/flanneld/flanneld/pkg/nstest"
)

// A result is what ADD answers, with the keys that the specification has in the versions below.
type result struct {
	CNIVersion string `json:"cniVersion"`
	Interfaces []struct {
		Name    string `json:"name"`
		MAC     string `json:"mac"`
		MTU     int    `json:"mtu"` // from 1.1.0
		Sandbox string `json:"sandbox"`
	} `json:"interfaces"`
	IPs []struct {
		Version   string `json:"version"` // before 1.0.0
		Address   string `json:"address"`
		Gateway   string `json:"gateway"`
		Interface int    `json:"interface"`
	} `json:"ips"`
	Routes []struct {
		Dst string `json:"dst"`
		GW  string `json:"gw"`
	} `json:"routes"`
	DNS struct{} `json:"dns"`
}

// check returns what the specification of a version does not allow, and what the pod's attachment lacks.
func (r *result) check(version string, p *pod, want []netip.Prefix) []string {
	var wrong []string
	complain := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	if r.CNIVersion != version {
		complain("cniVersion is %q", r.CNIVersion)
	}
	inPod := -1
	for i, link := range r.Interfaces {
		if _, err := net.ParseMAC(link.MAC); err != nil {
			complain("interface %s: %v", link.Name, err)
		}
		if link.MTU != 0 && version != "1.1.0" {
			complain("interface %s has an mtu", link.Name)
		}
		switch link.Sandbox {
		case "":
			nstest.Run(p, "ip link show dev "+link.Name)
		case p.path():
			if inPod >= 0 || link.Name != "eth0" {
				complain("a second interface in the pod: %s", link.Name)
			}
			inPod = i
		default:
			complain("interface %s: sandbox %s", link.Name, link.Sandbox)
		}
	}
	var got []netip.Prefix
	for _, ip := range r.IPs {
		prefix, err := netip.ParsePrefix(ip.Address)
		if err != nil {
			complain("%v", err)
			continue
		}
		got = append(got, prefix)
		family := ""
		if strings.HasPrefix(version, "0.") {
			family = map[bool]string{true: "4", false: "6"}[prefix.Addr().Is4()]
		}
		if ip.Version != family {
			complain("address %s: version %q, want %q", ip.Address, ip.Version, family)
		}
		if ip.Interface != inPod {
			complain("address %s: interface %v, want %d", ip.Address, ip.Interface, inPod)
		}
		if ip.Gateway != prefix.Masked().Addr().Next().String() {
			complain("address %s: gateway %q", ip.Address, ip.Gateway)
		}
	}
	if !slices.Equal(got, want) {
		complain("addresses %v, want %v", got, want)
	}
	var routes []string
	for _, route := range r.Routes {
		routes = append(routes, route.Dst)
	}
	for _, network := range networks.Each() {
		if !slices.Contains(routes, network.String()) {
			complain("no route to %s: %q", network, routes)
		}
	}
	return wrong
}

// hosts returns the addresses with a number in both subnets of the node.
func hosts(number byte) []netip.Prefix {
	var all []netip.Prefix
	for _, s := range dual.Each() {
		bytes := s.Addr().AsSlice()
		bytes[len(bytes)-1] = number
		addr, _ := netip.AddrFromSlice(bytes)
		all = append(all, netip.PrefixFrom(addr, s.Bits()))
	}
	return all
}

// decode reads a result, and refuses keys of other versions.
func decode(t *testing.T, text []byte) *result {
	t.Helper()
	var r result
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		t.Fatalf("%v:\n%s", err, text)
	}
	return &r
}

// cnitool runs the specification's tool, which is a small container runtime. Its cache is the node's.
func (n *node) cnitool(command, netns string) (stdout []byte, err error) {
	n.Helper()
	tool, err := filepath.Abs("../../build/bin/cnitool")
	if err != nil {
		n.Fatal(err)
	}
	cmd := exec.Command("unshare", "--mount", "sh", "-ec",
		`mkdir -p /var/lib/cni; mount --bind "$1" /var/lib/cni; shift; exec "$@"`, "sh", n.path("cache"), tool,
		command, "cbr0", netns)
	cmd.Env = append(os.Environ(), "CNI_PATH="+strings.Join(n.cni.Path, ":"), "NETCONFPATH="+n.path("net.d"))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err = cmd.Output()
	if err != nil {
		err = fmt.Errorf("cnitool %s: %w: %s", command, err, stderr.Bytes())
	}
	return stdout, err
}

// TestCnitool: cnitool attaches, checks and detaches pods, in each version of the specification, and results are as that
// version says: those of the plugin itself as well as what libcni makes of them.
func TestCnitool(t *testing.T) {
	if _, err := os.Stat("../../build/bin/cnitool"); err != nil {
		nstest.Missing(t, "%v: run make tools", err)
	}
	nstest.Need(t, "unshare", "mount")
	for _, version := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		t.Run(version, func(t *testing.T) {
			n := newNode(t, dual)
			conf := n.network(version, "cbr0")
			for _, dir := range []string{"cache", "net.d"} {
				if err := os.MkdirAll(n.path(dir), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.WriteFile(n.path("net.d/10-flannel.conflist"), conf.Bytes, 0o644); err != nil {
				t.Fatal(err)
			}
			run := func(command string, p *pod) []byte {
				t.Helper()
				out, err := n.cnitool(command, p.path())
				if err != nil {
					t.Error(err)
				}
				return out
			}
			fails := func(command string, p *pod, part string) {
				t.Helper()
				if _, err := n.cnitool(command, p.path()); err == nil || !strings.Contains(err.Error(), part) {
					t.Errorf("cnitool %s: %v, want %q", command, err, part)
				}
			}
			p, other := n.pod(), n.pod()
			run("status", p)
			first, second := hosts(2), hosts(3)
			if wrong := decode(t, run("add", p)).check(version, p, first); wrong != nil {
				t.Errorf("the result of cnitool add: %q", wrong)
			}
			p.has("eth0", dual, first)
			if wrong := decode(t, n.plugin("ADD", other, conf.Plugins[0].Bytes, version)).check(version, other,
				second); wrong != nil {
				t.Errorf("the plugin's result: %q", wrong)
			}
			if version == "0.3.1" {
				fails("check", p, "does not support the CHECK command")
			} else {
				run("check", p)
				p.run("ip addr del " + first[0].String() + " dev eth0")
				fails("check", p, first[0].Addr().String())
			}
			// cnitool detaches what it has attached itself, and names no attachments to the plugin, which then detaches none.
			run("gc", p)
			n.wantFiles("addresses/cbr0", second[0].Addr().String(), second[1].Addr().String())
			n.wantFiles("records", other.name)
			run("del", p)
			run("del", p)
			n.plugin("DEL", other, conf.Plugins[0].Bytes, version)
			n.wantFiles("addresses/cbr0")
			n.wantFiles("records")
			if err := os.Remove(n.path("subnet.env")); err != nil {
				t.Fatal(err)
			}
			fails("add", p, "flanneld is not ready on this node")
			if version == "1.1.0" {
				fails("status", p, "flanneld is not ready on this node")
			}
		})
	}
}

// plugin runs the plugin as a runtime does, and returns what it prints.
func (n *node) plugin(command string, p *pod, conf []byte, version string) []byte {
	n.Helper()
	var keys map[string]any
	if err := json.Unmarshal(conf, &keys); err != nil {
		n.Fatal(err)
	}
	keys["cniVersion"], keys["name"] = version, "cbr0"
	stdin, err := json.Marshal(keys)
	if err != nil {
		n.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(n.cni.Path[0], "flannel"))
	cmd.Stdin = bytes.NewReader(stdin)
	cmd.Env = append(os.Environ(), "CNI_COMMAND="+command, "CNI_CONTAINERID="+p.name, "CNI_NETNS="+p.path(),
		"CNI_IFNAME=eth0", "CNI_PATH="+strings.Join(n.cni.Path, ":"))
	out, err := cmd.Output()
	if err != nil {
		n.Errorf("%s: %v: %s", command, err, out)
	}
	return out
}
