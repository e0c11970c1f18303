package ipsec

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/strongswan/govici/vici"
	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/proc"
	"github.com/flanneld/flanneld/subnet"
)

// leftovers finds the charon that flanneld has started, or else what it has told
// another one. Policies are the kernel's to show, and associations go with charon.
func leftovers(ctx context.Context, _ *subnet.Config, _ subnet.Subnets) (backend.Leftovers, error) {
	var l backend.Leftovers
	for _, pid := range started() {
		l.Undo = append(l.Undo, backend.Undo{
			Command: fmt.Sprintf("kill %d    # charon", pid),
			Do:      func(context.Context) error { return end(pid) },
		})
	}
	if len(l.Undo) > 0 || dead() {
		l.Files = []string{strings.TrimSuffix(charonSocket, "vici") + "*"} // it leaves its sockets
		return l, nil
	}
	names, keys, err := loaded(ctx)
	if err != nil {
		l.Notes = append(l.Notes, fmt.Sprintf("what charon has been told, which does not answer (%v): swanctl --load-all --clear", err))
	}
	if len(names)+len(keys) > 0 {
		commands := []string{"swanctl --load-all --clear"} // forgets what is not in its files
		for _, name := range names {
			commands = append(commands, "swanctl --terminate --force --ike "+name)
		}
		l.Undo = []backend.Undo{{
			Command: strings.Join(commands, "\n"),
			Do:      func(ctx context.Context) error { return forget(ctx, names, keys) },
		}}
	}
	return l, nil
}

// dead tells whether there was a charon, and nobody listens any more.
func dead() bool {
	c, err := net.Dial("unix", charonSocket)
	if err == nil {
		c.Close()
	}
	return errors.Is(err, unix.ECONNREFUSED)
}

// started returns the processes of charon in this network that flanneld has
// started.
func started() []int {
	return slices.DeleteFunc(proc.Find("charon"), func(pid int) bool {
		variables, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		return !slices.Contains(strings.Split(string(variables), "\x00"), mark)
	})
}

// end ends a process that is nobody's child here.
func end(pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	for _, signal := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		if err := unix.PidfdSendSignal(fd, signal, nil, 0); err != nil {
			return nil // it has ended
		}
		// A pidfd can be read from when the process has ended (pidfd_open(2)).
		if n, _ := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(charonEnds.Milliseconds())); n > 0 {
			return nil
		}
	}
	return fmt.Errorf("charon, process %d, does not end", pid)
}

// loaded returns the connections and keys of ours that a running charon has; none
// where there is no charon.
func loaded(ctx context.Context) (names, keys []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, charonAnswers)
	defer cancel()
	s, err := vici.NewSession(vici.WithAddr("unix", charonSocket))
	if err != nil {
		return nil, nil, nil
	}
	defer s.Close()
	c := client{s}
	all, err := c.connections(ctx)
	if err != nil {
		return nil, nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if isTunnel(name) {
			names = append(names, name)
		}
	}
	answer, err := c.call(ctx, "get-shared", map[string]string{})
	if err != nil {
		return nil, nil, err
	}
	ids, _ := answer.Get("keys").([]string)
	for _, id := range ids {
		if ip, ok := strings.CutPrefix(id, keyPrefix); ok {
			if _, err := netip.ParseAddr(ip); err == nil {
				keys = append(keys, id)
			}
		}
	}
	return names, keys, nil
}

// isTunnel tells whether a connection's name is one that a tunnel has.
func isTunnel(name string) bool {
	parts := strings.Split(name, "-")
	if len(parts) != 4 {
		return false
	}
	for i, part := range parts {
		var err error
		if i == 0 || i == 3 {
			_, err = netip.ParseAddr(part)
		} else {
			_, err = netip.ParsePrefix(part)
		}
		if err != nil {
			return false
		}
	}
	return true
}

// forget has a running charon forget these, and end the tunnels.
func forget(ctx context.Context, names, keys []string) error {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	s, err := vici.NewSession(vici.WithAddr("unix", charonSocket))
	if err != nil {
		return fmt.Errorf("charon: %w", err)
	}
	defer s.Close()
	c := client{s}
	var errs []error
	for _, name := range names {
		_, err := c.call(ctx, "unload-conn", map[string]string{"name": name})
		errs = append(errs, err)
	}
	for _, name := range names {
		_, _ = c.call(ctx, "terminate", map[string]string{"ike": name, "force": "yes"}) // there may be none
	}
	for _, id := range keys {
		_, err := c.call(ctx, "unload-shared", map[string]string{"id": id})
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
