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
	// A session is over this long after its handshake, unless there was
	// another (REJECT_AFTER_TIME, section 6 of the WireGuard paper).
	sessionEnd = 180 * time.Second

	// Who is sent something answers within this time, be it that there is
	// nothing to say (KEEPALIVE_TIMEOUT + REKEY_TIMEOUT).
	answerTime = 15 * time.Second

	// wakeKeepalive is a keepalive interval that does not last: switching it on
	// has the device send at once.
	wakeKeepalive = 25 * time.Second

	// wakeAgain is how long after it was woken a peer without a handshake is woken
	// once more. Where both ends begin at the same time, neither takes the other's
	// answer. WireGuard tries again REKEY_TIMEOUT, 5 seconds, and a random third of
	// a second after it began, if its last message is 5 seconds ago: where its own
	// answer to the other is younger, nothing more happens until there is a packet
	// to be sent.
	wakeAgain = 7 * time.Second

	// wakeMost is how many peers are woken at once. More would keep everybody
	// busy with handshakes; the rest finds out within 15 seconds.
	wakeMost = 1000
)

// sights are how a device's peers looked last time.
type sights map[wgtypes.Key]sight

type sight struct {
	lease    netip.AddrPort // where its lease said that it is
	endpoint netip.AddrPort // where it was
	received int64          // bytes
	sent     int64          // bytes, by the time that it was heard
	heard    time.Time      // when received was last seen to grow
	woken    time.Time      // when it was made to send at once; zero: not lately
}

// A step is something to configure, and the commands that do the same. Steps
// are taken one after the other.
type step struct {
	wgtypes.Config
	commands []string
}

// changes compares what a device holds with what is wanted, and returns what to
// configure, and what was seen. Peers come before others go: a subnet that moves
// from one to another belongs to one of them at any time. again says that the
// device has lost its sessions.
func changes(dev string, have *wgtypes.Device, want config, before sights, again bool, now time.Time) ([]step, sights) {
	var first, second step
	after := sights{}
	say := func(s *step, format string, args ...any) {
		s.commands = append(s.commands, "wg set "+dev+" "+fmt.Sprintf(format, args...))
	}
	held := map[wgtypes.Key]wgtypes.Peer{}
	for _, p := range have.Peers {
		held[p.PublicKey] = p
	}
	if private := wgtypes.Key(want.Private); have.PrivateKey != private {
		// Another key ends all sessions. Peers are made anew after it: wireguard-go
		// takes locks in one order for a key and in the other for a handshake that
		// ends meanwhile, and may stand still then, for good.
		first.PrivateKey, first.ReplacePeers = &private, true
		clear(held)
		say(&first, "private-key %s", keyFile())
	}
	if have.ListenPort != want.port {
		first.ListenPort = &want.port
		say(&first, "listen-port %d", want.port)
	}
	woken := 0
	for _, key := range slices.SortedFunc(maps.Keys(want.peers), compareKeys) {
		w := want.peers[key]
		h, there := held[key]
		s, known := before[key]
		c, command := changeOf(h, there, w, want, !stays(h, w, s, known, now))
		// Of two nodes that get to know each other, the second one can begin: what
		// the first one sends is ignored, and would be tried again after 5 seconds
		// only. A session that this node has lost lives on at the peer, who sends
		// into the void until it hears of a new one.
		lost := !there || again // its session, if there ever was one
		wake := lost
		if !lost && !s.woken.IsZero() && now.Sub(s.woken) > wakeAgain {
			wake, s.woken = h.LastHandshakeTime.IsZero(), time.Time{}
		}
		if wake && woken < wakeMost {
			woken++
			if lost {
				s.woken = now
			}
			if want.keepalive == 0 {
				on, off := wakeKeepalive, time.Duration(0)
				c.PersistentKeepaliveInterval = &on
				second.Peers = append(second.Peers, wgtypes.PeerConfig{PublicKey: key, UpdateOnly: true, PersistentKeepaliveInterval: &off})
			}
		}
		if command != "" || c.PersistentKeepaliveInterval != nil {
			c.PublicKey, c.UpdateOnly = key, there
			first.Peers = append(first.Peers, c)
		}
		if command != "" {
			say(&first, "peer %s%s", key, command)
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
			say(&first, "peer %s remove", key)
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

// changeOf returns what to configure of one peer, and the end of the command that
// does it, which is empty where nothing differs.
func changeOf(have wgtypes.Peer, there bool, want peer, all config, move bool) (wgtypes.PeerConfig, string) {
	var c wgtypes.PeerConfig
	var b strings.Builder
	if !there {
		b.WriteString(" ") // a new one is told of in any case
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
	missing := slices.DeleteFunc(slices.Clone(want.allowed), func(p netip.Prefix) bool { return slices.Contains(allowed, p) })
	switch {
	case len(allowed)-(len(want.allowed)-len(missing)) > 0: // there are others
		c.ReplaceAllowedIPs, missing = true, want.allowed
		fallthrough
	case len(missing) > 0:
		for _, p := range missing {
			c.AllowedIPs = append(c.AllowedIPs, net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())})
		}
		fmt.Fprintf(&b, " allowed-ips %s", join(want.allowed))
	}
	return c, strings.Replace(b.String(), "  ", " ", 1)
}

// stays tells whether a peer's endpoint is left as it is: where its lease says or,
// if the peer has moved and is alive, where it was last heard from. A new lease
// overrules that, and so does an endpoint that changes without a packet from the
// peer, or at which nobody answers: that was somebody else.
func stays(have wgtypes.Peer, want peer, before sight, known bool, now time.Time) bool {
	at := endpointOf(have)
	switch {
	case at == want.endpoint:
		return true
	case !at.IsValid() || now.Sub(have.LastHandshakeTime) > sessionEnd:
		return false
	case !known: // since before a restart, maybe
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

// prefixes returns what wgtypes has as net.IPNet.
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
