package wireguard

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/flanneld/flanneld/subnet"
)

var (
	start = time.Unix(1e9, 0)
	ours  = secret(key('a'))
)

const leased, elsewhere, third = "198.18.0.2:51820", "203.0.113.9:4242", "203.0.113.9:4343"

// held is a peer as a device has it.
func held(b byte, endpoint string, received int64, handshake time.Duration, allowed ...string) wgtypes.Peer {
	p := wgtypes.Peer{PublicKey: key(b), ReceiveBytes: received}
	if handshake > 0 {
		p.LastHandshakeTime = start.Add(-handshake)
	}
	if endpoint != "" {
		p.Endpoint = net.UDPAddrFromAddrPort(netip.MustParseAddrPort(endpoint))
	}
	for _, a := range allowed {
		_, n, err := net.ParseCIDR(a)
		if err != nil {
			panic(err)
		}
		p.AllowedIPs = append(p.AllowedIPs, *n)
	}
	return p
}

func wanted(endpoint string, allowed ...string) peer {
	p := peer{endpoint: netip.MustParseAddrPort(endpoint)}
	for _, a := range allowed {
		p.allowed = append(p.allowed, netip.MustParsePrefix(a))
	}
	return p
}

func usual(peers map[byte]peer) config {
	c := config{Private: ours, keyFile: "/key", port: 51820, peers: map[wgtypes.Key]peer{}}
	for b, p := range peers {
		c.peers[key(b)] = p
	}
	return c
}

// brief tells a device's commands, with keys of one letter.
func brief(steps []step) string {
	var all []string
	for _, s := range steps {
		all = append(all, s.commands...)
	}
	text := strings.Join(all, "; ")
	for b := byte('a'); b <= 'z'; b++ {
		text = strings.ReplaceAll(text, key(b).String(), string(b))
	}
	return strings.ReplaceAll(text, "wg set dev ", "")
}

// started returns the peers with which a handshake is started.
func started(steps []step) string {
	var b strings.Builder
	for i, s := range steps {
		for _, p := range s.Peers {
			if i > 0 && p.UpdateOnly && p.PersistentKeepaliveInterval != nil && *p.PersistentKeepaliveInterval == 0 {
				b.WriteByte(p.PublicKey[0])
			}
		}
	}
	return b.String()
}

