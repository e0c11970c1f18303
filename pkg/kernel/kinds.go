package kernel

import (
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Kind tells one type of object from another. How to add a kind: Documentation/add-a-kernel-kind.md.
type Kind uint8

// Objects are added in the order of their kinds, and removed in the opposite order.
const (
	KindLink Kind = iota
	KindAddr
	KindNeighbor
	KindFDB
	KindNexthop
	KindRoute
	KindRule
	KindPolicy
	kinds // how many there are
)

// kindTable has all that the reconciler knows of each kind. It is filled by init, because its functions use it.
var kindTable [kinds]descriptor

func init() {
	kindTable = [kinds]descriptor{
		KindLink: {
			name: "link", plural: "links", removeFirst: true, removeFirstInDiff: true,
			protocol: unix.NETLINK_ROUTE, groups: []int{unix.RTNLGRP_LINK}, set: unix.RTM_NEWLINK, del: unix.RTM_DELLINK,
			ours: (*Reconciler).ownsLink, lower: lowerDevice, change: changeCommand,
			read: (*Reconciler).readLinks, apply: (*Reconciler).applyLink, handle: (*Reconciler).linkNotified,
		},
		KindAddr: {
			name: "address", plural: "addresses",
			protocol: unix.NETLINK_ROUTE, groups: []int{unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR},
			get: unix.RTM_GETADDR, set: unix.RTM_NEWADDR, del: unix.RTM_DELADDR,
			dumps: dumpAddrs, decode: decodeAddr, body: addrBody, ours: (*Reconciler).onOwnDevice,
			notified: (*Reconciler).addrNotified, removed: (*Reconciler).addrRemoved, permit: (*Reconciler).enableIPv6,
		},
		KindNeighbor: {
			name: "neighbor", plural: "neighbours",
			protocol: unix.NETLINK_ROUTE, groups: []int{unix.RTNLGRP_NEIGH},
			get: unix.RTM_GETNEIGH, set: unix.RTM_NEWNEIGH, del: unix.RTM_DELNEIGH,
			dumps: dumpNeighbors, decode: decodeNeighbor, body: neighborBody, ours: (*Reconciler).ownsEntry,
		},
		KindFDB: {
			name: "fdb", plural: "FDB entries",
			protocol: unix.NETLINK_ROUTE, groups: []int{unix.RTNLGRP_NEIGH},
			get: unix.RTM_GETNEIGH, set: unix.RTM_NEWNEIGH, del: unix.RTM_DELNEIGH,
			dumps: dumpFDB, decode: decodeFDB, body: fdbBody, ours: (*Reconciler).ownsEntry,
		},
		KindNexthop: {
			name: "nexthop", plural: "nexthops", bestEffort: true,
			protocol: unix.NETLINK_ROUTE, groups: []int{unix.RTNLGRP_NEXTHOP}, probe: probeNexthops,
			get: unix.RTM_GETNEXTHOP, set: unix.RTM_NEWNEXTHOP, del: unix.RTM_DELNEXTHOP,
			dumps: dumpNexthops, decode: decodeNexthop, body: nexthopBody, ours: (*Reconciler).ownsNexthop,
			skip: (*Reconciler).skipNexthop,
		},
		KindRoute: {
			name: "route", plural: "routes", removeFirst: true, removeFirstInDiff: true, evict: true,
			protocol: unix.NETLINK_ROUTE, groups: []int{unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE},
			get: unix.RTM_GETROUTE, set: unix.RTM_NEWROUTE, del: unix.RTM_DELROUTE,
			dumps: dumpRoutes, decode: decodeRoute, body: routeBody, ours: (*Reconciler).ownsRoute,
			notified: (*Reconciler).routeNotified, blocked: (*Reconciler).blockedRoute,
		},
		KindRule: {
			name: "rule", plural: "rules",
			protocol: unix.NETLINK_ROUTE, groups: []int{unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE},
			get: unix.RTM_GETRULE, set: unix.RTM_NEWRULE, del: unix.RTM_DELRULE,
			dumps: dumpRules, decode: decodeRule, body: ruleBody, ours: (*Reconciler).ownsRule,
			blocked: (*Reconciler).blockedRule,
		},
		KindPolicy: {
			name: "policy", plural: "policies", removeFirstInDiff: true,
			protocol: unix.NETLINK_XFRM, groups: []int{nl.XFRMNLGRP_POLICY}, unsupported: errNoXFRM,
			get: nl.XFRM_MSG_GETPOLICY, set: nl.XFRM_MSG_UPDPOLICY, del: nl.XFRM_MSG_DELPOLICY,
			dumps: dumpPolicies, decode: decodePolicy, body: policyBody, ours: (*Reconciler).ownsPolicy,
		},
	}
}

// A descriptor says what the reconciler must know of one kind. The functions are in the file of the kind.
type descriptor struct {
	name   string // in metrics
	plural string // in the log

	// bestEffort is for objects that only serve others: where they cannot be had, the others do without. They are set
	// when the objects that use them are set, they never count as missing, and their failures are not reported.
	bestEffort bool

	// Objects are removed after all others are added, or with removeFirst before any is. removeFirstInDiff is the
	// same for the order of the commands that Diff returns.
	removeFirst, removeFirstInDiff bool

	// evict is for objects that the kernel sometimes refuses to put in the place of another: the other is removed
	// first.
	evict bool

	// The netlink(7) protocol, its multicast groups that notify of the objects, and the types of its messages to
	// dump, set and delete them. Notifications of rtnetlink have the types set and del, and name the object. Any
	// notification of another protocol only makes the reconciler read all tables.
	protocol      int
	groups        []int
	get, set, del uint16

	// probe finds out whether the kernel has this kind. nil: it has, if it has the protocol.
	probe func(*socket) error
	// unsupported is the error of an object on a kernel that does not have this kind.
	unsupported error

	// dumps returns the bodies of the requests that dump the objects, to be sent one after the other.
	dumps func(*Reconciler) [][]byte
	// decode reads an object from the body of a message: of a dump's answer or of a notification.
	decode func(body []byte, devices devices) decoded
	// body returns the body of the message that sets the object, or deletes it. dev is the index of the object's
	// device, 0 if it has none, via the number of the nexthop that a route goes through, 0 if none.
	body func(o Object, dev int, via uint32, add bool) []byte
	// ours tells whether an object that the kernel holds is ours to remove.
	ours func(*Reconciler, Object) bool

	// The rest is optional.

	// lower returns the name of another device that the object needs, "" if none.
	lower func(Object) string
	// change returns the command for Diff that makes the object that the kernel has (nil: none) the desired one,
	// where this is not the desired object's String.
	change func(have, want Object) string
	// blocked returns why an object must not be set in the place of the one that the kernel holds. Objects of a kind
	// with this function are not set in the place of an object that we do not know of, either.
	blocked func(*Reconciler, *entry) error
	// skip tells that an object is not to be added now.
	skip func(*Reconciler, *entry) bool
	// notified follows up on a notification, after the object was observed, if its device is in use.
	notified func(r *Reconciler, d decoded, gone bool)
	// permit changes a setting of one of our own devices for which the kernel refused an object, and returns whether it
	// did: then the object is set again.
	permit func(r *Reconciler, o Object, refused error) bool
	// removed follows up on the removal of an object.
	removed func(*Reconciler, Object)

	// Objects that take more than one message (links) have these instead of dumps, decode and body.
	read   func(*Reconciler) error
	apply  func(*Reconciler, *entry) error
	handle func(r *Reconciler, gone bool, body []byte)
}

// decoded is what a message of the kernel says of an object.
type decoded struct {
	Object        // nil: something that we never make
	dev    string // also of a blackhole, which the kernel may put on lo
	via    uint32 // the nexthop that a route goes through, 0 if none

	behind   bool // a route: there is another with the same key, which comes first
	replaced bool // a route: it has replaced any other with the same key
}

func (k Kind) String() string { return kindTable[k].name }

// BestEffort tells whether objects of this kind only serve others, which do without them where they cannot be had.
func (k Kind) BestEffort() bool { return kindTable[k].bestEffort }

// encode returns the netlink request that sets an object (add), or deletes it.
func (d *descriptor) encode(o Object, dev int, via uint32, add bool) request {
	if !add {
		return request{kind: d.del, body: d.body(o, dev, via, false)}
	}
	return request{kind: d.set, flags: unix.NLM_F_CREATE | unix.NLM_F_REPLACE, body: d.body(o, dev, via, true)}
}
