package wireguard

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/backend/backendtest"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/subnet"
)

// host has one private key for all scenarios.
var host Host

// TestMain gives the scenarios the private key, and a kernel that has WireGuard.
func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "wireguard")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		file := filepath.Join(dir, "wgkey")
		if err := os.WriteFile(file, []byte(key('a').String()), 0o400); err != nil {
			panic(err)
		}
		host.KeyFile = file
		backend.Register(backend.Type{Name: Type,
			New: func(cfg *subnet.Config, uplink iface.Uplink) (backend.Backend, error) {
				return newBackend(cfg, uplink, host, func() bool { return true })
			}})
		return m.Run()
	}())
}

func TestGolden(t *testing.T) { backendtest.Golden(t) }

// key returns a key that can be told from others.
func key(b byte) (k wgtypes.Key) {
	for i := range k {
		k[i] = b
	}
	return k
}

// newTest makes the backend, with a kernel that has no WireGuard.
func newTest(t *testing.T, config string, uplink iface.Uplink) *wireguard {
	t.Helper()
	cfg, err := subnet.ParseConfig([]byte(`{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd05::/48","Backend":{"Type":"wireguard"` + config + `}}`))
	if err != nil {
		t.Fatal(err)
	}
	b, err := newBackend(cfg, uplink, host, func() bool { return false })
	if err != nil {
		t.Fatal(err)
	}
	return b.(*wireguard)
}

var dualUplink = uplink("198.18.0.1", "fd18::1")

func uplink(four, six string) iface.Uplink {
	return iface.Uplink{
		IPv4: iface.Link{Name: "eth0", MTU: 1500, Addr: netip.MustParseAddr(four)},
		IPv6: iface.Link{Name: "eth0", MTU: 1500, Addr: netip.MustParseAddr(six)},
	}
}

func lease(t *testing.T, key, attrs string) subnet.Lease {
	t.Helper()
	s, err := subnet.ParseKey(key)
	if err != nil {
		t.Fatal(err)
	}
	l := subnet.Lease{Subnets: s}
	if err := json.Unmarshal([]byte(attrs), &l.Attrs); err != nil {
		t.Fatal(err)
	}
	return l
}

// text tells what devices hold of peers.
func (c config) text() string {
	var lines []string
	for _, k := range slices.SortedFunc(maps.Keys(c.peers), compareKeys) {
		lines = append(lines, fmt.Sprintf("%c %s %s", k[0], c.peers[k].endpoint, join(c.peers[k].allowed)))
	}
	return strings.Join(lines, "; ")
}

