package udp

import (
	"fmt"
	"strings"
	"sync/atomic"
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

// Counters count what one queue has moved in one direction.
type Counters struct {
	Packets, Bytes uint64
	Drops          [reasons]uint64 // packets, by Reason
}

// A Traffic is what one queue has moved so far.
type Traffic struct{ Sent, Received Counters }

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
