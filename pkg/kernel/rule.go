package kernel

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/flanneld/flanneld/pkg/rtnl"
)

// MainTable is the number of the main routing table (RT_TABLE_MAIN, linux/rtnetlink.h).
const MainTable = unix.RT_TABLE_MAIN

// A Rule is a rule of the routing policy (ip-rule(8)), with our RouteProtocol: packets to a prefix are routed by a table.
type Rule struct {
	Dst      netip.Prefix
	Table    uint32
	Priority uint32 // rules with lower numbers come first
}

func (r Rule) Key() Key {
	return Key{Kind: KindRule, Dst: keyPrefix(r.Dst), ID: r.Table, Metric: r.Priority}
}
func (r Rule) device() string { return "" }
func (r Rule) String() string { return r.command("add") }
func (r Rule) Undo() string   { return r.command("del") }

func (r Rule) command(verb string) string {
	ip, table := "ip", fmt.Sprint(r.Table)
	if r.Dst.Addr().Is6() {
		ip = "ip -6"
	}
	if r.Table == MainTable {
		table = "main"
	}
	return fmt.Sprintf("%s rule %s to %s lookup %s priority %d protocol %d", ip, verb, r.Dst, table, r.Priority,
		RouteProtocol)
}

// ruleHeader is the size of a struct fib_rule_hdr, and toTable its action for tables (FR_ACT_TO_TBL, linux/fib_rules.h).
const (
	ruleHeader = 12
	toTable    = 1
)

// dumpRules asks for the rules of all families: a kernel without IPv6 has no answer for that family.
func dumpRules(*Reconciler) [][]byte { return [][]byte{make([]byte, ruleHeader)} }

func ruleBody(o Object, _ int, _ uint32, _ bool) []byte {
	r := o.(Rule)
	b := make([]byte, ruleHeader)
	b[0], b[1], b[7] = family(r.Dst.Addr()), uint8(r.Dst.Bits()), toTable
	b = appendAttr(b, unix.FRA_DST, r.Dst.Addr().AsSlice())
	b = appendAttr32(b, unix.FRA_PRIORITY, r.Priority)
	b = appendAttr32(b, unix.FRA_TABLE, r.Table)
	return appendAttr(b, unix.FRA_PROTOCOL, []byte{RouteProtocol})
}

// decodeRule reads a rule of ours. A rule with another protocol is another one for the kernel, too: both can be there.
func decodeRule(body []byte, _ devices) decoded {
	if len(body) < ruleHeader {
		return decoded{}
	}
	r := Rule{Table: uint32(body[4])}
	bits, ours := int(body[1]), false
	plain := body[7] == toTable && body[2] == 0 && body[3] == 0 && binary.NativeEndian.Uint32(body[8:]) == 0
	rtnl.EachAttr(body[ruleHeader:], func(kind uint16, value []byte) {
		switch kind {
		case unix.FRA_DST:
			if a, ok := netip.AddrFromSlice(value); ok {
				r.Dst = netip.PrefixFrom(a, bits)
			}
		case unix.FRA_PRIORITY:
			r.Priority = binary.NativeEndian.Uint32(value)
		case unix.FRA_TABLE:
			r.Table = binary.NativeEndian.Uint32(value)
		case unix.FRA_PROTOCOL:
			ours = value[0] == RouteProtocol
		case unix.FRA_IIFNAME, unix.FRA_OIFNAME, unix.FRA_FWMARK, unix.FRA_L3MDEV, unix.FRA_UID_RANGE, unix.FRA_IP_PROTO,
			unix.FRA_SPORT_RANGE, unix.FRA_DPORT_RANGE:
			plain = false
		}
	})
	if !ours || !plain || !r.Dst.IsValid() {
		return decoded{}
	}
	return decoded{Object: r}
}

// ownsRule tells whether a rule with our protocol is ours, rather than another network's on this host.
func (r *Reconciler) ownsRule(o Object) bool { return r.isWithin(o.(Rule).Dst) }

// blockedRule blocks nothing. With it, a rule that is there already is not added once more, which the kernel would do.
func (*Reconciler) blockedRule(*entry) error { return nil }
