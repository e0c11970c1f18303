package wireguard

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

const (
	// sessionEnd is how long a session lasts after its handshake (REJECT_AFTER_TIME, section 6 of the WireGuard paper).
	sessionEnd = 180 * time.Second

	// answerTime is how long a peer takes to answer a packet, if only with a keepalive (KEEPALIVE_TIMEOUT +
	// REKEY_TIMEOUT).
	answerTime = 15 * time.Second

	// startKeepalive is the keepalive interval that starts a handshake: when the interval is set, the device sends at
	// once. The interval is removed right afterwards.
	startKeepalive = 25 * time.Second

	// restartAfter is the time after which a handshake is started once more, if there was none. Where both ends start a
	// handshake at the same time, neither accepts the answer of the other. WireGuard retries REKEY_TIMEOUT, 5 seconds,
	// and a random third of a second after the start, if its last message is 5 seconds old. Where its own answer to the
	// other end is younger, nothing happens until there is a packet to send.
	restartAfter = 7 * time.Second

	// startMost is how many handshakes are started at once. More would keep all nodes busy with handshakes; the other
	// peers notice within 15 seconds.
	startMost = 1000
)

// keepaliveSize is the size of a packet without content, in bytes.
const keepaliveSize = 32

// peerStates are the states of the peers of a device at the last sync.
type peerStates map[wgtypes.Key]peerState

type peerState struct {
	lease     netip.AddrPort // the endpoint in the lease; zero: there was no sync yet
	elsewhere netip.AddrPort // where the peer is, as far as is known, if not where its lease says
	received  int64          // bytes
	sent      int64          // bytes
	synced    time.Time
	asked     time.Time // when something was sent that the peer has not answered; zero: nothing was
	started   time.Time // when a handshake was started; zero: not recently
	alone     time.Time // since when there has been no session with the peer; zero: there was one
	reported  bool      // that there is none
}

// elsewhere returns the endpoints of the peers that are not where their leases say.
func (p peerStates) elsewhere() map[wgtypes.Key]netip.AddrPort {
	all := map[wgtypes.Key]netip.AddrPort{}
	for key, s := range p {
		if s.elsewhere.IsValid() {
			all[key] = s.elsewhere
		}
	}
	return all
}

// expect returns the states of peers after a restart, of which the endpoints are known.
func expect(elsewhere map[wgtypes.Key]netip.AddrPort) peerStates {
	p := peerStates{}
	for key, endpoint := range elsewhere {
		p[key] = peerState{elsewhere: endpoint}
	}
	return p
}

// A step is a configuration, and the commands with the same effect. Steps are configured one after the other.
type step struct {
	wgtypes.Config
	commands []string
}