// TestModes: which way, with which key, to which subnets, as upstream does it.
func TestModes(t *testing.T) {
	data := func(b byte, port string) string { return `{"PublicKey":"` + key(b).String() + `"` + port + `}` }
	attrs := func(four, six, data, dataV6 string) string {
		return `{"PublicIP":"` + four + `","PublicIPv6":` + six + `,"BackendData":` + data + `,"BackendV6Data":` + dataV6 +
			`}`
	}
	const dual, four, six = "10.5.2.0-24&fd05:0:0:2::-64", "10.5.2.0-24", "0.0.0.0-0&fd05:0:0:2::-64"
	usual := attrs("198.18.0.2", `"fd18::2"`, data('b', ""), data('b', ""))
	global := uplink("10.0.0.1", "2001:db8::1")
	for _, c := range []struct {
		name, config string
		uplink       iface.Uplink
		key, attrs   string
		want         string // of each device
	}{
		{"separate", "", dualUplink, dual, usual, "b 198.18.0.2:51820 10.5.2.0/24 | b [fd18::2]:51821 fd05:0:0:2::/64"},
		{"separate, ports", `,"ListenPort":1,"ListenPortV6":2`, dualUplink, dual,
			attrs("198.18.0.2", `"fd18::2"`, data('b', `,"Port":3`), data('c', "")),
			"b 198.18.0.2:3 10.5.2.0/24 | c [fd18::2]:2 fd05:0:0:2::/64"},
		{"separate, IPv4's only", "", dualUplink, four, usual, "b 198.18.0.2:51820 10.5.2.0/24 | "},
		{"separate, IPv6's only", "", dualUplink, six, usual, " | b [fd18::2]:51821 fd05:0:0:2::/64"},
		{"separate, no address", "", dualUplink, dual, attrs("198.18.0.2", "null", data('b', ""), data('b', "")),
			"b 198.18.0.2:51820 10.5.2.0/24 | "},
		{"ipv4", `,"Mode":"ipv4"`, dualUplink, dual, usual, "b 198.18.0.2:51820 10.5.2.0/24,fd05:0:0:2::/64"},
		{"ipv4, no IPv6 address", `,"Mode":"ipv4"`, dualUplink, dual,
			attrs("198.18.0.2", "null", data('b', ""), data('b', "")),
			"b 198.18.0.2:51820 10.5.2.0/24,fd05:0:0:2::/64"},
		{"ipv6", `,"Mode":"ipv6"`, dualUplink, dual, usual, "b [fd18::2]:51820 10.5.2.0/24,fd05:0:0:2::/64"},
		{"ipv6, no address", `,"Mode":"ipv6"`, dualUplink, dual, attrs("198.18.0.2", "null", data('b', ""), data('b', "")),
			""},
		{"one device, IPv4's data", `,"Mode":"ipv4"`, dualUplink, dual, attrs("198.18.0.2", "null", data('b', ""), "null"),
			"b 198.18.0.2:51820 10.5.2.0/24,fd05:0:0:2::/64"},
		{"auto, public IPv4", `,"Mode":"auto"`, dualUplink, dual, usual, "b 198.18.0.2:51820 10.5.2.0/24,fd05:0:0:2::/64"},
		{"auto, both public", `,"Mode":"auto"`, global, dual,
			attrs("203.0.113.2", `"2001:db8::2"`, data('b', ""), data('b', "")),
			"b 203.0.113.2:51820 10.5.2.0/24,fd05:0:0:2::/64"},
		{"auto, public IPv6 on both sides", `,"Mode":"auto"`, global, dual,
			attrs("10.0.0.2", `"2001:db8::2"`, data('b', ""), data('b', "")),
			"b [2001:db8::2]:51820 10.5.2.0/24,fd05:0:0:2::/64"},
		{"auto, public IPv6 on one side", `,"Mode":"auto"`, dualUplink, dual,
			attrs("10.0.0.2", `"2001:db8::2"`, data('b', ""), data('b', "")),
			"b 10.0.0.2:51820 10.5.2.0/24,fd05:0:0:2::/64"},
		{"auto, no IPv4", `,"Mode":"auto"`, dualUplink, six, attrs("", `"fd18::2"`, "null", data('b', "")),
			"b [fd18::2]:51820 fd05:0:0:2::/64"},
	} {
		w := newTest(t, c.config, c.uplink)
		own := lease(t, "10.5.1.0-24&fd05:0:0:1::-64", `{"PublicIP":"198.18.0.1","PublicIPv6":"fd18::1"}`)
		l := lease(t, c.key, c.attrs)
		var got []string
		for _, tunnel := range w.tunnels {
			got = append(got, w.config(tunnel, secret(key('a')), own, map[subnet.Subnets]*subnet.Lease{l.Subnets: &l}).text())
		}
		if text := strings.Join(got, " | "); text != c.want {
			t.Errorf("%s: %s, want %s", c.name, text, c.want)
		}
	}
}

// TestGenerations: leases of two generations of a node share a subnet, which one
// peer has, always the same; a node with two leases is one peer.
func TestGenerations(t *testing.T) {
	w := newTest(t, `,"Mode":"ipv4"`, dualUplink)
	own := lease(t, "10.5.1.0-24&fd05:0:0:1::-64", `{"PublicIP":"198.18.0.1","PublicIPv6":"fd18::1"}`)
	for _, c := range []struct {
		second byte
		want   string
	}{
		{'c', "b 198.18.0.2:51820 ; c 198.18.0.3:51820 10.5.2.0/24,fd05:0:0:2::/64"},
		{'b', "b 198.18.0.3:51820 10.5.2.0/24,fd05:0:0:2::/64"},
	} {
		leases := map[subnet.Subnets]*subnet.Lease{}
		for _, l := range []subnet.Lease{
			lease(t, "10.5.2.0-24", `{"PublicIP":"198.18.0.2","BackendData":{"PublicKey":"`+key('b').String()+`"}}`),
			lease(t, "10.5.2.0-24&fd05:0:0:2::-64",
				`{"PublicIP":"198.18.0.3","BackendData":{"PublicKey":"`+key(c.second).String()+`"}}`),
		} {
			leases[l.Subnets] = &l
		}
		for range 20 {
			if got := w.config(w.tunnels[0], secret{}, own, leases).text(); got != c.want {
				t.Fatalf("%q, want %q", got, c.want)
			}
		}
	}
}

