package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"github.com/flanneld/flanneld/test/lab"
)

// members is how many members the store has.
const members = 3

// A store is a cluster of etcd on loopback addresses, and a client.
type store struct {
	*clientv3.Client
	dir     string
	members [members]*member
}

// A member is one process of etcd, which may be down.
type member struct {
	args []string
	log  string
	url  string // for clients
	cmd  *exec.Cmd
	done chan struct{}
	cpu  time.Duration // of the processes that have ended
}

// startStore starts etcd with no data, in an empty directory.
func startStore(ctx context.Context, program, dir string) (*store, error) {
	s := &store{dir: dir}
	var initial, endpoints []string
	for i := range members {
		initial = append(initial, fmt.Sprintf("m%d=http://127.0.0.1:%d", i, peerPort(i)))
	}
	for i := range members {
		m := &member{
			log: filepath.Join(dir, fmt.Sprintf("m%d.log", i)), url: fmt.Sprintf("http://127.0.0.1:%d", clientPort(i)),
		}
		m.args = []string{
			program, "--name", fmt.Sprintf("m%d", i), "--data-dir", filepath.Join(dir, fmt.Sprintf("m%d", i)),
			"--listen-client-urls", fmt.Sprintf("http://0.0.0.0:%d", clientPort(i)), "--advertise-client-urls", m.url,
			"--listen-peer-urls", fmt.Sprintf("http://127.0.0.1:%d", peerPort(i)),
			"--initial-advertise-peer-urls", fmt.Sprintf("http://127.0.0.1:%d", peerPort(i)),
			"--initial-cluster", strings.Join(initial, ","), "--log-level", "error",
			"--unsafe-no-fsync", // the three members share one disk, which real ones do not
		}
		s.members[i], endpoints = m, append(endpoints, m.url)
		if err := m.start(); err != nil {
			return s, err
		}
	}
	var err error
	s.Client, err = clientv3.New(clientv3.Config{
		Endpoints: endpoints, Logger: zap.NewNop(), DialOptions: []grpc.DialOption{grpc.WithConnectParams(
			grpc.ConnectParams{Backoff: backoff.Config{
				BaseDelay: 50 * time.Millisecond, Multiplier: 1.5, MaxDelay: 500 * time.Millisecond,
			}, MinConnectTimeout: time.Second})},
	})
	if err != nil {
		return s, err
	}
	return s, s.awaitAnswer(ctx)
}

func clientPort(member int) int { return 2379 + 1000*member }
func peerPort(member int) int   { return 2380 + 1000*member }

// awaitAnswer waits until the store answers.
func (s *store) awaitAnswer(ctx context.Context) error {
	return lab.Poll(ctx, "etcd to answer", func() error {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		_, err := s.Get(ctx, lab.Prefix)
		return err
	})
}

func (s *store) close() {
	if s.Client != nil {
		s.Client.Close()
	}
	for _, m := range s.members {
		if m != nil {
			m.kill()
		}
	}
	os.RemoveAll(s.dir)
}

func (m *member) start() error {
	if m.cmd != nil {
		return nil
	}
	log, err := os.OpenFile(m.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(m.args[0], m.args[1:]...)
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
	m.cmd, m.done = cmd, done
	return nil
}

// kill ends a member as a crash would.
func (m *member) kill() {
	if m.cmd == nil {
		return
	}
	m.cmd.Process.Kill() // fails only when it has ended
	<-m.done
	m.cpu += m.cmd.ProcessState.UserTime() + m.cmd.ProcessState.SystemTime()
	m.cmd = nil
}

// leader returns the member that leads.
func (s *store) leader(ctx context.Context) (*member, error) {
	for _, m := range s.members {
		status, err := s.Status(ctx, m.url)
		if err != nil {
			return nil, err
		}
		if status.Leader == status.Header.MemberId {
			return m, nil
		}
	}
	return nil, errors.New("etcd has no leader")
}

// followers returns the other members.
func (s *store) followers(ctx context.Context) ([]*member, error) {
	leader, err := s.leader(ctx)
	return slices.DeleteFunc(slices.Clone(s.members[:]), func(m *member) bool { return m == leader }), err
}

// usage returns the CPU time that all members have taken, and the memory that they have now, in bytes.
func (s *store) usage() (cpu time.Duration, resident int, err error) {
	for _, m := range s.members {
		cpu += m.cpu
		if m.cmd == nil {
			continue
		}
		used, err := lab.CPU(m.cmd.Process.Pid)
		if err != nil {
			return 0, 0, err
		}
		cpu += used
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", m.cmd.Process.Pid))
		if err != nil {
			return 0, 0, err
		}
		var size, pages int
		if _, err := fmt.Sscan(string(text), &size, &pages); err != nil {
			return 0, 0, err
		}
		resident += pages * os.Getpagesize()
	}
	return cpu, resident, nil
}

// A traffic is what a member, or all of them, had to do for clients.
type traffic struct {
	requests float64 // a watch that begins is one, and so is each renewal of an etcd lease
	messages float64 // to clients' watches
	events   float64 // that were sent to watches
	in, out  float64 // bytes
}

// fields says which counters of etcd are counted as what.
func (t *traffic) fields(line string) *float64 {
	switch watch := strings.Contains(line, `grpc_method="Watch"`); {
	case strings.HasPrefix(line, "grpc_server_started_total{") && !watch,
		strings.HasPrefix(line, "grpc_server_msg_received_total{") && watch:
		return &t.requests
	case strings.HasPrefix(line, "grpc_server_msg_sent_total{") && watch:
		return &t.messages
	case strings.HasPrefix(line, "etcd_debugging_mvcc_events_total "):
		return &t.events
	case strings.HasPrefix(line, "etcd_network_client_grpc_received_bytes_total "):
		return &t.in
	case strings.HasPrefix(line, "etcd_network_client_grpc_sent_bytes_total "):
		return &t.out
	}
	return nil
}

// each calls f for each counter of t and of o.
func (t *traffic) each(o traffic, f func(mine *float64, other float64)) {
	f(&t.requests, o.requests)
	f(&t.messages, o.messages)
	f(&t.events, o.events)
	f(&t.in, o.in)
	f(&t.out, o.out)
}

func (t *traffic) add(o traffic) { t.each(o, func(mine *float64, other float64) { *mine += other }) }
func (t *traffic) sub(o traffic) { t.each(o, func(mine *float64, other float64) { *mine -= other }) }

// since turns t, counted by a member that may have been started again after before was counted, into what is new.
func (t *traffic) since(before traffic) {
	t.each(before, func(mine *float64, other float64) {
		if *mine >= other {
			*mine -= other
		}
	})
}

// traffic reads a member's counters.
func (m *member) traffic(ctx context.Context) (t traffic, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, m.url+"/metrics", nil)
	if err != nil {
		return t, err
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return t, err
	}
	defer answer.Body.Close()
	lines := bufio.NewScanner(io.LimitReader(answer.Body, 8<<20))
	for lines.Scan() {
		field := t.fields(lines.Text())
		if field == nil {
			continue
		}
		var value float64
		if _, err := fmt.Sscan(lines.Text()[strings.LastIndexByte(lines.Text(), ' ')+1:], &value); err != nil {
			return t, err
		}
		*field += value
	}
	return t, lines.Err()
}
