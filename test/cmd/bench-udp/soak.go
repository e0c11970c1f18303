package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// soak loads a track for long, and prints every now and then what memory the
// daemons have by then.
func (t *track) soak(ctx context.Context, long time.Duration) error {
	const times = 20
	fmt.Printf("%s, at full load for %v: resident memory of the daemons\n", t.name, long)
	done := make(chan error, 1)
	began := time.Now()
	go func() {
		r, err := t.iperf(ctx, "--time", fmt.Sprint(int(long.Seconds())), "--parallel", "4", "--bidir")
		fmt.Printf("%.3g Gbit/s one way\n", r.End.Received.BitsPerSecond/1e9)
		done <- err
	}()
	tick := time.NewTicker(long / times)
	defer tick.Stop()
	for {
		memory, err := t.memory()
		if err != nil {
			return err
		}
		fmt.Printf("%6v  %s\n", time.Since(began).Round(time.Second), strings.Join(memory, "  "))
		select {
		case <-tick.C:
		case err := <-done:
			return err
		}
	}
}

// memory tells what each node's daemon has.
func (t *track) memory() ([]string, error) {
	var all []string
	status, err := filepath.Glob("/proc/[0-9]*/status")
	if err != nil {
		return nil, err
	}
	for _, n := range t.Nodes() {
		found := false
		for _, file := range status {
			arguments, err := os.ReadFile(filepath.Join(filepath.Dir(file), "cmdline"))
			if err != nil || !strings.Contains(string(arguments), "--subnet-file="+n.SubnetFile()+"\x00") {
				continue
			}
			text, err := os.ReadFile(file)
			if err != nil {
				return nil, err
			}
			for _, line := range strings.Split(string(text), "\n") {
				if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
					all, found = append(all, strings.TrimSpace(rest)), true
				}
			}
		}
		if !found {
			return nil, errors.New("there is no daemon on " + n.Hostname)
		}
	}
	return all, nil
}
