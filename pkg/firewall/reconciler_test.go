package firewall

import (
	"bytes"
	"context"
	"errors"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vishvananda/netns"
	"k8s.io/klog/v2"
	"k8s.io/klog/v2/textlogger"
)

const resync = 5 * time.Second

var turn sync.Mutex

// order shows the race detector that the test and Run take turns.
func order() {
	turn.Lock()
	defer turn.Unlock()
}

// fake is a driver that the test plays.
type fake struct {
	changed bool // the rules, by another program
	undoes  bool // another program changes the rules whenever they are set
	refuses error
	takes   time.Duration // a check
	applies time.Duration // for so long
	checked []time.Time
	wrote   []time.Time
	desired Desired
	changes chan struct{}
	opened  []bool // for nftables
	missing error

	outdated bool
	disturbs bool
}

func (f *fake) open(_ context.Context, nftables bool) (driver, error) {
	order()
	f.opened = append(f.opened, nftables)
	if f.missing != nil {
		return nil, f.missing
	}
	return f, nil
}

func (f *fake) Outdated(context.Context) bool { return f.outdated }

func (f *fake) Disturbs() bool { return f.disturbs }

func (f *fake) Check(context.Context) (bool, error) {
	order()
	f.checked = append(f.checked, time.Now())
	time.Sleep(f.takes)
	order()
	return !f.changed, nil
}

func (f *fake) Apply(_ context.Context, d Desired) error {
	order()
	f.wrote = append(f.wrote, time.Now())
	time.Sleep(f.applies)
	order()
	if f.refuses != nil {
		return f.refuses
	}
	f.desired, f.changed = d, f.undoes
	f.notify() // as the kernel does of our own changes, too
	return nil
}

func (f *fake) Changes(ctx context.Context) (<-chan struct{}, error) {
	f.changes = make(chan struct{}, 1)
	changes := f.changes
	context.AfterFunc(ctx, func() { close(changes) })
	return changes, nil
}

func (f *fake) notify() {
	select {
	case f.changes <- struct{}{}:
	default:
	}
}

// change is what another program does.
func (f *fake) change() {
	synctest.Wait()
	order()
	f.changed = true
	f.notify()
	synctest.Wait()
}

// run runs test with a Reconciler of f in a bubble, with what it logs and the
// States that it sends.
func run(t *testing.T, test func(t *testing.T, r *Reconciler, f *fake, log *bytes.Buffer, states *[]State)) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		logger := textlogger.NewLogger(textlogger.NewConfig(textlogger.Output(&log)))
		ctx, cancel := context.WithCancel(klog.NewContext(t.Context(), logger))
		r, f := NewReconciler("", resync), &fake{}
		r.open = f.open
		var states []State
		done := make(chan struct{})
		go func() {
			for {
				select {
				case s := <-r.States():
					order()
					states = append(states, s)
				case <-done:
					return
				}
			}
		}()
		go func() {
			defer close(done)
			r.Run(ctx, false)
		}()
		synctest.Wait() // Run has opened the driver
		test(t, r, f, &log, &states)
		cancel()
		<-done
	})
}

// pass lets time go by, until all goroutines wait again.
func pass(d time.Duration) {
	order()
	synctest.Wait()
	time.Sleep(d)
	synctest.Wait()
}

// TestStateOfTheLatestTarget: a State that was not received before Set is not taken for one of the new rules.
func TestStateOfTheLatestTarget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		r, f := NewReconciler("", resync), &fake{}
		r.open = f.open
		done := make(chan struct{})
		go func() {
			defer close(done)
			r.Run(ctx, false)
		}()
		r.Set(both, false)
		pass(0) // the State waits
		f.refuses = errors.New("refused")
		r.Set(Desired{IPv4: both.IPv4}, false)
		if s := <-r.States(); s.InPlace || s.Err == nil {
			t.Errorf("the state is %v, want that the new rules were refused", s)
		}
		cancel()
		<-done
	})
}

func expectStates(t *testing.T, states *[]State, want ...State) {
	t.Helper()
	synctest.Wait()
	if len(*states) != len(want) {
		t.Errorf("the states are %v, want %v", *states, want)
	} else {
		for i, s := range *states {
			if s != want[i] {
				t.Errorf("state %d is %v, want %v", i, s, want[i])
			}
		}
	}
	*states = nil
	order()
}

