package ipsec

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/flanneld/flanneld/backend"
	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/proc"
	"github.com/flanneld/flanneld/subnet"
)

var checks = []backend.Check{
	{Name: "charon-down", About: "charon runs, and answers", Run: checkCharon},
	{Name: "no-tunnel", About: "charon has a tunnel to each peer", Run: checkTunnels},
}

func checkCharon(ctx context.Context, _ backend.Node) []backend.Problem {
	_, err := remoteHosts(ctx)
	if err == nil {
		return nil
	}
	text := "there are no tunnels, or their keys are not renewed: "
	if errors.Is(err, errNoCharon) {
		return []backend.Problem{{Text: text + err.Error(), Fix: []string{
			"apt-get install strongswan-charon strongswan-swanctl libstrongswan-standard-plugins && systemctl restart flanneld",
		}}}
	}
	fix := []string{"systemctl restart flanneld"}
	for _, pid := range proc.Find("charon") {
		if fix = []string{fmt.Sprintf("kill -KILL %d    # flanneld starts it again", pid)}; proc.State(pid) == 'T' {
			fix = []string{fmt.Sprintf("kill -CONT %d", pid)}
		}
	}
	return []backend.Problem{{Text: text + "charon does not answer: " + err.Error(), Fix: fix}}
}

func checkTunnels(ctx context.Context, n backend.Node) []backend.Problem {
	hosts, err := remoteHosts(ctx)
	if err != nil {
		return nil // charon-down reports that
	}
	var found []backend.Problem
	for _, p := range n.Peers {
		for _, ip := range p.Attrs.PublicIPs() {
			if _, ok := hosts[ip]; ok || len(n.Networks.Of(family.Of(ip))) == 0 {
				continue
			}
			found = append(found, backend.Problem{
				Text: fmt.Sprintf("charon has no tunnel to %s of %s", ip, p.Subnets),
				Fix:  []string{"flannelctl doctor    # on that node", "swanctl --list-sas"},
			})
		}
	}
	return found
}

// Sessions implements backend.SessionReporter: it returns when the IKE association of a
// peer was established, of two families the earlier one.
func (b *ipsec) Sessions(ctx context.Context, peers []subnet.Lease) (map[subnet.Subnets]time.Time, error) {
	hosts, err := remoteHosts(ctx)
	if err != nil {
		return nil, err
	}
	sessions := map[subnet.Subnets]time.Time{}
	for _, p := range peers {
		for _, ip := range p.Attrs.PublicIPs() {
			at, ok := hosts[ip]
			if last, other := sessions[p.Subnets]; ok && (!other || at.Before(last)) {
				sessions[p.Subnets] = at
			}
		}
	}
	return sessions, nil
}

// Diff implements backend.Differ: it compares the connections that charon has with
// those of the peers. Where charon does not answer, its check reports that, and
// there is nothing to compare.
func (b *ipsec) Diff(ctx context.Context, own subnet.Lease, peers []subnet.Lease) ([]string, error) {
	if _, err := remoteHosts(ctx); err != nil {
		return nil, nil
	}
	have, _, err := loaded(ctx)
	if err != nil {
		return nil, err
	}
	missing := map[string]bool{}
	for _, p := range peers {
		for _, t := range b.tunnels(own, p) {
			missing[t.name()] = true
		}
	}
	var commands []string
	for _, name := range have {
		if !missing[name] && b.ours(name) {
			commands = append(commands, "swanctl --terminate --ike "+name+"    # and flanneld unloads the connection")
		}
		delete(missing, name)
	}
	for _, name := range slices.Sorted(maps.Keys(missing)) {
		commands = append(commands, fmt.Sprintf("systemctl restart flanneld    # charon lacks the connection %s", name))
	}
	return commands, nil
}
