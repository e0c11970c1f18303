package wireguard

import (
	"fmt"
	"net"
	"net/netip"
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
				before[key(byte(k))] = peerState{lease: netip.MustParseAddrPort(leased), endpoint: netip.MustParseAddrPort(leased)}
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

// TestRoaming: who follows whom.
func TestRoaming(t *testing.T) {
	at := netip.MustParseAddrPort
	seen := func(lease, endpoint string, received int64, heard time.Duration) *peerState {
		return &peerState{at(lease), at(endpoint), received, 100, start.Add(-heard), time.Time{}}
	}
	const now, lately, long = time.Second, 10 * time.Second, 20 * time.Second
	for _, c := range []struct {
		name   string
		have   wgtypes.Peer
		sent   int64
		before *peerState
		stays  bool
	}{
		{"where the lease says", held('b', leased, 0, 0), 0, nil, true},
		{"where the lease says, silent", held('b', leased, 5, time.Hour), 200, seen(leased, leased, 5, long), true},
		{"nowhere", held('b', "", 0, 0), 100, seen(leased, leased, 0, now), false},
		{"moved, and heard from", held('b', elsewhere, 6, time.Minute), 100, seen(leased, leased, 5, long), true},
		{"set by somebody", held('b', elsewhere, 5, time.Minute), 100, seen(leased, leased, 5, now), false},
		{"has been there, asked nothing", held('b', elsewhere, 5, time.Minute), 100, seen(leased, elsewhere, 5, long), true},
		{"has been there, just asked", held('b', elsewhere, 5, time.Minute), 200, seen(leased, elsewhere, 5, lately), true},
		{"has been there, and does not answer", held('b', elsewhere, 5, time.Minute), 200, seen(leased, elsewhere, 5, long),
			false},
		{"has been there, silent", held('b', elsewhere, 5, 4*time.Minute), 100, seen(leased, elsewhere, 5, long), false},
		{"has moved on", held('b', third, 6, time.Minute), 100, seen(leased, elsewhere, 5, long), true},
		{"never heard of", held('b', elsewhere, 0, 0), 100, seen(leased, elsewhere, 0, now), false},
		{"a new lease", held('b', elsewhere, 6, time.Second), 100, seen(third, elsewhere, 5, now), false},
		{"since before a restart", held('b', elsewhere, 6, time.Minute), 100, nil, true},
		{"since long before a restart", held('b', elsewhere, 6, time.Hour), 100, nil, false},
	} {
		before := peerStates{}
		if c.before != nil {
			before[key('b')] = *c.before
		}
		c.have.TransmitBytes = c.sent
		have := &wgtypes.Device{PrivateKey: key('a'), ListenPort: 51820, Peers: []wgtypes.Peer{c.have}}
		steps, after := changes("dev", have, usual(map[byte]peer{'b': wanted(leased)}), before, false, start)
		want, end := "peer b endpoint "+leased, at(leased)
		if c.stays {
			want, end = "", endpointOf(c.have)
		}
		if got := brief(steps); got != want {
			t.Errorf("%s: %q, want %q", c.name, got, want)
		}
		s := after[key('b')]
		if s.lease != at(leased) || s.endpoint != end || s.received != c.have.ReceiveBytes {
			t.Errorf("%s: seen is %+v", c.name, s)
		}
		if fresh := c.before == nil || c.before.received != c.have.ReceiveBytes ||
			!c.stays; fresh != (s.heard == start && s.sent == c.sent) && c.before != nil {
			t.Errorf("%s: heard %v ago, sent %d", c.name, start.Sub(s.heard), s.sent)
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