// The latest rules alone are set, and each Set is answered with a State. The driver of the expected mode, iptables, is
// opened before the first Set, and another one when the mode is another one.
func TestSet(t *testing.T) {
	run(t, func(t *testing.T, r *Reconciler, f *fake, _ *bytes.Buffer, states *[]State) {
		expectStates(t, states)
		if r.Stats() != (Stats{}) || !slices.Equal(f.opened, []bool{false}) {
			t.Errorf("before anything is desired, the counts are %+v; opened %v", r.Stats(), f.opened)
		}
		f.applies = time.Second
		r.Set(ipv4Alone, true)
		synctest.Wait()
		r.Set(ipv4Alone, true) // never set: the next comes sooner
		r.Set(both, true)
		pass(2 * time.Second)
		expectStates(t, states, State{InPlace: true})
		f.applies = 0
		if len(f.wrote) != 2 || !f.desired.IPv6.Equal(both.IPv6) || !slices.Equal(f.opened, []bool{false, true}) {
			t.Errorf("set %d times: %v; opened %v", len(f.wrote), f.desired, f.opened)
		}
		r.Set(both, false)
		expectStates(t, states, State{InPlace: true})
		if !slices.Equal(f.opened, []bool{false, true, false}) || len(f.wrote) != 3 {
			t.Errorf("in another mode: opened %v, set %d times", f.opened, len(f.wrote))
		}
		pass(3*resync + time.Second)
		expectStates(t, states)
		if s, last := r.Stats(), f.checked[len(f.checked)-1]; s.Writes != 3 || s.Checks != uint64(len(f.checked)) ||
			s.Checks < 3 || s.Repairs != 0 || !s.InPlace || !s.Checked.Equal(last) || time.Since(last) > resync {
			t.Errorf("the counts are %+v; checked at %v", s, last)
		}
	})
}

// The driver of the first Set is another one where kubelet's chain was made after Run has opened one.
func TestOutdated(t *testing.T) {
	run(t, func(t *testing.T, r *Reconciler, f *fake, _ *bytes.Buffer, states *[]State) {
		order()
		f.outdated = true
		for range 2 {
			r.Set(both, false)
			expectStates(t, states, State{InPlace: true})
		}
		if !slices.Equal(f.opened, []bool{false, false}) {
			t.Errorf("opened %v", f.opened)
		}
	})
}

// A failure is retried, logged once, and sent each time, since each is counted.
func TestFailures(t *testing.T) {
	run(t, func(t *testing.T, r *Reconciler, f *fake, log *bytes.Buffer, states *[]State) {
		f.missing = errors.New("no program")
		r.Set(Desired{}, true)
		expectStates(t, states, State{InPlace: true}) // no rules are desired
		r.Set(both, true)
		pass(2 * time.Second) // attempts at 0, 1 and, next, 3 s
		expectStates(t, states, State{Err: f.missing}, State{Err: f.missing})
		f.missing, f.refuses = nil, errors.New("refused")
		pass(2 * time.Second)
		expectStates(t, states, State{Err: f.refuses})
		if r.Stats().InPlace {
			t.Error("what failed is in place")
		}
		f.refuses = nil
		pass(5 * time.Second)
		expectStates(t, states, State{InPlace: true})
		for _, text := range []string{`err="no program" operation="Rules"`, `err="refused" operation="Rules"`,
			`"Recovered" operation="Rules"`} {
			if n := strings.Count(log.String(), text); n != 1 {
				t.Errorf("%s is logged %d times:\n%s", text, n, log)
			}
		}
	})
}

// intervals returns the time from each check since start to the next.
func (f *fake) intervals(start time.Time) (all []time.Duration) {
	last := start
	for _, at := range f.checked {
		if !at.Before(start) {
			all = append(all, at.Sub(last))
			last = at
		}
	}
	return all
}

