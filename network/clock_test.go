package network

import (
	"testing"
	"time"
	"unsafe"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/flanneld/flanneld/subnet"
)

// taken returns a moment as this process has taken it before the host's clock was set. There is no other way to have
// such a moment but to set the clock.
func taken(at time.Time, set time.Duration) time.Time {
	const secondsFrom = 30 // the lowest bits of a moment's first word are the nanoseconds of the wall clock
	*(*uint64)(unsafe.Pointer(&at)) -= uint64(set/time.Second) << secondsFrom
	return at
}

// A host that has booted with a wrong clock, which has been set since, shows when the lease ends by the clock that it
// has now.
func TestClockThatWasSet(t *testing.T) {
	for _, set := range []time.Duration{0, -time.Hour, time.Hour, -365 * 24 * time.Hour, 10 * 365 * 24 * time.Hour} {
		now := time.Now()
		ends := now.Add(time.Hour)
		before := taken(ends, set)
		if off := ends.Round(0).Sub(before.Round(0)); off != set || before.Sub(now) != time.Hour {
			t.Fatalf("a moment before the clock was set by %v: %v, which is %v off, and %v from now", set, before, off, before.Sub(now))
		}
		m := newManager("")
		m.expires = before
		registry := prometheus.NewRegistry()
		registry.MustRegister(newMetrics(m, ""))
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if got := f.Metric[0].GetGauge().GetValue(); f.GetName() == "flannel_lease_expiry_timestamp_seconds" &&
				(got < float64(ends.Unix()-2) || got > float64(ends.Unix()+2)) {
				t.Errorf("the metric of a lease that ends at %d is %.0f", ends.Unix(), got)
			}
		}
		own := subnet.Lease{}
		v := view{Options: Options{Manager: m}, state: &state{own: &own}, started: taken(now, set)}
		for what, got := range map[string][2]time.Time{"end": {v.leaseStatus(own).Expires, ends}, "start": {v.status().Started, now}} {
			if off := got[0].Round(0).Sub(got[1].Round(0)); off.Abs() > 2*time.Second {
				t.Errorf("after the clock was set by %v, the %s is %v off", set, what, off)
			}
		}
	}
	for _, at := range []time.Time{{}, time.Unix(2e9, 0)} { // not taken from this process's clock
		if got := byClock(at); got != at {
			t.Errorf("%v is shown as %v", at, got)
		}
	}
}
