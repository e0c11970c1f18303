package udp

import (
	"fmt"
	"strings"
	"sync/atomic"

	"github.com/flanneld/flanneld/backend"
)

// A dropReason is why a packet is dropped.
type dropReason int

const (
	dropMalformed    dropReason = iota // not a whole IP packet
	dropStranger                       // not from the proxy of a peer
	dropNotOurs                        // for a subnet that is not this node's
	dropNoRoute                        // for a subnet that is no peer's
	dropOnLink                         // multicast and the like, which the kernel sends to every device
	dropExpired                        // its TTL has expired
	dropUnsendable                     // the kernel refused to send it
	dropUnreceivable                   // the device is gone, down, or refused it
	reasons                            // the number of reasons
)

func (r dropReason) String() string {
	return [...]string{
		"malformed", "not from a peer", "not for this node's subnet", "for no peer's subnet",
		"for the link alone", "TTL expired", "not sent by the kernel", "not taken by " + device,
	}[r]
}

// label is the reason's name in metrics.
func (r dropReason) label() string {
	return [...]string{
		"malformed", "not_from_peer", "not_ours", "no_route", "on_link", "ttl_expired", "not_sent", "not_received",
	}[r]
}

// counters count the packets of one goroutine, for any goroutine to read.
type counters struct {
	packets, bytes atomic.Uint64
	drops          [reasons]atomic.Uint64
	_              [64]byte // keeps the counters of another goroutine on another cache line
}

func (c *counters) moved(packets, bytes int) {
	c.packets.Add(uint64(packets))
	c.bytes.Add(uint64(bytes))
}

func (c *counters) drop(r dropReason, packets int) { c.drops[r].Add(uint64(packets)) }

// totals are counters, read at one time.
type totals struct {
	packets, bytes uint64
	drops          [reasons]uint64
}

func (c *counters) addTo(t *totals) {
	t.packets += c.packets.Load()
	t.bytes += c.bytes.Load()
	for r := range c.drops {
		t.drops[r] += c.drops[r].Load()
	}
}

// QueueStats implements backend.StatsReporter. The device has a single queue, number 0.
func (u *udp) QueueStats() []backend.QueueStats {
	p := u.running.Load()
	if p == nil {
		return nil
	}
	sent, received := p.totals()
	return []backend.QueueStats{sent.queueStats("sent"), received.queueStats("received")}
}

func (t *totals) queueStats(direction string) backend.QueueStats {
	q := backend.QueueStats{Direction: direction, Packets: t.packets, Bytes: t.bytes, Drops: map[string]uint64{}}
	for r, n := range t.drops {
		q.Drops[dropReason(r).label()] = n
	}
	return q
}

// describeDrops returns in words which packets were dropped since before, without the drops that are normal.
func describeDrops(now, before [reasons]uint64) string {
	var parts []string
	for r := range reasons {
		if n := now[r] - before[r]; n > 0 && r != dropOnLink {
			parts = append(parts, fmt.Sprintf("%d %s", n, r))
		}
	}
	return strings.Join(parts, ", ")
}