// Checks after changes become rarer the more often the rules are restored. From
// the seventh time on it is a fight: the rules are restored at each resync. That a
// check finds our own change in place does not end the count.
func TestFight(t *testing.T) {
	run(t, func(t *testing.T, r *Reconciler, f *fake, log *bytes.Buffer, states *[]State) {
		r.Set(both, true)
		pass(2 * ruleCalm)
		expectStates(t, states, State{InPlace: true})
		start := time.Now()
		f.change()
		pass(150 * time.Millisecond)
		f.undoes = true
		f.change()
		pass(4 * time.Second)
		expectStates(t, states)
		if n := strings.Count(log.String(), `"Restoring the rules" mode="nftables" reason="another program changed them"`); n != 6 {
			t.Errorf("each of the first changes is logged; %d are:\n%s", n, log)
		}
		pass(3 * time.Second)
		expectStates(t, states, State{InPlace: true, Fight: "nftables"})
		pass(2 * resync)
		f.undoes = false
		pass(2 * resync)
		expectStates(t, states, State{InPlace: true})
		const ms = time.Millisecond
		want := []time.Duration{0, 100 * ms, 100 * ms, 200 * ms, 400 * ms, 800 * ms, 1600 * ms, 3200 * ms,
			resync, resync, resync, resync}
		if got := f.intervals(start); !slices.Equal(got, want) {
			t.Errorf("the intervals between checks are %v, want %v", got, want)
		}
		if s := r.Stats(); s.Repairs != 10 {
			t.Errorf("the counts are %+v", s)
		}
		lines := strings.Split(strings.TrimSpace(log.String()), "\n")
		if len(lines) != 8 || !strings.Contains(lines[6], `"Another program changes the rules again and again; `) ||
			!strings.Contains(lines[6], ` mode="nftables" count=7 period="6.4s" fix="`) ||
			!strings.Contains(lines[7], `"Other programs no longer undo what they fought over" count=1`) {
			t.Errorf("the log is\n%s", log)
		}
	})
}

// Changes with a calm time between them are restored at once, and no fight.
func TestCalm(t *testing.T) {
	run(t, func(t *testing.T, r *Reconciler, f *fake, log *bytes.Buffer, states *[]State) {
		r.Set(both, true)
		for range 10 {
			pass(ruleCalm + 10*time.Millisecond)
			f.change()
			if f.changed {
				t.Fatal("the rules are not restored at once")
			}
		}
		expectStates(t, states, State{InPlace: true})
		if n := strings.Count(log.String(), "Restoring"); n != 10 || r.Stats().Repairs != 10 {
			t.Errorf("%d of 10 restored:\n%s", n, log)
		}
	})
}

// Where writing may disturb another program, rules are restored when that has been quiet for a while, longer where checks
// take long, and not later than a second after its first change. Elsewhere, they are restored at once.
func TestQuiet(t *testing.T) {
	for _, c := range []struct {
		disturbs                    bool
		takes, between, lasts, want time.Duration
	}{
		{false, 0, 0, 0, 0},
		{true, 0, 0, 0, ruleQuiet},
		{true, 0, 80 * time.Millisecond, 400 * time.Millisecond, 400*time.Millisecond + ruleQuiet},
		{true, 100 * time.Millisecond, 300 * time.Millisecond, 300 * time.Millisecond, 700 * time.Millisecond},
		{true, 280 * time.Millisecond, 0, 0, ruleQuietMost},
		{true, 0, 10 * time.Millisecond, 3 * time.Second, ruleQuietMost},
	} {
		run(t, func(t *testing.T, r *Reconciler, f *fake, _ *bytes.Buffer, _ *[]State) {
			f.takes, f.disturbs = c.takes, c.disturbs
			r.resync = time.Hour
			r.Set(both, false)
			pass(c.takes + 2*ruleCalm) // a check finds the Reconciler's own change in place
			f.checked = nil
			start := time.Now()
			f.change()
			for time.Since(start) < c.lasts {
				pass(c.between)
				f.notify()
			}
			pass(2 * ruleQuietMost)
			if len(f.checked) == 0 || f.checked[0].Sub(start) != c.want {
				t.Errorf("%+v: checked %v after the first change", c, f.intervals(start))
			}
			pass(c.takes)
		})
	}
}

