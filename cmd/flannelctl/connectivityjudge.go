package main

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/flanneld/flanneld/network"
	"github.com/flanneld/flanneld/pkg/family"
	"github.com/flanneld/flanneld/pkg/plain"
)

// judge returns what is wrong on the paths to a peer, and notes on what is not known.
func judge(s network.Status, paths []path) (found []finding, notes []string) {
	found = []finding{}
	for _, p := range paths {
		f, n := judgePath(s, p)
		found, notes = append(found, f...), append(notes, n...)
	}
	return found, notes
}

func judgePath(s network.Status, p path) (found []finding, notes []string) {
	under, over := p.Underlay, p.Overlay
	switch {
	case !over.alive() && !under.alive():
		return []finding{hostSilent(under)}, nil
	case !over.To.IsValid():
		return nil, []string{fmt.Sprintf("the overlay to %s was not tried: this node has no address in its subnet until "+
			"a pod has run here", under.To)}
	case !over.alive() && over.Ping != silent:
		return []finding{{"not-sent", fmt.Sprintf("packets from %s to %s cannot be sent: %s", over.From, over.To, over.Ping),
			[]string{"flannelctl diff", "flannelctl doctor"}}}, nil
	case !over.alive() && p.isBridge(s) && over.Forward == "":
		return nil, []string{fmt.Sprintf("%s does not reply: packets get lost, or the node lacks this address, as long "+
			"as no pod has run there. flannelctl doctor may know more", over.To)}
	case !over.alive():
		return []finding{overlayBlocked(s, p)}, nil
	}
	if !under.alive() {
		notes = append(notes, fmt.Sprintf("the host %s does not reply, but packets arrive through the overlay: "+
			"a firewall probably drops ICMP, UDP and TCP to the host", under.To))
	}
	if !over.replies() {
		why := "its firewall probably drops what is for the node itself"
		if p.isBridge(s) {
			why = "as long as no pod has run there, it lacks this address"
		}
		return nil, append(notes, fmt.Sprintf("packets to pods arrive at the node of %s, which does not reply itself: "+
			"%s. MTU, checksums and masquerading were not tried", over.To, why))
	}
	if over.Ping != answered {
		notes = append(notes, fmt.Sprintf("%s does not reply to ping, but it replies to UDP or TCP: its firewall "+
			"probably drops ICMP. The MTU was not tried", over.To))
	}
	if over.Carries < over.Size {
		found = append(found, pathMTU(s, p))
	}
	switch {
	case over.UDP == silent && over.OwnUDP == answered:
		found = append(found, checksumWrong(s, p.Underlay, over))
	case over.UDP == silent || over.TCP == silent:
		notes = append(notes, portsSilent(over))
	}
	for _, l := range []leg{over, p.Bridge} {
		if l.SeenAs.IsValid() && l.SeenAs != l.From {
			found = append(found, masqueraded(l, over.To))
		}
	}
	return found, notes
}

// isBridge reports whether the overlay's addresses are those of bridges, which nodes without pods may lack.
func (p path) isBridge(s network.Status) bool {
	return !slices.ContainsFunc(s.Devices, func(d network.Device) bool {
		return slices.ContainsFunc(d.Addresses, func(a netip.Prefix) bool { return a.Addr() == p.Overlay.From })
	})
}

// isEncapsulated reports whether the backend puts the packets into others.
func (p path) isEncapsulated(s network.Status) bool {
	onDevice := func(d network.Device) bool { return d.Name == p.Overlay.Device }
	return len(s.Endpoints) > 0 && (len(s.Devices) == 0 || slices.ContainsFunc(s.Devices, onDevice))
}

func hostSilent(under leg) finding {
	text := fmt.Sprintf("nothing comes back from %s, and nothing through the overlay: the host is off, the network "+
		"between the hosts drops packets, or firewalls drop ping, UDP and TCP as well as the packets of the overlay", under.To)
	if under.Ping != silent {
		text = fmt.Sprintf("%s cannot be reached: %s", under.To, under.Ping)
	}
	return finding{"host-silent", text, []string{fmt.Sprintf("ip route get %s; ping -c 3 %s", under.To, under.To)}}
}

func masqueraded(l leg, to netip.Addr) finding {
	return finding{"masqueraded", fmt.Sprintf("packets from %s arrive at %s as packets from %s: pods there do not "+
		"see the addresses of pods here, and network policies may refuse the packets", l.From, to, l.SeenAs), []string{
		"iptables-save -t nat | grep -e MASQUERADE -e SNAT; nft list ruleset | grep -e masquerade -e snat    " +
			"# find the rule, and exclude the network from it"}}
}

