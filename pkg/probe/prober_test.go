package probe

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/echo"
	"github.com/flanneld/flanneld/pkg/family"
)

// A world delivers echo messages between hosts, as kernels do.
type world struct {
	mu    sync.Mutex
	hosts map[netip.Addr]*host // by all of their addresses
	drops func(packet) bool    // on the way; nil: nothing
	sent  int                  // requests
}

// A packet is a request, or a reply.
type packet struct {
	reply    bool
	from, to netip.Addr
}

// A host is one that has a Prober, or not.
type host struct {
	world           *world
	prober          *Prober
	number          int
	interval        time.Duration // 0: the usual one
	sourceless      bool          // overlay is no address of the host's
	overlay, public netip.Addr
	received        chan echo.Message // nil: nobody reads
}

func newWorld() *world { return &world{hosts: map[netip.Addr]*host{}} }

// add adds a host, the first one has number 1.
func (w *world) add(number int) *host {
	h := &host{
		world:   w,
		number:  number,
		overlay: netip.AddrFrom4([4]byte{10, byte(number >> 8), byte(number), 0}),
		public:  netip.AddrFrom4([4]byte{198, 18, byte(number >> 8), byte(number)}),
	}
	w.hosts[h.overlay], w.hosts[h.public] = h, h
	return h
}

// run has the host ask the others until the test ends.
func (h *host) run(ctx context.Context, others ...*host) {
	h.prober = New(h.interval, Observers{})
	h.received = make(chan echo.Message, 1000)
	h.prober.open = func(f family.Family) (conn, error) {
		if f == family.IPv6 {
			return nil, fmt.Errorf("no %s", f)
		}
		return h, nil
	}
	for _, other := range others {
		h.prober.Set(other.overlay.String(), Path{Overlay: other.overlay, Source: h.overlay, Public: other.public})
	}
	go h.prober.Run(ctx)
}

// path returns what h knows of the path to another host.
func (h *host) path(t *testing.T, to *host) Result {
	t.Helper()
	results := h.prober.Results(to.overlay.String())
	if len(results) != 1 {
		t.Fatalf("%d results", len(results))
	}
	return results[0]
}

// Send sends a request, and the reply of the host that gets it.
func (h *host) Send(from, to netip.Addr, seq uint16, data []byte) error {
	w := h.world
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sent++
	if !from.IsValid() {
		from = h.public
	}
	dropped := func(p packet) bool { return w.drops != nil && w.drops(p) }
	if h.sourceless && from == h.overlay {
		return os.NewSyscallError("sendmsg", unix.ENETUNREACH)
	}
	other := w.hosts[to]
	if other == nil || other.sourceless && to == other.overlay || dropped(packet{false, from, to}) {
		return nil
	}
	if other.received != nil {
		other.received <- echo.Message{From: from, Seq: seq, Data: data}
	}
	if !dropped(packet{true, to, from}) {
		h.received <- echo.Message{Reply: true, From: to, Seq: seq, Data: data}
	}
	return nil
}

func (h *host) Receive([]byte) (echo.Message, error) {
	h.world.mu.Lock()
	received := h.received
	h.world.mu.Unlock()
	if received == nil {
		return echo.Message{}, net.ErrClosed
	}
	m, ok := <-received
	if !ok {
		return m, net.ErrClosed
	}
	return m, nil
}

func (h *host) Close() error {
	h.world.mu.Lock()
	defer h.world.mu.Unlock()
	close(h.received)
	h.received = nil
	return nil
}

// set changes which packets are dropped.
func (w *world) set(drops func(packet) bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.drops = drops
}

// asks is what a host learns from the requests of its peer.
type asks struct{ asks, arrives, heard bool }

