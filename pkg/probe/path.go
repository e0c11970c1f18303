package probe

import (
	"encoding/binary"
	"errors"
	"math"
	"math/rand/v2"
	"net/netip"
	"time"
	"unique"

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

// A moment is a time. A time.Time takes three times as much memory, and there are many. 0: never, which is before all that
// is known of.
type moment time.Duration

// created is the moment in which a Prober is made. What peers have received before that counts, too.
const created = moment(1000 * time.Hour)

// sub returns the time from another moment to this one.
func (m moment) sub(from moment) time.Duration { return time.Duration(m - from) }

// A side is what all paths of a family that have the same Optional have in common.
type side struct {
	source, local netip.Addr // Path.Source and Path.Local
	optional      bool
}

// A path asks in rounds: through the overlay, and where nothing replies, underneath. It is for one goroutine. There are
// tens of thousands of paths.
type path struct {
	overlay, public netip.Addr // of the peer, as in Path
	side            unique.Handle[side]
	pace            *pace

	due   moment // of the next request, or of the end of the round
	nonce uint64
	index int32 // in its queue
	seq   uint16

	scope   scope           // that is asked
	attempt uint8           // how many requests of this round went to scope; 0: no round is in progress
	sent    [history]moment // the latest requests, each at its seq modulo history; 0: it has been replied to
	sentTo  [history]scope
	began   moment // the round

	state      State
	since      moment
	reported   State         // HostOnly or Silent, once it has lasted for AlarmAfter; "" otherwise
	rtt        time.Duration // of the latest reply through the overlay
	replied    moment        // the latest reply through the overlay came
	unanswered moment        // when the first request through the overlay was sent that has no reply; 0: all have

	err error // of sending the latest request through the overlay

	asked     moment // the latest request of the peer came
	heard     moment // the latest request of the peer through the overlay came
	peerHeard moment // the peer had received a packet of ours through the overlay
	lacking   bool   // the latest request of the peer was sourceless
	ever      bool   // anything has replied

	sample, lost uint8 // requests through the overlay since the last sample of losses, and how many had no reply
}

func newPath(p Path, pace *pace, now moment) *path {
	return &path{
		overlay: p.Overlay, public: p.Public, side: unique.Make(side{p.Source, p.Local, p.Optional}), pace: pace,
		nonce: rand.Uint64(), seq: uint16(rand.Uint32()), state: Unknown, since: now,
	}
}

// ends returns where the path leads, as the caller has given it.
func (p *path) ends() Path {
	s := p.side.Value()
	return Path{Overlay: p.overlay, Optional: s.optional, Source: s.source, Public: p.public, Local: s.local}
}

// step goes on with the round, or begins one. It returns whether there is a request to send, or else the round has ended.
func (p *path) step(now moment) (send bool) {
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
	p.sent[p.seq%history], p.sentTo[p.seq%history] = now, p.scope
	if p.scope == overlay {
		p.err = nil
		p.sample++
		if p.unanswered == 0 {
			p.unanswered = now
		}
	}
	return true
}

// patience returns how many requests the scope gets in this round. What is known to be silent gets one. Before a path is
// reported as blocked, it gets more than usual, so that a network which loses some packets does not count as blocked.
func (p *path) patience() uint8 {
	switch {
	case p.scope == overlay && p.state == HostOnly && p.reported == "":
		return 2 * attempts
	case p.state == Silent || p.state == NoReply || p.scope == overlay && (p.state == HostOnly || p.state == NoAddress):
		return 1
	}
	return attempts
}

// data returns the data of the request that step has asked for.
func (p *path) data(now moment) []byte {
	b := make([]byte, dataLen)
	b[scopeAt] = byte(p.scope)
	if p.scope == underlay && p.lacksSource() {
		b[scopeAt] = byte(sourceless)
	}
	age := time.Duration(neverHeard)
	if latest := max(p.heard, p.replied); latest != 0 {
		age = min(age, now.sub(latest)/time.Second)
	}
	binary.BigEndian.PutUint32(b[ageAt:], uint32(age))
	binary.BigEndian.PutUint64(b[nonceAt:], p.nonce)
	return b
}

func nonceOf(data []byte) uint64 { return binary.BigEndian.Uint64(data[nonceAt:]) }

// reply takes a reply with the path's nonce. It returns how long the reply took through the overlay, and 0 if the reply is
// none to one of the latest requests, or did not come through the overlay.
func (p *path) reply(now moment, seq uint16) time.Duration {
	sent := &p.sent[seq%history]
	if p.seq-seq >= history || *sent == 0 {
		return 0
	}
	took := max(now.sub(*sent), 1)
	*sent = 0
	p.ever = true
	switch {
	case p.sentTo[seq%history] == overlay:
		p.rtt, p.replied, p.unanswered = took, now, 0
		p.decide(now, true, true)
		return took
	case p.attempt > 0 && p.scope == underlay:
		p.decide(now, false, true)
	}
	return 0
}

// hear takes a request of the peer. It returns whether this is a reason to ask the peer now.
func (p *path) hear(now moment, data []byte) bool {
	p.asked, p.lacking = now, scope(data[scopeAt]) == sourceless
	if scope(data[scopeAt]) == overlay {
		p.heard = now
	}
	if age := binary.BigEndian.Uint32(data[ageAt:]); age != neverHeard {
		p.peerHeard = now - moment(time.Duration(age+1)*time.Second)
	}
	return p.heard == now && p.attempt == 0 && p.state != Reachable && now.sub(p.began) > 5*timeout
}

// decide ends the round.
func (p *path) decide(now moment, overlayReplied, hostReplied bool) {
	p.attempt = 0
	if p.isRecent(now, p.asked) && !p.isRecent(now, p.heard) {
		hostReplied = true // it could: its requests arrive underneath alone, and a firewall drops ours
	}
	state := NoReply
	switch {
	case overlayReplied, p.isConfirmed(now):
		state = Reachable
	case hostReplied && p.side.Value().optional && (p.replied == 0 || p.lacksSource() || p.lacking):
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
	return p.side.Value().optional && (errors.Is(p.err, unix.ENETUNREACH) || errors.Is(p.err, unix.EINVAL)) // see echo.Conn.Send
}

// isConfirmed tells whether packets arrive both ways although there are no replies, since the peer's firewall drops
// requests: requests of the peer arrive, and say that it receives the replies to them.
func (p *path) isConfirmed(now moment) bool {
	return p.isRecent(now, p.heard) && p.isRecent(now, p.peerHeard)
}

// isRecent tells whether something happened recently, and since requests through the overlay have no reply.
func (p *path) isRecent(now, at moment) bool {
	return at != 0 && now.sub(at) < p.pace.recent && at > p.unanswered
}

// losses returns the share of requests through the overlay that had no reply, once enough have been sent. A path through
// which nothing has ever replied says nothing of losses.
func (p *path) losses() (share float64, ok bool) {
	if p.sample < sampleSize {
		return 0, false
	}
	share, ok = float64(p.lost)/float64(p.sample), p.replied != 0
	p.sample, p.lost = 0, 0
	return share, ok
}

// isBad tells whether the state is one that is reported when it stays.
func (p *path) isBad() bool { return p.state == HostOnly || p.state == Silent }

// result returns what is known.
func (p *path) result(now moment) Result {
	return Result{
		Path: p.ends(), State: p.state, Since: time.Now().Add(p.since.sub(now)), RTT: p.rtt, Err: p.err,
		Asks: p.isRecent(now, p.asked), Arrives: p.isRecent(now, p.heard), Heard: p.isRecent(now, p.peerHeard),
	}
}
