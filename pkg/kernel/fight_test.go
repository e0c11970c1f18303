package kernel

import (
	"bytes"
	"flag"
	"strings"
	"testing"
	"time"

	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/nstest"
)

// logged catches what is logged, until it is asked.
func logged(t *testing.T) func() string {
	t.Helper()
	state := klog.CaptureState()
	t.Cleanup(state.Restore)
	var fs flag.FlagSet
	klog.InitFlags(&fs)
	fs.Set("logtostderr", "false")
	fs.Set("one_output", "true") // warnings not once more among the rest
	var out bytes.Buffer
	klog.SetOutput(&out)
	return func() string {
		klog.Flush()
		return out.String()
	}
}

// hear handles what the kernel tells, until the entry of that route is such.
func hear(r *Reconciler, such func(have Object) bool) {
	for k := peerDirect()[0].Key(); !such(r.entries.Get(k).have); {
		<-r.Wake() // without news, the test's deadline ends this
		r.receive()
	}
}

func gone(have Object) bool { return have == nil }

// undo has somebody undo a route of ours, and the reconciler hear of it.
func undo(t *testing.T, r *Reconciler) {
	t.Helper()
	nstest.Run(t, "ip route del 10.5.3.0/24")
	hear(r, gone)
}

// there tells whether that route is there.
func there(t *testing.T) bool {
	t.Helper()
	return nstest.Run(t, "ip route show 10.5.3.0/24") != ""
}

// Somebody removes a route whenever we set it: after a while we do so at the
// pace of the main loop's retries, and say so once.
func TestFight(t *testing.T) {
	host(t)
	log := logged(t)
	r := start(t)
	r.fights.Burst, r.backoff.First, r.backoff.Most = 0, time.Hour, time.Hour
	r.fights.Pace, r.fights.Calm = time.Hour, time.Hour // however slow the machine is
	fightTimes := r.fights.Times
	for i := 1; i < fightTimes; i++ {
		undo(t, r)
		apply(t, r)
		if !there(t) || r.waiting() {
			t.Fatalf("after %d times the route is there: %t; waits: %t", i, there(t), r.waiting())
		}
	}
	for i := range 3 {
		undo(t, r)
		if r.pending() || !r.waiting() {
			t.Fatalf("round %d: no wait", i)
		}
		nstest.Run(t, "ip route add 10.5.3.0/24 via 198.18.0.66 dev eth0 proto static") // hastens it no more than ...
		hear(r, func(have Object) bool { return have != nil })
		nstest.Run(t, "ip route del 10.5.3.0/24")
		hear(r, gone)
		if r.pending() {
			t.Fatalf("round %d: no wait, after something else was there", i)
		}
		r.Compare()     // ... this,
		r.retryFailed() // or news of some device
		apply(t, r)
		if there(t) {
			t.Fatalf("round %d: set again at once", i)
		}
		// Others need not wait.
		r.Set("peer", peer([]MAC{mac2, mac3}[i%2]))
		apply(t, r)
		if !r.Has("peer") || there(t) {
			t.Errorf("round %d: the peer has what it wants: %t; the route is there: %t", i, r.Has("peer"), there(t))
		}
		r.retry()
		apply(t, r)
		if !there(t) || r.waiting() {
			t.Fatalf("round %d: the route is there: %t; waits: %t", i, there(t), r.waiting())
		}
	}
	fight := `command="ip route replace 10.5.3.0/24 via 198.18.0.3 dev eth0 proto 70" count=20 `
	if got := strings.Count(log(), fight); got != 1 {
		t.Errorf("the fight is logged %d times:\n%s", got, log())
	}

	if s := r.Stats(); s.Fights != 1 || s.Fight != peerDirect()[0] ||
		s.Kinds[KindRoute].Repairs[Missing] != uint64(fightTimes-1) || s.Kinds[KindRoute].Repairs[Fight] != 3 {
		t.Errorf("the counts are %+v", s)
	}

	if got := strings.Count(log(), `reason="it was missing"`); got != fightTimes-1 {
		t.Errorf("each of %d repairs is said:\n%s", got, log())
	}

	// An opponent who takes his time does not have to be slowed down.
	r.fights.Pace = 0
	undo(t, r)
	apply(t, r)
	if !there(t) {
		t.Error("undone a second after it was set, it waits")
	}
	// And one who has given up is forgotten.
	r.fights.Calm = 1
	r.Compare()
	apply(t, r)
	if !strings.Contains(log(), "Other programs no longer undo what they fought over") {
		t.Errorf("the end of the fight is not logged:\n%s", log())
	}
	r.fights.Calm, r.fights.Pace = time.Hour, time.Hour
	if s := r.Stats(); s.Fights != 0 || s.Fight != nil {
		t.Errorf("after the peace, the counts are %+v", s)
	}
	undo(t, r)
	apply(t, r)
	if !there(t) {
		t.Error("after the peace, the first time, it waits")
	}
}

// A wish that changes has nothing to do with the fight over the former one.
func TestFightOverFormerWish(t *testing.T) {
	host(t)
	r := start(t)
	r.backoff.First, r.backoff.Most = time.Hour, time.Hour
	for range r.fights.Times - 1 {
		undo(t, r)
		apply(t, r)
	}
	undo(t, r)
	other := peerDirect()
	other[0] = Route{Dst: prefix("10.5.3.0/24"), Via: addr("198.18.0.33"), Dev: "eth0"}
	r.Set("direct", other)
	apply(t, r)
	if !there(t) {
		t.Error("it waits")
	}
	r.Set("direct", nil)
	apply(t, r)
	r.retry()
	if there(t) || r.pending() || r.waiting() {
		t.Errorf("dropped: there %t, pending %t, waits %t", there(t), r.pending(), r.waiting())
	}
}

// Somebody sets a route on our device whenever we remove it, as a DHCP client does.
func TestFightOverRemoval(t *testing.T) {
	host(t)
	log := logged(t)
	r := start(t)
	r.fights.Burst, r.backoff.First, r.backoff.Most = 0, time.Hour, time.Hour
	r.fights.Pace, r.fights.Calm = time.Hour, time.Hour // however slow the machine is
	k := Route{Dst: prefix("198.51.100.0/24"), Dev: "flannel.1"}.Key()
	add := func() {
		t.Helper()
		nstest.Run(t, "ip route add 198.51.100.0/24 dev flannel.1")
		for r.entries.Get(k) == nil || r.entries.Get(k).have == nil {
			<-r.Wake()
			r.receive()
		}
	}
	there := func() bool {
		t.Helper()
		return nstest.Run(t, "ip route show 198.51.100.0/24") != ""
	}
	for i := 1; i < r.fights.Times; i++ {
		add()
		apply(t, r)
		if there() || r.waiting() {
			t.Fatalf("after %d times the route is there: %t; waits: %t", i, there(), r.waiting())
		}
	}
	for i := range 3 {
		add()
		if r.pending() || !r.waiting() {
			t.Fatalf("round %d: no wait", i)
		}
		r.retry()
		apply(t, r)
		if there() || r.waiting() {
			t.Fatalf("round %d: the route is there: %t; waits: %t", i, there(), r.waiting())
		}
	}
	if got := strings.Count(log(), `again and again`); got != 1 ||
		!strings.Contains(log(), `command="ip route del 198.51.100.0/24 dev flannel.1`) {
		t.Errorf("the fight is logged %d times:\n%s", got, log())
	}
	if s := r.Stats(); s.Fights != 1 || !strings.HasPrefix(s.Fight.String(), "ip route del 198.51.100.0/24") {
		t.Errorf("the counts are %+v", s)
	}
}
