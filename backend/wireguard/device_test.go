package wireguard

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/conn/bindtest"
	"golang.zx2c4.com/wireguard/tun/tuntest"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/pkg/nstest"
)

// TestUserDevice: two devices in this process, configured as Work does it, carry
// packets; what they hold reads as what they were given.
func TestUserDevice(t *testing.T) {
	binds := bindtest.NewChannelBinds()
	ips := [2]netip.Addr{netip.MustParseAddr("10.5.1.1"), netip.MustParseAddr("10.5.2.1")}
	var keys [2]secret
	var devices [2]*userDevice
	var tuns [2]*tuntest.ChannelTUN
	for i := range devices {
		k, err := wgtypes.GeneratePrivateKey()
		if err != nil {
			t.Fatal(err)
		}
		keys[i], tuns[i] = secret(k), tuntest.NewChannelTUN()
		if devices[i], err = newUser(klog.Background(), tuns[i].TUN(), binds[i], keys[i], i+1); err != nil {
			t.Fatal(err)
		}
		defer devices[i].Close()
	}
	// The binds choose a port each, for IPv4 or IPv6. With one of each, peers would
	// be heard from elsewhere.
	var ports [2]int
	for ports == [2]int{} || ports[0] != ports[1]+1 {
		for i, d := range devices {
			if err := d.Configure(wgtypes.Config{ListenPort: &ports[i]}); err != nil {
				t.Fatal(err)
			}
			have, err := d.Device()
			if err != nil {
				t.Fatal(err)
			}
			ports[i] = have.ListenPort
		}
	}
	var all [2]peerStates
	settle := func(i int, again bool) int {
		t.Helper()
		j := 1 - i
		want := config{Private: keys[i], port: ports[i], PSK: secret(key('p')), peers: map[wgtypes.Key]peer{
			keys[j].public(): wanted(fmt.Sprintf("127.0.0.1:%d", ports[j]), fmt.Sprintf("10.5.%d.0/24", j+1),
				fmt.Sprintf("fd05:0:0:%d::/64", j+1)),
		}}
		have, err := devices[i].Device()
		if err != nil {
			t.Fatal(err)
		}
		steps, after := changes("test", have, want, all[i], again, time.Now())
		for _, s := range steps {
			if err := devices[i].Configure(s.Config); err != nil {
				t.Fatal(err)
			}
		}
		all[i] = after
		return len(steps)
	}
	for i := range devices {
		settle(i, false)
	}
	var arrived [2]chan []byte
	for i, c := range tuns {
		arrived[i] = make(chan []byte, 1)
		go func() {
			for {
				select {
				case p := <-c.Inbound:
					select {
					case arrived[i] <- p:
					default:
					}
				case <-t.Context().Done():
					return
				}
			}
		}()
	}
	carries := func() {
		t.Helper()
		for i := range devices {
			packet := tuntest.Ping(ips[1-i], ips[i])
			for begun := time.Now(); ; { // one may be lost with a session
				if time.Since(begun) > time.Minute {
					t.Fatal("nothing arrives")
				}
				tuns[i].Outbound <- packet
				select {
				case got := <-arrived[1-i]:
					if !bytes.Equal(got, packet) {
						t.Errorf("%x arrives, want %x", got, packet)
					}
				case <-time.After(time.Second):
					continue
				}
				break
			}
		}
	}
	carries()
	for i := range devices {
		have, err := devices[i].Device()
		if err != nil {
			t.Fatal(err)
		}
		p := have.Peers[0]
		if p.ReceiveBytes == 0 || time.Since(p.LastHandshakeTime) > time.Minute || p.PresharedKey != key('p') ||
			p.PersistentKeepaliveInterval != 0 {
			t.Errorf("the peer is %v, %v", p.ReceiveBytes, p.LastHandshakeTime)
		}
		if n := settle(i, false); n > 0 {
			t.Errorf("%d steps more", n)
		}
	}
	checkUndone(t, devices[0], keys[1].public(), func() int { return settle(0, false) })
	carries()
}

// checkUndone has somebody change what a device holds of a peer; settle notices, and
// there is no more to do then.
func checkUndone(t *testing.T, d device, peer wgtypes.Key, settle func() int) {
	t.Helper()
	seconds, wrong := 5*time.Second, key('x')
	wrong[0], wrong[31] = wrong[0]&248, wrong[31]&127|64 // as a private key is
	for name, c := range map[string]wgtypes.Config{
		"peer removed":    {Peers: []wgtypes.PeerConfig{{PublicKey: peer, Remove: true}}},
		"subnets removed": {Peers: []wgtypes.PeerConfig{{PublicKey: peer, UpdateOnly: true, ReplaceAllowedIPs: true}}},
		"PSK changed":     {Peers: []wgtypes.PeerConfig{{PublicKey: peer, UpdateOnly: true, PresharedKey: &wrong}}},
		"keepalive": {Peers: []wgtypes.PeerConfig{{PublicKey: peer, UpdateOnly: true,
			PersistentKeepaliveInterval: &seconds}}},
		"stranger": {Peers: []wgtypes.PeerConfig{{PublicKey: key('z'),
			Endpoint:   &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9},
			AllowedIPs: held('z', "", 0, 0, "10.5.2.0/24").AllowedIPs}}},
		"private key": {PrivateKey: &wrong, ReplacePeers: true}, // what happens without: see changes
	} {
		if err := d.Configure(c); err != nil {
			t.Fatal(err)
		}
		if settle() == 0 {
			t.Errorf("%s: nobody noticed", name)
		}
		if n := settle(); n > 0 {
			t.Errorf("%s: %d steps more", name, n)
		}
	}
}

