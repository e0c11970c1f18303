package udp

import (
	"fmt"
	"strings"
	"sync/atomic"

	"github.com/flanneld/flanneld/backend"
)

// A Reason is why a packet is dropped.
type Reason int

const (
	Malformed    Reason = iota // no whole IP packet
	Stranger                   // not from a peer's proxy
	NotOurs                    // for another subnet than this node's
	NoRoute                    // for no peer's subnet
	OnLink                     // multicast and the like, which every device is sent
	Expired                    // its TTL ended
	Unsendable                 // the kernel would not send it
	Unreceivable               // the device is gone, down, or would not take it
	reasons                    // how many there are
)

func (r Reason) String() string {
	return [...]string{
		"malformed", "not from a peer", "not for this node's subnet", "for no peer's subnet",
		"for the link alone", "TTL expired", "not sent by the kernel", "not taken by " + device,
	}[r]
}

// label is the reason's name in metrics.
func (r Reason) label() string {
	return [...]string{
		"malformed", "not_from_peer", "not_ours", "no_route", "on_link", "ttl_expired", "not_sent", "not_received",
	}[r]
}

// Counters count what one queue has moved in one direction.
type Counters struct {
	Packets, Bytes uint64
	Drops          [reasons]uint64 // packets, by Reason
}

// A Traffic is what one queue has moved so far.
type Traffic struct{ Sent, Received Counters }

// QueueStats implements backend.StatsReporter.
func (u *udp) QueueStats() []backend.QueueStats {
	var all []backend.QueueStats
	for queue, t := range u.Traffic() {
		for _, side := range []struct {
			direction string
			Counters
		}{{"sent", t.Sent}, {"received", t.Received}} {
			f := backend.QueueStats{Queue: queue, Direction: side.direction, Packets: side.Packets, Bytes: side.Bytes, Drops: map[string]uint64{}}
			for r, n := range side.Drops {
				f.Drops[Reason(r).label()] = n
			}
			all = append(all, f)
		}
	}
	return all
}

// A tally is Counters that are written by one goroutine and read by any.
type tally struct {
	packets, bytes atomic.Uint64
	drops          [reasons]atomic.Uint64
	_              [64]byte // another queue's is on another cache line
}

func (t *tally) moved(packets, bytes int) {
	t.packets.Add(uint64(packets))
	t.bytes.Add(uint64(bytes))
}

func (t *tally) drop(r Reason, packets int) { t.drops[r].Add(uint64(packets)) }

func (t *tally) add(to *Counters) {
	to.Packets += t.packets.Load()
	to.Bytes += t.bytes.Load()
	for r := range t.drops {
		to.Drops[r] += t.drops[r].Load()
	}
}

// dropped tells what was dropped since before, in words; "": nothing that matters
// was.
func dropped(now, before [reasons]uint64) string {
	var parts []string
	for r := range reasons {
		if n := now[r] - before[r]; n > 0 && r != OnLink {
			parts = append(parts, fmt.Sprintf("%d %s", n, r))
		}
	}
	return strings.Join(parts, ", ")
}
