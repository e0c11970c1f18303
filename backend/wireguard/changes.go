package wireguard

import (
	"bytes"
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

// peerStates are the states of the peers of a device at the last sync.
type peerStates map[wgtypes.Key]peerState

type peerState struct {
	lease    netip.AddrPort // the endpoint in the lease
	endpoint netip.AddrPort // the endpoint in the device
	received int64          // bytes
	sent     int64          // bytes, at the time heard
	heard    time.Time      // when received last grew
	started  time.Time      // when a handshake was started; zero: not recently
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
		w := want.peers[key]
		h, there := held[key]
		s, known := before[key]
		c, command := changeOf(h, there, w, want, !keepsEndpoint(h, w, s, known, now))
		// This node starts the handshake with a new peer. Of two nodes that learn of each other, only the handshake of
		// the second succeeds: the first node's message is ignored, and repeated only after 5 seconds. A session that
		// this node has lost stays alive at the peer, whose packets are lost until there is a new session.
		lost := !there || reopened // the session, if there was one
		start := lost
		if !lost && !s.started.IsZero() && now.Sub(s.started) > restartAfter {
			start, s.started = h.LastHandshakeTime.IsZero(), time.Time{}
		}
		if start && starts < startMost {
			starts++
			if lost {
				s.started = now
			}
			if want.keepalive == 0 {
				on, off := startKeepalive, time.Duration(0)
				c.PersistentKeepaliveInterval = &on
				second.Peers = append(second.Peers,
					wgtypes.PeerConfig{PublicKey: key, UpdateOnly: true, PersistentKeepaliveInterval: &off})
			}
		}
		if command != "" || c.PersistentKeepaliveInterval != nil {
			c.PublicKey, c.UpdateOnly = key, there
			first.Peers = append(first.Peers, c)
		}
		if command != "" {
			add(&first, "peer %s%s", key, command)
		}
		if !known || h.ReceiveBytes != s.received || c.Endpoint != nil {
			s.received, s.sent, s.heard = h.ReceiveBytes, h.TransmitBytes, now
		}
		s.lease, s.endpoint = w.endpoint, endpointOf(h)
		if c.Endpoint != nil {
			s.endpoint = w.endpoint
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

// changeOf returns what to configure of one peer, and the end of the command with the same effect, which is empty if
// nothing differs.
func changeOf(have wgtypes.Peer, there bool, want peer, all config, move bool) (wgtypes.PeerConfig, string) {
	var c wgtypes.PeerConfig
	var b strings.Builder
	if !there {
		b.WriteString(" ") // a new peer is added in any case
	}
	if psk := wgtypes.Key(all.PSK); have.PresharedKey != psk {
		c.PresharedKey = &psk
		b.WriteString(" preshared-key PSK")
	}
	if move {
		c.Endpoint = net.UDPAddrFromAddrPort(want.endpoint)
		fmt.Fprintf(&b, " endpoint %s", want.endpoint)
	}
	if have.PersistentKeepaliveInterval != all.keepalive {
		c.PersistentKeepaliveInterval = &all.keepalive
		fmt.Fprintf(&b, " persistent-keepalive %d", int(all.keepalive.Seconds()))
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

// keepsEndpoint reports whether the endpoint of a peer is kept: the endpoint in its lease or, if the peer has moved and
// is alive, the endpoint of its last packet. The endpoint of a new lease takes precedence. An endpoint that changes
// without a packet from the peer, or from which no answer comes, was set by another program, and is not kept.
func keepsEndpoint(have wgtypes.Peer, want peer, before peerState, known bool, now time.Time) bool {
	at := endpointOf(have)
	switch {
	case at == want.endpoint:
		return true
	case !at.IsValid() || now.Sub(have.LastHandshakeTime) > sessionEnd:
		return false
	case !known: // the peer may have moved before a restart
		return true
	case before.lease != want.endpoint:
		return false
	case have.ReceiveBytes != before.received:
		return true
	}
	return at == before.endpoint && (have.TransmitBytes == before.sent || now.Sub(before.heard) <= answerTime)
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