// changes compares the actual with the desired configuration of a device. It returns the steps from one to the other,
// and the states of the peers. Peers are added before other peers are removed: a subnet that moves from a peer to
// another belongs to one of them at any time. reopened means that the device has lost its sessions.
func changes(
	dev string, have *wgtypes.Device, want config, before peerStates, reopened bool, now time.Time,
) ([]step, peerStates) {
	var first, second step
	after := peerStates{}
	add := func(s *step, format string, args ...any) {
		s.commands = append(s.commands, "wg set "+dev+" "+fmt.Sprintf(format, args...))
	}
	held := map[wgtypes.Key]wgtypes.Peer{}
	for _, p := range have.Peers {
		held[p.PublicKey] = p
	}
	if private := wgtypes.Key(want.Private); have.PrivateKey != private {
		// A new key ends all sessions. All peers are removed and added again with the key: wireguard-go takes locks in
		// one order for a key, and in the other order for a handshake that ends meanwhile, which may be a deadlock.
		first.PrivateKey, first.ReplacePeers = &private, true
		clear(held)
		add(&first, "private-key %s", want.keyFile)
	}
	if have.ListenPort != want.port {
		first.ListenPort = &want.port
		add(&first, "listen-port %d", want.port)
	}
	starts := 0
	for _, key := range slices.SortedFunc(maps.Keys(want.peers), compareKeys) {
		w, s := want.peers[key], before[key]
		h, there := held[key]
		known := s.lease.IsValid()
		s.locate(h, there, w, now)
		endpoint := cmp.Or(s.elsewhere, w.endpoint)
		if s.elsewhere.IsValid() && want.automatic {
			w.keepalive = natKeepalive // the peer is behind NAT, or between two addresses
		}
		c, command := changeOf(h, there, endpoint, w, want.PSK)
		// This node starts the handshake with a new peer. Of two nodes that learn of each other, only the handshake of
		// the second succeeds: the first node's message is ignored, and repeated only after 5 seconds. A session that
		// this node has lost stays alive at the peer, whose packets are lost until there is a new session. A node behind
		// NAT may have got another address outside: its peers learn the address from any packet.
		lost := !there || reopened // the session, if there was one
		start := lost || !known && w.nat == ownNAT
		if !lost && !s.started.IsZero() && now.Sub(s.started) > restartAfter {
			start, s.started = h.LastHandshakeTime.IsZero(), time.Time{}
		}
		if start && starts < startMost {
			starts++
			if lost {
				s.started = now
			}
			sendNow(&c, key, h.PersistentKeepaliveInterval, w.keepalive, &second)
		}
		if command != "" || c.PersistentKeepaliveInterval != nil {
			c.PublicKey, c.UpdateOnly = key, there
			first.Peers = append(first.Peers, c)
		}
		if command != "" {
			add(&first, "peer %s%s", key, command)
		}
		after[key] = s
	}
	for _, key := range slices.SortedFunc(maps.Keys(held), compareKeys) {
		if _, wanted := want.peers[key]; !wanted {
			first.Peers = append(first.Peers, wgtypes.PeerConfig{PublicKey: key, UpdateOnly: true, Remove: true})
			add(&first, "peer %s remove", key)
		}
	}
	var steps []step
	if first.PrivateKey != nil || first.ListenPort != nil || len(first.Peers) > 0 {
		steps = append(steps, first)
	}
	if len(second.Peers) > 0 {
		steps = append(steps, second)
	}
	return steps, after
}

// sendNow makes the device send a packet to the peer at once: that is what it does when the keepalive interval is set,
// and was not set before. Where c does not set the interval, c and another step change it and change it back.
func sendNow(c *wgtypes.PeerConfig, key wgtypes.Key, have, want time.Duration, second *step) {
	on, off := startKeepalive, time.Duration(0)
	last := &off
	switch {
	case want == 0:
		c.PersistentKeepaliveInterval = &on
	case have == 0:
		return // c sets the interval
	default:
		c.PersistentKeepaliveInterval, last = &off, &want
	}
	second.Peers = append(second.Peers,
		wgtypes.PeerConfig{PublicKey: key, UpdateOnly: true, PersistentKeepaliveInterval: last})
}

// locate finds out where the peer is, and whether it answers, from what the device has of it. there: the device has it.
func (s *peerState) locate(have wgtypes.Peer, there bool, want peer, now time.Time) {
	known := s.lease.IsValid()
	heard := known && have.ReceiveBytes != s.received
	switch {
	case !there || !known || heard:
		s.asked = time.Time{}
	case s.asked.IsZero() && have.TransmitBytes != s.sent && !s.sentKeepalives(have, now):
		s.asked = now
	}
	s.elsewhere = s.place(have, there, want, heard, now)
	switch {
	case s.elsewhere == want.endpoint:
		s.elsewhere = netip.AddrPort{}
	case !there && s.elsewhere.IsValid():
		s.asked = now // a handshake is started
	}
	s.lease, s.received, s.sent, s.synced = want.endpoint, have.ReceiveBytes, have.TransmitBytes, now
	switch {
	case !have.LastHandshakeTime.IsZero():
		s.alone = time.Time{}
	case s.alone.IsZero():
		s.alone = now
	}
}

// sentKeepalives reports whether all that was sent since the last sync may have been keepalives, which no peer answers.
func (s *peerState) sentKeepalives(have wgtypes.Peer, now time.Time) bool {
	most := int64(1)
	if every := have.PersistentKeepaliveInterval; every > 0 {
		most += int64(now.Sub(s.synced) / every)
	}
	size := have.TransmitBytes - s.sent
	return size > 0 && size%keepaliveSize == 0 && size/keepaliveSize <= most
}

