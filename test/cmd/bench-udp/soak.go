package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/flanneld/flanneld/test/lab"
)

// soak loads a track for long, and prints every now and then what memory the
// daemons have by then. profile, if not empty, is where what they do meanwhile
// goes.
func (t *track) soak(ctx context.Context, long time.Duration, profile string) error {
	const times = 20
	fmt.Printf("%s, at full load for %v: resident memory of the daemons\n", t.name, long)
	done := make(chan error, 1)
	began := time.Now()
	go func() {
		r, err := t.iperf(ctx, "--time", fmt.Sprint(int(long.Seconds())), "--parallel", "4", "--bidir")
		fmt.Printf("%.3g Gbit/s one way\n", r.End.Received.BitsPerSecond/1e9)
		done <- err
	}()
	profiled := make(chan error, len(t.Nodes()))
	for _, n := range t.Nodes() {
		if profile != "" {
			go func() { profiled <- record(ctx, n, long, profile+"."+n.Hostname) }()
		} else {
			profiled <- nil
		}
	}
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
			return errors.Join(err, <-profiled, <-profiled)
		}
	}
}

// record writes a CPU profile of a node's daemon.
func record(ctx context.Context, n *lab.Node, long time.Duration, file string) error {
	client := &http.Client{Transport: &http.Transport{DialContext: n.Dial}}
	url := fmt.Sprintf("http://%s/debug/pprof/profile?seconds=%d", n.Health(), int(long.Seconds()))
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	answer, err := client.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	profile, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", url, answer.Status, profile)
	}
	if err != nil {
		return err
	}
	return os.WriteFile(file, profile, 0o644)
}

// memory returns what each node's daemon has.
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