// endpoints returns the protocols and ports of the backend, as texts and as conditions of iptables.
func endpoints(s network.Status, f family.Family) (texts, conditions []string) {
	for _, e := range s.Endpoints {
		if !f.Has(e.Address) {
			continue
		}
		if e.Port == 0 {
			texts = append(texts, "IP protocol "+e.Protocol)
			conditions = append(conditions, "-p "+plain.Shell(e.Protocol))
		} else {
			texts = append(texts, fmt.Sprintf("UDP port %d", e.Port))
			conditions = append(conditions, fmt.Sprintf("-p udp --dport %d", e.Port))
		}
	}
	return texts, conditions
}

func overlayBlocked(s network.Status, p path) finding {
	under, over := p.Underlay, p.Overlay
	if !p.isEncapsulated(s) {
		return finding{"overlay-blocked", fmt.Sprintf("packets from %s to %s get lost, although the hosts reach each "+
			"other: the network between the hosts, or a firewall, drops packets with addresses of pods", over.From, over.To),
			[]string{fmt.Sprintf("tcpdump -ni any host %s    # on %s; in a cloud, switch off the check of source and "+
				"destination", over.From, under.To)}}
	}
	f := family.Of(under.To)
	ports, conditions := endpoints(s, f)
	way := fmt.Sprintf("between %s and %s", under.From, under.To)
	if over.Heard {
		way = fmt.Sprintf("from %s to %s", under.From, under.To)
	}
	text := fmt.Sprintf("%s %s gets lost: the hosts reach each other, but %s does not reach %s through %s. "+
		"A firewall drops it, or the peer's device has another port or VNI",
		strings.Join(ports, ", "), way, over.From, over.To, over.Device)
	if over.Heard {
		text += ". The other way works: packets of the peer arrive here"
	}
	fix := []string{"flannelctl doctor    # here and on the peer: port-blocked names the rule of a host"}
	iptables := [...]string{"iptables", "ip6tables"}[f]
	for _, c := range conditions {
		fix = append(fix, fmt.Sprintf("%s -I INPUT -s %s %s -j ACCEPT    # on %s; in a cloud, in the security group",
			iptables, under.From, c, under.To))
	}
	return finding{"overlay-blocked", text, fix}
}

func pathMTU(s network.Status, p path) finding {
	over, under := p.Overlay, p.Underlay
	text := fmt.Sprintf("packets from %s to %s of more than %d bytes get lost, and pods send up to %d bytes: "+
		"connections hang", over.From, over.To, over.Carries, over.Size)
	overhead := s.Overhead.Of(family.Of(over.To))
	mtu := over.Carries + overhead
	if under.Size > 0 && under.Carries < under.Size {
		mtu = under.Carries
		text += fmt.Sprintf(". From host to host, %s to %s, at most %d bytes of %d get through", under.From, under.To,
			under.Carries, under.Size)
	}
	return finding{"path-mtu", text, []string{
		fmt.Sprintf("ping -M do -c 3 -s %d %s    # fails until all devices on the way carry %d bytes",
			s.MTU+overhead-family.Of(under.To).HeaderLen()-8, under.To, s.MTU+overhead),
		fmt.Sprintf("# or set \"MTU\": %d in the Backend of the network configuration, and create the pods again", mtu),
	}}
}

func checksumWrong(s network.Status, under, over leg) finding {
	text := fmt.Sprintf("UDP from %s arrives at %s with wrong checksums: a datagram gets through if flannelctl "+
		"computes the checksum, and does not if the kernel or %s does", over.From, over.To, under.Device)
	fix := []string{fmt.Sprintf("ethtool -K %s tx off    # until the host starts again", plain.Shell(under.Device))}
	for _, d := range s.Devices {
		if d.Name == over.Device && d.VNI != 0 {
			fix = []string{fmt.Sprintf("ethtool -K %s tx-checksum-ip-generic off    "+
				"# for good: \"DisableTxChecksumOffload\": true in the Backend of the network configuration", plain.Shell(d.Name))}
		}
	}
	return finding{"checksum-wrong", text, fix}
}

// portsSilent returns a note that packets to closed ports get no reply, although there is no proof of a fault.
func portsSilent(over leg) string {
	what := "UDP and TCP"
	switch {
	case over.UDP != silent:
		what = "TCP"
	case over.TCP != silent:
		what = "UDP"
	}
	return fmt.Sprintf("%s replies to ping, but does not refuse %s to closed ports: its firewall probably drops "+
		"that. If connections of pods hang, checksums may be wrong: run flannelctl connectivity on the peer, and see "+
		"DisableTxChecksumOffload", over.To, what)
}