// Where other programs change rules all the time, checks take a twentieth of the
// time. After a calm time, the first change is checked at once, however long that
// takes, and so are some more.
func TestShare(t *testing.T) {
	for _, takes := range []time.Duration{10 * time.Millisecond, 100 * time.Millisecond, time.Second} {
		run(t, func(t *testing.T, r *Reconciler, f *fake, _ *bytes.Buffer, _ *[]State) {
			r.Set(both, true)
			pass(resync + ruleCalm)
			f.takes = takes
			for range 3 {
				const busy = time.Minute
				f.checked = nil
				start := time.Now()
				for time.Since(start) < busy {
					synctest.Wait()
					order()
					f.notify()
					time.Sleep(10 * time.Millisecond)
				}
				synctest.Wait()
				order()
				spent := time.Duration(len(f.checked)) * takes
				// A check at each resync is always made.
				most := max(busy/ruleShare, busy/resync*takes) + ruleBurst + 2*takes
				if spent > most || spent < busy/ruleShare/2 && takes > ruleRest {
					t.Errorf("checks that take %v took %v of %v, want at most %v", takes, spent, busy, most)
				}
				if first := f.checked[0].Sub(start); first > 0 {
					t.Errorf("after a calm time, a change is checked after %v", first)
				}
				soon := ruleRest + takes + 10*time.Millisecond
				if next := f.checked[1].Sub(f.checked[0]); takes < time.Second && next > soon {
					t.Errorf("after a calm time, the next change is checked after %v, want at most %v", next, soon)
				}
				pass(2 * ruleShare * max(takes, ruleBurst))
				if running := takes - time.Since(f.checked[len(f.checked)-1]); running > 0 {
					pass(running)
				}
			}
		})
	}
}

// A fight ends with the mode.
func TestModeEndsFight(t *testing.T) {
	run(t, func(t *testing.T, r *Reconciler, f *fake, _ *bytes.Buffer, states *[]State) {
		f.undoes = true
		r.Set(both, false)
		pass(3 * resync)
		expectStates(t, states, State{InPlace: true}, State{InPlace: true, Fight: "iptables"})
		f.undoes = false
		r.Set(both, true)
		expectStates(t, states, State{InPlace: true})
		pass(resync)
		if f.change(); f.changed {
			t.Error("after the fight, a change is not restored at once")
		}
	})
}

// The real driver, of each mode, restores what another program removes.
func TestReconciler(t *testing.T) {
	t.Parallel()
	eachMode(t, modes, func(t *testing.T, m mode, n *node) {
		home, err := netns.Get()
		if err != nil {
			t.Fatal(err)
		}
		defer home.Close()
		r := NewReconciler("", time.Hour)
		r.open = func(ctx context.Context, nftables bool) (driver, error) {
			return newDriver(ctx, n.runner(), "", nftables)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			runtime.LockOSThread() // for good: the thread ends with the goroutine
			if err := netns.Set(home); err != nil {
				t.Error(err)
			}
			r.Run(ctx, m.nftables)
		}()
		r.Set(both, m.nftables)
		if s := <-r.States(); s != (State{InPlace: true}) {
			t.Errorf("the state is %v", s)
		}
		before := n.listing()
		if m == tablesMode {
			n.sh("nft flush ruleset")
		} else {
			n.sh("iptables -t nat -F; ip6tables -t nat -F; iptables -F")
		}
		deadline := time.Now().Add(time.Minute)
		for r.Stats().Repairs == 0 || n.listing() != before {
			time.Sleep(10 * time.Millisecond)
			if time.Now().After(deadline) {
				t.Fatalf("the rules are not restored:\n%s", n.listing())
			}
		}
		cancel()
		<-done
		if n.listing() != before {
			t.Errorf("at the end the rules go:\n%s", n.listing())
		}
	})
}

// A command in the log can be pasted, with the tabs that klog puts before each
// of its lines.
func TestLoggedCommand(t *testing.T) {
	t.Parallel()
	eachMode(t, modes, func(t *testing.T, m mode, n *node) {
		var log bytes.Buffer
		ctx := klog.NewContext(t.Context(), textlogger.NewLogger(textlogger.NewConfig(textlogger.Output(&log))))
		if err := n.driver(m).Apply(ctx, ipv4Alone); err != nil {
			t.Fatal(err)
		}
		applied := n.listing()
		n.apply(n.driver(m), Desired{})
		_, command, _ := strings.Cut(log.String(), `"Applied" command=<`)
		command, _, found := strings.Cut(command, "\n >")
		if !found {
			t.Fatalf("the log has no command:\n%s", &log)
		}
		n.sh(command)
		if got := n.listing(); got != applied {
			t.Errorf("the command makes\n%s\nwant\n%s", got, applied)
		}
	})
}
