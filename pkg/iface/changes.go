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

// Changes signals when a link, an address or a default route of the calling
// thread's network namespace changes so that Find may now answer otherwise.
// Signals that nobody took are merged into one; the first ones may be about
// nothing. It listens before it returns: what is found afterwards can only be
// outdated by a change that will be signalled. The channel is closed when ctx
// ends.
func Changes(ctx context.Context) (<-chan struct{}, error) {
	l, err := listen()
	if err != nil {
		return nil, fmt.Errorf("listening for changes of interfaces: %w", err)
	}
	return follow(ctx, l), nil
}

// follow signals the news that l has, and closes it when ctx ends.
func follow(ctx context.Context, l *rtnl.Listener) <-chan struct{} {
	changes := make(chan struct{}, 1)
	stop := context.AfterFunc(ctx, func() { l.Close() })
	go func() {
		defer close(changes)
		defer stop()
		r := reader{l, seen{}}
		buf := make([]byte, 1<<16)
		for {
			_, news, err := r.next(buf)
			if err != nil {
				if ctx.Err() == nil {
					klog.Errorf("Changes of interfaces go unnoticed from now on: netlink: %v", err)
					<-ctx.Done()
				}
				return
			}
			if !news {
				continue
			}
			select {
			case changes <- struct{}{}:
			default: // there is one already
			}
		}
	}()
	return changes
}

// listen asks for notifications of links and addresses, and of default routes
// alone.
func listen() (*rtnl.Listener, error) {
	return rtnl.Listen(onlyDefaultRoutes(), unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
}

// onlyDefaultRoutes returns a classic BPF program that drops the messages of
// all other routes: they come by the thousand, not least our own, and would
// wake us each time.
func onlyDefaultRoutes() []unix.SockFilter {
	const (
		kind   = uint32(unsafe.Offsetof(unix.NlMsghdr{}.Type))
		dstLen = unix.NLMSG_HDRLEN + uint32(unsafe.Offsetof(unix.RtMsg{}.Dst_len))
	)
	loaded := func(v uint16) uint32 { // as a big-endian load sees a native value
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

// A reader tells what is news of what the kernel says.
type reader struct {
	*rtnl.Listener
	seen seen
}

// next waits for a datagram, reads it into buf, and tells whether it says
// something new. A loss is news, of no datagram: anything may have changed, and
// nothing that is said afterwards is known already.
func (r *reader) next(buf []byte) (datagram []byte, news bool, err error) {
	datagram, err = r.Next(buf)
	if errors.Is(err, rtnl.ErrLost) {
		r.seen = seen{}
		return nil, true, nil
	}
	return datagram, err == nil && r.seen.news(datagram), err
}

// seen holds what was last said of a link or address, as far as Find looks at
// it. The kernel repeats itself: with every router advertisement, for one, it
// tells of an address anew because its lifetime has changed.
type seen map[subject]string

type subject struct {
	index uint32
	addr  string // prefix length and addresses; empty: the link itself
}

// news tells whether a datagram says something new.
func (s seen) news(datagram []byte) bool {
	messages, err := syscall.ParseNetlinkMessage(datagram)
	if err != nil {
		return true
	}
	news := false
	for _, m := range messages {
		if s.message(m) {
			news = true
		}
	}
	return news
}

func (s seen) message(m syscall.NetlinkMessage) bool {
	attrs, err := syscall.ParseNetlinkRouteAttr(&m)
	if err != nil {
		return true
	}
	switch m.Header.Type {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		if m.Data[0] == unix.AF_BRIDGE {
			return false // about a bridge's port; a DELLINK of this kind leaves the link where it is
		}
		who := subject{index: binary.NativeEndian.Uint32(m.Data[unsafe.Offsetof(unix.IfInfomsg{}.Index):])}
		if m.Header.Type == unix.RTM_DELLINK {
			for other := range s {
				if other.index == who.index {
					delete(s, other)
				}
			}
			return true
		}
		if pick(attrs, unix.IFLA_MTU) == "" {
			return false // a driver's event (IFLA_WIRELESS), not the link's state
		}
		flags := binary.NativeEndian.Uint32(m.Data[unsafe.Offsetof(unix.IfInfomsg{}.Flags):])
		return s.say(who, fmt.Sprint(flags&unix.IFF_UP)+pick(attrs, unix.IFLA_IFNAME, unix.IFLA_ADDRESS, unix.IFLA_MTU, unix.IFLA_PROP_LIST))
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		who := subject{
			index: binary.NativeEndian.Uint32(m.Data[unsafe.Offsetof(unix.IfAddrmsg{}.Index):]),
			addr:  string(m.Data[:2]) + pick(attrs, unix.IFA_ADDRESS, unix.IFA_LOCAL), // family, prefix length
		}
		if m.Header.Type == unix.RTM_DELADDR {
			delete(s, who)
			return true
		}
		return s.say(who, string(m.Data[2:4])+pick(attrs, unix.IFA_FLAGS)) // flags, scope
	}
	// Routes: some go unsaid with their link, so that none can be taken for known.
	return true
}

// say notes what is said, and tells whether it is new.
func (s seen) say(who subject, what string) bool {
	if s[who] == what {
		return false
	}
	s[who] = what
	return true
}

// pick returns the attributes of the given types as they are.
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
