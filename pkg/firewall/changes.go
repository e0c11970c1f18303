package firewall

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/flanneld/flanneld/pkg/rtnl"
)

// Changes signals when any program, this one included, may have changed the
// rules that the driver keeps, in the calling thread's network namespace: when
// nftables, where iptables-nft keeps its rules too, notifies of a change, or
// when iptables-legacy has more rules, or fewer. Signals that nobody received
// are merged into one. The channel is closed when ctx ends.
func (d *Driver) Changes(ctx context.Context) (<-chan struct{}, error) {
	changes := make(chan struct{}, 1)
	signal := func() {
		select {
		case changes <- struct{}{}:
		default: // there is one already
		}
	}
	var inNFTables, elsewhere bool
	for _, f := range d.families.Each() {
		if f.tool != nil {
			inNFTables = inNFTables || f.tool.inNFTables()
			elsewhere = elsewhere || !f.tool.inNFTables()
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	var watchers []func()
	if inNFTables {
		l, err := listenNFTables()
		if err != nil {
			cancel()
			return nil, fmt.Errorf("listening for changes of nftables: %w", err)
		}
		context.AfterFunc(ctx, func() { l.Close() })
		watchers = append(watchers, func() { watchNFTables(ctx, l, signal) })
	}
	if elsewhere {
		l, err := openLegacy()
		if err != nil {
			cancel()
			return nil, fmt.Errorf("watching iptables-legacy: %w", err)
		}
		before := l.count()
		watchers = append(watchers, func() { l.watch(ctx, before, signal) })
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

// listenNFTables listens in the calling thread's network namespace.
func listenNFTables() (*rtnl.Listener, error) {
	return rtnl.ListenTo(unix.NETLINK_NETFILTER, nil, unix.NFNLGRP_NFTABLES)
}

// watchNFTables calls signal when any program changes nftables where that
// concerns us, until ctx ends and the Listener is closed.
func watchNFTables(ctx context.Context, l *rtnl.Listener, signal func()) {
	buf := make([]byte, 1<<16)
	for {
		datagram, err := l.Next(buf)
		switch {
		case errors.Is(err, rtnl.ErrLost): // anything may have changed
		case err != nil:
			if ctx.Err() == nil {
				klog.FromContext(ctx).Error(err,
					"Cannot listen to nftables any more; the rules are only checked at intervals (--iptables-resync)")
				<-ctx.Done()
			}
			return
		case !concernsUs(datagram):
			continue
		}
		signal()
	}
}

// errConcerns ends the reading of a datagram that concerns us.
var errConcerns = errors.New("it concerns us")

// concernsUs returns whether a datagram is about chains or rules that are ours,
// or that may affect ours: a table that is deleted, or what leads to our chains.
// It returns true when the datagram cannot be read.
func concernsUs(datagram []byte) bool {
	return rtnl.EachMessage(datagram, func(h unix.NlMsghdr, body []byte) error {
		if len(body) < nl.SizeofNfgenmsg || h.Type>>8 != unix.NFNL_SUBSYS_NFTABLES {
			return nil
		}
		var text [unix.NFTA_CHAIN_NAME + 1]string // by attribute
		rtnl.EachAttr(body[nl.SizeofNfgenmsg:], func(kind uint16, value []byte) {
			if int(kind) < len(text) {
				text[kind] = unix.ByteSliceToString(value)
			}
		})
		// Tables, chains and rules all name their table in their first
		// attribute. Rules name their chain in the second, and chains themselves
		// in the third.
		table, name := text[unix.NFTA_RULE_TABLE], ""
		switch h.Type & 0xff {
		case unix.NFT_MSG_DELTABLE:
		case unix.NFT_MSG_NEWCHAIN, unix.NFT_MSG_DELCHAIN:
			name = text[unix.NFTA_CHAIN_NAME]
		case unix.NFT_MSG_NEWRULE, unix.NFT_MSG_DELRULE:
			name = text[unix.NFTA_RULE_CHAIN]
		default:
			return nil
		}
		for _, c := range []chain{postrouting, forward} {
			ours := table == c.table && (name == "" || name == c.base || strings.HasPrefix(name, c.name))
			if ours || strings.HasPrefix(table, protocols.IPv4.table) || strings.HasPrefix(table, protocols.IPv6.table) {
				return errConcerns
			}
		}
		return nil
	}) != nil
}
