package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"github.com/flanneld/flanneld/subnet"
)

// Where etcd is, as nodes see it, and the daemon's default prefix.
const (
	Endpoint   = "http://198.18.0.254:2379"
	EndpointV6 = "http://[fd18::fe]:2379"
	Prefix     = "/coreos.com/network"
)

// Etcd is the lab's etcd, one member with its data on disk, and a client whose connection does not depend on the
// underlay. The program may be kine, which knows only the requests that kube-apiserver makes: Put, Get and Compact.
type Etcd struct {
	Client *clientv3.Client

	lab  *Lab
	proc *Process
}

func newEtcd(ctx context.Context, l *Lab) (*Etcd, error) {
	e := &Etcd{lab: l}
	// A test starts etcd again at any time: do not wait long between attempts.
	quick := backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond}
	var err error
	e.Client, err = clientv3.New(clientv3.Config{
		Endpoints: []string{Endpoint},
		Logger:    zap.NewNop(),
		DialOptions: []grpc.DialOption{
			grpc.WithConnectParams(grpc.ConnectParams{Backoff: quick, MinConnectTimeout: time.Second}),
			grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
				return l.net.Dial(ctx, "tcp", address)
			}),
		},
	})
	if err != nil {
		return nil, fmt.Errorf("etcd client: %w", err)
	}
	return e, e.Start(ctx)
}

// Start starts etcd on the data it had, if any, and returns when it answers.
func (e *Etcd) Start(ctx context.Context) error {
	program, err := e.lab.Program(e.lab.options.Store)
	if err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(e.lab.Dir, "etcd.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	args := []string{
		"--data-dir=" + filepath.Join(e.lab.Dir, "etcd"),
		"--listen-client-urls=http://[::]:2379",
		"--advertise-client-urls=" + Endpoint,
		"--listen-peer-urls=http://127.0.0.1:2380",
		"--unsafe-no-fsync", // the machine does not crash, only etcd
	}
	if filepath.Base(program) == "kine" {
		args = []string{
			"--listen-address=http://0.0.0.0:2379", "--metrics-bind-address=0",
			"--endpoint=sqlite://" + filepath.Join(e.lab.Dir, "kine.db") + "?_journal=WAL&cache=shared&_busy_timeout=30000",
			"--compact-min-retain=0", // Compact is for all that there is
		}
	}
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = log, log
	if e.proc, err = e.lab.net.Launch(cmd); err != nil {
		return err
	}
	return Poll(ctx, "etcd", func() error {
		if e.proc.Exited() {
			return fmt.Errorf("it has exited: %w\n%s", e.proc.err, tail(log.Name()))
		}
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		_, err := e.Client.Get(ctx, Prefix)
		return err
	})
}

// Stop ends etcd in good order.
func (e *Etcd) Stop(ctx context.Context) error { return e.proc.Stop(ctx) }

// Kill ends etcd as a crash would.
func (e *Etcd) Kill() { e.proc.Kill() }

// Slow has etcd run for a tenth of the time only, until the function that it returns is called.
func (e *Etcd) Slow() (restore func()) {
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for on := false; ; on = !on {
			signal, wait := unix.SIGSTOP, 450*time.Millisecond
			if on {
				signal, wait = unix.SIGCONT, 50*time.Millisecond
			}
			e.proc.cmd.Process.Signal(signal)
			select {
			case <-time.After(wait):
			case <-stop:
				e.proc.cmd.Process.Signal(unix.SIGCONT)
				return
			}
		}
	}()
	return func() {
		close(stop)
		<-done
	}
}

// Cut drops the nodes' packets to etcd, those of open connections included. The lab's own client is not affected.
func (e *Etcd) Cut(ctx context.Context) error {
	_, err := e.lab.net.run(ctx, `
		add table inet cut
		add chain inet cut in { type filter hook input priority 0; }
		add rule inet cut in iifname != "lo" tcp dport 2379 drop`, "nft", "-f", "-")
	return err
}

// Restore ends a Cut.
func (e *Etcd) Restore(ctx context.Context) error {
	_, err := e.lab.net.Run(ctx, "nft delete table inet cut")
	return err
}

// Put writes a key.
func (e *Etcd) Put(ctx context.Context, key, value string) error {
	_, err := e.Client.Put(ctx, key, value)
	return err
}

// Get reads a key; "" where there is none.
func (e *Etcd) Get(ctx context.Context, key string) (string, error) {
	r, err := e.Client.Get(ctx, key)
	if err != nil || len(r.Kvs) == 0 {
		return "", err
	}
	return string(r.Kvs[0].Value), nil
}

// Delete deletes a key. A key that does not exist is an error.
func (e *Etcd) Delete(ctx context.Context, key string) error {
	r, err := e.Client.Delete(ctx, key)
	if err == nil && r.Deleted == 0 {
		err = fmt.Errorf("no such key: %s", key)
	}
	return err
}

// List reads all keys that start with prefix.
func (e *Etcd) List(ctx context.Context, prefix string) (map[string]string, error) {
	r, err := e.Client.Get(ctx, prefix, clientv3.WithPrefix())
	if err != nil {
		return nil, err
	}
	all := map[string]string{}
	for _, kv := range r.Kvs {
		all[string(kv.Key)] = string(kv.Value)
	}
	return all, nil
}

// Compact removes the history of all keys: a watch that was behind cannot continue.
func (e *Etcd) Compact(ctx context.Context) error {
	r, err := e.Client.Get(ctx, Prefix)
	if err == nil {
		_, err = e.Client.Compact(ctx, r.Header.Revision, clientv3.WithCompactPhysical())
	}
	return err
}

// Configure writes the network configuration, JSON.
func (e *Etcd) Configure(ctx context.Context, config string) error {
	return e.Put(ctx, Prefix+"/config", config)
}

// Leases reads the nodes' leases, by etcd key.
func (e *Etcd) Leases(ctx context.Context) (map[string]subnet.Lease, error) {
	const dir = Prefix + "/subnets/"
	records, err := e.List(ctx, dir)
	if err != nil {
		return nil, err
	}
	leases := map[string]subnet.Lease{}
	for key, value := range records {
		var l subnet.Lease
		if l.Subnets, err = subnet.ParseKey(strings.TrimPrefix(key, dir)); err == nil {
			err = json.Unmarshal([]byte(value), &l.Attrs)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", key, err)
		}
		leases[key] = l
	}
	return leases, nil
}
