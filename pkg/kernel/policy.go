package kernel

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/rtnl"
)

// PolicyID marks our IPsec policies, and the security associations that may serve them (reqid, ip-xfrm(8)). Upstream
// flannel has the same number.
const PolicyID = 11

// A Policy is an IPsec policy (XFRM): packets between two subnets must take the ESP tunnel between two hosts.
type Policy struct {
	Dir      PolicyDir
	Src, Dst netip.Prefix // of the packets
	From, To netip.Addr   // ends of the tunnel

	other bool // read from the kernel: the policy does something else
}

// PolicyDir says what packets a policy is for (XFRM_POLICY_*, linux/xfrm.h).
type PolicyDir uint8

const (
	PolicyIn  PolicyDir = iota // to the host itself
	PolicyOut                  // that leave
	PolicyFwd                  // that pass through, on their way in
)

func (d PolicyDir) String() string { return [...]string{"in", "out", "fwd"}[d] }

func (p Policy) Key() Key {
	return Key{Kind: KindPolicy, Dir: p.Dir, Src: keyPrefix(p.Src), Dst: keyPrefix(p.Dst)}
}
func (p Policy) device() string { return "" }
func (p Policy) Undo() string {
	return fmt.Sprintf("ip xfrm policy delete src %s dst %s dir %s", p.Src, p.Dst, p.Dir)
}
func (p Policy) String() string {
	s := fmt.Sprintf("ip xfrm policy update src %s dst %s dir %s", p.Src, p.Dst, p.Dir)
	if p.other {
		return s + " …"
	}
	return s + fmt.Sprintf(" tmpl src %s dst %s proto esp reqid %d mode tunnel", p.From, p.To, PolicyID)
}

var errNoXFRM = errors.New("this kernel has no IPsec: run modprobe xfrm_user")

func dumpPolicies(*Reconciler) [][]byte { return [][]byte{make([]byte, nl.SizeofXfrmUserpolicyId)} }

func (r *Reconciler) ownsPolicy(o Object) bool {
	p := o.(Policy)
	return !p.other && r.insideNetworks(p.Src) && r.insideNetworks(p.Dst)
}

// policyBody is a struct xfrm_userpolicy_info with a template, or, to delete the policy, a struct xfrm_userpolicy_id.
func policyBody(o Object, _ int, _ uint32, add bool) []byte {
	p := o.(Policy)
	selector := nl.XfrmSelector{
		Family: uint16(family(p.Src.Addr())), PrefixlenS: uint8(p.Src.Bits()), PrefixlenD: uint8(p.Dst.Bits()),
	}
	copy(selector.Saddr[:], p.Src.Addr().AsSlice())
	copy(selector.Daddr[:], p.Dst.Addr().AsSlice())
	if !add {
		id := nl.XfrmUserpolicyId{Sel: selector, Dir: uint8(p.Dir)}
		return id.Serialize()
	}
	info := nl.XfrmUserpolicyInfo{Sel: selector, Dir: uint8(p.Dir)}
	info.Lft.SoftByteLimit, info.Lft.HardByteLimit = nl.XFRM_INF, nl.XFRM_INF
	info.Lft.SoftPacketLimit, info.Lft.HardPacketLimit = nl.XFRM_INF, nl.XFRM_INF
	template := nl.XfrmUserTmpl{
		Family: uint16(family(p.To)), Reqid: PolicyID, Mode: modeTunnel,
		Aalgos: ^uint32(0), Ealgos: ^uint32(0), Calgos: ^uint32(0), // any
	}
	template.XfrmId.Proto = unix.IPPROTO_ESP
	copy(template.Saddr[:], p.From.AsSlice())
	copy(template.XfrmId.Daddr[:], p.To.AsSlice())
	return appendAttr(info.Serialize(), nl.XFRMA_TMPL, template.Serialize())
}

const modeTunnel = 1 // XFRM_MODE_TUNNEL

// decodePolicy reads a struct xfrm_userpolicy_info with attributes. Policies that cannot have the key of one of ours
// decode to a nil Object.
func decodePolicy(body []byte, _ devices) decoded {
	if len(body) < nl.SizeofXfrmUserpolicyInfo {
		return decoded{}
	}
	info := nl.DeserializeXfrmUserpolicyInfo(body)
	p := Policy{
		Dir: PolicyDir(info.Dir),
		Src: policyPrefix(info.Sel.Saddr, info.Sel.Family, info.Sel.PrefixlenS),
		Dst: policyPrefix(info.Sel.Daddr, info.Sel.Family, info.Sel.PrefixlenD),
	}
	s := info.Sel
	plain := s.Dport == 0 && s.Sport == 0 && s.Proto == 0 && s.Ifindex == 0 && s.User == 0
	if p.Dir > PolicyFwd || !p.Src.IsValid() || !p.Dst.IsValid() {
		plain = false // such as the policy of one socket
	}
	p.other = info.Priority != 0 || info.Action != 0 // XFRM_POLICY_BLOCK
	templates := 0
	rtnl.EachAttr(body[nl.SizeofXfrmUserpolicyInfo:], func(kind uint16, value []byte) {
		switch kind {
		case nl.XFRMA_TMPL:
			for ; len(value) >= nl.SizeofXfrmUserTmpl; value = value[nl.SizeofXfrmUserTmpl:] {
				t := nl.DeserializeXfrmUserTmpl(value)
				from, to := policyPrefix(t.Saddr, t.Family, 0), policyPrefix(t.XfrmId.Daddr, t.Family, 0)
				p.From, p.To = from.Addr(), to.Addr()
				p.other = p.other || t.XfrmId.Proto != unix.IPPROTO_ESP || t.Mode != modeTunnel ||
					t.Reqid != PolicyID || t.Optional != 0
				templates++
			}
		case nl.XFRMA_MARK, nl.XFRMA_IF_ID:
			plain = false
		}
	})
	if !plain {
		return decoded{}
	}
	p.other = p.other || templates != 1
	return decoded{Object: p}
}

// policyPrefix reads an xfrm_address_t.
func policyPrefix(a nl.XfrmAddress, family uint16, bits uint8) netip.Prefix {
	if family == unix.AF_INET {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte(a[:4])), int(bits))
	}
	return netip.PrefixFrom(netip.AddrFrom16(a), int(bits))
}
