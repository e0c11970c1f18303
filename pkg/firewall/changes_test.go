package firewall

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/flanneld/flanneld/pkg/nstest"
)

// There are signals of changes of our rules, of what leads to them, and of their
// tables.
func TestChanges(t *testing.T) {
	t.Parallel()
	n := newNode(t, "nft")
	nstest.Run(t, "nft add table ip nat")
	nstest.Run(t, "nft add chain ip nat OTHER")
	nstest.Run(t, "nft add chain ip nat POSTROUTING")
	nstest.Run(t, "nft add chain ip nat FLANNEL-POSTRTG")
	nstest.Run(t, "nft add table ip flannel-ipv4")
	changes, err := n.driver(nftMode).Changes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"nft add rule ip nat FLANNEL-POSTRTG accept", "nft add rule ip nat POSTROUTING accept",
		"nft flush chain ip nat FLANNEL-POSTRTG", "nft add chain ip flannel-ipv4 x", "nft delete table ip nat",
		"nft flush ruleset",
	} {
		for _, unrelated := range []string{
			"nft add table ip other", "nft add chain ip other POSTROUTING",
			"nft add rule ip other POSTROUTING accept", "nft delete table ip other",
		} {
			nstest.Run(t, unrelated)
		}
		nstest.Try("nft add rule ip nat OTHER accept")
		select {
		case <-changes:
			t.Errorf("before %q, there is a signal of others' rules", line)
		case <-time.After(50 * time.Millisecond): // enough to fail where it is wrong
		}
		nstest.Run(t, line)
		select {
		case <-changes:
		case <-time.After(time.Minute):
			t.Fatalf("%s: no signal", line)
		}
	}
}

// When notifications were lost, anything may have changed: there is a signal,
// and there are signals of the changes that follow.
func TestLostChanges(t *testing.T) {
	t.Parallel()
	newNode(t, "nft")
	nstest.Run(t, "nft add table ip flannel-ipv4")
	nstest.Run(t, "nft add table ip other")
	l, err := listenNFTables()
	if err != nil {
		t.Fatal(err)
	}
	nstest.OverflowBy(t, l, func(i int) { nstest.Run(t, fmt.Sprintf("nft add chain ip other c%d", i)) })
	signals := make(chan struct{}, 100)
	ctx, cancel := context.WithCancel(t.Context())
	context.AfterFunc(ctx, func() { l.Close() })
	done := make(chan struct{})
	go func() {
		defer close(done)
		watchNFTables(ctx, l, func() { signals <- struct{}{} })
	}()
	expect := func(what string) {
		t.Helper()
		select {
		case <-signals:
		case <-time.After(time.Minute):
			t.Fatalf("no signal of %s", what)
		}
	}
	expect("the loss")
	nstest.Run(t, "nft add chain ip flannel-ipv4 x")
	expect("the change that follows")
	cancel()
	<-done
}

// There are signals when rules of iptables-legacy come or go. Counting makes no
// tables.
func TestLegacyChanges(t *testing.T) {
	t.Parallel()
	n := newNode(t, "legacy")
	old, err := openLegacy()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(old.close)
	n.sh(`iptables-legacy -N OURS; iptables-legacy -A OURS -j ACCEPT; ip6tables-legacy -A FORWARD -j ACCEPT`)
	for _, line := range []string{
		"iptables-legacy -I OURS -j DROP", "iptables-legacy -F", "iptables-legacy -X OURS", "ip6tables-legacy -F",
	} {
		changes, err := n.driver(legacyMode).Changes(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		before := old.count()
		n.sh(line)
		if now := old.count(); now == before {
			t.Errorf("%s: %v entries as before", line, now)
		}
		select {
		case <-changes:
		case <-time.After(time.Minute):
			t.Fatalf("%s: no signal", line)
		}
	}
	if out := n.sh("cat /proc/thread-self/net/ip6_tables_names"); strings.Contains(out, "nat") {
		t.Errorf("counting has made tables: %q", out)
	}
}