// TestChanges: from what a device holds to what it should, in as few steps as it
// takes.
func TestChanges(t *testing.T) {
	const one, two, three = "10.5.2.0/24", "10.5.3.0/24", "10.5.4.0/24"
	whole := &wgtypes.Device{PrivateKey: key('a'), ListenPort: 51820}
	with := func(peers ...wgtypes.Peer) *wgtypes.Device {
		d := *whole
		d.Peers = peers
		return &d
	}
	b := func(p peer) map[byte]peer { return map[byte]peer{'b': p} }
	withPSK, keepalive := held('b', leased, 0, 0, one), held('b', leased, 0, 0, one)
	withPSK.PresharedKey = key('p')
	keepalive.PersistentKeepaliveInterval = 7 * time.Second
	for _, c := range []struct {
		name    string
		have    *wgtypes.Device
		want    config
		known   string // peers that were there
		again   bool
		steps   string
		started string
	}{
		{"nothing to do", with(held('b', leased, 5, time.Second, one)), usual(b(wanted(leased, one))), "b", false, "", ""},
		{"new device", &wgtypes.Device{}, usual(b(wanted(leased, one, two))), "", false,
			"private-key /key; listen-port 51820; peer b endpoint 198.18.0.2:51820 allowed-ips 10.5.2.0/24,10.5.3.0/24", "b"},
		{"private key changed", &wgtypes.Device{PrivateKey: key('x'), ListenPort: 51820,
			Peers: []wgtypes.Peer{held('b', leased, 0, 0, one)}},
			usual(b(wanted(leased, one))), "b", false, "private-key /key; " +
				"peer b endpoint 198.18.0.2:51820 allowed-ips 10.5.2.0/24", "b"},
		{"port changed", &wgtypes.Device{PrivateKey: key('a'), ListenPort: 1,
			Peers: []wgtypes.Peer{held('b', leased, 0, 0, one)}},
			usual(b(wanted(leased, one))), "b", false, "listen-port 51820", ""},
		{"peer joins", with(held('c', leased, 0, 0, two)),
			usual(map[byte]peer{'b': wanted(leased, one), 'c': wanted(leased, two)}), "c", false,
			"peer b endpoint 198.18.0.2:51820 allowed-ips 10.5.2.0/24", "b"},
		{"peer removed by somebody", with(held('c', leased, 0, 0, two)),
			usual(map[byte]peer{'b': wanted(leased, one), 'c': wanted(leased, two)}), "bc", false,
			"peer b endpoint 198.18.0.2:51820 allowed-ips 10.5.2.0/24", "b"},
		{"peer without subnets", with(held('c', leased, 0, 0, two)),
			usual(map[byte]peer{'b': {endpoint: netip.MustParseAddrPort(leased)}, 'c': wanted(leased, two)}), "", false,
			"peer b endpoint 198.18.0.2:51820", "b"},
		{"stranger", with(held('b', leased, 0, 0, one), held('z', third, 0, 0)), usual(b(wanted(leased, one))), "b", false,
			"peer z remove", ""},
		{"sessions lost", with(held('b', leased, 0, 0, one)), usual(b(wanted(leased, one))), "b", true, "", "b"},
		{"subnet missing", with(held('b', leased, 0, 0, two)), usual(b(wanted(leased, one, two))), "b", false,
			"peer b allowed-ips 10.5.2.0/24,10.5.3.0/24", ""},
		{"subnet too many", with(held('b', leased, 0, 0, one, three)), usual(b(wanted(leased, one))), "b", false,
			"peer b allowed-ips 10.5.2.0/24", ""},
		{"subnets exchanged", with(held('b', leased, 0, 0, one), held('c', leased, 0, 0, two)),
			usual(map[byte]peer{'b': wanted(leased, two), 'c': wanted(leased, one)}), "bc", false,
			"peer b allowed-ips 10.5.3.0/24; peer c allowed-ips 10.5.2.0/24", ""},
		{"another key, the same subnet", with(held('b', leased, 0, 0, one)), usual(map[byte]peer{'c': wanted(leased, one)}),
			"b", false,
			"peer c endpoint 198.18.0.2:51820 allowed-ips 10.5.2.0/24; peer b remove", "c"},
		{"PSK", with(held('b', leased, 0, 0, one)),
			config{Private: ours, PSK: secret(key('p')), port: 51820, peers: usual(b(wanted(leased, one))).peers}, "b", false,
			"peer b preshared-key PSK", ""},
		{"no PSK", with(withPSK), usual(b(wanted(leased, one))), "b", false, "peer b preshared-key PSK", ""},
		{"keepalive", with(keepalive), usual(b(wanted(leased, one))), "b", false, "peer b persistent-keepalive 0", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := peerStates{}
			for _, k := range c.known {
				before[key(byte(k))] = peerState{lease: netip.MustParseAddrPort(leased)}
			}
			steps, after := changes("dev", c.have, c.want, before, c.again, start)
			if got := brief(steps); got != c.steps {
				t.Errorf("the commands are\n%s\nwant\n%s", got, c.steps)
			}
			if got := started(steps); got != c.started {
				t.Errorf("%q are started, want %q", got, c.started)
			}
			// What was asked for is all that there is to do.
			have := c.have
			for _, s := range steps {
				have = applied(have, s.Config)
			}
			if again, _ := changes("dev", have, c.want, after, false, start); len(again) > 0 {
				t.Errorf("and then %s: %+v", brief(again), again)
			}
		})
	}
}

