package probe

import (
	"context"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/flanneld/flanneld/pkg/nstest"
)

// BenchmarkIdle reports the share of a core that probing a hundred peers takes, which all reply, at the default interval.
func BenchmarkIdle(b *testing.B) {
	nstest.New(b)
	p := New(DefaultInterval, Observers{})
	for i := range 100 {
		a := netip.AddrFrom4([4]byte{127, 0, 1, byte(i + 1)})
		p.Set(a.String(), Path{Overlay: a, Source: a, Public: netip.AddrFrom4([4]byte{127, 0, 2, byte(i + 1)})})
	}
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	done := make(chan error)
	started := make(chan struct{})
	go func() {
		close(started)
		done <- p.Run(ctx)
	}()
	<-started
	cpu := func() time.Duration {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	for p.Count()[Reachable] < 100 {
		time.Sleep(100 * time.Millisecond)
	}
	for b.Loop() {
		before, at := cpu(), time.Now()
		time.Sleep(DefaultInterval)
		b.ReportMetric(100*(cpu()-before).Seconds()/time.Since(at).Seconds(), "%core")
	}
}
