package wireguard

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"golang.zx2c4.com/wireguard/conn"
	wg "golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/kernel"
)

// controlDir is where wg and other programs find devices outside the kernel (wireguard.com/xplatform).
const controlDir = "/var/run/wireguard"

// userDevice is a TUN device with WireGuard in this process behind it.
type userDevice struct {
	wg      *wg.Device
	control *control // nil: other programs cannot see the device
}

// openUser runs WireGuard on a TUN device, which must exist and be up. gone receives a value when WireGuard has ended.
func openUser(log klog.Logger, name string, private secret, port int, gone chan<- struct{}) (device, error) {
	fd, err := kernel.OpenTUN(name)
	if err != nil {
		return nil, err
	}
	t, _, err := tun.CreateUnmonitoredTUNFromFD(fd) // Work listens to links already
	if err != nil {
		return nil, fmt.Errorf("attaching to %s: %w", name, err)
	}
	d, err := newUser(log, t, conn.NewStdNetBind(), private, port)
	if err != nil {
		return nil, err
	}
	go func() {
		<-d.Gone()
		select {
		case gone <- struct{}{}:
		default:
		}
	}()
	if d.control, err = listenControl(filepath.Join(controlDir, name+".sock"), d.wg.IpcHandle); err != nil {
		log.V(1).Info("Programs such as wg cannot show the device", "reason", err)
	}
	return d, nil
}

func newUser(log klog.Logger, t tun.Device, bind conn.Bind, private secret, port int) (*userDevice, error) {
	d := &userDevice{wg: wg.NewDevice(t, bind, logger(log))}
	key := wgtypes.Key(private)
	err := d.Configure(wgtypes.Config{PrivateKey: &key, ListenPort: &port})
	if err == nil {
		err = d.wg.Up()
	}
	if err != nil {
		d.wg.Close()
		return nil, fmt.Errorf("UDP port %d: %w", port, err)
	}
	return d, nil
}

// logger logs the messages of WireGuard. WireGuard logs some errors for every packet: their rate is limited.
func logger(log klog.Logger) *wg.Logger {
	limit := rate.NewLimiter(rate.Every(10*time.Second), 3)
	return &wg.Logger{
		Verbosef: func(format string, args ...any) {
			if log := log.V(4); log.Enabled() {
				log.Info("WireGuard", "message", fmt.Sprintf(format, args...))
			}
		},
		Errorf: func(format string, args ...any) {
			if log.V(4).Enabled() || limit.Allow() {
				log.Error(nil, "WireGuard", "message", fmt.Sprintf(format, args...))
			}
		},
	}
}

func (d *userDevice) Gone() <-chan struct{} { return d.wg.Wait() }

func (d *userDevice) Close() {
	if d.control != nil {
		d.control.close()
	}
	d.wg.Close()
	<-d.wg.Wait()
}

// Device and Configure use the text protocol that other implementations have on a socket (wireguard.com/xplatform), but
// no socket: a socket has a path, and nodes may share their files.
func (d *userDevice) Device() (*wgtypes.Device, error) {
	text, err := d.wg.IpcGet()
	if err != nil {
		return nil, err
	}
	return parseDevice(text)
}

func (d *userDevice) Configure(c wgtypes.Config) error { return d.wg.IpcSet(formatConfig(c)) }

func parseDevice(text string) (*wgtypes.Device, error) {
	d := &wgtypes.Device{Type: wgtypes.Userspace}
	p := &wgtypes.Peer{}
	var handshake [2]int64 // seconds, nanoseconds
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		var err error
		switch name {
		case "private_key":
			d.PrivateKey, err = parseKey(value)
		case "listen_port":
			d.ListenPort, err = strconv.Atoi(value)
		case "public_key":
			d.Peers = append(d.Peers, wgtypes.Peer{})
			p = &d.Peers[len(d.Peers)-1]
			p.PublicKey, err = parseKey(value)
		case "preshared_key":
			p.PresharedKey, err = parseKey(value)
		case "endpoint":
			var at netip.AddrPort
			at, err = netip.ParseAddrPort(value)
			p.Endpoint = net.UDPAddrFromAddrPort(at)
		case "last_handshake_time_sec":
			handshake[0], err = strconv.ParseInt(value, 10, 64)
		case "last_handshake_time_nsec":
			if handshake[1], err = strconv.ParseInt(value, 10, 64); handshake != [2]int64{} {
				p.LastHandshakeTime = time.Unix(handshake[0], handshake[1])
			}
		case "rx_bytes":
			p.ReceiveBytes, err = strconv.ParseInt(value, 10, 64)
		case "tx_bytes":
			p.TransmitBytes, err = strconv.ParseInt(value, 10, 64)
		case "persistent_keepalive_interval":
			var seconds int
			seconds, err = strconv.Atoi(value)
			p.PersistentKeepaliveInterval = time.Duration(seconds) * time.Second
		case "allowed_ip":
			var n *net.IPNet
			if _, n, err = net.ParseCIDR(value); err == nil {
				p.AllowedIPs = append(p.AllowedIPs, *n)
			}
		}
		if err != nil {
			return nil, fmt.Errorf("WireGuard's %s cannot be read", name) // err may show a key
		}
	}
	return d, nil
}

