package main

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/flanneld/flanneld/test/lab"
)

// steps are the messages in the daemon's log that end the parts of a start, and the names of the parts.
var steps = [...]struct{ message, part string }{
	{"flanneld starts", "the process starts"},
	{"Network configuration read", "configuration"},
	{"Subnet leased", "lease"},
	{"Ready", "kernel, rules, file"},
}

// A readiness is what a start took until the node was ready: all of it, and each part.
type readiness struct {
	took, cpu time.Duration
	parts     [len(steps)]time.Duration
	forks     int // the programs that the daemon has run, and one by which Go finds out what the kernel can do
	memory
}

// ready has the daemon start without peers and with rules to set, on a node that has just booted, and prints what takes
// how long until the node is ready.
func (b *bench) ready(ctx context.Context) error {
	heads := []string{fmt.Sprintf("\nUntil a node without peers is ready, with --ip-masq, median of %d", b.starts), "all"}
	for _, s := range steps {
		heads = append(heads, s.part)
	}
	w := newTable(append(heads, "CPU", "processes", "RSS", "no file's")...)
	for _, nftables := range []bool{false, true} {
		var runs []readiness
		for range b.starts {
			if err := b.empty(ctx, vxlan, nftables); err != nil {
				return err
			}
			if err := b.boot(ctx, vxlan); err != nil {
				return err
			}
			r, err := b.startUntilReady(ctx)
			if err != nil {
				return fmt.Errorf("until ready: %w", b.explain(err))
			}
			runs = append(runs, r)
		}
		ms := func(of func(readiness) time.Duration) string {
			return fmt.Sprintf("%.1f ms", float64(median(runs, of).Microseconds())/1000)
		}
		columns := []string{map[bool]string{false: "iptables", true: "nftables"}[nftables],
			ms(func(r readiness) time.Duration { return r.took })}
		for i := range steps {
			columns = append(columns, ms(func(r readiness) time.Duration { return r.parts[i] }))
		}
		columns = append(columns, ms(func(r readiness) time.Duration { return r.cpu }),
			fmt.Sprint(median(runs, func(r readiness) int { return r.forks })),
			mib(median(runs, func(r readiness) int { return r.resident })),
			mib(median(runs, func(r readiness) int { return r.anonymous })))
		fmt.Fprintln(w, strings.Join(columns, "\t")+"\t")
	}
	return w.Flush()
}

// startUntilReady starts the daemon, waits until it is ready, and ends it.
func (b *bench) startUntilReady(ctx context.Context) (r readiness, err error) {
	for _, file := range []string{b.log(), b.node.SubnetFile()} {
		if err := os.RemoveAll(file); err != nil {
			return r, err
		}
	}
	d, err := b.start("--ip-masq")
	if err != nil {
		return r, err
	}
	defer d.Kill()
	forks, err := countForks(d.pid)
	if err != nil {
		return r, err
	}
	defer forks.Close()
	var log string
	err = lab.Poll(ctx, "the daemon to be ready", func() error {
		text, err := os.ReadFile(b.log())
		if log = string(text); err == nil && !strings.Contains(log, `] "Ready"`) {
			err = fmt.Errorf("the log does not say so")
		}
		return err
	})
	if err != nil {
		return r, err
	}
	if r.cpu, err = lab.CPU(d.pid); err != nil {
		return r, err
	}
	if r.forks, err = forks.soFar(); err != nil {
		return r, err
	}
	if r.memory, err = memoryOf(d.pid); err != nil {
		return r, err
	}
	before := d.began
	for i, s := range steps {
		at, err := logged(log, s.message, d.began)
		if err != nil {
			return r, err
		}
		r.parts[i], before = at.Sub(before), at
	}
	r.took = before.Sub(d.began)
	return r, nil
}

// logged returns when a message was logged, on the day of another time or on the next.
func logged(log, message string, after time.Time) (time.Time, error) {
	line := regexp.MustCompile(`(?m)^I\d{4} (\S+) .*\] "` + regexp.QuoteMeta(message) + `"`).FindStringSubmatch(log)
	if line == nil {
		return time.Time{}, fmt.Errorf("the log has no %q", message)
	}
	at, err := time.ParseInLocation(time.DateOnly+" 15:04:05.000000", after.Format(time.DateOnly)+" "+line[1], time.Local)
	if err == nil && at.Before(after) {
		at = at.AddDate(0, 0, 1)
	}
	return at, err
}