// TestRoaming: which endpoint a peer has, after what is known of it.
func TestRoaming(t *testing.T) {
	at := netip.MustParseAddrPort
	// seen is what was known at the last sync, a second ago: 5 bytes were received and 1000 sent.
	seen := func(lease, elsewhere string, asked time.Duration) *peerState {
		s := &peerState{lease: at(lease), received: 5, sent: 1000, synced: start.Add(-time.Second)}
		if elsewhere != "" {
			s.elsewhere = at(elsewhere)
		}
		if asked > 0 {
			s.asked = start.Add(-asked)
		}
		return s
	}
	remembered := &peerState{elsewhere: at(elsewhere)}
	const lately, long, fresh, over = 10 * time.Second, 20 * time.Second, time.Minute, 4 * time.Minute
	const idle, keepalive, data = 1000, 1032, 1128 // sent
	for _, c := range []struct {
		name   string
		have   wgtypes.Peer
		sent   int64
		before *peerState
		nat    nat
		want   string
		asked  time.Duration // ago, afterwards
	}{
		{"where the lease says", held('b', leased, 0, 0), 0, nil, noNAT, leased, 0},
		{"where the lease says, silent", held('b', leased, 5, time.Hour), data, seen(leased, "", 0), noNAT, leased, -1},
		{"nowhere", held('b', "", 0, 0), idle, seen(leased, "", 0), noNAT, leased, 0},
		{"moved, and heard from", held('b', elsewhere, 6, fresh), data, seen(leased, "", long), noNAT, elsewhere, 0},
		{"set by somebody", held('b', elsewhere, 5, fresh), idle, seen(leased, "", 0), noNAT, leased, 0},
		{"has been there, asked nothing", held('b', elsewhere, 5, fresh), idle, seen(leased, elsewhere, 0), noNAT, elsewhere, 0},
		{"has been there, a keepalive", held('b', elsewhere, 5, fresh), keepalive, seen(leased, elsewhere, 0), noNAT, elsewhere, 0},
		{"has been there, asked now", held('b', elsewhere, 5, fresh), data, seen(leased, elsewhere, 0), noNAT, elsewhere, -1},
		{"has been there, just asked", held('b', elsewhere, 5, fresh), data, seen(leased, elsewhere, lately), noNAT, elsewhere,
			lately},
		{"has been there, and does not answer", held('b', elsewhere, 5, fresh), data, seen(leased, elsewhere, long), noNAT, leased,
			long},
		{"behind NAT, and does not answer", held('b', elsewhere, 5, fresh), data, seen(leased, elsewhere, long), peerNAT, elsewhere,
			long},
		{"has been there, and answers", held('b', elsewhere, 6, fresh), data, seen(leased, elsewhere, long), noNAT, elsewhere, 0},
		{"has been there, no session", held('b', elsewhere, 5, over), idle, seen(leased, elsewhere, 0), peerNAT, leased, 0},
		{"has moved on", held('b', third, 6, fresh), idle, seen(leased, elsewhere, 0), noNAT, third, 0},
		{"has come back", held('b', leased, 6, fresh), idle, seen(leased, elsewhere, 0), noNAT, leased, 0},
		{"has been there, set by somebody", held('b', third, 5, fresh), idle, seen(leased, elsewhere, 0), noNAT, elsewhere, 0},
		{"has been there, set back by somebody", held('b', leased, 5, fresh), idle, seen(leased, elsewhere, 0), noNAT, elsewhere, 0},
		{"never heard of", held('b', elsewhere, 0, 0), idle, seen(leased, "", 0), noNAT, leased, 0},
		{"a new lease", held('b', third, 6, fresh), idle, seen(third, "", 0), noNAT, leased, 0},
		{"a new lease, has been elsewhere", held('b', elsewhere, 5, fresh), idle, seen(third, elsewhere, 0), noNAT, elsewhere, 0},
		{"a new lease, does not answer elsewhere", held('b', elsewhere, 5, fresh), data, seen(third, elsewhere, long), noNAT, leased,
			long},
		{"a new lease, where it has been", held('b', leased, 5, fresh), idle, seen(third, leased, 0), noNAT, leased, 0},
		{"since before a restart", held('b', elsewhere, 6, fresh), idle, nil, noNAT, elsewhere, 0},
		{"since long before a restart", held('b', elsewhere, 6, time.Hour), idle, nil, noNAT, leased, 0},
		{"remembered, and there", held('b', elsewhere, 6, fresh), idle, remembered, noNAT, elsewhere, 0},
		{"remembered, and moved meanwhile", held('b', third, 6, fresh), idle, remembered, noNAT, third, 0},
		{"remembered, and back meanwhile", held('b', leased, 6, fresh), idle, remembered, noNAT, leased, 0},
		{"remembered, no session since", held('b', elsewhere, 6, time.Hour), idle, remembered, noNAT, leased, 0},
		{"remembered, a new device", wgtypes.Peer{}, 0, remembered, noNAT, elsewhere, -1},
		{"a new device", wgtypes.Peer{}, 0, seen(leased, elsewhere, 0), noNAT, elsewhere, -1},
		{"a new device, tried", held('b', elsewhere, 5, 0), data, seen(leased, elsewhere, lately), peerNAT, elsewhere, lately},
		{"a new device, tried in vain", held('b', elsewhere, 5, 0), data, seen(leased, elsewhere, long), peerNAT, leased, long},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.have.PublicKey == key('b') {
				c.have.TransmitBytes = c.sent
			}
			checkRoaming(t, c.have, c.before, c.nat, at(c.want), c.asked)
		})
	}
}

