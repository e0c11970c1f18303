package wireguard

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/subnet"
)

var checks = []backend.Check{
	{
		Name:  "no-tunnel",
		About: "WireGuard has had a handshake with each peer that packets were sent to",
		Run:   checkHandshakes,
	},
}

// checkHandshakes finds peers to which packets were sent and which have never answered.
func checkHandshakes(_ context.Context, n backend.Node) []backend.Problem {
	c, err := wgctrl.New()
	if err != nil {
		return nil
	}
	defer c.Close()
	var found []backend.Problem
	for _, name := range n.Devices {
		d, err := c.Device(name)
		if err != nil {
			continue // the device is missing, or cannot be read
		}
		for _, peer := range d.Peers {
			if !peer.LastHandshakeTime.IsZero() || peer.TransmitBytes == 0 {
				continue
			}
			holder := peer.PublicKey.String()
			for _, l := range n.Peers {
				if slices.Contains(published(l), peer.PublicKey) {
					holder = l.Subnets.String()
				}
			}
			found = append(found, backend.Problem{
				Text: fmt.Sprintf("%s has had no handshake with %s at %v", name, holder, peer.Endpoint),
				Fix: []string{"flannelctl doctor    # on that node; with NAT, the log of flanneld says what to do",
					"wg show " + plain.Shell(name)},
			})
		}
	}
	return found
}

// Sessions implements backend.SessionReporter: it returns the time of the last handshake, of two devices the earlier one.
func (w *wireguard) Sessions(_ context.Context, peers []subnet.Lease) (map[subnet.Subnets]time.Time, error) {
	c, err := wgctrl.New()
	if err != nil {
		return nil, fmt.Errorf("generic netlink: %w", err)
	}
	defer c.Close()
	handshakes := map[wgtypes.Key]time.Time{}
	for _, t := range w.tunnels {
		d, err := c.Device(t.dev)
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", t.dev, err)
		}
		for _, p := range d.Peers {
			if at, ok := handshakes[p.PublicKey]; !ok || p.LastHandshakeTime.Before(at) {
				handshakes[p.PublicKey] = p.LastHandshakeTime
			}
		}
	}
	sessions := map[subnet.Subnets]time.Time{}
	for _, l := range peers {
		for _, key := range published(l) {
			if at := handshakes[key]; !at.IsZero() {
				sessions[l.Subnets] = at
			}
		}
	}
	return sessions, nil
}

// Diff implements backend.Differ: it compares the peers of the devices with the leases.
func (w *wireguard) Diff(_ context.Context, own subnet.Lease, peers []subnet.Lease) ([]string, error) {
	c, err := wgctrl.New()
	if err != nil {
		return nil, fmt.Errorf("generic netlink: %w", err)
	}
	defer c.Close()
	leases := map[subnet.Subnets]*subnet.Lease{}
	for _, p := range peers {
		leases[p.Subnets] = &p
	}
	known, err := readLearned(w.host.endpointFile())
	if err != nil {
		return nil, err
	}
	var commands []string
	for _, t := range w.tunnels {
		have, err := c.Device(t.dev)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the device is among the kernel's objects
		}
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", t.dev, err)
		}
		key, err := readKey(w.host.KeyFile)
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, errEmpty):
			key = secret(have.PrivateKey) // the daemon has the key in memory
		case err != nil:
			return nil, err
		}
		steps, _ := changes(t.dev, have, w.config(t, key, own, leases), expect(known[t.dev]), false, time.Now())
		for _, s := range steps {
			commands = append(commands, s.commands...)
		}
	}
	return commands, nil
}
