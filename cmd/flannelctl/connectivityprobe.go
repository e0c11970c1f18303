package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"

	"github.com/flanneld/flanneld/pkg/echo"
	"github.com/flanneld/flanneld/pkg/family"
)

const (
	// patience is how long a reply may take. A host sends about one ICMP error per second to another host.
	patience = time.Second
	tries    = 4
	// few is how often a question is asked that is one of many.
	few = 2
	// smallPacket is the size in bytes of a packet that gets through wherever packets do.
	smallPacket = 100
)

// errNoReply is the error that nothing has come back.
var errNoReply = errors.New("no reply")

// A prober sends packets of one family to peers, and waits for what they send back. Its methods may be called at the
// same time.
type prober struct {
	family     family.Family
	conn       *echo.Conn
	datagrams  *net.IPConn // whose checksums are ours
	rejections *echo.Rejections

	mu      sync.Mutex
	seq     uint16
	waiting map[question]chan echo.Rejection
	heard   map[netip.Addr]bool // hosts whose requests arrive here
}

// A question is what a reply belongs to: the host, and the number of the request or the port of the datagram.
type question struct {
	to     netip.Addr
	number uint16
	isUDP  bool
}

// openProber opens a prober, which needs CAP_NET_RAW.
func openProber(f family.Family) (p *prober, err error) {
	p = &prober{family: f, waiting: map[question]chan echo.Rejection{}, heard: map[netip.Addr]bool{}}
	defer func() {
		if err != nil {
			p.close()
			err = fmt.Errorf("%s: %w", f, err)
		}
	}()
	if p.conn, err = echo.Open(f); err != nil {
		return p, err
	}
	if err := p.conn.DontFragment(); err != nil {
		return p, err
	}
	if p.rejections, err = echo.OpenRejections(f); err != nil {
		return p, err
	}
	if p.datagrams, err = net.ListenIP([...]string{"ip4:udp", "ip6:udp"}[f], nil); err != nil {
		return p, err
	}
	nothing, _ := bpf.Assemble([]bpf.Instruction{bpf.RetConstant{Val: 0}}) // or else it receives all UDP of the host
	if f == family.IPv4 {
		err = ipv4.NewPacketConn(p.datagrams).SetBPF(nothing)
	} else {
		err = ipv6.NewPacketConn(p.datagrams).SetBPF(nothing)
	}
	if err != nil {
		return p, err
	}
	go p.receiveEchoes()
	go p.receiveRejections()
	return p, nil
}

// close closes what is open, and so ends the goroutines.
func (p *prober) close() {
	if p.conn != nil {
		p.conn.Close()
	}
	if p.rejections != nil {
		p.rejections.Close()
	}
	if p.datagrams != nil {
		p.datagrams.Close()
	}
}

func (p *prober) receiveEchoes() {
	buf := make([]byte, 1<<16)
	for {
		m, err := p.conn.Receive(buf)
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err == nil && m.Reply:
			p.answer(question{to: m.From, number: m.Seq}, echo.Rejection{})
		case err == nil:
			p.mu.Lock()
			p.heard[m.From] = true
			p.mu.Unlock()
		}
	}
}

func (p *prober) receiveRejections() {
	for {
		r, err := p.rejections.Receive()
		switch {
		case errors.Is(err, os.ErrClosed):
			return
		case err == nil:
			p.answer(question{r.Dst.Addr(), r.Dst.Port(), true}, r)
		}
	}
}

func (p *prober) answer(q question, r echo.Rejection) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if to := p.waiting[q]; to != nil {
		to <- r
		delete(p.waiting, q)
	}
}

// hears reports whether a request of a host has arrived here.
func (p *prober) hears(from netip.Addr) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.heard[from]
}

// ask sends something, and waits for the answer.
func (p *prober) ask(ctx context.Context, q question, wait time.Duration, send func() error) (echo.Rejection, error) {
	answer := make(chan echo.Rejection, 1)
	p.mu.Lock()
	p.waiting[q] = answer
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.waiting, q)
		p.mu.Unlock()
	}()
	if err := send(); err != nil {
		return echo.Rejection{}, err
	}
	select {
	case r := <-answer:
		return r, nil
	case <-time.After(wait):
		return echo.Rejection{}, errNoReply
	case <-ctx.Done():
		return echo.Rejection{}, ctx.Err()
	}
}

// notDaemon is the data of our requests, from which the daemon of the peer does not learn anything.
const notDaemon = 0xff

// echo asks a host for a reply to a packet of a size, at most so many times, and returns how long the reply took.
func (p *prober) echo(
	ctx context.Context, from, to netip.Addr, size, most int, wait time.Duration,
) (rtt time.Duration, err error) {
	data := bytes.Repeat([]byte{notDaemon}, max(0, p.conn.DataLen(size)))
	for range most {
		p.mu.Lock()
		p.seq++
		seq := p.seq
		p.mu.Unlock()
		start := time.Now()
		_, err = p.ask(ctx, question{to: to, number: seq}, wait, func() error { return p.conn.Send(from, to, seq, data) })
		if !errors.Is(err, errNoReply) {
			return time.Since(start), err
		}
	}
	return 0, err
}

// closedPort is the first of the ports that traceroute uses, since nobody listens there. Each kind of question has
// ports of its own.
const closedPort = 33434