// place returns the endpoint of the peer, if it is not the endpoint of the lease. WireGuard answers to where the last
// packet came from, which nobody else can have sent: that endpoint is kept as long as there is a session, and the peer
// answers. An endpoint that changes without a packet from the peer was set by another program.
func (s *peerState) place(
	have wgtypes.Peer, there bool, want peer, heard bool, now time.Time,
) (elsewhere netip.AddrPort) {
	at, known := endpointOf(have), s.lease.IsValid()
	never := have.LastHandshakeTime.IsZero()
	session := now.Sub(have.LastHandshakeTime) <= sessionEnd
	switch {
	case !there: // the device was replaced, or is one of the next daemon
		return s.elsewhere
	case known && at == s.lease && at != want.endpoint: // the peer was where its lease said, and has another one now
		return netip.AddrPort{}
	case at.IsValid() && session && (heard || !known):
		return at
	case !session && !never:
		return netip.AddrPort{}
	case at != s.elsewhere: // set by another program
		return s.elsewhere
	case s.asked.IsZero() || now.Sub(s.asked) <= answerTime:
		return s.elsewhere
	case session && want.nat == peerNAT: // the endpoint of the lease cannot be better
		return s.elsewhere
	}
	return netip.AddrPort{}
}

// changeOf returns what to configure of one peer, and the end of the command with the same effect, which is empty if
// nothing differs.
func changeOf(
	have wgtypes.Peer, there bool, endpoint netip.AddrPort, want peer, PSK secret,
) (wgtypes.PeerConfig, string) {
	var c wgtypes.PeerConfig
	var b strings.Builder
	if !there {
		b.WriteString(" ") // a new peer is added in any case
	}
	if psk := wgtypes.Key(PSK); have.PresharedKey != psk {
		c.PresharedKey = &psk
		b.WriteString(" preshared-key PSK")
	}
	if endpointOf(have) != endpoint {
		c.Endpoint = net.UDPAddrFromAddrPort(endpoint)
		fmt.Fprintf(&b, " endpoint %s", endpoint)
	}
	if have.PersistentKeepaliveInterval != want.keepalive {
		c.PersistentKeepaliveInterval = &want.keepalive
		fmt.Fprintf(&b, " persistent-keepalive %d", int(want.keepalive.Seconds()))
	}
	allowed := prefixes(have.AllowedIPs)
	missing := slices.DeleteFunc(slices.Clone(want.allowed),
		func(p netip.Prefix) bool { return slices.Contains(allowed, p) })
	switch {
	case len(allowed)-(len(want.allowed)-len(missing)) > 0: // the peer has other prefixes too
		c.ReplaceAllowedIPs, missing = true, want.allowed
		fallthrough
	case len(missing) > 0:
		for _, p := range missing {
			c.AllowedIPs = append(c.AllowedIPs, net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(),
				p.Addr().BitLen())})
		}
		fmt.Fprintf(&b, " allowed-ips %s", join(want.allowed))
	}
	return c, strings.Replace(b.String(), "  ", " ", 1)
}

func endpointOf(p wgtypes.Peer) netip.AddrPort {
	if p.Endpoint == nil {
		return netip.AddrPort{}
	}
	at := p.Endpoint.AddrPort()
	return netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
}

// prefixes converts the prefixes of wgtypes.
func prefixes(all []net.IPNet) []netip.Prefix {
	var out []netip.Prefix
	for _, n := range all {
		ip, _ := netip.AddrFromSlice(n.IP)
		bits, _ := n.Mask.Size()
		out = append(out, netip.PrefixFrom(ip.Unmap(), bits))
	}
	return out
}

func join(all []netip.Prefix) string {
	var parts []string
	for _, p := range all {
		parts = append(parts, p.String())
	}
	return strings.Join(parts, ",")
}

func compareKeys(a, b wgtypes.Key) int { return bytes.Compare(a[:], b[:]) }
