package probe

import (
	"encoding/binary"
	"errors"
	"math"
	"math/rand/v2"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// A Path is the way to a peer in one family.
type Path struct {
	Overlay  netip.Addr // of the peer, inside the overlay
	Optional bool       // the peer may not have Overlay yet
	Source   netip.Addr // of this host, from which Overlay is asked: nothing else is sent there, and nothing without it
	Public   netip.Addr // of the peer, outside of the overlay
	Local    netip.Addr // of this host, from which Public is asked; not valid: the kernel chooses
}

// A State is what is known of a Path.
type State string

const (
	Unknown   State = "unknown"       // it has not been asked yet
	Reachable State = "reachable"     // packets arrive through the overlay, and back
	HostOnly  State = "host-only"     // the peer's host replies, but not through the overlay
	NoAddress State = "no-address"    // as HostOnly, of an Optional Path: this host or the peer lacks its address
	Silent    State = "silent"        // it has replied before, and nothing replies now
	NoReply   State = "never-replied" // nothing has ever replied: a firewall may drop ICMP
)

// States lists all States.
var States = []State{Unknown, Reachable, HostOnly, NoAddress, Silent, NoReply}

// A Result is the outcome of the latest requests on a Path.
type Result struct {
	Path
	State State
	Since time.Time     // when the State began: for HostOnly and Silent, when the first request without a reply was sent
	RTT   time.Duration // of the latest reply through the overlay; 0: there was none
	Err   error         // why the kernel did not send the latest request through the overlay

	// What the peer's own requests tell, if it sends any.
	Asks    bool // requests of the peer arrive, through the overlay or underneath
	Arrives bool // they arrive through the overlay
	Heard   bool // the peer has recently received packets of this host through the overlay
}

// A scope is where a request goes.
type scope byte

const (
	overlay scope = iota
	underlay
	sourceless // in a request underneath: the sender lacks its Source, and cannot ask through the overlay
)

// The data of a request.
const (
	scopeAt = 0           // a scope
	ageAt   = 1           // 4 bytes: seconds since the sender has received a packet of the receiver through the overlay
	nonceAt = 5           // 8 bytes that only the sender and the receiver know
	dataLen = nonceAt + 8 // more data is ignored

	neverHeard = math.MaxUint32 // the age where the sender has never received such a packet
)

const (
	timeout  = time.Second // after which a request counts as lost
	attempts = 2           // requests of a round until the overlay, or then the host, counts as silent
	history  = 4           // how many of the latest requests a reply is accepted for

	// AlarmAfter is how long a Path has to be HostOnly or Silent until it is reported.
	AlarmAfter = time.Minute

	sampleSize = 10 // requests through the overlay of which the share that had no reply is observed
)

// A pace is how often paths ask, now.
type pace struct {
	interval time.Duration // between the beginnings of two rounds
	recent   time.Duration // in which each peer has asked at least once, if its interval is not longer than usual
}

// A path asks in rounds: through the overlay, and where nothing replies, underneath. It is for one goroutine.
type path struct {
	Path
	peer string
	pace *pace

	due   time.Time // of the next request, or of the end of the round
	index int       // in its queue

	nonce   uint64
	seq     uint16
	sent    [history]request
	scope   scope     // that is asked
	attempt int       // how many requests of this round went to scope; 0: no round is in progress
	began   time.Time // the round

	state      State
	since      time.Time
	reported   State         // HostOnly or Silent, once it has lasted for AlarmAfter; "" otherwise
	rtt        time.Duration // of the latest reply through the overlay
	replied    time.Time     // the latest reply through the overlay came
	ever       bool          // anything has replied
	unanswered time.Time     // when the first request through the overlay was sent that has no reply; zero: all have

	err error // of sending the latest request through the overlay

	asked     time.Time // the latest request of the peer came
	lacking   bool      // the latest request of the peer was sourceless
	heard     time.Time // the latest request of the peer through the overlay came
	peerHeard time.Time // the peer had received a packet of ours through the overlay

	sample, lost int // requests through the overlay since the last sample of losses, and how many had no reply
}

// A request is one that a path has sent.
type request struct {
	at    time.Time // zero: it has been replied to
	scope scope
	seq   uint16
}

func newPath(peer string, p Path, pace *pace, now time.Time) *path {
	return &path{Path: p, peer: peer, pace: pace, nonce: rand.Uint64(), seq: uint16(rand.Uint32()), state: Unknown, since: now}
}

// step goes on with the round, or begins one. It returns whether there is a request to send, or else the round has ended.
func (p *path) step(now time.Time) (send bool) {
	if p.attempt > 0 && p.scope == overlay {
		p.lost++
	}
	switch {
	case p.attempt == 0:
		p.began, p.scope = now, overlay
	case p.attempt >= p.patience() && p.scope == overlay:
		p.scope, p.attempt = underlay, 0
	case p.attempt >= p.patience():
		p.decide(now, false, false)
		return false
	}
	p.attempt++
	p.seq++
	p.sent[p.seq%history] = request{now, p.scope, p.seq}
	if p.scope == overlay {
		p.err = nil
		p.sample++
		if p.unanswered.IsZero() {
			p.unanswered = now
		}
	}
	return true
}

// patience returns how many requests the scope gets in this round. What is known to be silent gets one. Before a path is
// reported as blocked, it gets more than usual, so that a network which loses some packets does not count as blocked.
func (p *path) patience() int {
	switch {
	case p.scope == overlay && p.state == HostOnly && p.reported == "":
		return 2 * attempts
	case p.state == Silent || p.state == NoReply || p.scope == overlay && (p.state == HostOnly || p.state == NoAddress):
		return 1
	}
	return attempts
}

// data returns the data of the request that step has asked for.
func (p *path) data(now time.Time) []byte {
	b := make([]byte, dataLen)
	b[scopeAt] = byte(p.scope)
	if p.scope == underlay && p.lacksSource() {
		b[scopeAt] = byte(sourceless)
	}
	latest := p.heard
	if p.replied.After(latest) {
		latest = p.replied
	}
	age := time.Duration(neverHeard)
	if !latest.IsZero() {
		age = min(age, now.Sub(latest)/time.Second)
	}
	binary.BigEndian.PutUint32(b[ageAt:], uint32(age))
	binary.BigEndian.PutUint64(b[nonceAt:], p.nonce)
	return b
}

func nonceOf(data []byte) uint64 { return binary.BigEndian.Uint64(data[nonceAt:]) }

// reply takes a reply with the path's nonce. It returns how long the reply took through the overlay, and 0 if the reply is
// none to one of the latest requests, or did not come through the overlay.
func (p *path) reply(now time.Time, seq uint16) time.Duration {
	r := &p.sent[seq%history]
	if r.seq != seq || r.at.IsZero() {
		return 0
	}
	took := max(now.Sub(r.at), 1)
	r.at = time.Time{}
	p.ever = true
	switch {
	case r.scope == overlay:
		p.rtt, p.replied, p.unanswered = took, now, time.Time{}
		p.decide(now, true, true)
		return took
	case p.attempt > 0 && p.scope == underlay:
		p.decide(now, false, true)
	}
	return 0
}

// hear takes a request of the peer. It returns whether this is a reason to ask the peer now.
func (p *path) hear(now time.Time, data []byte) bool {
	p.asked, p.lacking = now, scope(data[scopeAt]) == sourceless
	if scope(data[scopeAt]) == overlay {
		p.heard = now
	}
	if age := binary.BigEndian.Uint32(data[ageAt:]); age != neverHeard {
		p.peerHeard = now.Add(-time.Duration(age+1) * time.Second)
	}
	return p.heard == now && p.attempt == 0 && p.state != Reachable && now.Sub(p.began) > 5*timeout
}

// decide ends the round.
func (p *path) decide(now time.Time, overlayReplied, hostReplied bool) {
	p.attempt = 0
	if p.isRecent(now, p.asked) && !p.isRecent(now, p.heard) {
		hostReplied = true // it could: its requests arrive underneath alone, and a firewall drops ours
	}
	state := NoReply
	switch {
	case overlayReplied, p.isConfirmed(now):
		state = Reachable
	case hostReplied && p.Optional && (p.replied.IsZero() || p.lacksSource() || p.lacking):
		state = NoAddress
	case hostReplied:
		state = HostOnly
	case p.ever:
		state = Silent
	}
	if state == p.state {
		return
	}
	p.state, p.since = state, now
	if p.isBad() {
		p.since = p.unanswered
	}
}

// lacksSource tells whether the latest request through the overlay was not sent since this host lacks its address there.
func (p *path) lacksSource() bool {
	return p.Optional && (errors.Is(p.err, unix.ENETUNREACH) || errors.Is(p.err, unix.EINVAL)) // see echo.Conn.Send
}

// isConfirmed tells whether packets arrive both ways although there are no replies, since the peer's firewall drops
// requests: requests of the peer arrive, and say that it receives the replies to them.
func (p *path) isConfirmed(now time.Time) bool {
	return p.isRecent(now, p.heard) && p.isRecent(now, p.peerHeard)
}

// isRecent tells whether something happened recently, and since requests through the overlay have no reply.
func (p *path) isRecent(now, at time.Time) bool {
	return !at.IsZero() && now.Sub(at) < p.pace.recent && at.After(p.unanswered)
}

// losses returns the share of requests through the overlay that had no reply, once enough have been sent. A path through
// which nothing has ever replied says nothing of losses.
func (p *path) losses() (share float64, ok bool) {
	if p.sample < sampleSize {
		return 0, false
	}
	share, ok = float64(p.lost)/float64(p.sample), !p.replied.IsZero()
	p.sample, p.lost = 0, 0
	return share, ok
}

// isBad tells whether the state is one that is reported when it stays.
func (p *path) isBad() bool { return p.state == HostOnly || p.state == Silent }

// result returns what is known.
func (p *path) result(now time.Time) Result {
	return Result{
		Path: p.Path, State: p.state, Since: p.since, RTT: p.rtt, Err: p.err,
		Asks: p.isRecent(now, p.asked), Arrives: p.isRecent(now, p.heard), Heard: p.isRecent(now, p.peerHeard),
	}
}