// checkRoaming checks which endpoint a peer has, and when it was asked, after what was known of it. asked is how long
// ago, or -1 for now and 0 for never.
func checkRoaming(
	t *testing.T, peerHave wgtypes.Peer, known *peerState, n nat, want netip.AddrPort, asked time.Duration,
) {
	t.Helper()
	before := peerStates{}
	if known != nil {
		before[key('b')] = *known
	}
	have := &wgtypes.Device{PrivateKey: key('a'), ListenPort: 51820}
	if peerHave.PublicKey == key('b') {
		have.Peers = []wgtypes.Peer{peerHave}
	}
	p := wanted(leased)
	p.nat = n
	steps, after := changes("dev", have, usual(map[byte]peer{'b': p}), before, false, start)
	command := ""
	if endpointOf(peerHave) != want {
		command = "peer b endpoint " + want.String()
	}
	if got := brief(steps); got != command {
		t.Errorf("%q, want %q", got, command)
	}
	s := after[key('b')]
	if want == p.endpoint {
		want = netip.AddrPort{}
	}
	if s.lease != p.endpoint || s.elsewhere != want || s.received != peerHave.ReceiveBytes || s.sent != peerHave.TransmitBytes {
		t.Errorf("seen is %+v", s)
	}
	var at time.Time
	if asked != 0 {
		at = start.Add(-max(asked, 0))
	}
	if s.asked != at {
		t.Errorf("asked %v ago, want %v", start.Sub(s.asked), asked)
	}
	for _, s := range steps {
		have = applied(have, s.Config)
	}
	if again, _ := changes("dev", have, usual(map[byte]peer{'b': p}), after, false, start); len(again) > 0 {
		t.Errorf("and then %s", brief(again))
	}
}

// TestKeepalives: keepalives go through NAT alone, unless the configuration has an interval.
func TestKeepalives(t *testing.T) {
	const private, address, carrier = "192.168.1.2", "198.18.0.1", "100.64.0.9"
	for _, c := range []struct {
		config, own, public string
		peers               []string // the addresses in leases
		want                string   // the interval and the NAT of each
	}{
		{"", address, "", []string{"198.18.0.2"}, "0 0"},
		{"", private, "", []string{"198.18.0.2", "192.168.1.3", carrier}, "25 1, 0 3, 0 3"},
		{"", private, "", []string{"192.168.1.3", "10.0.0.9"}, "0 0, 0 0"},
		{"", carrier, "", []string{"198.18.0.2"}, "25 1"},
		{"", address, "", []string{"198.18.0.2", "192.168.1.3", carrier}, "0 0, 0 2, 0 2"},
		{"", private, "203.0.113.7", []string{"198.18.0.2", "10.0.0.9"}, "25 1, 0 2"},
		{`,"PersistentKeepaliveInterval":0`, private, "", []string{"198.18.0.2"}, "0 1"},
		{`,"PersistentKeepaliveInterval":7`, address, "", []string{"198.18.0.2", "192.168.1.3"}, "7 0, 7 2"},
	} {
		uplink := uplink(c.own, "fd18::1")
		uplink.IPv4.PublicIP = netip.MustParseAddr(cmp.Or(c.public, c.own))
		w := newTest(t, c.config, uplink)
		own := lease(t, "10.5.1.0-24", `{"PublicIP":"198.18.0.1"}`)
		leases := map[subnet.Subnets]*subnet.Lease{}
		for i, ip := range c.peers {
			l := lease(t, fmt.Sprintf("10.5.%d.0-24", i+2),
				fmt.Sprintf(`{"PublicIP":%q,"BackendData":{"PublicKey":%q}}`, ip, key(byte('b'+i))))
			leases[l.Subnets] = &l
		}
		config := w.config(w.tunnels[0], secret{}, own, leases)
		var got []string
		for i := range c.peers {
			p := config.peers[key(byte('b'+i))]
			got = append(got, fmt.Sprintf("%d %d", int(p.keepalive.Seconds()), p.nat))
		}
		if text := strings.Join(got, ", "); text != c.want {
			t.Errorf("%s%s to %s: %s, want %s", c.own, c.config, c.peers, text, c.want)
		}
		if config.automatic != (c.config == "") {
			t.Errorf("%q: automatic is %v", c.config, config.automatic)
		}
	}
}

