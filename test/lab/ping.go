package lab

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/netip"
	"os/exec"
	"regexp"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// PingOptions for Ping. The zero value is one packet of the usual size.
type PingOptions struct {
	Count    int           // packets; 0: 1
	Interval time.Duration // 0: 20 ms
	Packet   int           // size of the whole IP packet in bytes; 0: 84 (IPv6: 104)
	DF       bool          // may not be fragmented, not even by the sender
}

// Pings is what became of them.
type Pings struct {
	Sent, Received int
	Lost           []int         // sequence numbers, from 1
	RTT            time.Duration // mean
}

// Ping pings dst with the real ping. It is an error when an answer is missing.
func (ns *Namespace) Ping(ctx context.Context, dst netip.Addr, o PingOptions) (Pings, error) {
	count := max(o.Count, 1)
	args := []string{"-c", strconv.Itoa(count), "-W", fmt.Sprint(Patiently(time.Second).Seconds())}
	if o.Interval == 0 {
		o.Interval = 20 * time.Millisecond
	}
	args = append(args, "-i", fmt.Sprint(o.Interval.Seconds()))
	if o.Packet != 0 {
		headers := 20 + 8 // IPv4, ICMP
		if dst.Is6() {
			headers = 40 + 8
		}
		args = append(args, "-s", strconv.Itoa(o.Packet-headers))
	}
	if o.DF {
		args = append(args, "-M", "do")
	}
	p, err := ns.startPing(dst, args)
	if err != nil {
		return Pings{}, err
	}
	stop := context.AfterFunc(ctx, p.proc.Kill)
	defer stop()
	got, err := p.result(count)
	if err == nil && got.Received < got.Sent {
		err = fmt.Errorf("%s: %d of %d answered: %s", p.what, got.Received, got.Sent, p.remark)
	}
	return got, err
}

// WaitPing pings dst until it answers.
func (ns *Namespace) WaitPing(ctx context.Context, dst netip.Addr) error {
	return Poll(ctx, fmt.Sprintf("%s to answer %s", dst, ns.Name), func() error {
		_, err := ns.Ping(ctx, dst, PingOptions{})
		return err
	})
}

// A Pinging is a ping in the background, 50 packets a second.
type Pinging struct {
	what   string // from where to where
	proc   *Process
	first  chan struct{} // closed at the first answer
	read   chan struct{} // closed when all output is read
	answer map[int]bool  // by sequence number
	rtts   time.Duration // sum
	sent   int
	remark string // what else ping printed
}

// StartPing pings dst until Stop, and returns at the first answer. What is lost
// while neighbours along the path find each other does not count.
func (ns *Namespace) StartPing(ctx context.Context, dst netip.Addr) (*Pinging, error) {
	if err := ns.WaitPing(ctx, dst); err != nil {
		return nil, err
	}
	p, err := ns.startPing(dst, []string{"-i", "0.02"})
	if err != nil {
		return nil, err
	}
	select {
	case <-p.first:
		return p, nil
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-time.After(Patiently(Patience)):
		err = fmt.Errorf("no answer for %v", Patience)
	case <-p.read:
		err = p.proc.Wait()
	}
	p.proc.Kill()
	<-p.read
	return nil, fmt.Errorf("%s: %w: %s", p.what, err, p.remark)
}

// String returns from where to where.
func (p *Pinging) String() string { return p.what }

// Stop ends the ping and returns its result. The very last packet does not
// count when its answer was still on the way.
func (p *Pinging) Stop() (Pings, error) {
	p.proc.cmd.Process.Signal(unix.SIGINT) // ping's sign to sum up
	got, err := p.result(0)
	if n := len(got.Lost); n > 0 && got.Lost[n-1] == got.Sent {
		got.Lost = got.Lost[:n-1]
		got.Sent--
	}
	return got, err
}

func (ns *Namespace) startPing(dst netip.Addr, args []string) (*Pinging, error) {
	p := &Pinging{what: ns.Name + ": ping " + dst.String(), first: make(chan struct{}), read: make(chan struct{}),
		answer: map[int]bool{}}
	cmd := exec.Command("ping", append(append([]string{"-n"}, args...), dst.String())...)
	// A pipe of our own: cmd's would be closed at the end, read or not.
	r, w := io.Pipe()
	cmd.Stdout, cmd.Stderr = w, w
	var err error
	if p.proc, err = ns.Launch(cmd); err != nil {
		return nil, err
	}
	go func() {
		<-p.proc.done
		w.Close()
	}()
	go p.scan(r)
	return p, nil
}

var (
	pingAnswer = regexp.MustCompile(`bytes from .*icmp_seq=([0-9]+) .*time=([0-9.]+) ms`)
	pingSum    = regexp.MustCompile(`^([0-9]+) packets transmitted`)
	pingRemark = regexp.MustCompile(`^From |^ping: |rror|nreachable|too long`)
)

func (p *Pinging) scan(r io.Reader) {
	defer close(p.read)
	for lines := bufio.NewScanner(r); lines.Scan(); {
		if m := pingAnswer.FindStringSubmatch(lines.Text()); m != nil {
			seq, _ := strconv.Atoi(m[1])
			ms, _ := strconv.ParseFloat(m[2], 64)
			if len(p.answer) == 0 {
				close(p.first)
			}
			if !p.answer[seq] {
				p.answer[seq] = true
				p.rtts += time.Duration(ms * float64(time.Millisecond))
			}
		} else if m := pingSum.FindStringSubmatch(lines.Text()); m != nil {
			p.sent, _ = strconv.Atoi(m[1])
		} else if pingRemark.MatchString(lines.Text()) {
			p.remark = lines.Text()
		}
	}
}

// result waits for the end. Where ping could not even send, want packets are
// missing.
func (p *Pinging) result(want int) (Pings, error) {
	<-p.read
	got := Pings{Sent: max(p.sent, want), Received: len(p.answer)}
	if got.Sent == 0 {
		return got, fmt.Errorf("%s: ended without a word: %v: %s", p.what, p.proc.Wait(), p.remark)
	}
	for seq := 1; seq <= got.Sent; seq++ {
		if !p.answer[seq] {
			got.Lost = append(got.Lost, seq)
		}
	}
	if got.Received > 0 {
		got.RTT = p.rtts / time.Duration(got.Received)
	}
	return got, nil
}