// A datagram is a question that a host answers with an ICMP error: the datagram goes to a port on which nobody listens.
type datagram struct {
	from, to netip.Addr
	by       []netip.Addr // hosts that may answer, beside to
	kind     uint16
	own      bool // the checksum is computed here, instead of by the kernel or a device
	oneHop   bool // no host may forward it
}

// reject sends a datagram, at most so many times, and returns the source that it had when the peer rejected it.
func (p *prober) reject(ctx context.Context, most int, d datagram) (seen netip.Addr, err error) {
	for try := range uint16(most) {
		port := closedPort + tries*d.kind + try
		send := func() error { return d.send(port) }
		if d.own {
			send = func() error { return p.sendOwn(d.from, d.to, port) }
		}
		r, err := p.ask(ctx, question{d.to, port, true}, patience, send)
		if err == nil && (r.From == d.to || slices.Contains(d.by, r.From)) {
			return r.Src.Addr(), nil
		}
		if err != nil && !errors.Is(err, errNoReply) {
			return seen, err
		}
	}
	return seen, errNoReply
}

const payload = "flannelctl connectivity"

// send sends the datagram as any program would do it.
func (d datagram) send(port uint16) error {
	conn, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(d.from, 0)))
	if err != nil {
		return err
	}
	defer conn.Close()
	if d.oneHop && d.to.Is4() {
		err = ipv4.NewConn(conn).SetTTL(1)
	} else if d.oneHop {
		err = ipv6.NewConn(conn).SetHopLimit(1)
	}
	if err != nil {
		return err
	}
	_, err = conn.WriteToUDPAddrPort([]byte(payload), netip.AddrPortFrom(d.to, port))
	return err
}

// sendOwn sends a datagram with a checksum of ours.
func (p *prober) sendOwn(from, to netip.Addr, port uint16) error {
	packet := udpPacket(from, to, port)
	dst := &net.IPAddr{IP: to.AsSlice()}
	var err error
	if p.family == family.IPv4 {
		_, err = ipv4.NewPacketConn(p.datagrams).WriteTo(packet, &ipv4.ControlMessage{Src: from.AsSlice()}, dst)
	} else {
		_, err = ipv6.NewPacketConn(p.datagrams).WriteTo(packet, &ipv6.ControlMessage{Src: from.AsSlice()}, dst)
	}
	return err
}

// udpPacket returns a datagram with its checksum (RFC 768; RFC 8200, section 8.1). Its source port is the other's.
func udpPacket(from, to netip.Addr, port uint16) []byte {
	packet := binary.BigEndian.AppendUint16(nil, port)
	packet = binary.BigEndian.AppendUint16(packet, port)
	packet = binary.BigEndian.AppendUint16(packet, uint16(8+len(payload)))
	packet = append(append(packet, 0, 0), payload...)
	sum := uint32(syscall.IPPROTO_UDP + len(packet))
	for _, part := range [][]byte{from.AsSlice(), to.AsSlice(), packet} {
		for i, b := range part {
			sum += uint32(b) << (8 * (1 - i%2))
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	if sum == 0xffff {
		sum = 0 // a checksum of 0 is none, and 0xffff is the same number
	}
	binary.BigEndian.PutUint16(packet[6:], ^uint16(sum))
	return packet
}

// connect tries to open a connection to a port on which nobody listens. That the host refuses it is no error.
func connect(ctx context.Context, from, to netip.Addr) error {
	dialer := net.Dialer{Timeout: (tries - 1) * patience, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))}
	conn, err := dialer.DialContext(ctx, "tcp", netip.AddrPortFrom(to, closedPort).String())
	var timeout net.Error
	switch {
	case err == nil:
		return conn.Close()
	case errors.Is(err, syscall.ECONNREFUSED):
		return nil
	case errors.As(err, &timeout) && timeout.Timeout():
		return errNoReply
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno // without the addresses
	}
	return err
}

// largest returns the size of the largest packet for which a host sends a reply: between small, which gets through, and
// size, which does not.
func (p *prober) largest(ctx context.Context, from, to netip.Addr, small, size int, wait time.Duration) int {
	for size-small > 1 && ctx.Err() == nil {
		middle := (small + size) / 2
		if _, err := p.echo(ctx, from, to, middle, few, wait); err == nil {
			small = middle
		} else {
			size = middle
		}
	}
	return small
}

// findRoute finds the device, the next hop and, where there is none yet, the source address of a leg. It returns false
// if packets cannot be sent.
func (l *leg) findRoute() bool {
	if !l.To.IsValid() {
		return false
	}
	err := l.readRoute()
	if err != nil {
		l.Ping = outcomeOf(err)
	}
	return err == nil
}

func (l *leg) readRoute() error {
	var o netlink.RouteGetOptions
	if l.From.IsValid() {
		o.SrcAddr = l.From.AsSlice()
	}
	routes, err := netlink.RouteGetWithOptions(l.To.AsSlice(), &o)
	if err != nil || len(routes) == 0 {
		return fmt.Errorf("there is no route (%w)", errors.Join(err))
	}
	l.via = address(routes[0].Gw)
	if !l.From.IsValid() {
		l.From = address(routes[0].Src)
	}
	link, err := netlink.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		return err
	}
	l.Device = link.Attrs().Name
	return nil
}

// address returns an address of netlink's.
func address(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}
