package ipsec

import (
	"cmp"
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
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/pkg/proc"
	"github.com/flanneld/flanneld/subnet"
)

// cleanup finds the charon that flanneld has started, or else what flanneld has loaded into another charon. It also
// finds the security associations, which remain when charon is killed. Policies are among the kernel's objects.
func cleanup(ctx context.Context, _ *subnet.Config, env subnet.Env) (backend.Cleanup, error) {
	c, err := cleanupCharon(ctx)
	if err != nil {
		return c, err
	}
	steps, err := associationSteps(env.Networks.Each())
	c.Steps = append(c.Steps, steps...)
	return c, err
}

// associationSteps returns the steps that delete the security associations of flanneld's policies.
func associationSteps(networks []netip.Prefix) (steps []backend.CleanupStep, err error) {
	states, err := associations(networks)
	for _, s := range states {
		steps = append(steps, backend.CleanupStep{
			Command: fmt.Sprintf("ip xfrm state delete src %s dst %s proto esp spi %#x", s.Src, s.Dst, uint32(s.Spi)),
			Do:      func(context.Context) error { return deleteAssociations(networks) },
		})
	}
	return steps, err
}

// deleteAssociations deletes the associations that there are now: charon may have
// agreed on others since the steps were shown.
func deleteAssociations(networks []netip.Prefix) error {
	states, err := associations(networks)
	errs := []error{err}
	for _, s := range states {
		if err := netlink.XfrmStateDel(&s); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("the security association from %s to %s: %w", s.Src, s.Dst, err))
		}
	}
	return errors.Join(errs...)
}

// associations returns the security associations of tunnels with flanneld's policies: the policies with PolicyID
// between subnets of the networks.
func associations(networks []netip.Prefix) ([]netlink.XfrmState, error) {
	inside := func(n *net.IPNet) bool {
		if n == nil {
			return false
		}
		ip, _ := netip.AddrFromSlice(n.IP)
		return slices.ContainsFunc(networks, func(n netip.Prefix) bool { return n.Contains(ip.Unmap()) })
	}
	policies, err := netlink.XfrmPolicyList(netlink.FAMILY_ALL)
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
		return nil, nil // this kernel has no IPsec
	}
	if err != nil {
		return nil, fmt.Errorf("reading IPsec policies: %w", err)
	}
	ends := map[[2]string]bool{}
	for _, p := range policies {
		for _, t := range p.Tmpls {
			if t.Reqid == kernel.PolicyID && inside(p.Src) && inside(p.Dst) {
				ends[[2]string{t.Src.String(), t.Dst.String()}] = true
			}
		}
	}
	if len(ends) == 0 {
		return nil, nil
	}
	states, err := netlink.XfrmStateList(netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("reading security associations: %w", err)
	}
	states = slices.DeleteFunc(states, func(s netlink.XfrmState) bool {
		return s.Proto != netlink.XFRM_PROTO_ESP || s.Mode != netlink.XFRM_MODE_TUNNEL || s.Reqid != kernel.PolicyID ||
			!ends[[2]string{s.Src.String(), s.Dst.String()}]
	})
	slices.SortFunc(states, func(a, b netlink.XfrmState) int { return cmp.Compare(uint32(a.Spi), uint32(b.Spi)) })
	return states, nil
}

func cleanupCharon(ctx context.Context) (backend.Cleanup, error) {
	var c backend.Cleanup
	for _, pid := range started() {
		c.Steps = append(c.Steps, backend.CleanupStep{
			Command: fmt.Sprintf("kill %d    # charon", pid),
			Do:      func(context.Context) error { return end(pid) },
		})
	}
	if len(c.Steps) > 0 || dead() {
		c.Files = []string{strings.TrimSuffix(charonSocket, "vici") + "*"} // charon leaves its sockets
		return c, nil
	}
	names, keys, err := loaded(ctx)
	if err != nil {
		c.Notes = append(c.Notes,
			fmt.Sprintf("the connections in charon, which does not answer (%s): swanctl --load-all --clear",
				plain.Text(err.Error())))
	}
	if len(names)+len(keys) > 0 {
		commands := []string{"swanctl --load-all --clear"} // unloads everything that is not in the files of swanctl
		for _, name := range names {
			commands = append(commands, "swanctl --terminate --force --ike "+plain.Shell(name))
		}
		c.Steps = []backend.CleanupStep{{
			Command: strings.Join(commands, "\n"),
			Do:      func(ctx context.Context) error { return unload(ctx, names, keys) },
		}}
	}
	return c, nil
}

// dead reports whether there was a charon that has ended.
func dead() bool {
	c, err := net.Dial("unix", charonSocket)
	if err == nil {
		c.Close()
	}
	return errors.Is(err, unix.ECONNREFUSED)
}

// started returns the processes of charon in this network namespace that flanneld has started.
func started() []int {
	return slices.DeleteFunc(proc.Find("charon"), func(pid int) bool {
		variables, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		return !slices.Contains(strings.Split(string(variables), "\x00"), mark)
	})
}

// end ends a process that is not a child of this process.
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
			return nil // the process has ended
		}
		// A pidfd can be read from when the process has ended (pidfd_open(2)).
		if n, _ := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}},
			int(stopTimeout.Milliseconds())); n > 0 {
			return nil
		}
	}
	return fmt.Errorf("charon, process %d, does not end", pid)
}

// loaded returns the connections and keys of flanneld in a running charon; none, if no charon is running.
func loaded(ctx context.Context) (names, keys []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
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
			if ip, err := netip.ParseAddr(ip); err == nil && ip.Zone() == "" {
				keys = append(keys, id)
			}
		}
	}
	return names, keys, nil
}

// isTunnel reports whether a connection has the name of a tunnel.
func isTunnel(name string) bool {
	parts := strings.Split(name, "-")
	if len(parts) != 4 {
		return false
	}
	for i, part := range parts {
		var err error
		if i == 0 || i == 3 {
			var ip netip.Addr
			if ip, err = netip.ParseAddr(part); ip.Zone() != "" { // which may be any text
				return false
			}
		} else {
			_, err = netip.ParsePrefix(part)
		}
		if err != nil {
			return false
		}
	}
	return true
}

// unload has a running charon unload connections and keys, and end the tunnels.
func unload(ctx context.Context, names, keys []string) error {
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
		_, _ = c.call(ctx, "terminate", map[string]string{"ike": name, "force": "yes"}) // the tunnel may not exist
	}
	for _, id := range keys {
		_, err := c.call(ctx, "unload-shared", map[string]string{"id": id})
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