// All that can be told apart is: from the start, and after packets have arrived.
func TestStates(t *testing.T) {
	type view struct {
		state State
		asks
	}
	inside := func(a netip.Addr) bool { return a.As4()[0] == 10 }
	second := netip.MustParseAddr("10.0.2.0")
	isSecond := func(a netip.Addr) bool { return a == second || a == netip.MustParseAddr("198.18.0.2") }
	all := asks{true, true, true}
	for _, test := range []struct {
		name           string
		drops          func(packet) bool
		start1, start2 view // of host 1 and of host 2, where packets were dropped from the start
		later1, later2 view // where they were dropped later
		noProber       bool // host 2 does not ask
		optional       bool // host 1 does not know whether host 2 has an address inside
	}{
		{name: "healthy", drops: func(packet) bool { return false },
			start1: view{Reachable, all}, start2: view{Reachable, all},
			later1: view{Reachable, all}, later2: view{Reachable, all}},
		{name: "overlay to 2", drops: func(p packet) bool { return p.to == second },
			start1: view{HostOnly, asks{true, true, false}}, start2: view{HostOnly, asks{true, false, true}},
			later1: view{HostOnly, asks{true, true, false}}, later2: view{HostOnly, asks{true, false, true}}},
		{name: "overlay both ways", drops: func(p packet) bool { return inside(p.to) },
			start1: view{HostOnly, asks{true, false, false}}, start2: view{HostOnly, asks{true, false, false}},
			later1: view{HostOnly, asks{true, false, false}}, later2: view{HostOnly, asks{true, false, false}}},
		{name: "overlay both ways, to a host that does not ask", drops: func(p packet) bool { return inside(p.to) },
			noProber: true,
			start1:   view{HostOnly, asks{}}, later1: view{HostOnly, asks{}}},
		{name: "requests to 2", drops: func(p packet) bool { return !p.reply && isSecond(p.to) },
			start1: view{Reachable, all}, start2: view{Reachable, asks{}},
			later1: view{Reachable, all}, later2: view{Reachable, asks{}}},
		{name: "requests to both", drops: func(p packet) bool { return !p.reply },
			start1: view{NoReply, asks{}}, start2: view{NoReply, asks{}},
			later1: view{Silent, asks{}}, later2: view{Silent, asks{}}},
		{name: "requests to a host that does not ask", drops: func(p packet) bool { return !p.reply }, noProber: true,
			start1: view{NoReply, asks{}}, later1: view{Silent, asks{}}},
		{name: "overlay both ways, and requests to 2", drops: func(p packet) bool {
			return inside(p.to) || !p.reply && isSecond(p.to)
		},
			start1: view{HostOnly, asks{true, false, false}}, start2: view{HostOnly, asks{}},
			later1: view{HostOnly, asks{true, false, false}}, later2: view{HostOnly, asks{}}},
		{name: "requests to 2, and all replies", drops: func(p packet) bool { return p.reply || isSecond(p.to) },
			start1: view{NoReply, asks{true, true, false}}, start2: view{NoReply, asks{}},
			later1: view{Silent, asks{true, true, false}}, later2: view{Silent, asks{}}},
		{name: "all", drops: func(packet) bool { return true },
			start1: view{NoReply, asks{}}, start2: view{NoReply, asks{}},
			later1: view{Silent, asks{}}, later2: view{Silent, asks{}}},
		{name: "no pods", optional: true, noProber: true, drops: func(p packet) bool { return inside(p.to) },
			start1: view{NoAddress, asks{}}, later1: view{HostOnly, asks{}}},
	} {
		for _, later := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/later=%t", test.name, later), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					ctx, cancel := context.WithCancel(t.Context())
					w := newWorld()
					one, two := w.add(1), w.add(2)
					one.run(ctx)
					one.prober.Set(two.overlay.String(), Path{Overlay: two.overlay, Source: one.overlay, Public: two.public,
						Optional: test.optional})
					if !test.noProber {
						two.run(ctx, one)
					}
					if later {
						time.Sleep(time.Minute)
						if r := one.path(t, two); r.State != Reachable || r.RTT == 0 {
							t.Errorf("before anything is dropped: %+v", r)
						}
					}
					w.set(test.drops)
					began := time.Now()
					time.Sleep(3 * time.Minute)
					views := [2]view{test.start1, test.start2}
					if later {
						views = [2]view{test.later1, test.later2}
					}
					check := func(from, to *host, want view) {
						t.Helper()
						if from.prober == nil {
							return
						}
						r := from.path(t, to)
						if got := (view{r.State, asks{r.Asks, r.Arrives, r.Heard}}); got != want {
							t.Errorf("from %s: got %+v, want %+v", from.public, got, want)
						}
						bad := want.state == HostOnly || want.state == Silent
						if alarmed := len(from.prober.Alarms()) > 0; alarmed != bad {
							t.Errorf("from %s: alarmed is %t", from.public, alarmed)
						}
						if bad && (r.Since.Before(began) || r.Since.Sub(began) > DefaultInterval) {
							t.Errorf("from %s: since %v", from.public, r.Since.Sub(began))
						}
					}
					check(one, two, views[0])
					check(two, one, views[1])
					w.set(nil)
					time.Sleep(DefaultInterval + 10*time.Second)
					for _, h := range [][2]*host{{one, two}, {two, one}} {
						if h[0].prober == nil {
							continue
						}
						if r := h[0].path(t, h[1]); r.State != Reachable || len(h[0].prober.Alarms()) > 0 {
							t.Errorf("from %s, when nothing is dropped any more: %+v", h[0].public, r)
						}
					}
					cancel()
					synctest.Wait()
				})
			})
		}
	}
}

