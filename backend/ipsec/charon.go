package ipsec

import (
	"context"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/strongswan/govici/vici"

	"github.com/flanneld/flanneld/pkg/command"
	"github.com/flanneld/flanneld/pkg/kernel"
)

// charonSocket is where charon listens for VICI, its control protocol.
const charonSocket = "/var/run/charon.vici"

// charonPaths are the paths of charon in distributions.
var charonPaths = [...]string{
	"charon",                         // in PATH
	"/usr/lib/strongswan/charon",     // Alpine, Arch
	"/usr/lib/ipsec/charon",          // Debian, Ubuntu
	"/usr/libexec/strongswan/charon", // Fedora
	"/usr/libexec/ipsec/charon",      // openSUSE
}

const (
	// stopTimeout is how long charon may take to end its tunnels and stop.
	stopTimeout = 5 * time.Second
	// queryTimeout is how long charon may take to answer a query.
	queryTimeout = 5 * time.Second
)

// mark is in the environment of a charon that we have started, and of no other charon.
const mark = "STARTED_BY=flanneld"

// errNoCharon means that charon is not installed.
var errNoCharon = fmt.Errorf("there is no charon, neither in PATH nor at %s: install strongSwan with its VICI "+
	"plugin (Debian: strongswan-charon, strongswan-swanctl)",
	strings.Join(charonPaths[1:], ", "))

// findCharon returns the path of the program.
func findCharon() (string, error) {
	for _, path := range charonPaths {
		if path, err := new(command.Runner).Find(path); err == nil {
			return path, nil
		}
	}
	return "", errNoCharon
}

// start starts charon. charon outlives flanneld, so that packets pass while flanneld restarts.
func start() (*command.Process, error) {
	path, err := findCharon()
	if err != nil {
		return nil, err
	}
	p, err := command.Start(command.Command{Path: path, Env: []string{mark}})
	if err != nil {
		return nil, fmt.Errorf("starting charon: %w", err)
	}
	return p, nil
}

// A connection is a tunnel in the configuration of charon (swanctl.conf(5)).
type connection struct {
	LocalAddrs  []string         `vici:"local_addrs"`
	RemoteAddrs []string         `vici:"remote_addrs"`
	Proposals   []string         `vici:"proposals"`
	Version     int              `vici:"version"`
	KeyingTries int              `vici:"keyingtries"`
	DPDDelay    string           `vici:"dpd_delay"`
	Encap       bool             `vici:"encap"`
	MobIKE      bool             `vici:"mobike"` // no: the policies have the addresses, too
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

// name is the name of the tunnel in charon, which is the same as upstream's.
func (t tunnel) name() string {
	return fmt.Sprintf("%s-%s-%s-%s", t.from, t.own, t.peer, t.to)
}

// child is the name of the pair of subnets in the tunnel.
func (t tunnel) child() string { return fmt.Sprintf("%s-%s", t.own, t.peer) }

// connection returns the configuration of a tunnel. What both ends must agree on is the same as upstream's. charon
// makes no policies: they are desired state of the kernel.
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

// call sends a command to charon. args is a map, or a struct with vici tags.
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

// connections lists the connections that were loaded into charon.
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

// established lists the connections that are established or about to be.
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

// remoteHosts asks charon for the hosts that it has tunnels with, and since when: since
// their keys were agreed on last. The error says that charon does not answer.
func remoteHosts(ctx context.Context) (map[netip.Addr]time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	s, err := vici.NewSession(vici.WithAddr("unix", charonSocket))
	if err != nil {
		if _, missing := findCharon(); missing != nil {
			err = missing
		}
		return nil, err
	}
	defer s.Close()
	peers := map[netip.Addr]time.Time{}
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
			age, _ := sa.Get("established").(string) // in seconds
			seconds, _ := strconv.Atoi(age)
			at := time.Now().Add(-time.Duration(seconds) * time.Second)
			if ip, err := netip.ParseAddr(host); err == nil && at.After(peers[ip]) {
				peers[ip] = at
			}
		}
	}
	return peers, nil
}
