package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/test/lab"
)

// A server is one process of a store, which may be down.
type server struct {
	kind string // such as "etcd": what servers of a kind take is added up
	args []string
	log  string

	metrics *http.Request                                // its counters, which are there while it runs; nil: not counted
	client  *http.Client                                 // for metrics
	field   func(total *traffic, metric string) *float64 // what a line of the metrics counts as; nil: nothing

	cmd    *exec.Cmd
	done   chan struct{}
	cpu    time.Duration // of the processes that have ended
	starts atomic.Int64

	before traffic // what the counters were when they were read last, and of which process
	of     int64
}

func (s *server) start() error {
	if s.cmd != nil {
		return nil
	}
	log, err := os.OpenFile(s.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(s.args[0], s.args[1:]...)
	cmd.Dir = filepath.Dir(s.log)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	if err := cmd.Start(); err != nil {
		return err
	}
	done := make(chan struct{})
	go func() {
		cmd.Wait()
		close(done)
	}()
	s.cmd, s.done = cmd, done
	s.starts.Add(1)
	return nil
}

// kill ends a server as a crash would.
func (s *server) kill() {
	if s.cmd == nil {
		return
	}
	s.cmd.Process.Kill() // fails only when it has ended
	<-s.done
	s.cpu += s.cmd.ProcessState.UserTime() + s.cmd.ProcessState.SystemTime()
	s.cmd = nil
}

// A usage is what servers of a kind take.
type usage struct {
	cpu      time.Duration // so far
	resident int           // bytes, now
}

// usages returns what servers take, by kind.
func usages(servers []*server) (map[string]usage, error) {
	all := map[string]usage{}
	for _, s := range servers {
		u := all[s.kind]
		u.cpu += s.cpu
		if s.cmd != nil {
			cpu, err := lab.CPU(s.cmd.Process.Pid)
			if err != nil {
				return nil, err
			}
			text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", s.cmd.Process.Pid))
			if err != nil {
				return nil, err
			}
			var size, pages int
			if _, err := fmt.Sscan(string(text), &size, &pages); err != nil {
				return nil, err
			}
			u.cpu, u.resident = u.cpu+cpu, u.resident+pages*os.Getpagesize()
		}
		all[s.kind] = u
	}
	return all, nil
}

// more returns what the server's counters have grown by since the last call.
func (s *server) more(ctx context.Context) (t traffic, err error) {
	if s.metrics == nil {
		return t, nil
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	process := s.starts.Load()
	answer, err := s.client.Do(s.metrics.Clone(ctx))
	if err != nil {
		return t, err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return t, fmt.Errorf("%s: %s", s.metrics.URL, answer.Status)
	}
	lines := bufio.NewScanner(io.LimitReader(answer.Body, 32<<20))
	for lines.Scan() {
		line := lines.Text()
		field := s.field(&t, line)
		if field == nil {
			continue
		}
		var value float64
		if _, err := fmt.Sscan(line[strings.LastIndexByte(line, ' ')+1:], &value); err != nil {
			return t, err
		}
		*field += value
	}
	if err := lines.Err(); err != nil {
		return t, err
	}
	if process != s.starts.Load() {
		return traffic{}, fmt.Errorf("%s has started again", s.kind)
	}
	if process != s.of {
		s.before, s.of = traffic{}, process
	}
	now := t
	t.sub(s.before)
	s.before = now
	return t, nil
}
