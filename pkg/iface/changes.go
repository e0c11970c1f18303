package iface

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/rtnl"
)

// Changes signals when a link, an address or a default route of the calling thread's network namespace has changed,
// so that Find may return another result. Signals that are not received at once are merged into one. The first
// signals may come without a change. Changes subscribes before it returns: every change after that is signalled.
// The channel is closed when ctx ends.
func Changes(ctx context.Context) (<-chan struct{}, error) {
	l, err := listen()
	if err != nil {
		return nil, fmt.Errorf("listening for changes of interfaces: %w", err)
	}
	return follow(ctx, l), nil
}

// follow signals the changes that l receives, and closes l when ctx ends.
func follow(ctx context.Context, l *rtnl.Listener) <-chan struct{} {
	log := klog.FromContext(ctx)
	changes := make(chan struct{}, 1)
	stop := context.AfterFunc(ctx, func() { l.Close() })
	go func() {
		defer close(changes)
		defer stop()
		r := reader{l, seen{}}
		buf := make([]byte, 1<<16)
		for {
			_, changed, err := r.next(buf)
			if err != nil {
				if ctx.Err() == nil {
					log.Error(err, "Cannot read netlink notifications; changes of interfaces are not noticed any more",
						"fix", "restart flanneld")
					<-ctx.Done()
				}
				return
			}
			if !changed {
				continue
			}
			select {
			case changes <- struct{}{}:
			default: // a signal is pending already
			}
		}
	}()
	return changes
}

// listen subscribes to notifications of links, addresses and default routes.
func listen() (*rtnl.Listener, error) {
	return rtnl.Listen(onlyDefaultRoutes(), unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
}

// onlyDefaultRoutes returns a classic BPF program that drops the messages of all other routes. A node has thousands of
// other routes, most of them flanneld's own, and each message would wake flanneld.
func onlyDefaultRoutes() []unix.SockFilter {
	const (
		kind   = uint32(unsafe.Offsetof(unix.NlMsghdr{}.Type))
		dstLen = unix.NLMSG_HDRLEN + uint32(unsafe.Offsetof(unix.RtMsg{}.Dst_len))
	)
	loaded := func(v uint16) uint32 { // the result of a big-endian load of a native value
		return uint32(binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, v)))
	}
	return []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_H | unix.BPF_ABS, K: kind},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: loaded(unix.RTM_NEWROUTE), Jt: 1},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: loaded(unix.RTM_DELROUTE), Jf: 2},
		{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: dstLen},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: 0, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0xffffffff},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}
}

// A reader reads notifications and reports which of them are changes.
type reader struct {
	*rtnl.Listener
	seen seen
}

// next waits for a datagram, reads it into buf, and reports whether the datagram has a change. When notifications were
// lost, next reports a change without a datagram, and forgets all state: anything may have changed.
func (r *reader) next(buf []byte) (datagram []byte, changed bool, err error) {
	datagram, err = r.Next(buf)
	if errors.Is(err, rtnl.ErrLost) {
		r.seen = seen{}
		return nil, true, nil
	}
	return datagram, err == nil && r.seen.update(datagram), err
}

// seen holds the last state of each link and address, as far as Find uses the state. The kernel also sends
// notifications without such a change: with every router advertisement, for example, it sends one for each address,
// because the lifetime of the address has changed.
type seen map[object]string

// An object is a link, or an address on a link.
type object struct {
	index uint32 // of the link
	addr  string // prefix length and addresses; empty: the link itself
}

// update records the state in a datagram, and reports whether any state has changed.
func (s seen) update(datagram []byte) bool {
	messages, err := syscall.ParseNetlinkMessage(datagram)
	if err != nil {
		return true
	}
	changed := false
	for _, m := range messages {
		if s.updateMessage(m) {
			changed = true
		}
	}
	return changed
}

func (s seen) updateMessage(m syscall.NetlinkMessage) bool {
	attrs, err := syscall.ParseNetlinkRouteAttr(&m)
	if err != nil {
		return true
	}
	switch m.Header.Type {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		if m.Data[0] == unix.AF_BRIDGE {
			return false // the state of a bridge's port; such a DELLINK does not mean that the link was deleted
		}
		link := object{index: binary.NativeEndian.Uint32(m.Data[unsafe.Offsetof(unix.IfInfomsg{}.Index):])}
		if m.Header.Type == unix.RTM_DELLINK {
			for other := range s {
				if other.index == link.index {
					delete(s, other)
				}
			}
			return true
		}
		if pick(attrs, unix.IFLA_MTU) == "" {
			return false // an event of a driver (IFLA_WIRELESS), not the state of the link
		}
		flags := binary.NativeEndian.Uint32(m.Data[unsafe.Offsetof(unix.IfInfomsg{}.Flags):])
		return s.record(link, fmt.Sprint(flags&unix.IFF_UP)+
			pick(attrs, unix.IFLA_IFNAME, unix.IFLA_ADDRESS, unix.IFLA_MTU, unix.IFLA_PROP_LIST))
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		address := object{
			index: binary.NativeEndian.Uint32(m.Data[unsafe.Offsetof(unix.IfAddrmsg{}.Index):]),
			addr:  string(m.Data[:2]) + pick(attrs, unix.IFA_ADDRESS, unix.IFA_LOCAL), // family, prefix length
		}
		if m.Header.Type == unix.RTM_DELADDR {
			delete(s, address)
			return true
		}
		return s.record(address, string(m.Data[2:4])+pick(attrs, unix.IFA_FLAGS)) // flags, scope
	}
	// A route: the kernel deletes some routes with their link without a notification, so no state is kept.
	return true
}

// record records the state of an object, and reports whether the state has changed.
func (s seen) record(o object, state string) bool {
	if s[o] == state {
		return false
	}
	s[o] = state
	return true
}

// pick returns the attributes of the given types, unparsed.
func pick(attrs []syscall.NetlinkRouteAttr, types ...uint16) string {
	var out []byte
	for _, a := range attrs {
		for _, t := range types {
			if a.Attr.Type&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER) == t {
				out = append(binary.NativeEndian.AppendUint16(out, t), a.Value...)
			}
		}
	}
	return string(out)
}