// A state is reported a minute after the first request without a reply, and again when it is over, or another one. A peer
// that only its host has ever been heard of counts as silent when that is gone, too.
func TestReports(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		w := newWorld()
		one, two := w.add(1), w.add(2)
		w.set(func(p packet) bool { return p.to == two.overlay })
		one.run(ctx, two)
		expect := func(want State) time.Time {
			t.Helper()
			select {
			case <-one.prober.Reports():
			case <-time.After(time.Hour):
				t.Fatalf("%s is not reported", want)
			}
			now := time.Now()
			state := State("")
			for _, r := range one.prober.Alarms()[two.overlay.String()] {
				state = r.State
			}
			if state != want {
				t.Fatalf("reported: %q, want %q", state, want)
			}
			return now
		}
		at := expect(HostOnly)
		if since := one.path(t, two).Since; at.Sub(since) < AlarmAfter || at.Sub(since) > AlarmAfter+(2*attempts+1)*timeout {
			t.Errorf("reported after %v", at.Sub(since))
		}
		w.set(func(packet) bool { return true })
		expect(Silent)
		w.set(nil)
		expect("")
		w.set(func(p packet) bool { return p.to == two.overlay })
		expect(HostOnly)
		one.prober.Set(two.overlay.String())
		expect("")
		cancel()
		synctest.Wait()
	})
}

// A peer whose firewall drops requests stays reachable for a host that asks more often than the peer, and for hosts that
// ask each other as rarely as in a large cluster.
func TestIntervals(t *testing.T) {
	for _, intervals := range [][2]time.Duration{{time.Second, DefaultInterval}, {10 * time.Minute, 10 * time.Minute}} {
		t.Run(fmt.Sprint(intervals), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				w := newWorld()
				one, two := w.add(1), w.add(2)
				one.interval, two.interval = intervals[0], intervals[1]
				w.set(func(p packet) bool { return !p.reply && p.to == two.overlay })
				one.run(ctx, two)
				two.run(ctx, one)
				time.Sleep(3 * max(intervals[0], intervals[1]))
				for len(one.prober.Reports()) > 0 {
					<-one.prober.Reports()
				}
				time.Sleep(10 * max(intervals[0], intervals[1]))
				if r := one.path(t, two); r.State != Reachable || len(one.prober.Reports()) > 0 {
					t.Errorf("%+v, %d reports", r, len(one.prober.Reports()))
				}
				cancel()
				synctest.Wait()
			})
		})
	}
}

// Where one request of five arrives, nothing is reported as blocked.
func TestSomeLossIsNoAlarm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		w := newWorld()
		one, two := w.add(1), w.add(2)
		count := 0
		w.set(func(p packet) bool {
			if p.reply || p.to != two.overlay {
				return false
			}
			count++
			return count%5 != 0
		})
		one.run(ctx, two)
		select {
		case <-one.prober.Reports():
			t.Errorf("reported: %+v", one.prober.Alarms())
		case <-time.After(time.Hour):
		}
		cancel()
		synctest.Wait()
	})
}

// A host that loses its address in the overlay says so underneath: neither side reports that packets are lost.
func TestSourceless(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		w := newWorld()
		one, two := w.add(1), w.add(2)
		one.run(ctx)
		two.run(ctx)
		one.prober.Set(two.overlay.String(), Path{Overlay: two.overlay, Source: one.overlay, Public: two.public, Optional: true})
		two.prober.Set(one.overlay.String(), Path{Overlay: one.overlay, Source: two.overlay, Public: one.public, Optional: true})
		for _, lost := range []bool{false, true, false} {
			w.mu.Lock()
			two.sourceless = lost
			w.mu.Unlock()
			want := map[bool]State{false: Reachable, true: NoAddress}[lost]
			time.Sleep(3 * time.Minute)
			for _, r := range []Result{one.path(t, two), two.path(t, one)} {
				if r.State != want {
					t.Errorf("got %+v, want %s", r, want)
				}
			}
			for _, h := range []*host{one, two} {
				if len(h.prober.Reports()) > 0 {
					t.Errorf("from %s: reported", h.public)
				}
			}
			if lost { // this holds although the requests of the other host are lost for a while
				w.set(func(p packet) bool { return p.to == one.public && !p.reply })
				time.Sleep(3 * time.Minute)
				w.set(nil)
				if r := one.path(t, two); r.State != NoAddress || len(one.prober.Reports()) > 0 {
					t.Errorf("got %+v", r)
				}
			}
			if err := two.path(t, one).Err; lost != (err != nil) {
				t.Errorf("the error is %v", err)
			}
		}
		cancel()
		synctest.Wait()
	})
}