// TestKeepaliveElsewhere: a peer that is not where its lease says gets keepalives too, as long as it is there.
func TestKeepaliveElsewhere(t *testing.T) {
	for automatic, want := range map[bool]string{true: "peer b persistent-keepalive 25", false: ""} {
		have := &wgtypes.Device{PrivateKey: key('a'), ListenPort: 51820, Peers: []wgtypes.Peer{held('b', elsewhere, 6, time.Minute)}}
		c := usual(map[byte]peer{'b': wanted(leased)})
		c.automatic = automatic
		steps, states := changes("dev", have, c, nil, false, start)
		if got := brief(steps); got != want {
			t.Errorf("automatic %v: %q, want %q", automatic, got, want)
		}
		for _, s := range steps {
			have = applied(have, s.Config)
		}
		want = "peer b endpoint " + leased
		if automatic {
			want += " persistent-keepalive 0"
		}
		later, _ := changes("dev", have, c, states, false, start.Add(time.Hour))
		if got := brief(later); got != want {
			t.Errorf("automatic %v, later: %q, want %q", automatic, got, want)
		}
	}
}

// TestAnnounce: a node behind NAT sends to its peers as soon as it starts, so that they learn where it is; once.
func TestAnnounce(t *testing.T) {
	p := wanted(leased)
	p.nat, p.keepalive = ownNAT, natKeepalive
	h := held('b', leased, 6, time.Minute)
	h.PersistentKeepaliveInterval = natKeepalive
	have := &wgtypes.Device{PrivateKey: key('a'), ListenPort: 51820, Peers: []wgtypes.Peer{h}}
	steps, states := changes("dev", have, usual(map[byte]peer{'b': p}), nil, false, start)
	if len(steps) != 2 || *steps[0].Peers[0].PersistentKeepaliveInterval != 0 ||
		*steps[1].Peers[0].PersistentKeepaliveInterval != natKeepalive || brief(steps) != "" {
		t.Errorf("at first: %+v", steps)
	}
	if steps, _ := changes("dev", have, usual(map[byte]peer{'b': p}), states, false, start.Add(time.Second)); len(steps) > 0 {
		t.Errorf("and again: %+v", steps)
	}
}

// TestLearned: the file of endpoints is read as it was written, and only if it is whole.
func TestLearned(t *testing.T) {
	path := Host{KeyFile: filepath.Join(t.TempDir(), "run", "wgkey")}.endpointFile()
	if all, err := readLearned(path); len(all) > 0 || err != nil {
		t.Errorf("without a file: %v, %v", all, err)
	}
	all := learned{"flannel-wg": {key('b'): netip.MustParseAddrPort(elsewhere), key('c'): netip.MustParseAddrPort("[fd18::1]:9")},
		"flannel-wg-v6": {key('b'): netip.MustParseAddrPort(third)}}
	for _, l := range []learned{all, {}} {
		if err := l.write(path); err != nil {
			t.Fatal(err)
		}
		if again, err := readLearned(path); err != nil || !again.equal(l) {
			t.Errorf("%v became %v, %v", l, again, err)
		}
	}
	for _, text := range []string{"", "[]", `{"dev":{"x":"198.18.0.1:1"}}`, `{"dev":{"` + key('b').String() + `":"198.18.0.1:0"}}`} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if all, err := readLearned(path); err == nil || len(all) > 0 {
			t.Errorf("%q: %v", text, all)
		}
	}
}

// TestStartMost: not all handshakes with the peers of a large cluster are started at once.
func TestStartMost(t *testing.T) {
	c := config{Private: ours, port: 51820, peers: map[wgtypes.Key]peer{}}
	for i := range 3 * startMost {
		c.peers[wgtypes.Key{1, byte(i), byte(i >> 8)}] = wanted(leased)
	}
	steps, _ := changes("dev", &wgtypes.Device{}, c, nil, false, start)
	if len(steps) != 2 || len(steps[0].Peers) != 3*startMost || len(steps[1].Peers) != startMost {
		t.Errorf("%d steps", len(steps))
	}
}

// TestRestart: a handshake that did not succeed is started once more.
func TestRestart(t *testing.T) {
	for _, c := range []struct {
		name      string
		handshake time.Duration // after the start; 0: never
		started   []string      // at each sync, every 5 seconds
	}{
		{"no handshake", 0, []string{"b", "", "b", "", "", ""}},
		{"a handshake", time.Second, []string{"b", "", "", "", "", ""}},
		{"a late handshake", 6 * time.Second, []string{"b", "", "", "", "", ""}},
	} {
		have, before := &wgtypes.Device{PrivateKey: key('a'), ListenPort: 51820}, peerStates{}
		for i, want := range c.started {
			now := start.Add(time.Duration(i) * 5 * time.Second)
			if done := start.Add(c.handshake); i > 0 && c.handshake != 0 && !now.Before(done) {
				have.Peers[0].LastHandshakeTime = done
			}
			var steps []step
			steps, before = changes("dev", have, usual(map[byte]peer{'b': wanted(leased)}), before, false, now)
			if got := started(steps); got != want {
				t.Errorf("%s: at sync %d %q are started, want %q", c.name, i, got, want)
			}
			for _, s := range steps {
				have = applied(have, s.Config)
			}
		}
	}
}

