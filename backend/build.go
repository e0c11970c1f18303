package backend

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/iface"
	"github.com/flanneld/flanneld/pkg/kernel"
	"github.com/flanneld/flanneld/pkg/plain"
	"github.com/flanneld/flanneld/subnet"
)

// Options reads the keys of the configuration's Backend into the struct that
// into points to. Keys that the struct does not have are noted in cfg.Warnings.
func Options(cfg *subnet.Config, into any) error {
	if cfg.Backend == nil {
		return nil
	}
	hint := "it has none beside Type"
	if known := subnet.Keys(into); len(known) > 0 {
		hint = "known are Type, " + strings.Join(known, ", ")
	}
	unknown, err := subnet.Decode(cfg.Backend, into)
	for _, key := range unknown {
		if !strings.EqualFold(key, "Type") {
			cfg.Warnings = append(cfg.Warnings,
				fmt.Sprintf("unknown key %s of Backend %s is ignored: %s", plain.Quote(key), cfg.BackendType, hint))
		}
	}
	return err
}

// maxPacket is the largest IPv4 packet, and the largest UDP datagram, in bytes.
const maxPacket = 65535

// PodMTU returns the largest packets that pods may send, for each family that is
// on, where the backend puts overhead bytes around them. configured is the MTU of
// the network between the nodes; 0: it is the uplink's. info has the MTU for both
// families, the smaller one, and the overhead.
func PodMTU(cfg *subnet.Config, uplink iface.Uplink, configured int, overhead func(family.Family) int) (
	mtu family.Pair[int], info Info, err error) {
	for f, pool := range cfg.Pools().Each() {
		if !pool.Enabled() {
			continue
		}
		underlay, whose := uplink.Of(f).MTU, "of the uplink "+uplink.Of(f).Name
		if configured != 0 {
			underlay, whose = configured, "in the configuration"
		}
		around := overhead(f)
		m := min(underlay, maxPacket) - around
		if least := f.MinMTU() + around; underlay < least { // of two families, IPv6 needs more
			err = fmt.Errorf("MTU %d %s leaves %d for pods: it must be at least %d", underlay, whose, m, least)
		}
		*mtu.At(f) = m
		if info.MTU == 0 || m < info.MTU {
			info.MTU = m
		}
		*info.Overhead.At(f) = around
	}
	return mtu, info, err
}

// HostAddr returns the first address of a subnet as an address of this node's
// device, without a network, so that there is no broadcast and no route. The node
// itself sends from it to pods of other nodes.
func HostAddr(dev string, own netip.Prefix) kernel.Addr {
	return kernel.Addr{Dev: dev, Prefix: netip.PrefixFrom(own.Addr(), own.Addr().BitLen())}
}

// A Side is one address family's part of what this node and a peer have to do
// with each other.
type Side struct {
	On       bool            // both nodes have a subnet of the family, and the peer an address
	Own      netip.Prefix    // this node's subnet
	Peer     netip.Prefix    // the peer's subnet
	PublicIP netip.Addr      // the peer's
	Data     json.RawMessage // the peer's backend data
}

// Sides returns the IPv4 and the IPv6 side of a peer.
func Sides(own, peer subnet.Lease) family.Pair[Side] {
	var sides family.Pair[Side]
	for _, f := range family.All {
		s := Side{Own: own.Of(f), Peer: peer.Of(f), PublicIP: peer.Attrs.PublicIPOf(f), Data: peer.Attrs.DataOf(f)}
		s.On = s.Own.IsValid() && s.Peer.IsValid() && s.PublicIP.IsValid()
		*sides.At(f) = s
	}
	return sides
}

// DataError returns the error that a peer's backend data cannot be used, and why. The text of why may have parts of
// the data.
func DataError(data json.RawMessage, why string) error {
	return fmt.Errorf("backend data %s: %s", plain.Quote(data), plain.Text(why))
}

// JoinErrors returns what is wrong with a peer, as one line; nil if errs is empty.
func JoinErrors(errs []error) error {
	if len(errs) == 0 {
		return nil
	}
	return errors.New(plain.Line(errors.Join(errs...).Error()))
}

// Direct returns the route to the peer's subnet through the peer itself, with
// nothing around the packets: for peers on the uplink's own link.
func (s Side) Direct(uplink iface.Uplink) kernel.Route {
	return kernel.Route{Dst: s.Peer, Via: s.PublicIP, Dev: uplink.Of(family.Of(s.PublicIP)).Name}
}