// A node that recovers is asked as soon as its first request arrives.
func TestAsksWhoAsks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		w := newWorld()
		one, two := w.add(1), w.add(2)
		one.run(ctx, two)
		time.Sleep(2 * time.Minute)
		if s := one.path(t, two).State; s != Reachable {
			t.Fatal(s)
		}
		w.set(func(packet) bool { return true })
		time.Sleep(2 * time.Minute)
		next := func() time.Duration {
			one.prober.mu.Lock()
			defer one.prober.mu.Unlock()
			return one.prober.from[two.overlay].due.sub(one.prober.now())
		}
		for next() < DefaultInterval/2 {
			time.Sleep(time.Second)
		}
		time.Sleep(6 * time.Second) // the last round is not just over, and the next one is far away
		w.set(nil)
		two.run(ctx, one)
		two.prober.Set(one.overlay.String())
		if err := two.Send(two.overlay, one.overlay, 1, nil); err != nil { // which says nothing
			t.Fatal(err)
		}
		if err := two.Send(two.overlay, one.overlay, 1, make([]byte, dataLen)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if r := one.path(t, two); r.State != Reachable {
			t.Errorf("got %+v", r)
		}
		cancel()
		synctest.Wait()
	})
}

// Peers behind one public address, which only their overlay addresses tell apart, are told apart.
func TestSharedAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		w := newWorld()
		one, two, three := w.add(1), w.add(2), w.add(3)
		three.public = two.public
		one.run(ctx, two, three)
		w.set(func(p packet) bool { return p.to == three.overlay })
		time.Sleep(time.Minute)
		for _, want := range []struct {
			host  *host
			state State
		}{{two, Reachable}, {three, HostOnly}} {
			if r := one.path(t, want.host); r.State != want.state {
				t.Errorf("got %+v, want %s", r, want.state)
			}
		}
		w.set(func(p packet) bool { return p.to == two.overlay })
		time.Sleep(time.Minute)
		if r := one.path(t, two); r.State != HostOnly {
			t.Errorf("got %+v", r)
		}
		cancel()
		synctest.Wait()
	})
}

// A conn that can send nothing more, as where the queue of a device stands still.
type fullConn struct{ closed chan struct{} }

func (c fullConn) Send(netip.Addr, netip.Addr, uint16, []byte) error {
	<-c.closed
	return net.ErrClosed
}

func (c fullConn) Receive([]byte) (echo.Message, error) {
	<-c.closed
	return echo.Message{}, net.ErrClosed
}

func (c fullConn) Close() error {
	close(c.closed)
	return nil
}

// Run returns although a request cannot be sent.
func TestRunEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		one := newWorld().add(1)
		p := New(0, Observers{})
		p.open = func(family.Family) (conn, error) { return fullConn{make(chan struct{})}, nil }
		p.Set("peer", Path{Overlay: one.overlay, Source: one.overlay, Public: one.public})
		if err := p.Run(ctx); err != nil { // which lasts for ever otherwise
			t.Error(err)
		}
	})
}

// At most ten requests a second are sent, however many peers there are and however many of them are silent, and each peer
// is asked in its turn: one that is gone shows within a round, or three when half of all are gone, since requests are
// repeated then.
func TestManyPeers(t *testing.T) {
	for _, peers := range []int{100, 300, 5000, 20000} {
		t.Run(fmt.Sprint(peers), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				w := newWorld()
				me := w.add(0)
				var others []*host
				for i := range peers {
					others = append(others, w.add(i+1))
				}
				me.run(ctx, others...)
				round := max(DefaultInterval, time.Duration(peers)*tick/batch)
				count := func(d time.Duration) float64 {
					w.mu.Lock()
					before := w.sent
					w.mu.Unlock()
					time.Sleep(d)
					w.mu.Lock()
					defer w.mu.Unlock()
					return float64(w.sent-before) / d.Seconds()
				}
				rate := count(round + 10*time.Second)
				if n := me.prober.Count()[Reachable]; n != peers {
					t.Errorf("%d are reachable after the first round", n)
				}
				w.set(func(p packet) bool { return w.hosts[p.to].number%2 == 1 })
				began := time.Now()
				failing := count(4 * round)
				silent, last := 0, time.Duration(0)
				for _, other := range others {
					r := me.path(t, other)
					if bad := other.number%2 == 1; bad != (r.State == Silent) {
						t.Errorf("%d is %s", other.number, r.State)
					} else if bad {
						silent++
						last = max(last, r.Since.Sub(began))
					}
				}
				if last > 3*round {
					t.Errorf("a peer that is gone shows after %v, %v is a round", last, round)
				}
				if rate > 10.1 || failing > 10.1 {
					t.Errorf("%.1f requests a second, %.1f while peers fail", rate, failing)
				}
				t.Logf("%d peers: %.1f requests a second, %.1f while half of the peers are silent; the last of %d shows after %v",
					peers, rate, failing, silent, last.Round(time.Second))
				cancel()
				synctest.Wait()
			})
		})
	}
}