// applied is what becomes of a device by a configuration, as WireGuard has it.
func applied(have *wgtypes.Device, c wgtypes.Config) *wgtypes.Device {
	d := *have
	d.Peers = slices.Clone(d.Peers)
	if c.ReplacePeers {
		d.Peers = nil
	}
	if c.PrivateKey != nil {
		d.PrivateKey = *c.PrivateKey
	}
	if c.ListenPort != nil {
		d.ListenPort = *c.ListenPort
	}
	for _, p := range c.Peers {
		i := slices.IndexFunc(d.Peers, func(h wgtypes.Peer) bool { return h.PublicKey == p.PublicKey })
		switch {
		case i < 0 && p.UpdateOnly:
			continue
		case p.Remove:
			d.Peers = slices.Delete(d.Peers, i, i+1)
			continue
		case i < 0:
			i, d.Peers = len(d.Peers), append(d.Peers, wgtypes.Peer{PublicKey: p.PublicKey})
		}
		h := &d.Peers[i]
		if p.PresharedKey != nil {
			h.PresharedKey = *p.PresharedKey
		}
		if p.Endpoint != nil {
			h.Endpoint = p.Endpoint
		}
		if p.PersistentKeepaliveInterval != nil {
			h.PersistentKeepaliveInterval = *p.PersistentKeepaliveInterval
		}
		if p.ReplaceAllowedIPs {
			h.AllowedIPs = nil
		}
		for _, a := range p.AllowedIPs {
			for j := range d.Peers {
				d.Peers[j].AllowedIPs = slices.DeleteFunc(slices.Clone(d.Peers[j].AllowedIPs),
					func(b net.IPNet) bool { return b.String() == a.String() })
			}
			h.AllowedIPs = append(h.AllowedIPs, a)
		}
	}
	return &d
}

// TestMoves: whatever moves, a subnet is never nobody's on the way, once it was
// somebody's, unless a peer has to lose another one, too.
func TestMoves(t *testing.T) {
	have := &wgtypes.Device{PrivateKey: key('a'), ListenPort: 51820,
		Peers: []wgtypes.Peer{held('b', leased, 0, 0, "10.5.2.0/24")}}
	steps, _ := changes("dev", have, usual(map[byte]peer{'c': wanted(leased, "10.5.2.0/24")}), nil, false, start)
	for i, p := range steps[0].Peers {
		have = applied(have, wgtypes.Config{Peers: []wgtypes.PeerConfig{p}})
		if text := fmt.Sprint(have.Peers[len(have.Peers)-1].AllowedIPs); !strings.Contains(text, "10.5.2.0") {
			t.Errorf("after %d changes, nobody has the subnet", i+1)
		}
	}
}

// TestIdentities: nodes are told apart by their public keys alone, since nodes behind one NAT share a public address.
func TestIdentities(t *testing.T) {
	lease := func(data, dataV6 string) subnet.Lease {
		return subnet.Lease{Attrs: subnet.Attrs{
			PublicIP: netip.MustParseAddr("198.18.0.2"), BackendType: Type,
			BackendData: []byte(data), BackendV6Data: []byte(dataV6),
		}}
	}
	data := func(name byte) string { return fmt.Sprintf(`{"PublicKey":%q,"Port":51820}`, key(name)) }
	one, other := "public key "+key('a').String(), "public key "+key('b').String()
	for _, c := range []struct {
		lease subnet.Lease
		want  []string
	}{
		{lease(data('a'), ""), []string{one}},
		{lease(data('a'), data('a')), []string{one}},
		{lease(data('a'), data('b')), []string{one, other}},
		{lease("{}", data('b')), []string{other}},
		{lease("", ""), nil},
	} {
		if got := (&wireguard{}).Identities(c.lease); !slices.Equal(got, c.want) {
			t.Errorf("%s, %s: got %q, want %q", c.lease.Attrs.BackendData, c.lease.Attrs.BackendV6Data, got, c.want)
		}
	}
}
