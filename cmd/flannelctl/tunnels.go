package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/flanneld/flanneld/backend/ipsec"
	"github.com/flanneld/flanneld/backend/wireguard"
	"github.com/flanneld/flanneld/pkg/proc"
)

func charonDown(p *patient) []problem {
	if p.status.Backend != ipsec.Type || p.charonErr == nil {
		return nil
	}
	text := "there are no tunnels, or their keys are not renewed: "
	if errors.Is(p.charonErr, ipsec.ErrNoCharon) {
		return []problem{{text + p.charonErr.Error(),
			[]string{"apt-get install strongswan-charon strongswan-swanctl libstrongswan-standard-plugins && systemctl restart flanneld"}}}
	}
	fix := []string{"systemctl restart flanneld"}
	for _, pid := range proc.Find("charon") {
		if fix = []string{fmt.Sprintf("kill -KILL %d    # flanneld starts it again", pid)}; proc.State(pid) == 'T' {
			fix = []string{fmt.Sprintf("kill -CONT %d", pid)}
		}
	}
	return []problem{{text + "charon does not answer: " + p.charonErr.Error(), fix}}
}

// noTunnel finds peers with whom no keys have been agreed on.
func noTunnel(p *patient) []problem {
	switch {
	case p.status.Lease == nil:
		return nil
	case p.status.Backend == ipsec.Type && p.charonErr == nil:
		return p.noAssociation()
	case p.status.Backend == wireguard.Type:
		return p.noHandshake()
	}
	return nil
}

func (p *patient) noAssociation() []problem {
	var found []problem
	for _, l := range p.leases {
		for _, ip := range l.PublicIPs {
			if l.Own || l.Problem != "" || p.charonPeers[ip] || !p.has(func(a netip.Addr) bool { return a.Is4() == ip.Is4() }) {
				continue
			}
			found = append(found, problem{fmt.Sprintf("charon has no tunnel to %s of %s", ip, join(l.Subnets)), []string{"flannelctl doctor    # on that node", "swanctl --list-sas"}})
		}
	}
	return found
}

// noHandshake finds peers that were sent something and have never answered.
func (p *patient) noHandshake() []problem {
	c, err := wgctrl.New()
	if err != nil {
		return nil
	}
	defer c.Close()
	var found []problem
	for _, name := range p.devices() {
		d, err := c.Device(name)
		if err != nil {
			continue // it is not there, or cannot be read
		}
		for _, peer := range d.Peers {
			if peer.LastHandshakeTime.IsZero() && peer.TransmitBytes > 0 {
				found = append(found, problem{fmt.Sprintf("%s has had no handshake with %s at %v", name, p.holder(peer.PublicKey), peer.Endpoint),
					[]string{"flannelctl doctor    # on that node", "wg show " + name}})
			}
		}
	}
	return found
}

// holder names the node with a public key by its subnets.
func (p *patient) holder(key wgtypes.Key) string {
	for _, l := range p.leases {
		for _, data := range []json.RawMessage{l.BackendData, l.BackendV6Data} {
			var d struct{ PublicKey string }
			if json.Unmarshal(data, &d) == nil && d.PublicKey == key.String() {
				return join(l.Subnets)
			}
		}
	}
	return key.String()
}

// otherWireGuards returns the kernel's devices that are not among ours. Those of
// programs have sockets of theirs.
func otherWireGuards(ours []string) []*wgtypes.Device {
	c, err := wgctrl.New()
	if err != nil {
		return nil
	}
	defer c.Close()
	all, err := c.Devices()
	if err != nil {
		return nil
	}
	return slices.DeleteFunc(all, func(d *wgtypes.Device) bool {
		return d.Type != wgtypes.LinuxKernel || slices.Contains(ours, d.Name)
	})
}