func parseKey(text string) (wgtypes.Key, error) {
	b, err := hex.DecodeString(text)
	if err != nil {
		return wgtypes.Key{}, err
	}
	return wgtypes.NewKey(b)
}

func formatConfig(c wgtypes.Config) string {
	var b strings.Builder
	set := func(name string, value any) { fmt.Fprintf(&b, "%s=%v\n", name, value) }
	if c.ReplacePeers { // before the key: see changes
		set("replace_peers", true)
	}
	if c.PrivateKey != nil {
		set("private_key", hex.EncodeToString(c.PrivateKey[:]))
	}
	if c.ListenPort != nil {
		set("listen_port", *c.ListenPort)
	}
	for _, p := range c.Peers {
		set("public_key", hex.EncodeToString(p.PublicKey[:]))
		if p.UpdateOnly {
			set("update_only", true)
		}
		if p.Remove {
			set("remove", true)
		}
		if p.PresharedKey != nil {
			set("preshared_key", hex.EncodeToString(p.PresharedKey[:]))
		}
		if p.Endpoint != nil {
			set("endpoint", p.Endpoint.AddrPort())
		}
		if p.PersistentKeepaliveInterval != nil {
			set("persistent_keepalive_interval", int(p.PersistentKeepaliveInterval.Seconds()))
		}
		if p.ReplaceAllowedIPs {
			set("replace_allowed_ips", true)
		}
		for _, a := range p.AllowedIPs {
			set("allowed_ip", a.String())
		}
	}
	return b.String()
}

// A control is the socket by which other programs read and change a device.
type control struct {
	path     string
	listener net.Listener
	stop     context.CancelFunc
	done     sync.WaitGroup
}

// listenControl listens on a socket that only root can use, unless another program listens there.
func listenControl(path string, handle func(net.Conn)) (*control, error) {
	if other, err := net.Dial("unix", path); err == nil {
		other.Close()
		return nil, fmt.Errorf("%s is in use", path)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	// A directory that other users cannot enter, until the mode of the socket is set.
	dir, err := os.MkdirTemp(filepath.Dir(path), ".flanneld-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	temp := filepath.Join(dir, "sock")
	l, err := net.Listen("unix", temp)
	if err != nil {
		return nil, err
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(temp, 0o600), os.Rename(temp, path)); err != nil {
		l.Close()
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	c := &control{path: path, listener: l, stop: stop}
	c.done.Go(func() {
		for {
			caller, err := l.Accept()
			if err != nil {
				return
			}
			c.done.Go(func() {
				defer context.AfterFunc(ctx, func() { caller.Close() })()
				handle(&peerRemover{Conn: caller, lines: bufio.NewReader(caller)})
			})
		}
	})
	return c, nil
}

func (c *control) close() {
	os.Remove(c.path)
	c.listener.Close()
	c.stop()
	c.done.Wait()
}

// A peerRemover is a connection on which a new private key removes all peers (see changes). The next sync adds them
// again.
type peerRemover struct {
	net.Conn
	lines  *bufio.Reader
	unread []byte
}

func (c *peerRemover) Read(p []byte) (int, error) {
	if len(c.unread) == 0 {
		line, err := c.lines.ReadBytes('\n')
		if len(line) == 0 {
			return 0, err
		}
		if bytes.HasPrefix(line, []byte("private_key=")) {
			line = append([]byte("replace_peers=true\n"), line...)
		}
		c.unread = line
	}
	n := copy(p, c.unread)
	c.unread = c.unread[n:]
	return n, nil
}