// TestUserSpace: where the kernel has no WireGuard, the device is a TUN.
func TestUserSpace(t *testing.T) {
	own := lease(t, "10.5.1.0-24&fd05:0:0:1::-64", `{"PublicIP":"198.18.0.1","PublicIPv6":"fd18::1"}`)
	var lines []string
	for _, o := range newTest(t, "", dualUplink).Local(own) {
		lines = append(lines, o.String())
	}
	want := `ip tuntap add flannel-wg mode tun multi_queue && ip link set flannel-wg mtu 1420 up
ip addr replace 10.5.1.0/32 dev flannel-wg
ip route replace 10.5.0.0/16 dev flannel-wg proto 70
ip tuntap add flannel-wg-v6 mode tun multi_queue && ip link set flannel-wg-v6 mtu 1420 up
ip addr replace fd05:0:0:1::/128 dev flannel-wg-v6 nodad
ip -6 route replace fd05::/48 dev flannel-wg-v6 proto 70`
	if got := strings.Join(lines, "\n"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// TestSecrets: nothing that is printed tells a secret.
func TestSecrets(t *testing.T) {
	psk := key('p').String()
	w := newTest(t, `,"PSK":"`+psk+`"`, dualUplink)
	if w.PSK != secret(key('p')) {
		t.Error("the PSK is another one")
	}
	c := w.config(w.tunnels[0], secret(key('k')), subnet.Lease{}, nil)
	for _, format := range []string{"%v", "%+v", "%#v", "%s"} {
		for _, v := range []any{*w, w.options, w.PSK, c} {
			text := fmt.Sprintf(format, v)
			for _, k := range []wgtypes.Key{key('p'), key('k')} {
				for _, told := range []string{k.String(), fmt.Sprintf("%d %d", k[0], k[0]), fmt.Sprintf("0x%x", k[0]),
					string(k[:4])} {
					if strings.Contains(text, told) {
						t.Errorf("%s of a %T tells %s: %s", format, v, told, text)
					}
				}
			}
		}
	}
}

// TestKeyFile: a node has one key, from the first time on, and for itself.
func TestKeyFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "run", "flannel", "wgkey")
	var all sync.Map
	var group sync.WaitGroup
	for range 20 {
		group.Go(func() {
			k, err := privateKey(file)
			if err != nil {
				t.Error(err)
			}
			all.Store(k, true)
		})
	}
	group.Wait()
	count := 0
	all.Range(func(k, _ any) bool { count++; return k != secret{} })
	if count != 1 {
		t.Errorf("there are %d keys", count)
	}
	mode := func() os.FileMode {
		info, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		return info.Mode().Perm()
	}
	if m := mode(); m != 0o600 {
		t.Errorf("the file's mode is %v", m)
	}
	if left, _ := os.ReadDir(filepath.Dir(file)); len(left) != 1 {
		t.Errorf("there are files left: %v", left)
	}
	first, _ := privateKey(file)
	// As upstream leaves it: no newline, and nobody may write.
	if err := os.WriteFile(file, []byte(wgtypes.Key(first).String()), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, m := range []os.FileMode{0o644, 0o400, 0o600} {
		if err := os.Chmod(file, m); err != nil {
			t.Fatal(err)
		}
		if k, err := privateKey(file); err != nil || k != first {
			t.Errorf("mode %v: the key is another one: %v", m, err)
		}
		if mode()&0o077 != 0 {
			t.Errorf("mode %v stays", m)
		}
	}
	raw := key(0xff)
	if err := os.WriteFile(file, []byte(raw.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if k, err := privateKey(file); err != nil || k[0] != 0xf8 || k[31] != 0x7f || k.public() != raw.PublicKey() {
		t.Errorf("%x became %x: %v", raw, [32]byte(k), err)
	}
	if err := os.WriteFile(file, []byte("c2VjcmV0\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := privateKey(file); err == nil || strings.Contains(err.Error(), "c2Vj") ||
		!strings.Contains(err.Error(), file) {
		t.Errorf("the error is %v", err)
	}
	if err := os.Truncate(file, 0); err != nil { // power was lost
		t.Fatal(err)
	}
	if k, err := privateKey(file); err != nil || k == first || k == (secret{}) {
		t.Errorf("an empty file: %v", err)
	}
	if m := mode(); m != 0o600 {
		t.Errorf("the file's mode is %v", m)
	}
}

func TestReference(t *testing.T) { backendtest.Keys(t, defaults) }
