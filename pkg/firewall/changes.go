package firewall

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

// Changes signals when somebody, ourselves included, may have changed the rules
// that the driver keeps, in the calling thread's network namespace: as nftables
// tells, where iptables-nft keeps its rules too, or when iptables-legacy has
// more of them, or fewer. Signals that nobody took are merged into one. The
// channel is closed when ctx ends.
func (d *Driver) Changes(ctx context.Context) (<-chan struct{}, error) {
	changes := make(chan struct{}, 1)
	tell := func() {
		select {
		case changes <- struct{}{}:
		default: // there is one already
		}
	}
	var watchers []func()
	ctx, cancel := context.WithCancel(ctx)
	var counted, uncounted bool
	for _, s := range d.sides {
		if s.kept != nil {
			counted = counted || s.kept.counted()
			uncounted = uncounted || !s.kept.counted()
		}
	}
	if counted {
		watch, err := watchNFTables(ctx, tell)
		if err != nil {
			cancel()
			return nil, fmt.Errorf("listening for changes of nftables: %w", err)
		}
		watchers = append(watchers, watch)
	}
	if uncounted {
		watch, err := watchLegacy(ctx, tell)
		if err != nil {
			cancel()
			return nil, fmt.Errorf("looking at iptables-legacy: %w", err)
		}
		watchers = append(watchers, watch)
	}
	go func() {
		defer cancel()
		defer close(changes)
		var all sync.WaitGroup
		for _, watch := range watchers {
			all.Go(watch)
		}
		all.Wait()
	}()
	return changes, nil
}

// watchNFTables returns what calls tell when somebody changes nftables where
// that concerns us, from now on and until ctx ends.
func watchNFTables(ctx context.Context, tell func()) (watch func(), err error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "nfnetlink") // non-blocking: the runtime waits for it
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		f.Close()
		return nil, err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, unix.NFNLGRP_NFTABLES); err != nil {
		f.Close()
		return nil, err
	}
	context.AfterFunc(ctx, func() { f.Close() })
	return func() {
		buf := make([]byte, 1<<16)
		for {
			n, err := f.Read(buf)
			switch {
			case errors.Is(err, unix.ENOBUFS): // anything may have changed
			case err != nil:
				if ctx.Err() == nil {
					klog.Errorf("Changes of rules are noticed at checks alone from now on: netlink: %v", err)
					<-ctx.Done()
				}
				return
			case !concernsUs(buf[:n]):
				continue
			}
			tell()
		}
	}, nil
}

// concernsUs tells whether a datagram is about chains or rules that are ours,
// or that may be about ours: a table's end, and what leads to our chains.
func concernsUs(datagram []byte) bool {
	messages, err := syscall.ParseNetlinkMessage(datagram)
	if err != nil {
		return true
	}
	for _, m := range messages {
		if len(m.Data) < nl.SizeofNfgenmsg || m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES {
			continue
		}
		attrs, err := nl.ParseRouteAttr(m.Data[nl.SizeofNfgenmsg:])
		if err != nil {
			return true
		}
		text := func(kind uint16) string {
			for _, a := range attrs {
				if a.Attr.Type == kind {
					return nl.BytesToString(a.Value)
				}
			}
			return ""
		}
		// Tables, chains and rules all name their table in their first
		// attribute, rules their chain in the second, chains themselves in the third.
		table, name := text(unix.NFTA_RULE_TABLE), ""
		switch m.Header.Type & 0xff {
		case unix.NFT_MSG_DELTABLE:
		case unix.NFT_MSG_NEWCHAIN, unix.NFT_MSG_DELCHAIN:
			name = text(unix.NFTA_CHAIN_NAME)
		case unix.NFT_MSG_NEWRULE, unix.NFT_MSG_DELRULE:
			name = text(unix.NFTA_RULE_CHAIN)
		default:
			continue
		}
		for _, c := range []chain{postrouting, forward} {
			if table == ipv4.table || table == ipv6.table || table == c.table && (name == "" || name == c.base || name == c.name) {
				return true
			}
		}
	}
	return false
}