// TestKernelDevice: what the kernel's WireGuard holds reads as what it was given,
// and whatever somebody does to it is undone.
func TestKernelDevice(t *testing.T) {
	nstest.New(t)
	if !kernel.HasWireGuard() {
		t.Skip("this kernel has no WireGuard")
	}
	nstest.Run(t, "ip link add flannel-wg up type wireguard")
	d, err := openKernel("flannel-wg")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	k, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	want := config{Private: secret(k), port: 51820, PSK: secret(key('p')), peers: map[wgtypes.Key]peer{
		key('b'): wanted("127.0.0.1:51820", "10.5.2.0/24", "fd05:0:0:2::/64"), key('c'): wanted("[::1]:51820", "10.5.3.0/24"),
	}}
	var before peerStates
	settle := func() int {
		t.Helper()
		have, err := d.Device()
		if err != nil {
			t.Fatal(err)
		}
		steps, after := changes("flannel-wg", have, want, before, false, time.Now())
		for _, s := range steps {
			if err := d.Configure(s.Config); err != nil {
				t.Fatal(err)
			}
		}
		before = after
		return len(steps)
	}
	if settle() == 0 || settle() > 0 {
		t.Error("the new device is not settled at once")
	}
	checkUndone(t, d, key('b'), settle)
	nstest.Run(t, "ip link del flannel-wg")
	if _, err := d.Device(); !errors.Is(err, errGone) {
		t.Errorf("the error is %v", err)
	}
}

// TestPort: a port that somebody has is told of, and nothing stays behind.
func TestPort(t *testing.T) {
	nstest.New(t)
	taken, err := net.ListenUDP("udp", &net.UDPAddr{Port: 51820})
	if err != nil {
		t.Fatal(err)
	}
	open := func() (*userDevice, error) {
		return newUser(klog.Background(), tuntest.NewChannelTUN().TUN(), conn.NewStdNetBind(), ours, 51820)
	}
	if _, err := open(); !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(err.Error(), "UDP port 51820") {
		t.Errorf("the error is %v", err)
	}
	taken.Close()
	for range 2 {
		d, err := open()
		if err != nil {
			t.Fatal(err)
		}
		d.Close()
	}
}

// TestControl: the socket is for its owner alone, there is one, and what a dead
// process has left is no obstacle.
func TestControl(t *testing.T) {
	path := filepath.Join(t.TempDir(), "wireguard", "test.sock")
	handle := func(c net.Conn) {
		defer c.Close()
		for lines := bufio.NewScanner(c); lines.Scan(); {
			fmt.Fprintln(c, strings.ToUpper(lines.Text()))
		}
	}
	var left net.Listener
	for _, before := range []string{"nothing", "a dead socket"} {
		c, err := listenControl(path, handle)
		if err != nil {
			t.Fatalf("%s: %v", before, err)
		}
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", before, info, err)
		}
		if all, _ := os.ReadDir(filepath.Dir(path)); len(all) != 1 {
			t.Errorf("there is %v", all)
		}
		if _, err := listenControl(path, handle); err == nil {
			t.Error("two listen")
		}
		caller, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(caller, "set=1\nprivate_key=aa\nlisten_port=1\n\n")
		// wireguard-go may stand still if it gets a key while a handshake ends.
		const want = "SET=1\nREPLACE_PEERS=TRUE\nPRIVATE_KEY=AA\nLISTEN_PORT=1\n\n"
		got := make([]byte, len(want))
		if _, err := io.ReadFull(caller, got); string(got) != want {
			t.Errorf("what arrives is %q: %v", got, err)
		}
		hung, err := net.Dial("unix", path) // must not keep close from returning
		if err != nil {
			t.Fatal(err)
		}
		defer hung.Close()
		c.close()
		if _, err := os.Stat(path); err == nil {
			t.Error("the socket is still there")
		}
		if left, err = net.Listen("unix", path); err != nil {
			t.Fatal(err)
		}
		left.(*net.UnixListener).SetUnlinkOnClose(false)
		left.Close()
	}
}

// TestDeviceText: what cannot be read is told, without what it was.
func TestDeviceText(t *testing.T) {
	for _, text := range []string{"private_key=c0ffee\n", "private_key=secret\n", "listen_port=x\n", "endpoint=x\n",
		"allowed_ip=x\n"} {
		_, err := parseDevice("public_key=" + strings.Repeat("62", 32) + "\n" + text)
		if err == nil || strings.Contains(err.Error(), "c0ffee") || strings.Contains(err.Error(), "secret") {
			t.Errorf("%q: %v", text, err)
		}
	}
}
