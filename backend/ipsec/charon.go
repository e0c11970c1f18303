package ipsec

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/strongswan/govici/vici"
	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/kernel"
)

// charonSocket is where charon listens for VICI, its control protocol.
const charonSocket = "/var/run/charon.vici"

// charonPaths are where distributions have it.
var charonPaths = [...]string{
	"charon",                         // in PATH
	"/usr/lib/strongswan/charon",     // Alpine, Arch
	"/usr/lib/ipsec/charon",          // Debian, Ubuntu
	"/usr/libexec/strongswan/charon", // Fedora
	"/usr/libexec/ipsec/charon",      // openSUSE
}

const (
	// charonEnds is how long charon may take to say goodbye to its peers.
	charonEnds = 5 * time.Second
	// charonAnswers is how long somebody waits who only wants to know.
	charonAnswers = 5 * time.Second
)

// mark is in the environment of a charon that we started, and of no other.
const mark = "STARTED_BY=flanneld"

// A process is a charon that we started.
type process struct {
	*exec.Cmd
	ended chan struct{} // closed when it has
}

// errNoCharon says that charon is not installed.
var errNoCharon = fmt.Errorf("there is no charon, neither in PATH nor at %s: install strongSwan with its VICI plugin (Debian: strongswan-charon, strongswan-swanctl)",
	strings.Join(charonPaths[1:], ", "))

// findCharon returns the path of the program.
func findCharon() (string, error) {
	for _, path := range charonPaths {
		if path, err := exec.LookPath(path); err == nil {
			return path, nil
		}
	}
	return "", errNoCharon
}

// start starts charon. It outlives us, so that packets pass while we restart.
func start() (*process, error) {
	path, err := findCharon()
	if err != nil {
		return nil, err
	}
	p := &process{exec.Command(path), make(chan struct{})}
	p.Stdout, p.Stderr = os.Stdout, os.Stderr
	p.Env = append(os.Environ(), mark)
	p.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	if err := p.Start(); err != nil {
		return nil, fmt.Errorf("starting charon: %w", err)
	}
	go func() {
		_ = p.Wait() // its own log says why
		close(p.ended)
	}()
	return p, nil
}

// running tells whether it is.
func (p *process) running() bool {
	if p == nil {
		return false
	}
	select {
	case <-p.ended:
		return false
	default:
		return true
	}
}

// stop ends it.
func (p *process) stop() {
	if !p.running() {
		return
	}
	_ = p.Process.Signal(unix.SIGTERM)
	select {
	case <-p.ended:
	case <-time.After(charonEnds):
		_ = p.Process.Kill()
		<-p.ended
	}
}

// A connection is a tunnel as charon is told of it (swanctl.conf(5)).
type connection struct {
	LocalAddrs  []string         `vici:"local_addrs"`
	RemoteAddrs []string         `vici:"remote_addrs"`
	Proposals   []string         `vici:"proposals"`
	Version     int              `vici:"version"`
	KeyingTries int              `vici:"keyingtries"`
	DPDDelay    string           `vici:"dpd_delay"`
	Encap       bool             `vici:"encap"`
	MobIKE      bool             `vici:"mobike"` // no: the addresses are the policies', too
	Local       auth             `vici:"local"`
	Remote      auth             `vici:"remote"`
	Children    map[string]child `vici:"children"`
}

type auth struct {
	Auth string `vici:"auth"`
}

type child struct {
	LocalTS      []string `vici:"local_ts"`
	RemoteTS     []string `vici:"remote_ts"`
	ESPProposals []string `vici:"esp_proposals"`
	Mode         string   `vici:"mode"`
	ReqID        int      `vici:"reqid"`
	Policies     bool     `vici:"policies"`
	RekeyTime    string   `vici:"rekey_time"`
	StartAction  string   `vici:"start_action"`
	CloseAction  string   `vici:"close_action"`
	DPDAction    string   `vici:"dpd_action"`
}

// name is what charon knows the tunnel by. It is upstream's.
func (t tunnel) name() string {
	return fmt.Sprintf("%s-%s-%s-%s", t.from, t.own, t.peer, t.to)
}

// child is the name of the one pair of subnets in it.
func (t tunnel) child() string { return fmt.Sprintf("%s-%s", t.own, t.peer) }

// connection returns what charon must know of a tunnel. What the two ends must
// agree on is upstream's. Policies are not charon's, but desired state.
func (b *ipsec) connection(t tunnel) connection {
	return connection{
		LocalAddrs: []string{t.from.String()}, RemoteAddrs: []string{t.to.String()},
		Proposals: []string{"aes256-sha256-modp4096"}, Version: 2,
		KeyingTries: 0, // without end
		DPDDelay:    "30s",
		Encap:       b.UDPEncap,
		Local:       auth{"psk"}, Remote: auth{"psk"},
		Children: map[string]child{t.child(): {
			LocalTS: []string{t.own.String()}, RemoteTS: []string{t.peer.String()},
			ESPProposals: []string{b.ESPProposal}, Mode: "tunnel", ReqID: kernel.PolicyID, RekeyTime: "1h",
			StartAction: "start", CloseAction: "trap", DPDAction: "restart",
		}},
	}
}

// A client speaks VICI.
type client struct{ *vici.Session }

// call gives charon a command. args is a map, or a struct with vici tags.
func (c client) call(ctx context.Context, command string, args any) (*vici.Message, error) {
	m, err := vici.MarshalMessage(args)
	if err != nil {
		return nil, fmt.Errorf("charon: %s: %w", command, err)
	}
	answer, err := c.Call(ctx, command, m)
	if err != nil {
		return nil, fmt.Errorf("charon: %s: %w", command, err)
	}
	return answer, nil
}

// connections lists those that charon has been told of.
func (c client) connections(ctx context.Context) (map[string]bool, error) {
	answer, err := c.call(ctx, "get-conns", map[string]string{})
	if err != nil {
		return nil, err
	}
	all := map[string]bool{}
	names, _ := answer.Get("conns").([]string)
	for _, name := range names {
		all[name] = true
	}
	return all, nil
}

// established lists the connections that are up, or about to be.
func (c client) established(ctx context.Context) (map[string]bool, error) {
	all := map[string]bool{}
	for m, err := range c.CallStreaming(ctx, "list-sas", "list-sa", nil) {
		if err != nil {
			return nil, fmt.Errorf("charon: list-sas: %w", err)
		}
		for _, name := range m.Keys() {
			all[name] = true
		}
	}
	return all, nil
}

// remoteHosts asks charon for the hosts that it has tunnels with. The error says that
// charon does not answer.
func remoteHosts(ctx context.Context) (map[netip.Addr]bool, error) {
	ctx, cancel := context.WithTimeout(ctx, charonAnswers)
	defer cancel()
	s, err := vici.NewSession(vici.WithAddr("unix", charonSocket))
	if err != nil {
		if _, missing := findCharon(); missing != nil {
			err = missing
		}
		return nil, err
	}
	defer s.Close()
	peers := map[netip.Addr]bool{}
	for m, err := range s.CallStreaming(ctx, "list-sas", "list-sa", nil) {
		if err != nil {
			return nil, fmt.Errorf("%s: list-sas: %w", charonSocket, err)
		}
		for _, name := range m.Keys() {
			sa, ok := m.Get(name).(*vici.Message)
			if !ok || sa.Get("state") != "ESTABLISHED" {
				continue
			}
			host, _ := sa.Get("remote-host").(string)
			if ip, err := netip.ParseAddr(host); err == nil {
				peers[ip] = true
			}
		}
	}
	return peers, nil
}
